"""Decoding layers in C++: right against fp64, the same bits in every batch, and PyTorch's layers where they are not."""

import importlib
import itertools
import shutil
import warnings
import zlib
from pathlib import Path

import pytest
import torch

from tests.sampling.test_sampler import PROMPTS, tiny
from umedtrain import kernels
from umedtrain.kernels import cpu
from umedtrain.kernels.quantized import quantize_int4, quantize_int8
from umedtrain.model.config import LlamaConfig
from umedtrain.model.layout import Layout
from umedtrain.model.llama import Llama
from umedtrain.model.rope import rope_frequencies, rope_tables
from umedtrain.sampling import Sampler, SamplingParams
from umedtrain.sampling.forward import TorchDecoder

KINDS = {
    "fp32": lambda weight: weight,
    "bf16": lambda weight: weight.bfloat16(),
    "int8": quantize_int8,
    "int4": lambda weight: quantize_int4(weight, 64 if weight.shape[1] % 128 else 128),
}

# The package offers the function under the file's name.
building = importlib.import_module("umedtrain.kernels.cpu.library")
needs_library = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")


def made(kind, outputs, inputs, seed=0):
    """A weight of a kind, and the same numbers in fp64."""
    weight = KINDS[kind](torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)))
    if isinstance(weight, torch.Tensor):
        return weight, weight.double()
    return weight, weight.dequantize(torch.float64)


def inputs_of(kind):
    return (64, 512, 1408) if kind == "int4" else (1, 7, 63, 512, 1408)


# --- products


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs", [1, 7, 48, 49, 1000])
def test_products_against_fp64(kind, outputs):
    for inputs, rows in itertools.product(inputs_of(kind), (1, 2, 5, 9)):
        weight, exact = made(kind, outputs, inputs)
        x = torch.randn(rows, inputs)
        wanted = x.double() @ exact.T
        # An error of one rounding in each of the LANES partial sums, on sums of magnitude sqrt(inputs).
        allowed = 1e-6 * (x.double().abs() @ exact.T.abs()).max().item()
        assert (cpu.linear(x, weight) - wanted).abs().max() <= allowed
        before = torch.randn(rows, outputs)
        into = before.clone()
        assert cpu.linear(x, weight, into=into) is into
        assert (into - before - wanted).abs().max() <= allowed + 1e-6 * before.abs().max()


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_and_no_write_outside(kind):
    weight, _ = made(kind, 49, 64)
    assert cpu.linear(torch.empty(0, 64), weight).shape == (0, 49)
    for rows in (1, 3, 4, 6):
        buffer = torch.full((rows * 49 + 64,), torch.nan)
        inside = buffer[32 : 32 + rows * 49].view(rows, 49)
        cpu.linear(torch.ones(rows, 64), weight, into=inside.zero_())
        assert inside.isfinite().all()
        assert buffer[:32].isnan().all()
        assert buffer[32 + rows * 49 :].isnan().all()


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(49, 512), (1000, 192), (7, 64)])
def test_a_row_has_the_same_bits_beside_any_others(kind, shape):
    weight, _ = made(kind, *shape)
    x = torch.randn(40, shape[1])
    alone = torch.cat([cpu.linear(row[None].contiguous(), weight) for row in x])
    for rows in range(1, 41):
        order = torch.randperm(40)[:rows]
        assert cpu.linear(x[order].contiguous(), weight).equal(alone[order])


@needs_library
def test_bits_do_not_depend_on_the_number_of_threads():
    weights = [made(kind, 500, 192)[0] for kind in KINDS]
    xs, model = [torch.randn(rows, 192) for rows in (1, 4, 11)], tiny()
    asked = SamplingParams(max_tokens=20, n=2, seed=1, top_p=0.9)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.get_num_threads() == threads
            products = [cpu.linear(x, weight).tolist() for weight in weights for x in xs]
            results.append((products, Sampler(model, eos_ids=(3,)).generate(PROMPTS, asked)))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


@needs_library
@pytest.mark.parametrize("width", [1, 7, 16, 40, 1000])
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_rms_norm(width, dtype):
    x, weight = torch.randn(5, width) * torch.logspace(-3, 3, 5)[:, None], torch.randn(width).to(dtype)
    exact = torch.nn.functional.rms_norm(x.double(), (width,), eps=1e-5) * weight.double()
    ours = cpu.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)
    alone = torch.cat([cpu.rms_norm(row[None].contiguous(), weight, 1e-5) for row in x])
    assert ours.equal(alone)


# --- layers


