from itertools import chain
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.compare import assert_bitwise_equal, assert_two_references, misaligned, poisoned
from tests.kernels.shards import clones, random_shards, watch_shards
from umedtrain.kernels import adamw
from umedtrain.kernels._adamw_twin import BLOCK, State8, decode_state, encode_state, random_bits
from umedtrain.kernels._shards import shard_table
from umedtrain.kernels.adamw import adamw_step

HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
IMPLS = ("torch", "triton")


def zeros(params):
    return [torch.zeros(p.shape) for p in params]


def zeros8(params):
    def states(code):
        return [State8(torch.zeros(p.shape, dtype=code), torch.zeros(-(-p.numel() // BLOCK))) for p in params]

    return states(torch.int8), states(torch.uint8)


def exact_step(weights, grads, avgs, sqs, step, lr, betas, eps, weight_decay):
    """The formula in float64, in place."""
    for w, g, m, v in zip(weights, (g.double() for g in grads), avgs, sqs, strict=True):
        m.mul_(betas[0]).add_((1 - betas[0]) * g)
        v.mul_(betas[1]).add_((1 - betas[1]) * g * g)
        update = m / (1 - betas[0] ** step) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        w.mul_(1 - lr * weight_decay).sub_(lr * update)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_is_the_formula(impl, dtype):
    params = random_shards()
    avgs, sqs = zeros(params), zeros(params)
    exact = [[x.double() for x in xs] for xs in (params, avgs, sqs)]
    for step in (1, 2, 3):
        grads = random_shards(dtype=dtype)
        with poisoned():
            adamw_step(params, grads, avgs, sqs, step=step, impl=impl, **HYPER)
        exact_step(exact[0], grads, *exact[1:], step, **HYPER)
    for ours, theirs, name in zip((params, avgs, sqs), exact, ("weight", "m", "v"), strict=True):
        assert_two_references(torch.cat(ours), torch.cat(theirs), name=name)


def trained_with_torch(params, all_grads):
    leaves = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.AdamW(leaves, foreach=False, fused=False, **HYPER)
    for grads in all_grads:
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad.clone()
        optimizer.step()
    states = [[optimizer.state[leaf][key] for leaf in leaves] for key in ("exp_avg", "exp_avg_sq")]
    return [leaf.detach() for leaf in leaves], *states


def test_many_steps_are_those_of_torch():
    sizes = (1, 3, 70)
    params, all_grads = random_shards(sizes), [random_shards(sizes) for _ in range(25)]
    reference = trained_with_torch(params, all_grads)
    for impl in IMPLS:
        ours = clones(params), zeros(params), zeros(params)
        for step, grads in enumerate(all_grads, 1):
            adamw_step(ours[0], grads, *ours[1:], step=step, impl=impl, **HYPER)
        for mine, theirs in zip(chain(*ours), chain(*reference), strict=True):
            if impl == "torch":
                assert_bitwise_equal(mine, theirs)
            else:  # PyTorch's loops on a CPU contract some products with sums, and its square root is not exact
                torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-6)


def test_one_step_is_that_of_torch_to_an_ulp():
    params, grads = [torch.rand(2000) + 1], [torch.rand(2000) + 1]  # nothing cancels
    reference = trained_with_torch(params, [grads])
    avgs, sqs = zeros(params), zeros(params)
    adamw_step(params, grads, avgs, sqs, step=1, impl="triton", **HYPER)
    for ours, theirs in zip((params, avgs, sqs), reference, strict=True):
        assert (ours[0].view(torch.int32) - theirs[0].view(torch.int32)).abs().max() <= 1


@pytest.mark.parametrize("impl", IMPLS)
def test_masters_and_copies_are_rounded_in_the_same_pass(impl):
    weights, grads = random_shards(), random_shards(dtype=torch.bfloat16)
    alone = clones(weights), zeros(weights), zeros(weights)
    adamw_step(alone[0], grads, *alone[1:], step=1, impl=impl, **HYPER)

    for half in (torch.bfloat16, torch.float16):
        params, master = [w.to(half) for w in weights], clones(weights)
        adamw_step(params, grads, zeros(params), zeros(params), master=master, step=1, impl=impl, **HYPER)
        copied, copies = clones(weights), [torch.zeros_like(w, dtype=half) for w in weights]
        adamw_step(copied, grads, zeros(params), zeros(params), copies=copies, step=1, impl=impl, **HYPER)
        for want, *got in zip(alone[0], master, copied, strict=True):
            assert_bitwise_equal(want, got[0])
            assert_bitwise_equal(want, got[1])
        for want, *got in zip(alone[0], params, copies, strict=True):
            assert_bitwise_equal(want.to(half), got[0])
            assert_bitwise_equal(want.to(half), got[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_types_in_one_call(impl):
    """fp32 and bf16, with and without copies, 32 and 8 bits: each as if it were alone (and at its position)."""
    sizes = (5, 300, 7, 257, 0)
    weights, grads = random_shards(sizes), random_shards(sizes)
    grads[1] = grads[1].bfloat16()

    def arguments():
        params, master = clones(weights), [None] * 5
        params[1], master[1] = weights[1].bfloat16(), weights[1].clone()
        copies = [torch.zeros(5, dtype=torch.bfloat16), None, None, None, None]
        avgs, sqs = zeros(params), zeros(params)
        (*_, avgs[3], _), (*_, sqs[3], _) = zeros8(params)
        return params, grads, avgs, sqs, master, copies

    params, _, avgs, sqs, master, copies = together = arguments()
    adamw_step(*together[:4], master=master, copies=copies, step=1, impl=impl, **HYPER)
    for i in range(5):
        params1, grads1, avgs1, sqs1, master1, copies1 = ([x[i]] for x in arguments())
        adamw_step(params1, grads1, avgs1, sqs1, master=master1, copies=copies1, step=1, impl=impl, **HYPER)
        assert_bitwise_equal(params[i], params1[0])
        if i == 0:
            assert_bitwise_equal(copies[0], params[0].bfloat16())
            assert_bitwise_equal(copies[0], copies1[0])
        if i != 3:  # the random bits of 8-bit states depend on the position
            assert_bitwise_equal(avgs[i], avgs1[0])
            assert_bitwise_equal(sqs[i], sqs1[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bits", (32, 8))
def test_numbers_on_the_device(impl, bits):
    """grad_scale scales the gradients; lr and step give the same from the host and from the device."""
    params, grads = random_shards((300,)), random_shards((300,))
    results = []
    for form in range(3):
        weights = clones(params)
        states = zeros8(params) if bits == 8 else (zeros(params), zeros(params))
        for step in (1, 2):
            hyper = HYPER | {"step": step, "lr": HYPER["lr"] * step}
            scale = {"grad_scale": torch.tensor([0.25])}
            if form == 2:
                hyper |= {"lr": torch.tensor(hyper["lr"]), "step": torch.tensor([step])}
            scaled = [g * 0.25 for g in grads] if form == 0 else grads
            adamw_step(weights, scaled, *states, impl=impl, **hyper, **(scale if form else {}))
        results.append(weights[0])
    assert_bitwise_equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=1e-6, atol=1e-7)  # lr was rounded to fp32


@pytest.mark.parametrize("impl", IMPLS)
def test_tensor_step_keeps_the_bias_correction_exact(impl):
    """1 - 0.9999 ** 1 in fp32 would be off by 1e-4 of itself."""
    hyper = HYPER | {"betas": (0.9, 0.9999)}
    params, grads = random_shards((300,)), random_shards((300,))
    first, second = clones(params), clones(params)
    adamw_step(first, grads, zeros(params), zeros(params), step=1, impl=impl, **hyper)
    adamw_step(second, grads, zeros(params), zeros(params), step=torch.tensor(1.0), impl=impl, **hyper)
    torch.testing.assert_close(first, second, rtol=3e-7, atol=0)


def test_misaligned_and_strided_tensors():
    params, grads = random_shards(), random_shards()
    want = clones(params), zeros(params), zeros(params)
    adamw_step(want[0], grads, *want[1:], step=1, impl="triton", **HYPER)
    got = tuple([misaligned(x) for x in xs] for xs in (params, zeros(params), zeros(params)))
    strided = [torch.stack((g, g.new_full(g.shape, float("nan"))), 1)[:, 0] for g in grads]
    adamw_step(got[0], strided, *got[1:], step=1, impl="triton", **HYPER)
    for x, y in zip(chain(*want), chain(*got), strict=True):
        assert_bitwise_equal(x, y)


@pytest.mark.parametrize("bits", (32, 8))
def test_tiles_do_not_change_bits(bits):
    sizes = (300, 1025)
    params, grads = random_shards(sizes), random_shards(sizes)
    results = []
    for tile, chunk in ((4096, 1024), (512, 256)):
        name = "CONFIGS_8" if bits == 8 else "CONFIGS_32"
        with mock.patch.object(adamw, name, {"default": ((1, (tile, chunk, 4)),)}):
            weights, states = clones(params), zeros8(params) if bits == 8 else (zeros(params), zeros(params))
            for step in (1, 2):
                adamw_step(weights, grads, *states, step=step, seed=3, impl="triton", **HYPER)
        results.append(weights + [s.codes for s in states[0] + states[1] if bits == 8])
    for first, second in zip(*results, strict=True):
        assert_bitwise_equal(first, second)


def test_nothing_to_do():
    for impl in IMPLS:
        adamw_step([], [], [], [], step=1, impl=impl, **HYPER)
        empty = random_shards((0, 0))
        adamw_step(empty, clones(empty), zeros(empty), zeros(empty), step=1, impl=impl, **HYPER)
        adamw_step(empty, clones(empty), *zeros8(empty), step=1, impl=impl, **HYPER)


# --- 8-bit states


def test_philox_known_answer():
    """Salmon et al., Random123's kat_vectors: philox4x32 10, counter and key of zeros, and of ones."""
    bits = random_bits(torch.Size([4]), 0, 0, 0, torch.device("cpu"))
    assert [f"{word:08x}" for word in bits.tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_8_bit_kernel_is_the_twin():
    sizes = (1, 3, 0, 300, 1025)
    params, seed = random_shards(sizes), 2**40 + 7
    ours, twin = (clones(params), *zeros8(params)), (clones(params), *zeros8(params))
    for step in (1, 2, 3):
        grads = random_shards(sizes)
        for (weights, avgs, sqs), impl in ((ours, "triton"), (twin, "torch")):
            adamw_step(weights, grads, avgs, sqs, step=step, seed=seed, impl=impl, **HYPER)
        torch.testing.assert_close(ours[0], twin[0], rtol=1e-5, atol=1e-6)
        for x, y in zip(ours[1] + ours[2], twin[1] + twin[2], strict=True):
            torch.testing.assert_close(x.scales, y.scales, rtol=1e-6, atol=0)
            # An ulp of difference may carry a value over the edge between up and down.
            assert (x.codes != y.codes).sum() <= 1
            x.codes.copy_(y.codes)


@pytest.mark.parametrize("code", (torch.int8, torch.uint8))
def test_rounding_keeps_the_mean(code):
    """Over 4096 roundings each value's mean is within 5 standard errors of the value (of v, for the second moment)."""
    draws = 4096
    sign = torch.randn(256).sign() if code == torch.int8 else torch.ones(256)
    values = 10.0 ** torch.empty(256).uniform_(-6, 0) * sign
    state = State8(torch.zeros(draws, 256, dtype=code), torch.zeros(draws))
    bits = random_bits(state.codes.shape, 5, 0, 1, torch.device("cpu"))
    encode_state(values.expand(draws, 256), bits & 0xFFFF if code == torch.int8 else bits >> 16, state)
    decoded = decode_state(state).double()
    assert len(decoded[:, 0].unique()) <= 2
    error = decoded.std(0) / draws**0.5
    resolution = 2**-17 * 0.02 * values.abs().max()
    assert ((decoded.mean(0) - values.double()).abs() <= 5 * error + resolution).all()


def test_levels_are_as_stated():
    state = State8(torch.arange(-127, 128, dtype=torch.int8), torch.tensor([2.0]))
    values = decode_state(state)
    assert_bitwise_equal(values, -values.flip(0))
    assert values[-1] == 2
    assert values[-2] == pytest.approx(2 * (126 / 127) ** 2)
    v = decode_state(State8(torch.arange(256, dtype=torch.uint8), torch.tensor([2.0])))
    assert v[255] == pytest.approx(4)
    assert v[1] == pytest.approx(4 / 255**4)


@pytest.mark.parametrize("impl", IMPLS)
def test_v_never_becomes_zero_beside_larger_ones(impl):
    """Gradients of 1e-8 of the block's largest: at worst the element moves too little, never by m / eps."""
    params, grads = [torch.zeros(256)], [torch.full((256,), 1e-8)]
    grads[0][0] = 1.0
    avgs, sqs = zeros8(params)
    for step in range(1, 6):
        before = params[0].clone()
        adamw_step(params, grads, avgs, sqs, step=step, impl=impl, **HYPER | {"eps": 0.0})
        assert (sqs[0].codes >= 1).all()
        assert ((params[0] - before).abs() <= 5 * HYPER["lr"]).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_bad_gradients_do_not_hide_in_8_bits(impl, bad):
    params, grads = random_shards((600,)), random_shards((600,))
    grads[0][300] = bad
    states = zeros8(params)
    for step in (1, 2):
        adamw_step(params, grads, *states, step=step, impl=impl, **HYPER)
    assert not params[0][300].isfinite()
    assert params[0][:256].isfinite().all()
    for state in states:
        assert not decode_state(state[0])[256:512].isfinite().all()
        assert decode_state(state[0])[512:].isfinite().all()


def test_8_bit_training_is_as_good_as_32_bit():
    """Logistic regression with noisy gradients of very different sizes: the same loss after 200 steps to 2 %."""
    generator = torch.Generator().manual_seed(1)
    scales = 10.0 ** torch.empty(512).uniform_(-2, 1, generator=generator)
    x = torch.randn(4096, 512, generator=generator) * scales
    y = (x @ (torch.randn(512, generator=generator) / scales) > 0).float()
    losses = {}
    for bits in (32, 8):
        weight = torch.zeros(512)
        states = zeros8([weight]) if bits == 8 else ([torch.zeros(512)], [torch.zeros(512)])
        for step in range(1, 201):
            rows = torch.arange(step * 64, step * 64 + 64) % 4096
            grad = x[rows].T @ (torch.sigmoid(x[rows] @ weight) - y[rows]) / 64
            adamw_step([weight], [grad], *states, step=step, impl="torch", **HYPER | {"weight_decay": 0.0})
        losses[bits] = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight, y).item()
    assert losses[32] < 0.5
    assert losses[8] == pytest.approx(losses[32], rel=0.02)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**62), st.integers(1, 2**20), st.integers(0, 1000))
def test_random_bits_are_of_their_counters(seed, step, shard):
    def draw(*counters):
        return random_bits(torch.Size([64]), *counters, torch.device("cpu"))

    first = draw(seed, shard, step)
    assert torch.equal(first, draw(seed, shard, step))
    for other in ((seed + 1, shard, step), (seed, shard + 1, step), (seed, shard, step + 1)):
        assert (first == draw(*other)).sum() <= 1
    assert torch.equal(first[:7], random_bits(torch.Size([7]), seed, shard, step, torch.device("cpu")))


# --- how it is offered


@pytest.mark.parametrize("bits", (32, 8))
def test_sanitizer_and_traffic(bits):
    """28 bytes an element with fp32 states, 16 and the scales with 8 bits; a table row and a map entry per tile."""
    sizes = (1, 300, 1024) if bits == 8 else (1, 3, 300, 8192)
    weights, grads = random_shards(sizes), random_shards(sizes, torch.bfloat16)
    params = [w.bfloat16() for w in weights]
    states = zeros8(weights) if bits == 8 else (zeros(weights), zeros(weights))
    parts = [list(s) if bits == 8 else [s] for state in states for s in state]
    with watch_shards(weights, grads, params, *parts) as watched:
        adamw_step(params, grads, *states, master=weights, step=1, impl="triton", **HYPER)
    (launch,) = watched.launches
    elements, blocks, tiles = sum(sizes), sum(-(-s // BLOCK) for s in sizes), sum(-(-s // 4096) for s in sizes)
    of_state = 2 * elements + 8 * blocks if bits == 8 else 8 * elements
    assert launch.programs == tiles
    assert launch.stored == launch.unique_stored == 6 * elements + of_state
    assert launch.loaded <= 6 * elements + of_state + 88 * tiles
    assert launch.unique_loaded >= 6 * elements + of_state


def test_table():
    """Where a compiled kernel may load wide is decided here; the interpreter would forgive a mistake."""
    tensors = [torch.zeros(5000), misaligned(torch.zeros(7)), torch.zeros(0)]
    table = shard_table(tensors, 4096)
    assert table.tiles.tolist() == [[0, 0], [0, 1], [1, 0]]
    want = [[t.data_ptr(), 0, t.numel(), t.data_ptr() % 16 == 0, n] for t, n in zip(tensors, (4, 5, 6), strict=True)]
    assert table.rows([tensors, []], (4, 5, 6)).tolist() == want
    assert [row[3] for row in want] == [1, 0, 1]
    both = table.rows([tensors, [misaligned(torch.zeros(5000)), *tensors[1:]]])
    assert both[:, 3].tolist() == [0, 0, 1]


def test_one_launch_and_a_table_made_once():
    params, grads = random_shards(), random_shards()
    states = zeros(params), zeros(params)
    shard_table(params, 4096)
    with mock.patch("torch.repeat_interleave") as made:
        for step in (1, 2, 3):
            grads = random_shards() if step == 3 else grads  # elsewhere in memory
            with watch_shards(params, grads, *states) as watched:
                adamw_step(params, grads, *states, step=step, impl="triton", **HYPER)
            assert len(watched.launches) == 1
    assert not made.called


@pytest.mark.parametrize("bits", (32, 8))
@pytest.mark.parametrize("impl", IMPLS)
def test_repeats_bit_for_bit(bits, impl):
    params, grads = random_shards((300,)), random_shards((300,))
    runs = []
    for _ in range(2):
        weights, states = clones(params), zeros8(params) if bits == 8 else (zeros(params), zeros(params))
        for step in (1, 2):
            adamw_step(weights, grads, *states, step=step, seed=9, impl=impl, **HYPER)
        runs.append(weights[0])
    assert_bitwise_equal(*runs)


@pytest.mark.parametrize("impl", IMPLS)
def test_autograd_sees_the_change(impl):
    """A tensor saved for backward that was updated since is an error, as with PyTorch's optimizers."""
    weight = torch.randn(4, requires_grad=True)
    loss = weight.square().sum()
    adamw_step([weight], [torch.ones(4)], [torch.zeros(4)], [torch.zeros(4)], step=1, impl=impl, **HYPER)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("bits", (32, 8))
def test_operator(bits):
    params, grads = random_shards((5, 7)), random_shards((5, 7))
    numbers, none = [0.9, 0.1, 0.5, 0.1, 0.9, 0.1, 1e-8], None
    if bits == 32:
        op = torch.ops.umedtrain.adamw.default
        args = (params, grads, zeros(params), zeros(params), [], none, none, numbers, False)
    else:
        op = torch.ops.umedtrain.adamw_8bit.default
        avgs, sqs = zeros8(params)
        scales = [s.scales for s in avgs], [s.scales for s in sqs]
        codes = [s.codes for s in avgs], [s.codes for s in sqs]
        args = (params, grads, *codes, [], *scales, [0, 1], none, none, numbers, 1, 0, False)
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiles_into_one_graph(backend):
    params, grads = random_shards((5, 300)), random_shards((5, 300))
    want, got = clones(params), clones(params)
    states = zeros(params), zeros(params)

    def step(weights, grads, avgs, sqs, lr, number):
        scaled = [grad * 2 for grad in grads]
        adamw_step(weights, scaled, avgs, sqs, **HYPER | {"lr": lr}, step=number, impl="triton")
        return weights[0] + 1

    numbers = torch.tensor(0.01), torch.tensor(1.0)
    first = step(want, grads, zeros(params), zeros(params), *numbers)
    second = torch.compile(step, fullgraph=True, backend=backend)(got, grads, *states, *numbers)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(want, got, rtol=1e-6, atol=1e-7)


def test_errors_name_the_argument():
    def call(**changed):
        params = random_shards((4, 6))
        named = {"params": params, "grads": clones(params), "exp_avgs": zeros(params), "exp_avg_sqs": zeros(params)}
        adamw_step(**named | HYPER | {"step": 1} | changed)

    four, six = torch.zeros(4), torch.zeros(6)
    state8 = State8(torch.zeros(6, dtype=torch.int8), torch.zeros(1))
    call()
    for changed, message in (
        ({"grads": [four]}, "grads has 1 entries; it must have one for each of 2 params"),
        ({"grads": [four, four]}, r"grads\[1\] has 4 elements; it must have 6"),
        ({"grads": [four, six.double()]}, r"grads\[1\] is torch.float64; it must be float32 or bfloat16 or float16"),
        ({"params": [four, six.bfloat16()]}, r"params\[1\] is torch.bfloat16; it must be float32, or have a master"),
        ({"params": [four, torch.zeros(12)[::2]]}, r"params\[1\] has strides \(2,\); it must be contiguous"),
        ({"params": [four, six.to("meta")]}, r"params\[1\] is on meta; it must be on cpu"),
        ({"master": [None, six]}, r"params\[1\] is torch.float32; it must be bfloat16 or float16 where there is"),
        ({"copies": [None, six]}, r"copies\[1\] is torch.float32; it must be bfloat16 or float16"),
        ({"exp_avgs": [four, six.bfloat16()]}, r"exp_avgs\[1\] is torch.bfloat16; it must be float32"),
        ({"exp_avgs": [four, state8]}, r"exp_avgs\[1\] and exp_avg_sqs\[1\] must both be State8"),
        ({"exp_avgs": [four, state8], "exp_avg_sqs": [four, state8]}, r"exp_avg_sqs\[1\].codes is torch.int8"),
        ({"lr": -1.0}, "lr is -1.0; it must be at least 0"),
        ({"lr": torch.zeros(2)}, r"lr has shape \(2,\); it must have one element"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); it must be two numbers"),
        ({"eps": -1.0}, "eps and weight_decay must be at least 0, are -1.0"),
        ({"step": 0}, "step is 0; the first is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"grad_scale": torch.zeros(2)}, "grad_scale has 2 elements; it must have 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changed)
