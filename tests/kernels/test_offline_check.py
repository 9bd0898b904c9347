"""`check` in a process of its own, which compiles planted kernels, and the rules by which it judges them."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from umedtrain.kernels.offline import budgets, capture, check, measure, resources
from umedtrain.kernels.offline.budgets import Budget, Limit, judge, propose, read_budgets, unused
from umedtrain.kernels.offline.lint import Finding, lint
from umedtrain.kernels.offline.measure import Binary, Failure, Job

ROOT = Path(__file__).parents[2]
PLANTED = Path(__file__).parent / "planted"
pytestmark = pytest.mark.timeout(1200)  # compilers on a machine that others use too
BUDGETS = """
[clean.centre_rows]
tensor_cores = false
sm_90 = { registers = 64, shared_bytes = 256, resident_warps = 32 }

[clean.product]
tensor_cores = true
sm_90 = { registers = 128, shared_bytes = 16384, resident_warps = 16 }
"""


def run_check(folder, text, *arguments):
    """`check` of the planted kernels for sm_90, without the interpreter, with a cache of its own."""
    path = folder / "budgets.toml"
    path.write_text(text)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "umedtrain.kernels.offline.check", "--cases", "tests.kernels.planted"]
    command += ["--targets", "sm_90", "--budgets", str(path), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """One run over everything that was planted: its result, and what it measured by kernel."""
    folder = tmp_path_factory.mktemp("check")
    result = run_check(folder, BUDGETS, "--json", str(folder / "measured.json"))
    measured = json.loads((folder / "measured.json").read_text())
    return SimpleNamespace(folder=folder, result=result, binaries={f"{b['module']}.{b['kernel']}": b for b in measured})


def failures(result, kernel):
    return [line for line in result.stdout.splitlines() if line.startswith("FAILED") and kernel in line]


def test_planted_faults_turn_the_check_red(planted):
    result = planted.result
    assert result.returncode == 1, result.stderr
    for kernel, message in {
        "faulty.centre_rows on sm_90": r"spills \d+ bytes, allowed 0",
        "faulty.offset_32 on sm_90": r"int32-offset: 32-bit product at faulty.py:\d+ is an offset to a pointer",
        "faulty.atomic_sum on sm_90": r"float-atomic: tt.atomic_rmw at faulty.py:\d+",
        "faulty.double on sm_90": r"float64: arith.mulf at faulty.py:\d+",
        "case 'refused' on sm_90": "CompilationError: .*power of 2",
        "case 'dies' on sm_90": "the compiler died with code -6",
        "case 'nothing' on sm_90": "launches nothing",
    }.items():
        assert any(re.search(message, line) for line in failures(result, kernel)), f"{kernel}\n{result.stdout}"
    assert failures(result, "faulty.double: no budget in budgets.toml")


def test_clean_twins_stay_green(planted):
    assert failures(planted.result, "clean.") == []
    rows = [line.split() for line in planted.result.stdout.splitlines() if line.startswith("clean.")]
    assert [(row[0], row[-1]) for row in rows] == [("clean.centre_rows", "ok"), ("clean.product", "ok")]


def test_clean_kernels_alone_turn_it_green(planted):
    green = run_check(planted.folder, BUDGETS, "--only", "clean")
    assert green.returncode == 0, green.stdout + green.stderr
    assert "ok: 2 binaries of 2 cases" in green.stdout


def test_what_was_read_from_the_binaries(planted):
    product = planted.binaries["clean.product"]["resources"]
    assert product["tensor_core_instructions"] > 0
    assert product["shared_bytes"] > 0
    rows = planted.binaries["clean.centre_rows"]["resources"]
    assert rows["tensor_core_instructions"] == 0
    assert rows["warps"] == 16
    assert rows["spill_bytes"] == 0
    assert rows["accesses"]["load.16B@0"] == 4  # 8192 fp32 for 512 threads: 4 loads of 16 bytes each
    assert rows["instructions"] == sum(rows["mix"].values())
    assert planted.binaries["faulty.centre_rows"]["resources"]["mix"]["spill"] > 0
    assert planted.binaries["faulty.double"]["resources"]["mix"]["double"] > 0
    assert planted.binaries["faulty.atomic_sum"]["resources"]["mix"]["atomic"] > 0
    assert "1" in planted.binaries["offsets.offsets"]["resources"]["loop_mix"]


def test_offsets_are_found_at_their_lines_and_nowhere_else(planted):
    lines = (PLANTED / "offsets.py").read_text().splitlines()
    expected = {f"offsets.py:{i}" for i, line in enumerate(lines, 1) if line.endswith("# found")}
    found = {re.search(r"offsets\.py:\d+", f["message"])[0] for f in planted.binaries["offsets.offsets"]["findings"]}
    assert found == expected


def test_a_process_that_interprets_refuses_to_compile(capsys):
    assert check.main(["--only", "nothing"]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), capture.capture("sm_90"):
        pass
    with pytest.raises(ValueError, match="target is 'sm_70'"), capture.capture("sm_70"):
        pass


def test_a_compiler_that_hangs_is_one_failure(monkeypatch):
    monkeypatch.setattr(measure, "_SECONDS", 0.3)
    monkeypatch.setattr(measure, "_compile", lambda job: time.sleep(60) if job.case == "hangs" else [])
    jobs = [Job("m", "hangs", "sm_90", {}), Job("m", "ends", "sm_90", {})]
    results = list(measure.measure(jobs, processes=1))
    assert results == [Failure("m", "hangs", "sm_90", "not compiled after 0.3 seconds"), []]
    assert str(results[0]) == "m: case 'hangs' on sm_90: not compiled after 0.3 seconds"


# --- judging


def binary(kernel="kernel", target="sm_90", findings=(), **taken):
    values = {"registers": 32, "spill_bytes": 0, "shared_bytes": 1024, "resident_warps": 64} | taken
    values = {"warps": 4, "limited_by": "registers", "instructions": 1, "tensor_core_instructions": 0} | values
    measured = resources.Resources(target=target, mix={}, loop_mix={}, accesses={}, **values)
    return Binary("norm", "case", ("8b",), target, kernel, (1, 1, 1), measured, tuple(findings))


def budget(tensor_cores=False, allow=None, registers=32, shared_bytes=1024, resident_warps=64):
    limits = {"sm_90": Limit(registers, shared_bytes, resident_warps)}
    return {("norm", "kernel"): Budget(tensor_cores, limits, allow or {})}


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        ({"registers": 33}, "33 registers, allowed 32"),
        ({"shared_bytes": 1025}, "1025 bytes of shared memory, allowed 1024"),
        ({"resident_warps": 63}, "63 resident warps (by registers), must be 64"),
        ({"spill_bytes": 8}, "spills 8 bytes, allowed 0"),
        ({"findings": [Finding("atomic", "here")]}, "atomic: here"),
    ],
)
def test_each_limit_is_held(taken, message):
    assert judge([binary()], budget()) == []
    assert judge([binary(**taken)], budget()) == [f"norm.kernel on sm_90 (case, 8b): {message}"]


def test_tensor_cores_missing_budgets_and_allowances():
    (problem,) = judge([binary()], budget(tensor_cores=True))
    assert "no tensor-core instructions, must have some" in problem
    assert judge([binary(tensor_core_instructions=1)], budget(tensor_cores=True)) == []
    assert judge([binary(target="sm_80")], budget()) == ["norm.kernel: no budget for sm_80 in budgets.toml"]
    assert judge([binary("other")], budget()) == ["norm.other: no budget in budgets.toml"]
    assert judge([binary(findings=[Finding("atomic", "{here}")])], budget(allow={"atomic": "a lock"})) == []


def test_unused_budgets_are_errors():
    assert unused([binary()], budget(), ["norm"], ["sm_90"]) == []
    assert unused([], budget(), ["rope"], ["sm_90"]) == []
    assert unused([], budget(), ["norm"], ["sm_80"]) == []
    (problem,) = unused([binary("other")], budget(), ["norm"], ["sm_90"])
    assert problem == "norm.kernel: budgets.toml has sm_90, but no case launches it there"
    (problem,) = unused([binary()], budget(allow={"atomic": "a lock"}), ["norm"], ["sm_90"])
    assert problem == "norm.kernel: budgets.toml allows atomic, which is not found"


def read_text(folder, text):
    path = folder / "read.toml"
    path.write_text(text)
    return read_budgets(path)


def test_a_proposal_fits_with_at_most_seven_registers_to_spare(tmp_path):
    binaries = [binary(registers=33), binary(registers=57, shared_bytes=2048, resident_warps=32)]
    limits = read_text(tmp_path, propose(binaries, {}))
    assert limits["norm", "kernel"] == Budget(False, {"sm_90": Limit(64, 2048, 32)})
    assert judge(binaries, limits) == []


def test_a_proposal_keeps_reasons_and_asks_for_missing_ones(tmp_path):
    binaries = [binary(findings=[Finding("atomic", "here")])]
    known = budget(allow={"atomic": "a lock"})
    assert read_text(tmp_path, propose(binaries, known))["norm", "kernel"].allow == {"atomic": "a lock"}
    with pytest.raises(ValueError, match=r"allow\.atomic must say why"):
        read_text(tmp_path, propose(binaries, {}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[norm.kernel", "read.toml: Expected"),
        ("norm = 3", "norm must be a table"),
        ("[norm.kernel]\nspeed = 3", "norm.kernel: unknown key 'speed'"),
        ("[norm.kernel]\nsm_90 = {}", "norm.kernel: tensor_cores must be true or false"),
        ("[norm.kernel]\ntensor_cores = true", "norm.kernel: no target has limits"),
        (
            "[norm.kernel]\ntensor_cores = true\nsm_90 = {registers = 3}",
            "norm.kernel.sm_90 must have registers, shared",
        ),
        ("[norm.kernel]\ntensor_cores = true\nallow.speed = 'x'", "norm.kernel.allow: unknown finding 'speed'"),
        ("[norm.kernel]\ntensor_cores = true\nallow.atomic = ' '", "norm.kernel.allow.atomic must say why"),
        (
            "[norm.kernel]\ntensor_cores = true\nsm_90 = {registers = -3, shared_bytes = 0, resident_warps = 1}",
            "norm.kernel.sm_90.registers is -3; it must be an integer that is not negative",
        ),
    ],
)
def test_bad_budgets_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path, text)


def test_the_budgets_of_the_project_can_be_read():
    assert read_budgets(budgets.PATH) is not None
    assert {module for module, _ in read_budgets()} <= set(measure.find_modules())


# --- reading binaries


def kernel_of(backend, arch, warps, shared=0, tensor_memory=None):
    target = SimpleNamespace(backend=backend, arch=arch)
    metadata = SimpleNamespace(target=target, num_warps=warps, shared=shared, tmem_size=tensor_memory)
    return SimpleNamespace(metadata=metadata)


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "tensor_memory", "expected"),
    [
        (90, 38, 8, 32, None, (48, "registers")),
        (90, 64, 16, 16452, None, (32, "registers")),
        (90, 113, 8, 8192, None, (16, "registers")),
        (90, 255, 8, 147456, None, (8, "shared memory")),
        (90, 32, 32, 0, None, (64, "slots")),
        (90, 16, 1, 0, None, (32, "slots")),  # 32 programs at most
        (80, 32, 4, 65536, None, (8, "shared memory")),
        (100, 32, 4, 0, 512, (4, "tensor memory")),
    ],
)
def test_resident_warps_of_nvidia(arch, registers, warps, shared, tensor_memory, expected):
    """The CUDA occupancy calculator's figures."""
    kernel = kernel_of("cuda", arch, warps, shared, tensor_memory)
    assert resources._nvidia_resident_warps(kernel, registers) == expected


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "expected"),
    [
        (64, 4, 0, (32, "slots")),
        (128, 4, 0, (16, "registers")),
        (512, 4, 0, (4, "registers")),
        (24, 8, 32768, (16, None)),
    ],
)
def test_resident_warps_of_amd(registers, warps, shared, expected):
    resident, limit = resources._amd_resident_warps(kernel_of("hip", "gfx942", warps, shared), registers)
    assert resident == expected[0]
    assert limit == (expected[1] or "shared memory")


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   FADD R2, R2, R3 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/               @P0 BRA 0x20 ;
        /*0040*/               @P1 BRA 0x10 ;
        /*0050*/                   EXIT ;
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R2 ;
        /*0070*/              @!P0 BRA 0x60 ;
        /*0080*/                   NOP;
