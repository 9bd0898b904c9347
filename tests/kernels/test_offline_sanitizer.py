"""Each planted race and stray access is found, each clean twin passes, and bytes are counted."""

import pytest
import torch
from triton.runtime import interpreter as stock
from triton.tools.tensor_descriptor import TensorDescriptor

from umedtrain.kernels._triton import tl, triton
from umedtrain.kernels.offline.sanitizer import SanitizerError, watch


@triton.jit
def planted(x_ptr, out_ptr, count_ptr, FAULT: tl.constexpr, B: tl.constexpr):
    """Copies B elements a program, and does one thing that it must not."""
    program = tl.program_id(0)
    i = tl.arange(0, B)
    mine = program * B + i
    following = tl.minimum(program + 1, tl.num_programs(0) - 1) * B + i
    x = tl.load(x_ptr + mine)
    if FAULT == "loads outside":
        x = tl.load(x_ptr + mine + B)
    elif FAULT == "loads before":
        x = tl.load(x_ptr + mine - 1)
    elif FAULT == "stores outside":
        tl.store(out_ptr + mine + 1, x)
    elif FAULT == "two store":
        tl.store(out_ptr + i, x)
    elif FAULT == "loads what another stores":
        tl.store(out_ptr + mine, x)
        x = tl.load(out_ptr + tl.maximum(program - 1, 0) * B + i)
    elif FAULT == "works in place":
        tl.load(x_ptr + following)
        tl.store(x_ptr + mine, x)
    elif FAULT == "stores what several loaded":
        tl.load(x_ptr + i)
        if program == tl.num_programs(0) - 1:
            tl.store(x_ptr + i, x)
    elif FAULT == "atomic beside a load":
        tl.atomic_add(count_ptr, 1)
        tl.debug_barrier()
        x += tl.load(count_ptr)
    elif FAULT == "lanes differ":
        tl.store(out_ptr + program * B + i // 2, x)
    elif FAULT == "no barrier":
        tl.store(out_ptr + mine, x)
        x = tl.load(out_ptr + program * B + (i ^ 1))
    elif FAULT == "none, barrier":
        tl.store(out_ptr + mine, x)
        tl.debug_barrier()
        x = tl.load(out_ptr + program * B + (i ^ 1))
    elif FAULT == "none, atomics":
        tl.atomic_add(count_ptr, 1)
    elif FAULT == "none, lanes agree":
        tl.store(out_ptr + program * B + i // 2 * 2, tl.load(x_ptr + program * B + i // 2 * 2))
    elif FAULT == "none, masked":
        x = tl.load(x_ptr + mine + B, mask=mine + B < tl.num_programs(0) * B, other=0.0)
    elif FAULT == "none, in place":
        tl.store(x_ptr + mine, x)
    tl.store(out_ptr + mine, x)


def run(fault, **options):
    x, out, count = torch.randn(64), torch.zeros(64), torch.zeros(1, dtype=torch.int32)
    with watch(**options) as watched:
        planted[(4,)](x, out, count, fault, 16)
    return watched.launches


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("loads outside", "planted: load out of bounds in program 3: 16 of 16 lanes, first byte 256 of .* 256 bytes"),
        ("loads before", "planted: load out of bounds in program 0: 1 of 16 lanes"),
        ("stores outside", "planted: store out of bounds in program 3: 1 of 16 lanes|program 1 stores to an element"),
        ("two store", "planted: program 1 stores to an element that program 0 stored to"),
        ("loads what another stores", "planted: program 1 loads an element that program 0 stored to|barrier"),
        ("works in place", "planted: program 1 stores to an element that several programs loaded"),
        ("stores what several loaded", "planted: program 3 stores to an element that several programs loaded"),
        ("atomic beside a load", "planted: program 1 atomically updates an element that program 0 loaded"),
        ("lanes differ", "planted: two lanes of one store in program 0 have different values"),
        ("no barrier", "planted: program 0 loads what it stored without a tl.debug_barrier"),
    ],
)
def test_faults_are_found(fault, message):
    with pytest.raises(SanitizerError, match=message):
        run(fault)


