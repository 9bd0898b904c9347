import sys
from unittest import mock

import pytest
import torch

from tests.kernels.compare import assert_bitwise_equal, misaligned, poisoned
from tests.kernels.shards import random_shards, watch_shards
from umedtrain.kernels.grad_norm import clip_factor, grad_norm

module = sys.modules["umedtrain.kernels.grad_norm"]
"""The package's attribute of this name is the function."""
IMPLS = ("torch", "triton")
SIZES = (1, 3, 0, 4099, 20000)
"""The last is of more than one tile."""


def exact(grads):
    return torch.cat([g.reshape(-1).double() for g in grads]).norm()


def assert_is_norm(norm, grads, relative=1e-6):
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert abs(norm.double() - exact(grads)) <= relative * exact(grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_is_the_norm(impl, dtype):
    grads = random_shards(SIZES, dtype)
    with poisoned():
        assert_is_norm(grad_norm(grads, impl=impl), grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_types_strides_and_alignment(impl):
    grads = [
        torch.randn(70, 50).t(),
        torch.randn(40, 30).bfloat16()[:, ::3],
        misaligned(torch.randn(3000)),
        misaligned(torch.randn(3000).half()),
        torch.tensor(3.0),
    ]
    assert_is_norm(grad_norm(grads, impl=impl), grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_sizes_of_very_different_gradients(impl):
    """Many small ones beside a large one count: fp32 sums in one long chain would lose them."""
    grads = [torch.full((30000,), 1e-3), torch.tensor([1.0])]
    assert_is_norm(grad_norm(grads, impl=impl), grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_cut_into_tensors_changes_rounding_only(impl):
    whole = torch.randn(20000)
    norms = [grad_norm(whole.split(size), impl=impl) for size in (20000, 16384, 7001)]
    for norm in norms:
        assert_is_norm(norm, [whole], relative=3e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_repeats_bit_for_bit(impl):
    grads = random_shards(SIZES)
    assert_bitwise_equal(grad_norm(grads, impl=impl), grad_norm([g.clone() for g in grads], impl=impl))


def test_tiles_agree():
    grads = random_shards(SIZES)
    first = grad_norm(grads, impl="triton")
    with mock.patch.object(module, "CONFIGS", {"default": ((1, (4096, 512, 4)),)}):
        torch.testing.assert_close(first, grad_norm(grads, impl="triton"), rtol=3e-7, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_infinities_nan_and_nothing(impl):
    for bad in (float("inf"), float("-inf"), float("nan")):
        grads = random_shards((300, 5000), torch.bfloat16)
        grads[1][4999] = bad
        norm = grad_norm(grads, impl=impl)
        assert norm.isnan() if bad != bad else norm == float("inf")
    assert grad_norm([torch.zeros(0), torch.zeros(0, 3)], impl=impl) == 0
    assert grad_norm([torch.zeros(5)], impl=impl) == 0


def test_sanitizer_and_traffic():
    """Every gradient once, a table row and a map entry for each tile, and a partial sum written and read."""
    grads = random_shards(SIZES, torch.bfloat16)
    with watch_shards(grads) as watched:
        grad_norm(grads, impl="triton")
    sums, root = watched.launches
    tiles = sum(-(-size // 16384) for size in SIZES)
    assert sums.programs == tiles
    assert 2 * sum(SIZES) < sums.loaded <= 2 * sum(SIZES) + 32 * tiles
    assert sums.stored == root.loaded == 4 * tiles
    assert root.stored == 4


def test_one_launch_for_each_type():
    grads = random_shards(SIZES) + random_shards(SIZES, torch.bfloat16)
    with watch_shards(grads) as watched:
        grad_norm(grads, impl="triton")
    assert [launch.name for launch in watched.launches] == ["_square_sums_kernel"] * 2 + ["_root_kernel"]


def test_gradients_are_left_alone_and_detached():
    grads = [torch.randn(10, requires_grad=True)]
    before = grads[0].detach().clone()
    for impl in IMPLS:
        assert not grad_norm(grads, impl=impl).requires_grad
        assert_bitwise_equal(grads[0].detach(), before)


def test_clip_factor_is_that_of_torch():
    for norm in (0.0, 0.5, 1.0, 3.0, float("inf"), float("nan")):
        parameter = torch.nn.Parameter(torch.zeros(3))
        parameter.grad = torch.tensor([1.0, 2.0, 4.0])
        factor = clip_factor(torch.tensor(norm), 1.0)
        assert factor.shape == ()
        torch.nn.utils.clip_grads_with_norm_([parameter], 1.0, torch.tensor(norm))
        assert_bitwise_equal(parameter.grad, torch.tensor([1.0, 2.0, 4.0]) * factor)
    assert clip_factor(torch.tensor(2.0), float("inf")) == 1


@pytest.mark.parametrize("use_kernel", (False, True))
def test_operator(use_kernel):
    torch.library.opcheck(torch.ops.umedtrain.grad_norm.default, (random_shards((5, 300)), use_kernel))


def test_compiles_into_one_graph():
    def factor(grads):
        return clip_factor(grad_norm([g * 2 for g in grads]), 1.0)

    grads = random_shards((5, 300))
    torch.testing.assert_close(factor(grads), torch.compile(factor, fullgraph=True, backend="aot_eager")(grads))


def test_errors_name_the_argument():
    for grads, message in (
        ([], "grads is empty"),
        ([torch.zeros(2), torch.zeros(2).double()], r"grads\[1\] is torch.float64; it must be float32 or"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], r"grads\[1\] is on meta; it must be on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            grad_norm(grads)
    with pytest.raises(ValueError, match="max_norm is 0; it must be positive"):
        clip_factor(torch.tensor(1.0), 0)