def llama(heads, kv_heads, head_dim, dtype=torch.float32):
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    model = Llama(config)
    model.init_weights(seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


class Paged:
    """A model's C++ layers over a cache of NaN, and tables of pages that tests fill in."""

    def __init__(self, model, num_pages, slots):
        config = model.config
        self.model, self.slots = model, slots
        shape = (num_pages, slots, config.num_key_value_heads, config.head_dim)
        dtype = model.lm_head_weight.dtype
        self.keys, self.values = (
            [torch.full(shape, torch.nan, dtype=dtype) for _ in model.layers] for _ in ("keys", "values")
        )
        self.layers = cpu.LlamaLayers(
            [
                cpu.Layer(
                    block.input_layernorm.weight,
                    block.post_attention_layernorm.weight,
                    keys,
                    values,
                    [getattr(block.self_attn, f"{name}_proj").weight for name in "qkvo"]
                    + [getattr(block.mlp, f"{name}_proj").weight for name in ("gate", "up", "down")],
                )
                for block, keys, values in zip(model.layers, self.keys, self.values, strict=True)
            ],
            heads=config.num_attention_heads,
            eps=config.rms_norm_eps,
        )

    @torch.no_grad()
    def __call__(self, pieces, table_BM):
        """Hidden states of (sequence, ids, first position) pieces, one after the other."""
        ids = torch.tensor([i for _, piece, _ in pieces for i in piece])
        sequence_T = torch.tensor([row for row, piece, _ in pieces for _ in piece])
        position_T = torch.tensor([first + k for _, piece, first in pieces for k in range(len(piece))])
        rotation = rope_tables(rope_frequencies(self.model.config), position_T)
        x_TD = self.model.embed_tokens.weight[ids].float()
        out_TD = self.layers(x_TD, rotation, sequence_T, position_T, table_BM.int().contiguous())
        return list(out_TD.split([len(piece) for _, piece, _ in pieces]))


@torch.no_grad()
def exact_hidden(model, ids):
    """After the final norm, in fp64."""
    double = Llama(model.config).double()
    double.load_state_dict(model.state_dict())
    # Angles are formed in fp32 in both.
    return double(torch.tensor(ids), Layout.packed([len(ids)]))


@torch.no_grad()
def final_norm(model, hidden_TD):
    return torch.nn.functional.rms_norm(hidden_TD.double(), hidden_TD.shape[-1:], eps=model.norm.eps) * (
        model.norm.weight.double()
    )


@needs_library
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, slots",
    [(1, 1, 20, 16), (4, 2, 20, 16), (3, 1, 8, 16), (4, 1, 12, 4), (8, 1, 16, 16), (8, 2, 6, 1), (2, 2, 40, 7)],
)
def test_layers_against_the_model_in_fp64(heads, kv_heads, head_dim, slots):
    """Sequences of lengths around a page's end, computed in pieces, over scattered pages."""
    model = llama(heads, kv_heads, head_dim)
    lengths = [1, 15, 16, 17, 33, 40]
    texts = [torch.randint(61, (length,)).tolist() for length in lengths]
    pages = -(-max(lengths) // slots)
    table_BM = torch.randperm(len(texts) * pages + 3)[: len(texts) * pages].view(len(texts), pages)
    paged = Paged(model, len(texts) * pages + 3, slots)
    parts = [[] for _ in texts]
    done = [0] * len(texts)
    for step in (1, 13, 2, 1, 100):
        pieces = [(row, text[done[row] :][:step], done[row]) for row, text in enumerate(texts)]
        pieces = [piece for piece in pieces if piece[1]]
        for (row, piece, _), hidden in zip(pieces, paged(pieces, table_BM), strict=True):
            parts[row].append(hidden)
            done[row] += len(piece)
    assert done == lengths
    for text, hidden in zip(texts, parts, strict=True):
        torch.testing.assert_close(final_norm(model, torch.cat(hidden)), exact_hidden(model, text), rtol=0, atol=2e-5)


@needs_library
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_a_token_has_the_same_bits_in_every_pass(dtype):
    """Alone, in chunks of any length, beside others, over other pages, and next to NaN that is not its own."""
    model = llama(6, 2, 20, dtype)
    texts = [torch.randint(61, (length,)).tolist() for length in (37, 5, 18)]
    alone = []
    for text in texts:
        paged, table_BM = Paged(model, 3, 16), torch.arange(3)[None]
        alone.append(torch.cat([paged([(0, [token], at)], table_BM)[0] for at, token in enumerate(text)]))
    for chunk in (2, 7, 16, 64):
        paged, table_BM = Paged(model, 20, 16), torch.randperm(20)[:9].view(3, 3)
        for start in range(0, 37, chunk):
            pieces = [(row, text[start : start + chunk], start) for row, text in enumerate(texts) if start < len(text)]
            for (row, piece, first), hidden in zip(pieces, paged(pieces, table_BM), strict=True):
                assert hidden.equal(alone[row][first : first + len(piece)])


@needs_library
def test_a_token_does_not_feel_a_later_one_that_is_no_number():
    """Not even one whose key and value are read for the sake of others in the same pass."""
    model = llama(4, 2, 20)
    with torch.no_grad():
        model.embed_tokens.weight[7] = torch.nan
    text = [1, 2, 3, 4, 5, 7, 6, 8]
    table_BM = torch.tensor([[0]])
    together = Paged(model, 1, 16)([(0, text, 0)], table_BM)[0]
    assert together[:5].equal(Paged(model, 1, 16)([(0, text[:5], 0)], table_BM)[0])
    assert together[5:].isnan().all()


@needs_library
def test_shared_pages():
    """Two sequences go on from the pages of a third."""
    model = llama(4, 2, 20)
    common = torch.randint(61, (32,)).tolist()
    rests = [torch.randint(61, (length,)).tolist() for length in (9, 3)]
    paged = Paged(model, 8, 16)
    paged([(0, common, 0)], torch.tensor([[5, 2]]))
    table_BM = torch.tensor([[5, 2, 0], [5, 2, 7]])
    for rest, hidden in zip(rests, paged([(0, rests[0], 32), (1, rests[1], 32)], table_BM), strict=True):
        exact = exact_hidden(model, common + rest)[32:]
        torch.testing.assert_close(final_norm(model, hidden), exact, rtol=0, atol=2e-5)


# --- draws


def parameters(rows, *, temperature=None, top_k=None, top_p=None, min_p=None, generator=None):
    """Random ones; a number holds for all rows."""

    def pick(values, dtype):
        indices = torch.randint(len(values), (rows,), generator=generator)
        return torch.tensor(values, dtype=dtype)[indices]

    return [
        pick([0.0, 0.3, 1.0, 1.7, 1e-6, 1e-30, 50.0] if temperature is None else [temperature], torch.float32),
        pick([0, 1, 2, 5, 40, 10**6] if top_k is None else [top_k], torch.int64),
        pick([1.0, 0.9, 0.5, 1e-9, 0.999] if top_p is None else [top_p], torch.float64),
        pick([0.0, 0.05, 0.5, 1.0] if min_p is None else [min_p], torch.float32),
        torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        torch.randint(0, 2**40, (rows,), generator=generator),
    ]


def both(logits_RV, given):
    temperature, top_k, top_p, min_p, seeds, positions = given
    rows = {"temperature_R": temperature, "top_k_R": top_k, "top_p_R": top_p, "min_p_R": min_p}
    ours = cpu.sample(logits_RV.contiguous(), **rows, seeds_R=seeds, positions_R=positions)
    twin = {name.replace("_R", "_B"): x for name, x in rows.items()}
    return ours, kernels.sample(logits_RV, **twin, seeds_B=seeds, positions_B=positions, impl="torch")


def assert_same(logits_RV, given):
    ours, twin = both(logits_RV, given)
    assert ours.tokens_B.equal(twin.tokens_B)
    torch.testing.assert_close(ours.logprobs_B, twin.logprobs_B, rtol=0, atol=1e-5, equal_nan=True)
    finite = twin.logprobs_B.isfinite()
    torch.testing.assert_close(
        ours.truncated_logprobs_B[finite], twin.truncated_logprobs_B[finite], rtol=1e-6, atol=1e-5
    )


def rows_of(kind, rows, vocabulary, generator):
    x = torch.randn(rows, vocabulary, generator=generator) * 4
    if kind == "ties":
        x = (x / 2).round()
    elif kind == "equal":
        x = torch.full_like(x, 1.25)
    elif kind == "large":
        x = x * 1e4 + 1e4
    elif kind == "masked":
        x[torch.rand(x.shape, generator=generator) < 0.7] = -torch.inf
        x[:, -1] = 0.0
    elif kind == "one":
        x[:, :] = -torch.inf
        x[:, vocabulary // 2] = 3.0
    elif kind == "nan":
        x[:, vocabulary // 3] = torch.nan
    elif kind == "inf":
        x[:, vocabulary // 3] = torch.inf
    elif kind == "nothing":
        x[:] = -torch.inf
    return x


@needs_library
@pytest.mark.parametrize("kind", ["plain", "ties", "equal", "large", "masked", "one", "nan", "inf", "nothing"])
def test_draws_are_the_twins(kind):
    generator = torch.Generator().manual_seed(zlib.crc32(kind.encode()))
    for vocabulary in (1, 3, 97, 1001):
        logits_RV = rows_of(kind, 40, vocabulary, generator)
        assert_same(logits_RV, parameters(40, generator=generator))


@needs_library
@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 0, "top_p": 1e-12},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 1.0},
    ],
    ids=str,
)
def test_what_leaves_only_the_likeliest(given):
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(50, 300, generator=generator)
    drawn, _ = both(logits_RV, parameters(50, **given, generator=generator))
    assert drawn.tokens_B.equal(logits_RV.argmax(-1))
    torch.testing.assert_close(drawn.truncated_logprobs_B, torch.zeros(50), rtol=0, atol=1e-6)
    assert_same((logits_RV / 2).round(), parameters(50, **given, generator=generator))


