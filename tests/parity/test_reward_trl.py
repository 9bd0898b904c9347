"""Our reward training against TRL's trainer: the same weights, and the very token ids of the batches that it makes."""

import dataclasses

import pytest

pytest.importorskip("trl")
import datasets
import trl
from transformers import LlamaForSequenceClassification
from transformers.utils import logging as transformers_logging

from tests.parity.trl_runs import (
    PAIRS,
    assert_same_loss_and_gradients,
    hf_model,
    our_model,
    pair_batch,
    rows,
    sequences,
    settings,
    their_batch,
    word_tokenizer,
)
from umedtrain.model.heads import RewardModel
from umedtrain.training.tasks import RewardTask

MARGINS = [0.5, 3.0, 0.0, -1.0, 2.5]


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    transformers_logging.set_verbosity(verbosity)


@pytest.mark.parametrize(
    ("center", "with_margins"), [(None, False), (0.01, False), (0.5, False), (None, True), (0.1, True)]
)
def test_reward(tmp_path, center, with_margins):
    words = word_tokenizer()
    theirs = hf_model(seed=3, kind=LlamaForSequenceClassification, num_labels=1)
    ours = our_model(RewardModel, theirs, tmp_path / "model")
    pairs = rows(with_prompt=False)
    trainer = trl.RewardTrainer(
        theirs,
        args=trl.RewardConfig(center_rewards_coefficient=center, **settings(tmp_path)),
        train_dataset=pairs.add_column("margin", MARGINS) if with_margins else pairs,
        processing_class=words,
    )
    inputs = their_batch(trainer)
    assert ("margin" in inputs) == with_margins
    chosen, rejected = sequences(inputs)
    wanted = trainer.compute_loss(trainer.model, inputs)
    prompts = {" ".join(prompt.split()): len(prompt.split()) for prompt, _, _ in PAIRS}
    lengths = [next(n for text, n in prompts.items() if words.decode(ids).startswith(text + " ")) for ids in chosen]
    batch = pair_batch(chosen, rejected, lengths)
    if with_margins:
        assert sorted(inputs["margin"].tolist()) == sorted(MARGINS)
        batch = dataclasses.replace(batch, margins_P=inputs["margin"])
    task = RewardTask(margin_scale=float(with_margins), center=center or 0.0)
    total, sums = task(ours, batch)
    assert_same_loss_and_gradients(wanted, theirs, total / len(PAIRS), ours)
    metrics = task.report({name: float(value) / len(PAIRS) for name, value in sums.items()})
    logged = trainer._metrics["eval"]
    assert metrics["accuracy"] == pytest.approx(logged["accuracy"][0])
    assert metrics["margin"] == pytest.approx(logged["margin"][0], abs=1e-5)
    mean = (metrics["reward_chosen"] + metrics["reward_rejected"]) / 2
    assert mean == pytest.approx(logged["mean_reward"][0], abs=1e-5)
