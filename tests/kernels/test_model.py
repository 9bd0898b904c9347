"""The package's own model on these kernels: what `umedtrain.Llama` and `token_logprobs` compute without them."""

import dataclasses

import pytest
import torch

from tests.kernels.attention_reference import small_blocks
from tests.kernels.compare import assert_bitwise_equal
from tests.ranks import run_ranks
from umedtrain import Layout, Llama, LlamaConfig, RopeScaling, token_logprobs
from umedtrain.distributed.sharding import checkpoint_layer, shard_model
from umedtrain.kernels import AdamW, clip_factor, grad_norm
from umedtrain.kernels.offline import interpreter, sanitizer
from umedtrain.losses import token_cross_entropy

CONFIG = LlamaConfig(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16),
)
# A prompt with two answers, one of which goes on, and a document of its own.
SEGMENTS = ((7, None), (4, 0), (3, 0), (2, 2), (5, None))
KERNELS = {
    "_attention_dkdv_kernel",
    "_attention_dq_kernel",
    "_attention_forward_kernel",
    "_gradient_kernel",
    "_partials_kernel",
    "_rms_norm_backward_kernel",
    "_rms_norm_forward_kernel",
    "_rms_norm_partials_kernel",
    "_rope_kernel",
    "_swiglu_backward_kernel",
    "_swiglu_forward_kernel",
}


def build(dtype=torch.float32, *, tied=False):
    model = Llama(dataclasses.replace(CONFIG, tie_word_embeddings=tied))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else 0.2 * noise)
    return model.to(dtype)


def batch(segments=SEGMENTS, seed=2):
    """Layout, tokens, rows, targets (some without) and a weight for each of them."""
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.tree(segments)
    tokens, targets = torch.randint(CONFIG.vocab_size, (2, layout.num_tokens), generator=generator)
    rows = torch.cat([torch.arange(layout.num_tokens), torch.tensor([6])])  # one row predicts two tokens
    targets = torch.cat([targets, torch.tensor([3])])
    targets[::4] = -100
    return layout, tokens, rows, targets, torch.randn(len(rows), generator=generator)


def loss_of(model, layout, tokens, rows, targets, weights):
    hidden = model(tokens, layout)
    logp = token_logprobs(hidden[rows], model.lm_head_weight, targets, chunk_bytes=4000)
    entropy = token_cross_entropy(hidden[rows], model.lm_head_weight, targets, chunk_bytes=4000)
    return (logp * weights.to(logp)).sum() + 0.3 * entropy, hidden, logp


def results(model, given):
    """Logits, log-probabilities and gradients by name."""
    loss, hidden, logp = loss_of(model, *given)
    model.zero_grad()
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"logits": model.logits(hidden).detach(), "logp": logp.detach(), **gradients}


@pytest.fixture
def forced(monkeypatch):
    """Calling this makes the model run on the kernels from then on."""
    with small_blocks(64, 32, 16):
        yield lambda: monkeypatch.setenv("UMEDTRAIN_KERNELS", "triton")


def distance(first, second):
    return (first.double() - second.double()).norm()


@pytest.mark.parametrize(("dtype", "tied"), ((torch.float32, True), (torch.bfloat16, False)))
def test_a_step_is_that_of_pytorchs_operators(forced, dtype, tied):
    """In bf16 the two may differ by what either differs from float64, of the same rounded weights."""
    given = batch()
    with sanitizer.watch() as unused:
        plain = results(build(dtype, tied=tied), given)
    assert not unused.launches
    exact = results(build(dtype, tied=tied).double(), given)
    forced()
    with sanitizer.watch() as watched:
        ours = results(build(dtype, tied=tied), given)
    assert {launch.name for launch in watched.launches} == KERNELS
    for name, want in exact.items():
        assert ours[name].dtype == plain[name].dtype, name
        allowed = 1e-5 * want.norm() if dtype == torch.float32 else 1.5 * distance(plain[name], want)
        assert distance(ours[name], want) <= allowed, name


def test_activation_checkpointing_changes_no_bit(forced):
    forced()
    expected = results(build(torch.bfloat16), batch())
    model = build(torch.bfloat16)
    for layer in model.layers:
        checkpoint_layer(layer)
    for name, got in results(model, batch()).items():
        assert_bitwise_equal(got, expected[name], name)