@pytest.mark.parametrize(
    "fault", ["none", "none, barrier", "none, atomics", "none, lanes agree", "none, masked", "none, in place"]
)
def test_clean_twins_pass(fault):
    run(fault)


def test_each_check_can_be_left_out():
    run("two store", races=False)
    with pytest.raises(SanitizerError, match="out of bounds"):
        run("loads outside", races=False)


@triton.jit
def doubled(x):
    return x + x


@triton.jit
def add_rows(x_ptr, weight_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + i, mask=i < columns, other=0.0)
    w = tl.load(weight_ptr + i, mask=i < columns, other=0.0)
    tl.store(out_ptr + row * columns + i, doubled(x) + w, mask=i < columns)


def test_bytes_requested_and_unique():
    x, weight = torch.randn(8, 5).bfloat16(), torch.randn(5).bfloat16()
    with watch() as watched:
        add_rows[(8,)](x, weight, torch.empty_like(x), 5, 8)
    (launch,) = watched.launches
    assert (launch.name, launch.programs) == ("add_rows", 8)
    assert launch.loaded == 2 * (8 * 5 + 8 * 5)  # the weight once for each row
    assert launch.unique_loaded == 2 * (8 * 5 + 5)
    assert launch.stored == launch.unique_stored == 2 * 8 * 5
    assert launch.dot_flops == 0


@triton.jit
def through_descriptors(a_desc, b_ptr, out_ptr, N: tl.constexpr):
    b_desc = tl.make_tensor_descriptor(b_ptr, [N, N], [N, 1], [N, N])
    i = tl.arange(0, N)
    product = tl.dot(a_desc.load([0, 0]), b_desc.load([0, 0]))
    tl.store(out_ptr + i[:, None] * N + i[None, :], product)


def test_descriptors_and_products_are_metered():
    a, b, out = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    with watch() as watched:
        through_descriptors[(1,)](TensorDescriptor.from_tensor(a, [16, 16]), b, out, 16)
    (launch,) = watched.launches
    assert launch.unique_loaded == launch.loaded == 2 * 2 * 16 * 16
    assert launch.unique_stored == 4 * 16 * 16
    assert launch.dot_flops == 2 * 16**3
    torch.testing.assert_close(out, a.float() @ b.float())


@triton.jit
def as_bytes(x_ptr, out_ptr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out_ptr + i, tl.load(x_ptr.to(tl.pointer_type(tl.uint8)) + i))


def test_narrower_pointers_are_told_apart():
    x, out = torch.randn(4), torch.empty(16, dtype=torch.uint8)
    with watch() as watched:
        as_bytes[(8,)](x, out, 2)
    assert torch.equal(out.view(torch.float32), x)
    assert watched.launches[0].unique_loaded == watched.launches[0].loaded == 16


@triton.jit
def broken(x_ptr):
    tl.static_assert(False, "as planned")


def test_other_errors_pass_and_the_interpreter_is_left_as_it_was():
    before = type(stock.interpreter_builder), stock.GridExecutor
    with pytest.raises(Exception, match="as planned"), watch():
        broken[(1,)](torch.zeros(1))
    assert before == (type(stock.interpreter_builder), stock.GridExecutor)
    with watch() as outer, watch() as inner:
        add_rows[(1,)](torch.zeros(1, 4), torch.zeros(4), torch.zeros(1, 4), 4, 4)
    assert (len(outer.launches), len(inner.launches)) == (0, 1)


def test_no_programs_and_no_bytes():
    with watch() as watched:
        add_rows[(0,)](torch.zeros(0, 4), torch.zeros(4), torch.zeros(0, 4), 4, 4)
    assert watched.launches[0].loaded == 0
