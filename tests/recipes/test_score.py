"""Scoring files with a reward model."""

import json
import math
from itertools import chain

import pytest
import torch

import umedtrain as ut
from tests.ranks import run_ranks
from tests.recipes.material import ORGANS, question, save_random_model, write_rows
from umedtrain.recipes import score

ANSWERS = [f"So, the answer is {organ}." for organ in ORGANS]


def asked(index):
    return {"role": "user", "content": question(index)[0]}


def said(text):
    return {"role": "assistant", "content": text}


ROWS = [
    {"id": "a", "prompt": question(0)[0], "answer": ANSWERS[0]},
    {"prompt": [asked(1)], "completion": [said(ANSWERS[1])], "answer": "B"},
    {"id": 3, "conversations": [asked(2), said(ANSWERS[2]), asked(3), said(ANSWERS[3])]},
    {"id": "x", "messages": [asked(4)], "completions": [ANSWERS[4], "", ANSWERS[5], ANSWERS[4]], "logprobs": [0] * 4},
    {"id": "pair", "prompt": question(5)[0], "chosen": ANSWERS[6], "rejected": ANSWERS[7]},
]
TEXTS = [[ANSWERS[0]], [ANSWERS[1]], [ANSWERS[3]], [ANSWERS[4], "", ANSWERS[5], ANSWERS[4]], ANSWERS[6:8]]
DIALOGS = [[asked(0)], [asked(1)], [asked(2), said(ANSWERS[2]), asked(3)], [asked(4)], [asked(5)]]


@pytest.fixture(scope="module")
def reward_model(files, tmp_path_factory):
    return save_random_model(files, tmp_path_factory.mktemp("model") / "reward", ut.RewardModel)


def config_of(folder, reward_model, path, **changes):
    changes = {"output": str(folder / "run"), "dtype": "float32", **changes}
    return score.ScoreConfig(reward_model=reward_model, files=(path,), **changes)


@torch.no_grad()
def by_hand(reward_model):
    """Rewards and lengths, every dialog rendered and run alone."""
    model, tokenizer = ut.load_model(reward_model), ut.load_tokenizer(reward_model)
    rewards, lengths = [], []
    for dialog, texts in zip(DIALOGS, TEXTS, strict=True):
        before = len(ut.render_chat(dialog, tokenizer, add_generation_prompt=True)[0])
        ids = [ut.render_chat([*dialog, said(text)], tokenizer)[0] for text in texts]
        rewards.append([float(model(torch.tensor(one), ut.Layout.packed([len(one)]))[0]) for one in ids])
        lengths.append([len(one) - before for one in ids])
    return rewards, lengths


def score_on(world, config):
    return score.run(config, world)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_layout_is_scored_in_order_on_one_rank_and_on_two(reward_model, world, tmp_path):
    path = write_rows(tmp_path / "answers.jsonl", ROWS)
    result = score.run(config_of(tmp_path, reward_model, path), world)
    rows = read(result)
    assert [(row["id"], row["file"], row["line"]) for row in rows] == [
        (identity, path, line) for line, identity in enumerate(("a", None, "3", "x", "pair"), start=1)
    ]
    rewards, lengths = by_hand(reward_model)
    assert [row["lengths"] for row in rows] == lengths
    for row, wanted in zip(rows, rewards, strict=True):
        assert row["rewards"] == pytest.approx(wanted, abs=1e-4)
    assert len({round(reward, 3) for group in rewards for reward in group}) == 8, "rewards must differ for a test"
    assert rows[3]["rewards"][0] == rows[3]["rewards"][3]

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    flat, sizes = (torch.tensor(list(chain(*groups))) for groups in (rewards, lengths))
    assert (summary["rows"], summary["count"], summary["dropped"]) == (5, 9, {})
    assert summary["mean"] == pytest.approx(float(flat.mean()), abs=1e-4)
    assert summary["std"] == pytest.approx(float(flat.std(correction=0)), abs=1e-4)
    wanted = float(torch.corrcoef(torch.stack([flat, sizes]))[0, 1])
    assert summary["length_correlation"] == pytest.approx(wanted, abs=1e-4)

    other = run_ranks(2, score_on, config_of(tmp_path, reward_model, path, output=str(tmp_path / "two")))[1]
    assert other == tmp_path / "two" / "scores.jsonl"
    assert other.read_bytes() == result.read_bytes()


def test_an_interrupted_run_goes_on_and_a_finished_one_is_left_alone(reward_model, world, tmp_path):
    path = write_rows(tmp_path / "answers.jsonl", ROWS)
    config = config_of(tmp_path, reward_model, path)
    result = score.run(config, world)
    whole = result.read_bytes()
    part = tmp_path / "run" / "rewards" / "part-00000.jsonl"
    part.write_bytes(part.read_bytes()[:-3])
    result.unlink()
    assert score.run(config, world) == result
    assert not result.exists(), "summary.json says that nothing is left to do"
    (tmp_path / "run" / "summary.json").unlink()
    assert score.run(config, world).read_bytes() == whole


def test_a_row_that_does_not_fit_is_dropped_whole_and_counted(reward_model, world, tmp_path):
    long = {"id": "long", "messages": [asked(4)], "completions": [ANSWERS[0], "because " * 300]}
    path = write_rows(tmp_path / "answers.jsonl", [ROWS[0], long, ROWS[4]])
    rows = read(score.run(config_of(tmp_path, reward_model, path, max_tokens=300), world))
    assert [(row["id"], row["line"]) for row in rows] == [("a", 1), ("pair", 3)]
    dropped = json.loads((tmp_path / "run" / "summary.json").read_text())["dropped"]
    assert dropped == {"prompt and answer longer than 300 tokens": {"count": 1, "first": [f"{path}:2"]}}
    with pytest.raises(ValueError, match="no row fits max_tokens = 20; raise it"):
        score.run(config_of(tmp_path, reward_model, path, max_tokens=20, output=str(tmp_path / "none")), world)


def test_one_length_has_no_correlation(reward_model, world, tmp_path):
    path = write_rows(tmp_path / "answers.jsonl", ROWS[:1])
    score.run(config_of(tmp_path, reward_model, path), world)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["length_correlation"] is None
    assert (summary["count"], summary["std"]) == (1, 0.0)
    assert math.isfinite(summary["mean"])


def test_bad_input_is_one_sentence(files, reward_model, world, tmp_path):
    language_model = save_random_model(files, tmp_path / "language", ut.Llama)
    good = write_rows(tmp_path / "good.jsonl", ROWS)
    bad = write_rows(tmp_path / "bad.jsonl", [ROWS[0], {"messages": [asked(0)], "completions": []}])
    cases = {
        "files is empty; name": {"files": ()},
        "reward_model is empty; name": {"reward_model": ""},
        "nowhere: no such checkpoint": {"reward_model": "nowhere"},
        f"reward_model: {language_model} is a language model": {"reward_model": language_model},
        "missing.jsonl: cannot be read": {"files": ("missing.jsonl",)},
        f"{bad}, line 2, completions: is an empty list": {"files": (bad,)},
    }
    for number, (message, change) in enumerate(cases.items()):
        settings = {"files": (good,), "reward_model": reward_model, "output": str(tmp_path / str(number))} | change
        with pytest.raises(ValueError) as error:
            score.run(score.ScoreConfig(**settings), world)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