def test_compiles_whole(forced):
    forced()
    model, (layout, tokens, *_) = build(), batch()
    weights = torch.randn(len(tokens), CONFIG.hidden_size)
    eager = model(tokens, layout)  # which makes the layout's tables, on the host
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, layout)
    assert_bitwise_equal(compiled.detach(), eager.detach())
    parameters = [p for name, p in model.named_parameters() if name != "lm_head.weight"]
    for ours, theirs in zip(
        *(torch.autograd.grad((y * weights).sum(), parameters) for y in (compiled, eager)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_other_documents_leave_no_trace(forced):
    """The packed stream with another first document: the last one's hidden states keep their bits."""
    forced()
    model = build(torch.bfloat16)
    layout, tokens, *_ = batch()
    changed = torch.where(torch.arange(len(tokens)) < 16, (tokens + 1) % CONFIG.vocab_size, tokens)
    with torch.no_grad():
        first, second = model(tokens, layout), model(changed, layout)
    assert not torch.equal(first[:16], second[:16])
    assert_bitwise_equal(first[16:], second[16:])


def test_inputs_that_do_not_fit_are_refused_alike(forced):
    model = build()
    layout, tokens, *_ = batch()
    for _ in range(2):
        with pytest.raises(ValueError, match="outside the vocabulary of 101"):
            token_logprobs(model(tokens, layout), model.lm_head_weight, torch.full_like(tokens, 101))
        with pytest.raises(ValueError, match="targets_N has shape"):
            token_logprobs(model(tokens, layout), model.lm_head_weight, tokens[1:])
        forced()


# --- sharded


RUNS = ((torch.float32, False), (torch.bfloat16, True))
"""Dtype that parameters are gathered in, activation checkpointing."""
HYPER = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1}


def of_rank(rank):
    return batch(((5 + rank, None), (4, 0), (3 + rank, 0), (6, None)), seed=rank)


def train_sharded(world, dtype, checkpointing):
    """Two steps on two ranks: losses, norms of the gradient, and the weights at the end."""
    model = build()
    shard_model(model, world.mesh(0), dtype=dtype, activation_checkpointing=checkpointing)
    optimizer, losses, norms = AdamW(model.parameters(), **HYPER), [], []
    for _ in range(2):
        loss, *_ = loss_of(model, *of_rank(world.rank))
        loss.backward()
        square = grad_norm([parameter.grad.to_local() for parameter in model.parameters()]) ** 2
        norm = torch.tensor(world.sum([float(square)])[0]).sqrt()
        optimizer.step(grad_scale=clip_factor(norm, 1.0))
        optimizer.zero_grad()
        losses.append(world.sum([loss.item()])[0])
        norms.append(float(norm))
    return losses, norms, {name: parameter.full_tensor() for name, parameter in model.named_parameters()}


def train_all_sharded(world):
    interpreter.install()
    with pytest.MonkeyPatch.context() as patch, small_blocks(64, 32, 16):
        patch.setenv("UMEDTRAIN_KERNELS", "triton")
        return [train_sharded(world, *run) for run in RUNS]


def train_whole(dtype):
    """The same in one process, on PyTorch's operators and optimizer; the weights stay fp32."""
    model, losses, norms = build(), [], []
    optimizer = torch.optim.AdamW(model.parameters(), **HYPER)
    for _ in range(2):
        optimizer.zero_grad()
        total = 0.0
        for rank in range(2):
            copy = build(dtype)
            copy.load_state_dict(model.state_dict())
            loss, *_ = loss_of(copy, *of_rank(rank))
            loss.backward()
            for ours, theirs in zip(model.parameters(), copy.parameters(), strict=True):
                ours.grad = theirs.grad.float() + (0 if ours.grad is None else ours.grad)
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        losses.append(total)
        optimizer.step()
    return losses, norms, dict(model.named_parameters())


def test_sharded_over_ranks():
    """FSDP2 on two ranks, with the optimizer and the norm on their shards, is one process without any of it."""
    for trained in run_ranks(2, train_all_sharded):
        for (dtype, _), (losses, norms, weights) in zip(RUNS, trained, strict=True):
            want_losses, want_norms, want_weights = train_whole(dtype)
            relative = 1e-5 if dtype == torch.float32 else 1e-2
            assert losses == pytest.approx(want_losses, rel=relative)
            assert norms == pytest.approx(want_norms, rel=relative)
            for name, want in want_weights.items():
                assert distance(weights[name], want.detach()) < relative * want.norm(), (name, dtype)
