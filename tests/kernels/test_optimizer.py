import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.kernels.compare import assert_bitwise_equal
from umedtrain.kernels.grad_norm import clip_factor, grad_norm
from umedtrain.kernels.optimizer import AdamW


def network(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(256, 8), nn.Tanh(), nn.Linear(8, 256, bias=False)).to(dtype)


def train(model, optimizer, steps, first=0, scale=None):
    for step in range(first, first + steps):
        torch.manual_seed(100 + step)
        x = torch.randn(16, 256, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss = (model(x) - x).float().square().mean()
        loss.backward()
        optimizer.step(**({} if scale is None else {"grad_scale": scale(model)}))
    return loss.item()


def assert_same_weights(first, second):
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert_bitwise_equal(a.detach(), b.detach())


def groups(model):
    return [
        {"params": [model[0].weight, model[2].weight]},
        {"params": [model[0].bias], "weight_decay": 0.0, "lr": 0.01},
    ]


def test_is_torch_adamw_bit_for_bit_in_its_place():
    ours, theirs = network(), network()
    first = AdamW(groups(ours), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, impl="torch")
    second = torch.optim.AdamW(groups(theirs), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=False, fused=False)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 5) for o in (first, second)]
    for step in range(10):
        train(ours, first, 1, step)
        train(theirs, second, 1, step)
        for schedule in schedules:
            schedule.step()
    assert_same_weights(ours, theirs)


def test_takes_over_a_checkpoint_of_torch_adamw():
    theirs = network()
    second = torch.optim.AdamW(theirs.parameters(), lr=3e-3, foreach=False, fused=False)
    train(theirs, second, 3)
    ours = copy.deepcopy(theirs)
    first = AdamW(ours.parameters(), lr=1.0, impl="torch")
    first.load_state_dict(copy.deepcopy(second.state_dict()))
    train(theirs, second, 3, 3)
    train(ours, first, 3, 3)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("bits", (32, 8))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_resumes_bit_for_bit(bits, dtype, impl):
    def fresh():
        model = network(dtype)
        return model, AdamW(model.parameters(), lr=3e-3, state_bits=bits, seed=11, impl=impl)

    model, optimizer = fresh()
    train(model, optimizer, 2)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    train(model, optimizer, 2, 2)
    resumed, other = fresh()
    weights, states = torch.load(file)
    resumed.load_state_dict(weights)
    other.load_state_dict(states)
    train(resumed, other, 2, 2)
    assert_same_weights(model, resumed)
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert_bitwise_equal(a[key], b[key], key)


def test_states_are_as_documented():
    model = network(torch.bfloat16)
    optimizer = AdamW(model.parameters(), state_bits=8)
    train(model, optimizer, 1)
    kinds = [{key: (t.dtype, tuple(t.shape)) for key, t in optimizer.state[p].items()} for p in model.parameters()]
    step = {"step": (torch.float32, ())}
    assert kinds[0] == step | {
        "exp_avg": (torch.int8, (8, 256)),
        "exp_avg_scale": (torch.float32, (8, 1)),
        "exp_avg_sq": (torch.uint8, (8, 256)),
        "exp_avg_sq_scale": (torch.float32, (8, 1)),
        "master": (torch.float32, (8, 256)),
    }
    assert kinds[1] == step | {name: (torch.float32, (8,)) for name in ("exp_avg", "exp_avg_sq", "master")}
    assert "exp_avg_scale" not in kinds[2]  # rows of 8
    for p in model.parameters():
        assert_bitwise_equal(p.detach(), optimizer.state[p]["master"].bfloat16())


def test_is_copied_with_its_settings():
    model = network()
    optimizer = AdamW(model.parameters(), lr=3e-3, state_bits=8, seed=5, impl="torch")
    train(model, optimizer, 1)
    twin, other = copy.deepcopy((model, optimizer))
    assert (other.state_bits, other.seed, other.impl) == (8, 5, "torch")
    train(model, optimizer, 2, 1)
    train(twin, other, 2, 1)
    assert_same_weights(model, twin)