"""


def test_loops_are_backward_branches_before_the_last_exit():
    opcodes, depths = zip(*resources._sass(SASS), strict=True)
    assert opcodes == ("MOV", "FADD", "LDG.E.128", "BRA", "BRA", "EXIT", "SYNCS.PHASECHK.TRANS64.TRYWAIT", "BRA")
    assert depths == (0, 1, 2, 2, 1, 0, 0, 0)


GCN = """
kernel:
; %bb.0:
	s_load_dwordx2 s[0:1], s[2:3], 0x0
.LBB0_1:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_2 Depth 2
	global_load_dwordx4 v[0:3], v4, s[0:1]
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
.Ltmp7:
	scratch_store_dword off, v0, off
	s_cbranch_scc1 .LBB0_2
; %bb.3:                                ;   in Loop: Header=BB0_1 Depth=1
	s_cbranch_scc1 .LBB0_1
.LBB0_4:
	global_store_short v4, v0, s[0:1]
	s_branch .LBB0_4
    .private_segment_fixed_size: 12
    .vgpr_count:     40
    .vgpr_spill_count: 2
"""


def test_amd_assembly():
    assert resources._amd_registers(GCN) == (40, 12)
    mix, loops, accesses = resources._count(resources._gcn(GCN), resources._amd_class, resources._amd_width)
    assert (mix["tensor core"], mix["spill"]) == (1, 1)
    assert accesses == {"load.16B@1": 1, "store.2B@0": 1}  # a jump back is a loop only where LLVM says so
    assert {depth: sum(counts.values()) for depth, counts in loops.items()} == {0: 3, 1: 2, 2: 3}


def test_an_argument_in_double_precision_is_found():
    assert lint("module {\n  tt.func public @k(%x: f64) {\n  }\n}") == [
        Finding("float64", "an argument is in double precision")
    ]


def test_every_kernel_of_the_package_has_a_budget_for_every_target():
    """Kernels are the jitted functions without a result that are named as such; the others are parts of them."""
    kernels = set()
    for path in (ROOT / "kernels").glob("*.py"):
        kernels.update(re.findall(r"@triton\.jit(?:\(.*\))?\ndef (_\w+_kernel)\(", path.read_text(encoding="utf-8")))
    assert len(kernels) > 20
    limits = read_budgets()
    assert {kernel for _, kernel in limits} == kernels
    for (module, kernel), budget in limits.items():
        assert budget.limits.keys() == capture.TARGETS.keys(), f"{module}.{kernel}"
