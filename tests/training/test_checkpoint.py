"""Invariant 5: kill it anywhere, and the resumed curve is bit-identical."""

import contextlib
import json
import os
import random
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.runs import run
from umedtrain.training.checkpoint import CheckpointWriteError
from umedtrain.training.metrics import Metrics

OPTIONS = {"count": 20, "batch": 4, "epochs": 3, "every": 4, "max_tokens": 40}


def curve(folder):
    """Loss and gradient norm of every step, exactly as written."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [(line["loss"], line["grad_norm"], line["lr"]) for line in lines]


def killed_run(world, folder, task_name, options, step, delay=0.0):
    """Rank 0 dies by SIGKILL when `step` lines of metrics are there, or `delay` seconds later."""
    log = Metrics.log

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def log_and_die(metrics, number, values):
        log(metrics, number, values)
        if world.is_main and number >= step:
            threading.Timer(delay, die).start() if delay else die()

    Metrics.log = log_and_die
    return run(world, folder, task_name, options)


@pytest.mark.parametrize(("num_ranks", "task_name", "kill_step"), [(1, "dpo", 3), (2, "sft", 9), (2, "reward", 13)])
def test_invariant_5_a_killed_run_resumes_bit_identically(tmp_path, num_ranks, task_name, kill_step):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = run_ranks(num_ranks, run, str(whole), task_name, OPTIONS)
    with pytest.raises(AssertionError):
        run_ranks(num_ranks, killed_run, str(broken), task_name, OPTIONS, kill_step)
    resumed = run_ranks(num_ranks, run, str(broken), task_name, OPTIONS)
    assert curve(broken) == curve(whole)
    assert len(curve(whole)) == 15
    for name, value in undisturbed[0][1].items():
        assert torch.equal(resumed[0][1][name], value), name


def test_a_checkpoint_loads_on_another_number_of_ranks(tmp_path):
    run_ranks(2, run, str(tmp_path), "sft", {**OPTIONS, "epochs": 2})
    two_then_one = run_ranks(1, run, str(tmp_path), "sft", OPTIONS)[0][0]
    assert two_then_one["tokens"] > 0
    assert len(curve(tmp_path)) == 15


def test_only_the_newest_checkpoints_are_kept_and_no_partial_ones(tmp_path):
    run_ranks(1, run, str(tmp_path), "sft", OPTIONS)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000012", "step-00000015"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000015"


def full_disk(world, folder):
    """Files may not grow over a few kilobytes: what a full disk does to a write."""
    run(world, folder, "sft", {**OPTIONS, "epochs": 1, "every": 5})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    try:
        run(world, folder, "sft", {**OPTIONS, "epochs": 2, "every": 2})
    except CheckpointWriteError as error:
        return str(error)
    return None


def test_a_full_disk_is_one_clear_error_on_every_rank_and_loses_nothing(tmp_path):
    messages = run_ranks(2, full_disk, str(tmp_path))
    for message in messages:
        assert "step-00000006: checkpoint could not be written" in message
        assert "earlier checkpoints are intact" in message
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000005"
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def other_data(world, folder):
    run(world, folder, "sft", {**OPTIONS, "epochs": 1})
    try:
        run(world, folder, "sft", {**OPTIONS, "count": 21})
    except ValueError as error:
        return str(error)
    return None


def test_a_resume_on_other_data_is_refused(tmp_path):
    (message,) = run_ranks(1, other_data, str(tmp_path))
    assert "sizes was '20' and is '21'" in message
    assert "another run folder" in message


def damaged(world, folder):
    run(world, folder, "sft", {**OPTIONS, "epochs": 1})
    checkpoint = Path(folder, "checkpoints", "step-00000005")
    (shard,) = checkpoint.glob("*.distcp")
    shard.unlink()
    try:
        run(world, folder, "sft", OPTIONS)
    except ValueError as error:
        return str(error)
    return None


def test_a_missing_shard_is_named(tmp_path):
    (message,) = run_ranks(1, damaged, str(tmp_path))
    assert "step-00000005" in message
    assert "distcp" in message


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_soak_kills_at_many_random_moments(tmp_path):
    random.seed(0)
    undisturbed = run_ranks(1, run, str(tmp_path / "whole"), "sft", OPTIONS)
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        for step in sorted(random.sample(range(1, 15), 3)):
            with contextlib.suppress(AssertionError):  # of a run that was killed and not done before
                run_ranks(1, killed_run, str(folder), "sft", OPTIONS, step, random.uniform(0.001, 0.05))
        resumed = run_ranks(1, run, str(folder), "sft", OPTIONS)
        assert curve(folder) == curve(tmp_path / "whole")
        for name, value in undisturbed[0][1].items():
            assert torch.equal(resumed[0][1][name], value), name