@needs_library
def test_rows_that_are_no_numbers_say_so():
    for value in (torch.nan, torch.inf):
        logits_RV = torch.randn(4, 50)
        logits_RV[:, 7] = value
        drawn, _ = both(logits_RV, parameters(4))
        assert drawn.logprobs_B.isnan().all()
        assert ((drawn.tokens_B >= 0) & (drawn.tokens_B < 50)).all()


# --- without the library


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A cache folder of its own, and a library that is looked for anew; afterwards again."""
    cpu.available()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    building.library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    building.library.cache_clear()


def answers(model):
    sampler = Sampler(model, eos_ids=(3, 8))
    asked = SamplingParams(max_tokens=12, n=2, seed=1, temperature=0.8, top_p=0.95)
    outputs = sampler.generate(PROMPTS, asked)
    return sampler, [[(o.tokens, torch.tensor(o.logprobs)) for o in samples] for samples in outputs]


def assert_torch_takes_over(message):
    building.library.cache_clear()
    with pytest.warns(UserWarning, match=message):
        sampler, ours = answers(tiny())
    assert isinstance(sampler.engine.decoder, TorchDecoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers(tiny())  # said once
    return ours


def assert_alike(first, second):
    for ours, theirs in zip(itertools.chain(*first), itertools.chain(*second), strict=True):
        assert ours[0] == theirs[0]
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-5)


def test_without_a_compiler_pytorch_gives_the_same_tokens(elsewhere, monkeypatch):
    monkeypatch.setattr(building, "_compiler", lambda: None)
    slow = assert_torch_takes_over(r"no C\+\+ compiler")
    monkeypatch.undo()
    building.library.cache_clear()
    _, fast = answers(tiny())
    assert_alike(fast, slow)


@pytest.mark.parametrize(
    "script",
    ["echo 'broken on purpose' >&2; exit 1", "exit 1", '[ "$1" = --version ] || { echo >&2; exit 1; }; echo x'],
)
def test_a_broken_compiler(elsewhere, monkeypatch, script):
    path = elsewhere / "broken"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    assert_torch_takes_over("could not make the decoding library")


def test_a_compiler_that_makes_rubbish(elsewhere, monkeypatch):
    path = elsewhere / "rubbish"
    path.write_text('#!/bin/sh\nfor last; do :; done\n[ "$last" = --version ] || echo rubbish > "$last"\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    assert_torch_takes_over("could not make the decoding library")


def test_a_compiler_that_is_not_there(elsewhere, monkeypatch):
    monkeypatch.setenv("CXX", str(elsewhere / "nowhere"))
    monkeypatch.setenv("PATH", str(elsewhere))
    assert_torch_takes_over(r"no C\+\+ compiler")


@needs_library
def test_a_cache_folder_that_cannot_be_made_is_replaced(monkeypatch, elsewhere):
    """A file where the folder should be: even root cannot write there."""
    (elsewhere / "file").write_text("")
    made_in = []
    with monkeypatch.context() as usual:
        usual.delenv("XDG_CACHE_HOME")
        ready = building.library()._name
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere / "file"))

    def build(*command):
        made_in.append(Path(command[-1]))
        shutil.copy(ready, command[-1])

    monkeypatch.setattr(building, "_run", build)
    building.library.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library = building.library()
    assert library is not None
    assert made_in
    assert not made_in[-1].exists(), "a temporary folder is left behind"
