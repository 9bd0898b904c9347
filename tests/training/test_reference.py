"""The reference's log-probabilities, kept in files."""

import json
import re

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.runs import dpo_loss, pairs, sharded
from umedtrain.config import CheckpointConfig, LogConfig, OptimizerConfig, ParallelConfig
from umedtrain.data.loader import Loader
from umedtrain.distributed.sharding import full_tensors
from umedtrain.model.llama import Llama
from umedtrain.training.loop import train
from umedtrain.training.reference import build_reference, cached_reference, frozen_reference
from umedtrain.training.tasks import PreferenceTask
from umedtrain.weights.fingerprint import weights_fingerprint

CHUNK = 2**20


def loader_of(world, *, count=12, batch=4, epochs=1, seed=3):
    return Loader(
        [pairs(count)],
        batch_size=batch,
        max_tokens=64,
        epochs=epochs,
        seed=seed,
        rank=world.rank,
        num_ranks=world.size,
    )


def cache(world, folder, loader, model=None, **changes):
    names = {"weights": "seed 1", "dtype": "float32"} | changes
    model = model or sharded(Llama, world)
    return cached_reference(model, loader, folder, world, **names, chunk_bytes=CHUNK, progress=False)


def train_with(world, folder, kind, epochs):
    """Weights after DPO with a cached or a frozen reference."""
    loader = loader_of(world, epochs=epochs)
    model = sharded(Llama, world)
    # The model that fills the cache is the one that is trained then.
    reference = build_reference(
        kind,
        model,
        loader,
        folder / "reference",
        world,
        parallel=ParallelConfig(dtype="float32", logits_megabytes=1),
        weights="seed 1",
        progress=False,
    )
    train(
        model,
        loader,
        PreferenceTask(dpo_loss(beta=0.5), reference, beta=0.5),
        run=folder,
        world=world,
        optimizer_config=OptimizerConfig(lr=1e-2),
        checkpoint_config=CheckpointConfig(every_steps=2),
        log_config=LogConfig(progress=False),
    )
    return dict(full_tensors(model))


def trained_both_ways(world, folder, epochs):
    results = []
    for kind in ("cache", "model"):
        (folder / kind).mkdir(exist_ok=True)
        results.append(train_with(world, folder / kind, kind, epochs))
    return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_epoch_with_the_cache_and_with_a_frozen_model_is_the_same_to_the_last_bit(tmp_path, ranks):
    for cached, frozen in run_ranks(ranks, trained_both_ways, tmp_path, 1):
        for name in frozen:
            assert torch.equal(cached[name], frozen[name]), name


def test_later_epochs_agree_to_rounding(tmp_path):
    # Other packings of the same example may round differently in the frozen model.
    for cached, frozen in run_ranks(2, trained_both_ways, tmp_path, 3):
        for name in frozen:
            torch.testing.assert_close(cached[name], frozen[name], atol=1e-5, rtol=1e-4)


def filled(world, folder):
    loader = loader_of(world)
    reference = cache(world, folder, loader)
    frozen = frozen_reference(sharded(Llama, world), chunk_bytes=CHUNK)
    found = []
    for step in range(loader.num_steps):
        for batch in loader.batch(step):
            assert torch.equal(reference(batch), frozen(batch))
            found += batch.numbers
    return found


def test_every_answer_is_there_once(tmp_path):
    found = run_ranks(2, filled, tmp_path / "cache")
    assert sorted(found[0] + found[1]) == list(range(12))
    lines = [json.loads(line) for part in (tmp_path / "cache").glob("part-*") for line in part.open()]
    assert sorted(line["index"] for line in lines) == list(range(12))
    assert all(len(line["logprobs"]) == 2 for line in lines)


def count_forwards(world, folder):
    loader, calls = loader_of(world), []
    model = sharded(Llama, world)
    model.register_forward_hook(lambda *_: calls.append(1))
    cached_reference(model, loader, folder, world, weights="seed 1", dtype="float32", chunk_bytes=CHUNK, progress=False)
    return len(calls)


def test_an_interrupted_cache_is_completed_and_a_whole_one_costs_nothing(tmp_path):
    folder = tmp_path / "cache"
    assert run_ranks(1, count_forwards, folder)[0] == 3
    part = folder / "part-00000.jsonl"
    whole = part.read_bytes()
    assert run_ranks(1, count_forwards, folder)[0] == 0
    # A torn last line is made again, with the step that it belongs to.
    part.write_bytes(whole[:-5])
    assert run_ranks(1, count_forwards, folder)[0] == 1
    assert sorted(part.read_bytes().splitlines()) == sorted(whole.splitlines())


def other(world, folder, changes):
    loader = loader_of(world, count=changes.pop("count", 12))
    try:
        cache(world, folder, loader, **changes)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "changes, what", [({"count": 11}, "examples"), ({"weights": "seed 2"}, "weights"), ({"dtype": "bfloat16"}, "dtype")]
)
def test_a_cache_of_something_else_is_refused_on_every_rank(tmp_path, changes, what):
    folder = tmp_path / "cache"
    run_ranks(1, filled, folder)
    for message in run_ranks(2, other, folder, changes):
        assert message == (f"{folder} holds a reference cache with other {what}; choose another folder or remove it")


def test_fingerprints_follow_the_weights_and_not_the_place(tmp_path):
    for name, byte in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(3 << 20) + bytes([byte]))
    first, same, changed = (weights_fingerprint(tmp_path / name) for name in "abc")
    assert first == same != changed
    assert re.fullmatch("[0-9a-f]{64}", first)
    with pytest.raises(ValueError, match="no file of weights"):
        weights_fingerprint(tmp_path)
