"""Our Llama against Meta's own: logits, cached decoding, and .pth files, whole and split in two."""

import json

import pytest
import torch

pytest.importorskip("llama_models")
pytest.importorskip("fairscale")

from tests.ranks import run_ranks
from umedtrain.model.layout import Layout
from umedtrain.weights import load_model

SIZES = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=102, multiple_of=8, norm_eps=1e-5, rope_theta=5e5)
CASES = {
    "llama3": SIZES | dict(ffn_dim_multiplier=1.3),
    "llama3.1": SIZES | dict(use_scaled_rope=True),
    # Tied, so that the factor must be given: 8, as Meta's code has it for every model.
    "llama3.2": SIZES | dict(use_scaled_rope=True, rope_scaling_factor=8.0),
    "no_groups": {key: value for key, value in SIZES.items() if key != "n_kv_heads"},
}
LENGTH, PREFILL = 100, 5


def run_meta(world, folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """In a process of its own (fairscale keeps global state): random models, their logits, their files."""
    import warnings

    warnings.filterwarnings("ignore")
    import fairscale.nn.model_parallel.initialize as fairscale_initialize
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    fairscale_initialize.initialize_model_parallel(1)
    results = {}
    for case, params in CASES.items():
        torch.manual_seed(0)
        model = Transformer(ModelArgs(**params, max_batch_size=1, max_seq_len=128))
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
        if case == "llama3.2":
            model.output.weight.data.copy_(model.tok_embeddings.weight)
        tokens_T = torch.randint(0, params["vocab_size"], (LENGTH,))
        full_TV = model(tokens_T[None], 0)[0].clone()
        steps = [model(tokens_T[None, :PREFILL], 0)[0]]
        steps += [model(tokens_T[None, i : i + 1], i)[0] for i in range(PREFILL, LENGTH)]
        torch.save(model.state_dict(), f"{folder}/{case}.pth")
        results[case] = dict(tokens_T=tokens_T, full_TV=full_TV, cached_TV=torch.cat(steps).clone())
    return results


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta")
    (results,) = run_ranks(1, run_meta, str(folder))
    return folder, results


def write_release(meta, case: str, directory, split=None) -> None:
    """A directory as Meta publishes it; `split` maps a name and tensor to the shards' parts."""
    folder, _ = meta
    state = torch.load(folder / f"{case}.pth")
    shards = [state]
    if split is not None:
        halves = {name: split(name, tensor) for name, tensor in state.items()}
        shards = [{name: parts[rank] for name, parts in halves.items()} for rank in range(2)]
    for rank, shard in enumerate(shards):
        torch.save(
            {name: tensor.clone() for name, tensor in shard.items()},
            directory / f"consolidated.{rank:02d}.pth",
        )
    params = CASES[case] | {"vocab_size": -1}  # as Llama 2's files have it
    (directory / "params.json").write_text(json.dumps(params))


@torch.no_grad()
def assert_same_logits(meta, case: str, directory) -> None:
    _, results = meta
    result = results[case]
    ours = load_model(directory)
    found_TV = ours.logits(ours(result["tokens_T"], Layout.packed([LENGTH])))
    assert found_TV.std() > 0.5
    torch.testing.assert_close(found_TV, result["full_TV"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found_TV, result["cached_TV"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_cached_decoding(meta, case, tmp_path):
    write_release(meta, case, tmp_path)
    assert_same_logits(meta, case, tmp_path)


def split_llama3(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """How Llama 3's files are cut for two ranks: column-parallel rows, row-parallel columns, norms whole."""
    if "norm" in name:
        return tensor, tensor
    return tensor.chunk(2, dim=1 if name.endswith(("wo.weight", "w2.weight")) else 0)


def split_llama2(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Llama 2 cut the embedding's width instead of its rows."""
    return tensor.chunk(2, dim=1) if "tok_embeddings" in name else split_llama3(name, tensor)


@pytest.mark.parametrize(
    "case, split",
    [*((case, split_llama3) for case in CASES), ("llama3", split_llama2), ("no_groups", split_llama2)],
)
def test_two_tensor_parallel_shards(meta, case, split, tmp_path):
    write_release(meta, case, tmp_path, split)
    assert_same_logits(meta, case, tmp_path)


def test_rope_scaling_acts(meta, tmp_path):
    """The comparison would see a wrong scaling."""
    write_release(meta, "llama3.1", tmp_path)
    params = CASES["llama3.1"] | {"rope_scaling_factor": 32.0}
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(AssertionError):
        assert_same_logits(meta, "llama3.1", tmp_path)
