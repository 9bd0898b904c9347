"""What a compiled kernel takes of a GPU, read from its binary: no GPU, no driver.

NVIDIA: `cuobjdump` (in Triton's wheel) gives registers, stack and SASS; where there is a stack, `ptxas -v` gives the
exact bytes of spills. AMD: the assembly says all of it. Resident warps are what one streaming multiprocessor (compute
unit) holds at a time, limited by registers, shared (tensor) memory and slots; a small grid may give fewer.

Instructions are counted as they stand in the binary, for each depth of loop nesting: a loop's body counts once. None of
this is a measurement of time.
"""

import functools
import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from triton import knobs
from triton.compiler import CompiledKernel

Instruction = tuple[str, int]
"""Opcode, and how many loops enclose it."""


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    registers: of 32 bits, per thread (AMD: vector registers, both kinds). spill_bytes: stores and loads of spilled
    registers in the binary (AMD: scratch bytes of a lane). shared_bytes: per program. instructions: in the binary.
    mix, loop_mix: counts by class, over all and by depth of nesting (0 is outside of loops). accesses: global loads and
    stores by their width, as in "load.16B@1", the last figure being the depth.
    """

    target: str
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    resident_warps: int
    limited_by: str
    instructions: int
    tensor_core_instructions: int
    mix: dict[str, int]
    loop_mix: dict[int, dict[str, int]]
    accesses: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def resources(kernel: CompiledKernel) -> Resources:
    """Read `kernel`, which `capture` compiled."""
    target = kernel.metadata.target
    if target.backend == "cuda":
        listing = _cuobjdump(kernel.kernel)
        registers, spills = _nvidia_registers(kernel, listing)
        code = _sass(listing)
        name, classify, width = f"sm_{target.arch}", _nvidia_class, _nvidia_width
        resident, limit = _nvidia_resident_warps(kernel, registers)
    else:
        registers, spills = _amd_registers(kernel.asm["amdgcn"])
        code = _gcn(kernel.asm["amdgcn"])
        name, classify, width = target.arch, _amd_class, _amd_width
        resident, limit = _amd_resident_warps(kernel, registers)
    mix, loop_mix, accesses = _count(code, classify, width)
    return Resources(
        target=name,
        warps=kernel.metadata.num_warps,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=kernel.metadata.shared,
        resident_warps=resident,
        limited_by=limit,
        instructions=len(code),
        tensor_core_instructions=mix.get("tensor core", 0),
        mix=mix,
        loop_mix=loop_mix,
        accesses=accesses,
    )


def _count(code: list[Instruction], classify: Any, width: Any) -> tuple[dict, dict, dict]:
    mix, accesses, loops = Counter(), Counter(), {}
    for opcode, depth in code:
        kind = classify(opcode)
        mix[kind] += 1
        loops.setdefault(depth, Counter())[kind] += 1
        if kind in ("load", "store"):
            accesses[f"{kind}.{width(opcode)}B@{depth}"] += 1
    return dict(mix), {depth: dict(loops[depth]) for depth in sorted(loops)}, dict(sorted(accesses.items()))


# --- NVIDIA

_SHARED_OF_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
_SHARED_RESERVED = 1 << 10  # of each program, by the system
_TENSOR_MEMORY_COLUMNS = 512
_SLOTS, _PROGRAMS, _REGISTER_FILE, _REGISTER_GRAIN = 64, 32, 65536, 256

_SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", re.M)

_NVIDIA_CLASSES = {
    "load": "LDG LD",
    "store": "STG ST",
    "async copy": "LDGSTS UTMALDG UBLKCP UTMASTG UTMARED UTMAPF",
    "spill": "LDL STL",
    "shared": "LDS LDSM STS STSM ATOMS LDTM STTM",
    "atomic": "RED REDG ATOMG ATOM",
    "tensor core": "HMMA IMMA QMMA HGMMA QGMMA IGMMA BGMMA UTCHMMA UTCQMMA UTCIMMA",
    "special function": "MUFU",
    "shuffle": "SHFL REDUX CREDUX",
    "barrier": "BAR SYNCS WARPSYNC WARPGROUP",
    "wait": "DEPBAR LDGDEPBAR",
    "float": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 FMNMX FMNMX3 FSEL FSETP FSET FCHK HADD2 HFMA2 HMUL2 HMNMX2",
    "double": "DADD DMUL DFMA DSETP DMNMX",
    "convert": "F2F F2FP F2I I2F I2FP PRMT",
}
_NVIDIA_CLASS = {opcode: name for name, opcodes in _NVIDIA_CLASSES.items() for opcode in opcodes.split()}


def _nvidia_class(opcode: str) -> str:
    return _NVIDIA_CLASS.get(opcode.split(".")[0], "integer and control")


def _nvidia_width(opcode: str) -> int:
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[part] for part in opcode.split(".") if part in sizes), 4)


def _nvidia_registers(kernel: CompiledKernel, listing: str) -> tuple[int, int]:
    """Registers and bytes of spills. Spilled registers live on the stack: without one there are none."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of the registers of {kernel.name}:\n{listing[:1000]}")
    return int(found[1]), _ptxas_spills(kernel) if int(found[2]) else 0


