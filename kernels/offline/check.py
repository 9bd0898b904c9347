"""Compile every launch at the shapes of real models, for GPUs that are absent, and hold each kernel to its budget.

    python -m umedtrain.kernels.offline.check [--targets sm_90 ...] [--shapes 8b 70b] [--only norm ...] [--json FILE]

Prints one table, then what is wrong: the kernel, the target, what was measured and what is allowed. Ends with 1 if
anything is. `--propose` prints the budgets.toml that would fit instead of judging.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from umedtrain.kernels.offline import budgets, cases
from umedtrain.kernels.offline.budgets import Budgets
from umedtrain.kernels.offline.capture import TARGETS
from umedtrain.kernels.offline.measure import CASES, Binary, Failure, find_jobs, find_modules, measure

SHAPES = {shape.name: shape for shape in (cases.LLAMA_8B, cases.LLAMA_70B)}


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code is 0 if all is well, 1 if a kernel is not, 2 if nothing could be checked."""
    options = _parse(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("check: TRITON_INTERPRET=1 is set, so nothing would be compiled; unset it", file=sys.stderr)
        return 2
    try:
        limits = budgets.read_budgets(options.budgets)
        modules = _chosen_modules(options)
    except ValueError as error:
        print(f"check: {error}", file=sys.stderr)
        return 2
    jobs = find_jobs(modules, options.targets, [SHAPES[name] for name in options.shapes], options.cases)
    binaries, failures = _measure(jobs, options.processes)
    if options.json:
        options.json.write_text(json.dumps([_as_dict(b) for b in binaries], indent=1) + "\n", encoding="utf-8")
    if options.propose:
        print(budgets.propose(binaries, limits))
        problems = [str(failure) for failure in failures]
    else:
        print_table(binaries, limits)
        problems = [str(failure) for failure in failures] + budgets.judge(binaries, limits)
        if not failures and set(options.shapes) == set(SHAPES):
            problems += budgets.unused(binaries, limits, modules, options.targets)
        if not options.only:
            strays = sorted({module for module, _ in limits} - set(modules))
            problems += [f"{module}: budgets.toml has it, but there are no such cases" for module in strays]
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr if options.propose else sys.stdout)
    if not problems and not options.propose:
        print(f"ok: {len(binaries)} binaries of {len(jobs)} cases within their budgets, no spills")
    return int(bool(problems))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m umedtrain.kernels.offline.check", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--only", nargs="+", metavar="MODULE", help="files of cases; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all that was measured")
    parser.add_argument("--propose", action="store_true", help="print the budgets that would fit")
    parser.add_argument("--processes", type=int, default=2, help="compilers at a time (2)")
    parser.add_argument("--budgets", type=Path, default=budgets.PATH, metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--cases", default=CASES, metavar="PACKAGE", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _chosen_modules(options: argparse.Namespace) -> list[str]:
    modules = find_modules(options.cases)
    unknown = sorted(set(options.only or ()) - set(modules))
    if unknown:
        raise ValueError(f"no cases called {unknown[0]!r}; there are {', '.join(modules) or 'none'}")
    return [module for module in modules if not options.only or module in options.only]


def _measure(jobs: list, processes: int) -> tuple[list[Binary], list[Failure]]:
    binaries: list[Binary] = []
    failures: list[Failure] = []
    for done, result in enumerate(measure(jobs, processes), 1):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            binaries += result
        if sys.stderr.isatty():
            end = "\n" if done == len(jobs) else ""
            print(f"\rcompiled {done} of {len(jobs)} cases", end=end, file=sys.stderr, flush=True)
    order = {target: i for i, target in enumerate(TARGETS)}
    binaries.sort(key=lambda b: (b.module, b.kernel, order[b.target], b.case, b.shapes))
    failures.sort(key=str)
    return binaries, failures


def _as_dict(binary: Binary) -> dict:
    findings = [{"kind": finding.kind, "message": finding.message} for finding in binary.findings]
    return vars(binary) | {"resources": binary.resources.as_dict(), "findings": findings}


# --- the table

_HEADER = (
    "kernel",
    "target",
    "binaries",
    "warps",
    "registers",
    "spills",
    "shared",
    "resident",
    "tensor",
    "lint",
    "verdict",
)


def print_table(binaries: list[Binary], limits: Budgets) -> None:
    """One line for each kernel and target: the worst of its binaries, beside what is allowed."""
    groups: dict[tuple[str, str], list[Binary]] = {}
    for binary in binaries:
        groups.setdefault((binary.name, binary.target), []).append(binary)
    rows = [_HEADER, *(_row(group, limits) for group in groups.values())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())


def _row(group: list[Binary], limits: Budgets) -> tuple[str, ...]:
    first, taken = group[0], [binary.resources for binary in group]
    budget = limits.get((first.module, first.kernel))
    limit = budget.limits.get(first.target) if budget else None
    kinds = sorted({finding.kind for binary in group for finding in binary.findings})
    warps = sorted({r.warps for r in taken})

    def beside(value: int, name: str) -> str:
        return f"{value}/{getattr(limit, name)}" if limit else str(value)

    return (
        first.name,
        first.target,
        str(len(group)),
        ",".join(map(str, warps)),
        beside(max(r.registers for r in taken), "registers"),
        str(max(r.spill_bytes for r in taken)),
        beside(max(r.shared_bytes for r in taken), "shared_bytes"),
        beside(min(r.resident_warps for r in taken), "resident_warps"),
        str(min(r.tensor_core_instructions for r in taken)),
        ",".join(kinds) or "-",
        "ok" if not budgets.judge(group, limits) else "FAILED",
    )


if __name__ == "__main__":
    sys.exit(main())
