"""Our DPO against TRL's trainer: the same weights, and the very token ids of the batches that it makes."""

import pytest
import torch

pytest.importorskip("trl")
import datasets
import trl
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
from tests.training.runs import dpo_loss
from umedtrain.data.batch import Batch
from umedtrain.model.llama import Llama
from umedtrain.training.reference import frozen_reference
from umedtrain.training.tasks import PreferenceTask


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    transformers_logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def words():
    return word_tokenizer()


def dpo_batch(inputs: dict[str, torch.Tensor]) -> Batch:
    """The same pairs, cut into prompt and answers where their completion mask says."""
    chosen, rejected = sequences(inputs)
    answer_lengths = inputs["completion_mask"].sum(1)[: len(chosen)].tolist()
    return pair_batch(chosen, rejected, [len(ids) - n for ids, n in zip(chosen, answer_lengths, strict=True)])


def dpo_trainer(words, directory, **options) -> tuple[trl.DPOTrainer, Llama, Llama]:
    """Their trainer, and its policy and reference as our models."""
    policy, reference = hf_model(seed=1), hf_model(seed=2)
    our_policy = our_model(Llama, policy, directory / "policy")
    our_reference = our_model(Llama, reference, directory / "reference")
    trainer = trl.DPOTrainer(
        policy,
        reference,
        args=trl.DPOConfig(beta=0.3, **(settings(directory) | options)),
        train_dataset=rows(with_prompt=True),
        processing_class=words,
    )
    return trainer, our_policy, our_reference


def test_dpo(words, tmp_path):
    trainer, our_policy, our_reference = dpo_trainer(words, tmp_path)
    inputs = their_batch(trainer)
    wanted = trainer.compute_loss(trainer.model, inputs)
    batch = dpo_batch(inputs)
    assert batch.num_examples == len(PAIRS)
    task = PreferenceTask(dpo_loss(beta=0.3), frozen_reference(our_reference, chunk_bytes=2**20), beta=0.3)
    total, metrics = task(our_policy, batch)
    assert metrics["reward_chosen"].abs() > 0.05, "policy and reference must differ"
    assert_same_loss_and_gradients(wanted, trainer.model, total / len(PAIRS), our_policy)
    logged = trainer._metrics["eval"]
    for ours, theirs in (("reward_chosen", "rewards/chosen"), ("reward_rejected", "rewards/rejected")):
        assert float(metrics[ours]) / len(PAIRS) == pytest.approx(logged[theirs][0], abs=1e-5)
    assert float(metrics["accuracy"]) / len(PAIRS) == pytest.approx(logged["rewards/accuracies"][0])


def test_smoothed_dpo(words, tmp_path):
    """Of their losses, "aot" smooths labels as we do ("robust" subtracts and divides); of one pair it is cDPO's."""
    trainer, our_policy, our_reference = dpo_trainer(
        words, tmp_path, loss_type="aot", label_smoothing=0.2, per_device_train_batch_size=1
    )
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == len(PAIRS)
    task = PreferenceTask(
        dpo_loss(beta=0.3, label_smoothing=0.2), frozen_reference(our_reference, chunk_bytes=2**20), beta=0.3
    )
    for inputs in batches:
        wanted = trainer.compute_loss(trainer.model, dict(inputs))
        torch.testing.assert_close(task(our_policy, dpo_batch(inputs))[0], wanted, atol=1e-5, rtol=0)