def test_masters_keep_what_bf16_loses():
    """Updates far below a bf16 step add up in the master weights."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW([parameter], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert parameter[0].item() == pytest.approx(0.99, abs=2e-3)


def test_clips_without_asking_the_device():
    ours, theirs = network(), network()
    train(ours, AdamW(ours.parameters(), impl="torch"), 3, scale=lambda m: clip_factor(norm_of(m), 0.01))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
    for step in range(3):
        torch.manual_seed(100 + step)
        x = torch.randn(16, 256)
        optimizer.zero_grad()
        (theirs(x) - x).square().mean().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
        optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def norm_of(model):
    return grad_norm([p.grad for p in model.parameters()])


def test_closure_missing_gradients_and_a_tensor_lr():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([used, unused], lr=torch.tensor(0.1), weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    torch.testing.assert_close(used.detach(), torch.full((3,), 0.9))
    assert_bitwise_equal(unused.detach(), torch.ones(3))
    assert unused not in optimizer.state
    unused.grad = torch.ones(3)  # its first step, while the other makes its second
    optimizer.step()
    torch.testing.assert_close(unused.detach(), torch.full((3,), 0.9))
    assert [int(optimizer.state[p]["step"]) for p in (used, unused)] == [2, 1]


def test_errors():
    parameter = nn.Parameter(torch.zeros(2, 256))
    for settings, message in (
        ({"state_bits": 4}, "state_bits is 4; it must be 8 or 32"),
        ({"lr": -1}, "lr is -1"),
        ({"betas": (0.9, 1.5)}, "betas is"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamW([parameter], **settings)
    parameter.grad = torch.ones(2, 256)
    wide, narrow = AdamW([parameter]), AdamW([parameter], state_bits=8)
    wide.step()
    narrow.step()
    with pytest.raises(ValueError, match="parameter 0 has 32 bits; state_bits of this optimizer asks for 8"):
        narrow.load_state_dict(wide.state_dict())
    with pytest.raises(ValueError, match="parameter 0 has 8 bits"):
        wide.load_state_dict(narrow.state_dict())
    assert len(wide.state) == len(narrow.state) == 1  # as they were
    with pytest.raises(ValueError, match="different number of parameter groups"):
        AdamW([{"params": [nn.Parameter(torch.zeros(2))]}, {"params": [parameter]}]).load_state_dict(wide.state_dict())
    strided = nn.Parameter(torch.zeros(4, 6).t())
    strided.grad = torch.ones(6, 4)
    with pytest.raises(ValueError, match=r"params\[0\] has strides .* it must be contiguous"):
        AdamW([strided]).step()


# --- DTensor parameters


@pytest.fixture
def gloo():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def fake_ranks():
    """Rank 1 of 4, the others of which are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


@pytest.mark.parametrize("bits", (32, 8))
def test_fsdp2_and_distributed_checkpoint_states(gloo, bits):
    plain, sharded = network(), network()
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer, mesh=gloo)
    fully_shard(sharded, mesh=gloo)
    first = AdamW(plain.parameters(), state_bits=bits)
    second = AdamW(sharded.parameters(), state_bits=bits)
    train(plain, first, 2)
    train(sharded, second, 2)
    for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert_bitwise_equal(a.detach(), b.full_tensor().detach())
    states = get_optimizer_state_dict(sharded, second)
    assert all(isinstance(t, DTensor) for s in states["state"].values() for k, t in s.items() if k != "step")
    third = AdamW(sharded.parameters(), state_bits=bits)
    set_optimizer_state_dict(sharded, third, states)
    for a, b in zip(second.state.values(), third.state.values(), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            first, second = (t if key == "step" else t.full_tensor() for t in (a[key], b[key]))
            assert_bitwise_equal(first, second, key)


@pytest.mark.parametrize("placement", (Shard(0), Shard(1), Replicate()))
@pytest.mark.parametrize("bits", (32, 8))
def test_a_rank_updates_its_own_shard(fake_ranks, placement, bits):
    def parameter(local):
        return nn.Parameter(DTensor.from_local(local, fake_ranks, [placement], run_check=False))

    local, grad = torch.randn(3, 512), torch.randn(3, 512)
    plain, sharded = nn.Parameter(local.clone()), parameter(local.clone())
    plain.grad, sharded.grad = grad.clone(), parameter(grad.clone()).detach()
    for p in (plain, sharded):
        optimizer = AdamW([p], state_bits=bits)
        optimizer.step()
    assert_bitwise_equal(plain.detach(), sharded.to_local().detach())
    scale = optimizer.state[sharded].get("exp_avg_scale")
    assert (scale is not None) == (bits == 8)
    if scale is not None:
        ranks = [4 if placement.is_shard(d) else 1 for d in (0, 1)]
        assert scale.shape == (3 * ranks[0], 2 * ranks[1])
        assert scale.placements == (placement,)
        assert scale.to_local().shape == (3, 2)


def test_blocks_do_not_cross_the_edges_of_ranks(fake_ranks):
    """512 columns over 4 ranks are half a block for each: the states stay at 32 bits, on every rank."""
    local = DTensor.from_local(torch.randn(3, 128), fake_ranks, [Shard(1)], run_check=False)
    parameter = nn.Parameter(local)
    parameter.grad = local.clone()
    optimizer = AdamW([parameter], state_bits=8)
    optimizer.step()
    assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32
