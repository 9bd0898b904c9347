"""Rollouts: the same rows on any number of ranks, and after being killed anywhere."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from umedtrain.model.config import LlamaConfig
from umedtrain.model.llama import Llama, initial_weight
from umedtrain.sampling import Sampler, SamplingParams
from umedtrain.sampling.rollout import rollout

CONFIG = LlamaConfig(67, 32, 48, 2, 4, 2, 8)
PROMPTS = [[(7 * index + place) % 67 for place in range(1 + index % 5)] for index in range(17)]
PARAMS = SamplingParams(max_tokens=16, temperature=1.0, n=2, seed=3)


def roll(world, folder, **options):
    """One prompt per write, so that there are many moments to be killed at, and batches are always the same."""
    model = Llama(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(5 * initial_weight(name, parameter.shape, CONFIG, seed=1))
    arguments = {"prompts": PROMPTS, "params": PARAMS, "weights": "tiny", "chunk": 1, "progress": False, **options}
    return rollout(Sampler(model, eos_ids=(0, 1, 2, 3)), folder=Path(folder), world=world, **arguments)


def lines(folder):
    """The lines of all part files, sorted."""
    return sorted(line for part in Path(folder).glob("part-*.jsonl") for line in part.read_bytes().splitlines())


def killed_roll(world, folder):
    """Rank 1 dies by SIGKILL once it has written three rows."""

    def watch():
        part = Path(folder, "part-00001.jsonl")
        while not part.exists() or part.read_bytes().count(b"\n") < 3:
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)

    if world.rank == 1:
        threading.Thread(target=watch, daemon=True).start()
    return roll(world, folder)


def test_rows_have_every_prompt_in_order_and_the_answers_asked_for(world, tmp_path):
    rows = roll(world, tmp_path)
    assert [row["index"] for row in rows] == list(range(len(PROMPTS)))
    answers = [answer for row in rows for answer in row["answers"]]
    assert len(answers) == 2 * len(PROMPTS)
    assert {answer["finish_reason"] for answer in answers} == {"stop", "length"}
    assert all(answer["text"] is None and answer["logprob"] < 0 and len(answer["tokens"]) <= 16 for answer in answers)
    together = roll(world, tmp_path / "together", chunk=128)
    assert [[a["tokens"] for a in row["answers"]] for row in together] == [
        [a["tokens"] for a in row["answers"]] for row in rows
    ]


def test_invariant_5_a_killed_rollout_goes_on_on_any_number_of_ranks(world, tmp_path):
    whole = roll(world, tmp_path / "one")
    broken = tmp_path / "two"
    with pytest.raises(AssertionError):
        run_ranks(2, killed_roll, str(broken), timeout=30)
    kept = lines(broken)
    assert 3 <= len(kept) < len(PROMPTS)
    resumed = run_ranks(2, roll, str(broken))
    assert resumed == [whole, whole]
    assert lines(broken) == lines(tmp_path / "one")
    assert set(kept) <= set(lines(broken))


def test_a_torn_last_line_is_cut_and_sampled_again(world, tmp_path):
    whole = roll(world, tmp_path)
    part = tmp_path / "part-00000.jsonl"
    content = part.read_bytes()
    # In the middle of the last row, in its first byte, and with everything but its line break.
    for cut in (len(content) - 20, content.rindex(b"\n", 0, -1) + 2, len(content) - 1):
        part.write_bytes(content[:cut])
        assert roll(world, tmp_path) == whole
        assert part.read_bytes() == content


def test_rows_that_are_there_are_not_sampled_again(world, tmp_path):
    roll(world, tmp_path)
    part = tmp_path / "part-00000.jsonl"
    rows = [json.loads(line) for line in part.read_text().splitlines()]
    next(row for row in rows if row["index"] == 4)["answers"] = "kept as it was"
    part.write_text("".join(json.dumps(row) + "\n" for row in rows if row["index"] != 6))
    again = roll(world, tmp_path)
    assert again[4]["answers"] == "kept as it was"
    assert len(part.read_text().splitlines()) == len(PROMPTS)


def test_a_damaged_row_is_named(world, tmp_path):
    roll(world, tmp_path)
    part = tmp_path / "part-00000.jsonl"
    content = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([*content[:2], content[2][:25] + b"\n", *content[3:]]))
    with pytest.raises(ValueError, match=r"part-00000\.jsonl, line 3: not valid JSON; remove the line"):
        roll(world, tmp_path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"weights": "other"}, "weights"),
        ({"prompts": [[1], *PROMPTS[1:-1], [2]]}, "prompts"),
        ({"params": SamplingParams(max_tokens=16, n=2, seed=4)}, "params"),
    ],
)
def test_the_folder_of_another_rollout_is_refused(world, tmp_path, options, named):
    whole = roll(world, tmp_path, prompts=PROMPTS)
    with pytest.raises(ValueError, match=f"holds a rollout with other {named}; choose another folder"):
        roll(world, tmp_path, **options)
    assert roll(world, tmp_path) == whole


def test_a_rollout_needs_a_seed(world, tmp_path):
    with pytest.raises(ValueError, match="needs a seed"):
        roll(world, tmp_path / "new", params=SamplingParams(max_tokens=4))
    assert not (tmp_path / "new").exists()
