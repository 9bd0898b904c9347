"""Our kernels beside Liger-Kernel's, under the same compiler: what each takes of a GPU, and how many bytes it moves.

    make bench-kernels        or        python benchmarks/kernels/compare.py [--targets sm_90] [--shape 8b]

Without a GPU: registers, spills, shared memory, resident warps and instructions are read from binaries that the same
driver compiles from both projects' unmodified host code; bytes are counted by the interpreter's sanitizer on a few rows
of the real width, and set against the least possible. No time is printed then: the columns stay empty. With a GPU the
same command adds medians of `triton.testing.do_bench`, both sides by turns, and peak memory.

Writes results/static.json, results/table.md and, with matplotlib, results/resident_warps.png beside this file.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from umedtrain.kernels.linear_chunks import weight_traffic
from umedtrain.kernels.offline import cases
from umedtrain.kernels.offline.roofline import H100, costs

sys.path.insert(0, str(Path(__file__).parent))
from operations import NAMES, SIDES, operations

RESULTS = Path(__file__).parent / "results"
SHAPES = {shape.name: shape for shape in (cases.LLAMA_8B, cases.LLAMA_70B)}
ROWS = {"rms_norm": 272, "add_rms_norm": 272, "rope": 32, "swiglu": 16, "cross_entropy": 4, "attention": 256}
"""Bytes are counted on this many rows and on twice as many; the difference is what rows cost in a full batch."""
ARCHITECTURES = {"sm_80": "ampere_ada", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna3"}
"""What Liger calls the targets."""
ONE_PROGRAM_PER_PROCESSOR = ("_rms_norm_backward_kernel", "_fused_add_rms_norm_backward_kernel")
"""Liger launches as many programs of these as there are multiprocessors, so no more than one is resident on each."""


def compile_side(side: str, target: str, shape_name: str) -> list[dict]:
    """Every kernel that one side launches, compiled for `target`."""
    from umedtrain.kernels.offline.capture import capture
    from umedtrain.kernels.offline.resources import resources

    if side == "liger":
        _tell_liger(ARCHITECTURES[target])
    rows = []
    for name, run in operations(side, SHAPES[shape_name], 1024, "meta" if side == "ours" else "cpu").items():
        with capture(target) as launches:
            run()
        for launch in {launch.kernel.hash: launch for launch in launches}.values():
            taken = resources(launch.kernel)
            resident = taken.resident_warps
            if side == "liger" and launch.name in ONE_PROGRAM_PER_PROCESSOR:
                resident = min(resident, taken.warps)
            loop = sum(sum(mix.values()) for depth, mix in taken.loop_mix.items() if depth > 0)
            rows.append(
                {
                    "operation": name,
                    "side": side,
                    "target": target,
                    "kernel": launch.name,
                    "warps": taken.warps,
                    "registers": taken.registers,
                    "spill_bytes": taken.spill_bytes,
                    "shared_bytes": taken.shared_bytes,
                    "resident_warps": resident,
                    "instructions": taken.instructions,
                    "loop_instructions": loop,
                    "loop_barriers": sum(m.get("barrier", 0) for d, m in taken.loop_mix.items() if d > 0),
                }
            )
    return rows


def count_bytes(side: str, shape_name: str) -> dict[str, dict[str, float]]:
    """Bytes that the forward and backward kernels of each operation request, in the interpreter."""
    from umedtrain.kernels.offline import interpreter

    interpreter.install()
    if side == "liger":
        _interpret_libdevice()
    traffic = {}
    for name, rows in ROWS.items():
        if name not in operations(side, SHAPES[shape_name], rows, "cpu"):
            continue
        fewer, more = (_watch(side, shape_name, name, count) for count in (rows, 2 * rows))
        traffic[name] = {"requested": more[0] - fewer[0], "unique": more[1] - fewer[1]}
    return traffic


def _watch(side: str, shape_name: str, name: str, rows: int) -> tuple[int, int]:
    """Bytes requested, and distinct ones among them in each launch."""
    from umedtrain.kernels.offline import sanitizer

    run = operations(side, SHAPES[shape_name], rows, "cpu")[name]
    with sanitizer.watch(races=False) as watched:
        run()
    requested = sum(launch.loaded + launch.stored for launch in watched.launches)
    return requested, sum(launch.unique_loaded + launch.unique_stored for launch in watched.launches)


def minimal_bytes(name: str, shape: cases.LlamaShape) -> float:
    """The least bytes that forward and backward move for the rows that were counted."""
    fewer, more = (costs(dataclasses.replace(shape, tokens=tokens)) for tokens in (ROWS[name], 2 * ROWS[name]))
    return sum(more[part].bytes - fewer[part].bytes for part in passes(name))


def passes(name: str) -> tuple[str, str]:
    """Forward and backward of an operation, as the roofline calls them."""
    backward = {"rope": "rope", "attention": "attention backward, deterministic"}
    return name, backward.get(name, f"{name} backward")


def _tell_liger(architecture: str) -> None:
    """Liger asks the GPU that is there for its generation and maker; here it is told those that are compiled for."""
    import liger_kernel.ops.cross_entropy as cross_entropy
    import liger_kernel.ops.swiglu as swiglu
    import liger_kernel.ops.utils as settings
    import liger_kernel.utils as utils

    is_amd = architecture.startswith("cdna")
    for module in (cross_entropy, swiglu, settings, utils):
        if hasattr(module, "infer_device_arch"):
            module.infer_device_arch = lambda device_id=0: architecture
        if hasattr(module, "is_hip"):
            module.is_hip = lambda: is_amd


@triton.jit
def _rsqrt(x):
    return tl.rsqrt(x)


def _interpret_libdevice() -> None:
    """Triton's interpreter has no libdevice, of which Liger's norms call one function."""
    import liger_kernel.ops.fused_add_rms_norm as add_norm
    import liger_kernel.ops.rms_norm as norm

    for module in (norm, add_norm):
        module.rsqrt = _rsqrt


def measure_gpu(shape: cases.LlamaShape) -> dict[str, dict[str, dict[str, float]]]:
    """Median milliseconds of forward and backward and peak MiB on the GPU that is there, both sides by turns."""
    times: dict[str, dict[str, list[float]]] = {side: {} for side in SIDES}
    peaks: dict[str, dict[str, float]] = {side: {} for side in SIDES}
    for _ in range(5):
        for side in SIDES:
            for name, run in operations(side, shape, shape.tokens, "cuda").items():
                torch.cuda.reset_peak_memory_stats()
                times[side].setdefault(name, []).append(triton.testing.do_bench(run, return_mode="median"))
                peaks[side][name] = torch.cuda.max_memory_allocated() / 2**20
    return {
        side: {
            name: {"milliseconds": statistics.median(values), "peak_mib": peaks[side][name]}
            for name, values in times[side].items()
        }
        for side in SIDES
    }


def in_child(*arguments: str, interpret: bool) -> object:
    """This script's own part `arguments`, in a process that compiles or interprets kernels; its JSON."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    command = [sys.executable, __file__, "--part", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(static: list[dict], traffic: dict, gpu: dict | None, shape: cases.LlamaShape) -> str:
    """The results as Markdown."""
    least = costs(shape)
    lines = [
        f"# Llama-3 {shape.name}, bf16",
        "",
        f"{shape.tokens} tokens for the roofline, which is bytes or FLOPs by the data sheet of {H100.name}. "
        + (torch.cuda.get_device_name() if gpu else "No GPU was there: its columns are empty."),
        "",
        "| operation | side | kernel | target | warps | registers | spills | shared | resident warps | in loops "
        "| barriers in loops |",
        "| --- | --- | --- | --- " + "| ---: " * 7 + "|",
    ]
    for row in static:
        keys = ("warps", "registers", "spill_bytes", "shared_bytes", "resident_warps", "loop_instructions")
        figures = " | ".join(str(row[key]) for key in (*keys, "loop_barriers"))
        lines.append(f"| {row['operation']} | {row['side']} | `{row['kernel']}` | {row['target']} | {figures} |")
    lines += [
        "",
        "Forward and backward together. Bytes requested by the kernels for some more rows, over the least that those "
        "rows need; what is read again (the norms' weight in forward, keys by every block of queries) comes from the "
        "cache at best.",
        "",
        "| operation | side | more rows | requested / least | FLOPs | roofline on H100, us | GPU, us | peak MiB |",
        "| --- | --- " + "| ---: " * 6 + "|",
    ]
    for name in NAMES:
        both = [least[part] for part in passes(name)]
        for side in SIDES:
            if name not in traffic[side]:
                continue
            ratio = traffic[side][name]["requested"] / minimal_bytes(name, shape)
            measured = gpu[side].get(name) if gpu else None
            seconds, flops = sum(cost.seconds() for cost in both), sum(cost.flops for cost in both)
            times = f"{measured['milliseconds'] * 1e3:.0f} | {measured['peak_mib']:.0f}" if measured else " | "
            cells = f"{ROWS[name]} | {ratio:.2f} | {flops:.3g} | {seconds * 1e6:.0f} | {times} |"
            lines.append(f"| {name} | {side} | {cells}")
    ours, liger = head_traffic(shape)
    lines += [
        "",
        f"Linear head and loss, {shape.tokens} tokens: traffic of the head's weight and its gradient over all chunks, "
        f"{ours / 1e9:.1f} GB in our chunks of 512 MiB of logits; {liger[0] / 1e9:.1f} GB (bf16 gradient) to "
        f"{liger[1] / 1e9:.1f} GB (fp32) by Liger's rule for chunks.",
    ]
    return "\n".join(lines) + "\n"