def _ptxas_spills(kernel: CompiledKernel) -> int:
    arch = kernel.metadata.target.arch
    ptxas = (knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas).path
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        # The flags that Triton itself gives (backends/nvidia/compiler.py).
        command = [ptxas, "-lineinfo", "-v", "--regAllocOptLevel=2", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if found is None:
        raise RuntimeError(f"ptxas says nothing of the spills of {kernel.name}:\n{log}")
    return int(found[1]) + int(found[2])


def _sass(listing: str) -> list[Instruction]:
    lines = [(int(m[1], 16), m[3], (m[2] or "").strip() + m[4]) for m in _SASS_LINE.finditer(listing)]
    lines = [line for line in lines if line[1] != "NOP"]
    loops = _loops(lines)
    return [(opcode, sum(first <= at <= last for first, last in loops)) for at, opcode, _ in lines]


def _loops(lines: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """Ranges of backward branches, of lines that are (address, opcode, operands).

    Cold blocks, which ptxas puts after the last exit, jump back but do not loop.
    """
    exits = [at for at, opcode, operands in lines if opcode == "EXIT" and not operands.startswith("@")]
    end = exits[-1] if exits else math.inf
    branches = [
        (re.search(r"0x([0-9a-f]+)", rest), at) for at, opcode, rest in lines if opcode.startswith("BRA") and at < end
    ]
    return [(int(to[1], 16), at) for to, at in branches if to and int(to[1], 16) < at]


def _cuobjdump(binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia_resident_warps(kernel: CompiledKernel, registers: int) -> tuple[int, str]:
    warps = kernel.metadata.num_warps
    of_warp = math.ceil(registers * 32 / _REGISTER_GRAIN) * _REGISTER_GRAIN
    # Registers are handed out by each of the four quarters of a multiprocessor to its own warps.
    by_registers = 4 * (_REGISTER_FILE // 4 // of_warp) // warps
    shared = _SHARED_OF_SM[kernel.metadata.target.arch]
    programs = {
        "registers": by_registers,
        "shared memory": shared // (kernel.metadata.shared + _SHARED_RESERVED),
        "slots": min(_SLOTS // warps, _PROGRAMS),
    }
    columns = getattr(kernel.metadata, "tmem_size", None)
    if columns:
        programs["tensor memory"] = _TENSOR_MEMORY_COLUMNS // columns
    return _scarcest(programs, warps)


def _scarcest(programs: dict[str, int], warps: int) -> tuple[int, str]:
    limit = min(reversed(programs), key=programs.__getitem__)
    return programs[limit] * warps, limit


# --- AMD (CDNA3)

_AMD_SIMDS, _AMD_WAVES_OF_SIMD, _AMD_REGISTERS, _AMD_REGISTER_GRAIN, _AMD_SHARED = 4, 8, 512, 8, 64 << 10

_GCN_INSTRUCTION = re.compile(r"^\s+((?:s|v|ds|global|buffer|flat|scratch)_\w+)")
_GCN_BLOCK = re.compile(r"^(?:\.LBB\w+:|; %bb\.\d+:)")  # other labels stand inside of blocks

_AMD_CLASSES = (
    ("spill", r"scratch_"),
    ("async copy", r"(global|buffer)_load_lds"),
    ("load", r"(global|buffer|flat)_load"),
    ("store", r"(global|buffer|flat)_store"),
    ("atomic", r"(global|buffer|flat)_atomic"),
    ("shared", r"ds_"),
    ("tensor core", r"v_s?mfmac?_"),
    ("special function", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    ("barrier", r"s_barrier"),
    ("wait", r"s_waitcnt"),
    ("convert", r"v_(cvt|perm)"),
    ("float", r"v_(pk_)?(add|sub|mul|fma|mac|fmac|max|min|max3|min3|cmp_\w+)_f(16|32|64)|v_pk_\w+_f32"),
)
_AMD_CLASSES = tuple((name, re.compile(pattern)) for name, pattern in _AMD_CLASSES)


@functools.cache
def _amd_class(opcode: str) -> str:
    return next((name for name, pattern in _AMD_CLASSES if pattern.match(opcode)), "integer and control")


def _amd_width(opcode: str) -> int:
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1, "sbyte": 1}
    return next((sizes[part] for part in opcode.split("_") if part in sizes), 4)


def _amd_registers(assembly: str) -> tuple[int, int]:
    def value(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    # Scalar registers spill into lanes of vector registers, which costs no memory and shows in the vector registers.
    return value("vgpr_count"), max(value("private_segment_fixed_size"), 4 * value("vgpr_spill_count"))


def _gcn(assembly: str) -> list[Instruction]:
    """LLVM's comments at the head of a block say which loops it is in: the innermost has the largest "Depth="."""
    code: list[Instruction] = []
    depth = 0
    for line in assembly.splitlines():
        instruction = _GCN_INSTRUCTION.match(line)
        if instruction:
            code.append((instruction[1], depth))
            continue
        if _GCN_BLOCK.match(line):
            depth = 0
        depth = max([depth, *(int(n) for n in re.findall(r"Depth=(\d+)", line))])
    return code


def _amd_resident_warps(kernel: CompiledKernel, registers: int) -> tuple[int, str]:
    warps = kernel.metadata.num_warps
    of_wave = max(1, math.ceil(registers / _AMD_REGISTER_GRAIN)) * _AMD_REGISTER_GRAIN
    programs = {
        "registers": _AMD_SIMDS * (_AMD_REGISTERS // of_wave) // warps,
        "shared memory": _AMD_SHARED // kernel.metadata.shared if kernel.metadata.shared else 1 << 30,
        "slots": _AMD_SIMDS * _AMD_WAVES_OF_SIMD // warps,
    }
    return _scarcest(programs, warps)
