"""What each kernel may take of a GPU (`kernels/budgets.toml`), and whether it does.

    [norm._backward_kernel]                # file of cases, kernel
    tensor_cores = false                   # whether each of its binaries must have tensor-core instructions
    sm_90 = { registers = 64, shared_bytes = 16456, resident_warps = 32 }   # at most, at most, at least
    allow.int32-offset = "why it is harmless"

A kernel's line for a target holds for all of its binaries there: every case, shape and configuration. Spills have no
budget: there must be none. Every kernel that is launched needs a line, and every line a kernel that is launched.
"""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from umedtrain.kernels.offline.capture import TARGETS
from umedtrain.kernels.offline.measure import Binary

PATH = Path(__file__).parents[1] / "budgets.toml"
LINT_KINDS = ("int32-offset", "float64", "float-atomic", "atomic")


@dataclass(frozen=True)
class Limit:
    """The most registers and shared bytes, and the fewest resident warps, of a kernel on one target."""

    registers: int
    shared_bytes: int
    resident_warps: int


@dataclass(frozen=True)
class Budget:
    """One kernel's limits by target, and the lint findings that are allowed, each with its reason."""

    tensor_cores: bool
    limits: dict[str, Limit]
    allow: dict[str, str] = field(default_factory=dict)


Budgets = dict[tuple[str, str], Budget]
"""By file of cases and kernel."""


def read_budgets(path: Path = PATH) -> Budgets:
    """The budgets in a file.

    Raises:
        ValueError: for what is not a budget, naming the file, the kernel and the key.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    budgets: Budgets = {}
    for module, kernels in tables.items():
        for kernel, table in _table(kernels, f"{path}: {module}").items():
            where = f"{path}: {module}.{kernel}"
            budgets[module, kernel] = _read_budget(_table(table, where), where)
    return budgets


def _read_budget(table: dict, where: str) -> Budget:
    unknown = table.keys() - {"tensor_cores", "allow", *TARGETS}
    if unknown:
        raise ValueError(f"{where}: unknown key {min(unknown)!r}; known are tensor_cores, allow, {', '.join(TARGETS)}")
    if not isinstance(table.get("tensor_cores"), bool):
        raise ValueError(f"{where}: tensor_cores must be true or false")
    allow = _table(table.get("allow", {}), f"{where}.allow")
    for kind, reason in allow.items():
        if kind not in LINT_KINDS:
            raise ValueError(f"{where}.allow: unknown finding {kind!r}; known are {', '.join(LINT_KINDS)}")
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f"{where}.allow.{kind} must say why it is allowed")
    limits = {target: _read_limit(table[target], f"{where}.{target}") for target in TARGETS if target in table}
    if not limits:
        raise ValueError(f"{where}: no target has limits")
    return Budget(table["tensor_cores"], limits, allow)


def _read_limit(table: object, where: str) -> Limit:
    names = ("registers", "shared_bytes", "resident_warps")
    table = _table(table, where)
    if table.keys() != set(names):
        raise ValueError(f"{where} must have {', '.join(names)} and nothing else; it has {', '.join(table)}")
    for name, value in table.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{where}.{name} is {value!r}; it must be an integer that is not negative")
    return Limit(**table)


def _table(value: object, where: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a table")
    return value


# --- judging


def judge(binaries: Iterable[Binary], budgets: Budgets) -> list[str]:
    """What is over its budget or has none, one sentence each that says what was measured and what is allowed."""
    problems: dict[str, None] = {}
    for binary in binaries:
        budget = budgets.get((binary.module, binary.kernel))
        limit = budget.limits.get(binary.target) if budget else None
        if budget is None or limit is None:
            missing = "" if budget is None else f" for {binary.target}"
            problems[f"{binary.name}: no budget{missing} in budgets.toml"] = None
        where = f"{binary.name} on {binary.target} ({binary.case}, {', '.join(binary.shapes)})"
        problems.update({f"{where}: {complaint}": None for complaint in _complaints(binary, budget, limit)})
    return list(problems)


def _complaints(binary: Binary, budget: Budget | None, limit: Limit | None) -> list[str]:
    taken, found = binary.resources, []
    if taken.spill_bytes:
        found.append(f"spills {taken.spill_bytes} bytes, allowed 0")
    if limit is not None:
        if taken.registers > limit.registers:
            found.append(f"{taken.registers} registers, allowed {limit.registers}")
        if taken.shared_bytes > limit.shared_bytes:
            found.append(f"{taken.shared_bytes} bytes of shared memory, allowed {limit.shared_bytes}")
        if taken.resident_warps < limit.resident_warps:
            least = limit.resident_warps
            found.append(f"{taken.resident_warps} resident warps (by {taken.limited_by}), must be {least}")
    if budget is not None and budget.tensor_cores and not taken.tensor_core_instructions:
        found.append("no tensor-core instructions, must have some")
    allowed = budget.allow if budget is not None else {}
    return found + [f"{finding.kind}: {finding.message}" for finding in binary.findings if finding.kind not in allowed]


def unused(binaries: Iterable[Binary], budgets: Budgets, modules: Iterable[str], targets: Iterable[str]) -> list[str]:
    """Limits and allowances of `modules` on `targets` that no kernel needs, one sentence each."""
    binaries, modules, targets = list(binaries), set(modules), set(targets)
    launched = {(b.module, b.kernel, b.target) for b in binaries}
    found = {(b.module, b.kernel, finding.kind) for b in binaries for finding in b.findings}
    problems = []
    for (module, kernel), budget in budgets.items():
        if module not in modules:
            continue
        for target in budget.limits:
            if target in targets and (module, kernel, target) not in launched:
                problems.append(f"{module}.{kernel}: budgets.toml has {target}, but no case launches it there")
        for kind in budget.allow:
            if targets >= set(budget.limits) and (module, kernel, kind) not in found:
                problems.append(f"{module}.{kernel}: budgets.toml allows {kind}, which is not found")
    return problems


# --- proposing


def propose(binaries: Iterable[Binary], budgets: Budgets) -> str:
    """budgets.toml as it would fit: registers rounded up to their grain of 8, the rest exact, known reasons kept."""
    kernels: dict[tuple[str, str], list[Binary]] = {}
    for binary in binaries:
        kernels.setdefault((binary.module, binary.kernel), []).append(binary)
    return "\n".join(_proposal(key, group, budgets.get(key)) for key, group in sorted(kernels.items()))


def _proposal(key: tuple[str, str], binaries: list[Binary], budget: Budget | None) -> str:
    required = all(b.resources.tensor_core_instructions for b in binaries)
    lines = [f"[{'.'.join(key)}]", f"tensor_cores = {str(required).lower()}"]
    for target in TARGETS:
        taken = [b.resources for b in binaries if b.target == target]
        if taken:
            registers = -(-max(r.registers for r in taken) // 8) * 8
            shared, warps = max(r.shared_bytes for r in taken), min(r.resident_warps for r in taken)
            limit = f"registers = {registers}, shared_bytes = {shared}, resident_warps = {warps}"
            lines.append(f"{target} = {{ {limit} }}")
    for kind in sorted({finding.kind for binary in binaries for finding in binary.findings}):
        reason = budget.allow.get(kind, "") if budget else ""
        lines.append(f'allow.{kind} = "{reason}"')
    return "\n".join(lines) + "\n"