def head_traffic(shape: cases.LlamaShape) -> tuple[float, tuple[float, float]]:
    """Bytes of weight and weight gradient for our chunks, and for Liger's (bf16 and fp32 gradients)."""
    ours = weight_traffic(shape.tokens, shape.hidden, shape.vocab)
    # Its fused linear cross-entropy: chunk = next power of two of tokens / ceil(vocab / hidden).
    rows = shape.tokens / math.ceil(shape.vocab / shape.hidden)
    chunk = 2 ** math.ceil(math.log2(rows))
    chunks = math.ceil(shape.tokens / chunk)
    weight = shape.vocab * shape.hidden
    return ours, (chunks * weight * (2 + 2 + 2 + 2), chunks * weight * (2 + 2 + 4 + 4))


def plot(static: list[dict], path: Path) -> None:
    """Resident warps of every kernel on sm_90, ours and Liger's."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no plot: pip install 'umedtrain[report]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in static if row["target"] == "sm_90" and row["operation"] != "attention"]
    labels = [f"{row['operation']}  {row['kernel'].strip('_')}" for row in rows]
    colors = ["tab:blue" if row["side"] == "ours" else "tab:orange" for row in rows]
    figure, axes = pyplot.subplots(figsize=(9, 0.28 * len(rows) + 1), layout="constrained")
    axes.barh(range(len(rows)), [row["resident_warps"] for row in rows], color=colors)
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("warps resident on a multiprocessor, sm_90 (64 at most); blue: ours, orange: Liger-Kernel")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        kind, *rest = options.part
        print(json.dumps({"compile": compile_side, "bytes": count_bytes}[kind](*rest)))
        return
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        raise SystemExit("liger-kernel is not installed: pip install --no-deps liger-kernel==0.8.5") from None

    shape = SHAPES[options.shape]
    static = [
        row
        for target in options.targets
        for side in SIDES
        for row in in_child("compile", side, target, options.shape, interpret=False)
    ]
    static.sort(key=lambda row: (NAMES.index(row["operation"]), list(ARCHITECTURES).index(row["target"]), row["side"]))
    traffic = {side: in_child("bytes", side, options.shape, interpret=True) for side in SIDES}
    gpu = measure_gpu(shape) if torch.cuda.is_available() else None
    RESULTS.mkdir(exist_ok=True)
    everything = {"shape": options.shape, "static": static, "bytes": traffic, "gpu": gpu}
    (RESULTS / "static.json").write_text(json.dumps(everything, indent=1) + "\n")
    (RESULTS / "table.md").write_text(table(static, traffic, gpu, shape))
    plot(static, RESULTS / "resident_warps.png")
    print((RESULTS / "table.md").read_text())


if __name__ == "__main__":
    main()
