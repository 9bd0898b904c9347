"""Our losses against TRL's trainers: the same weights, and the very token ids of the batches that they make."""

import pytest
import torch

pytest.importorskip("trl")
import datasets
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from tests.data.makers import segment
from tests.parity.llamas import hf_llama
from tests.training.runs import dpo_loss
from umedtrain.data.batch import Batch, collate
from umedtrain.data.example import Example
from umedtrain.model.heads import RewardModel
from umedtrain.model.llama import Llama
from umedtrain.training.reference import frozen_reference
from umedtrain.training.tasks import PreferenceTask, RewardTask
from umedtrain.weights import open_checkpoint

# (prompt, chosen, rejected) as words; lengths differ, one pair shares the beginning of its answers.
PAIRS = [
    ("w1 w2 w3 w4 w5 w6 w7", "w8 w9", "w10 w11 w12 w13 w14 w15"),
    ("w20 w21", "w22 w23 w24 w25 w26 w27 w28 w29 w30", "w31"),
    ("w3 w40 w41 w42", "w43 w44 w45", "w43 w44 w46 w47 w48"),
    ("w50 w51 w52 w53 w54 w55 w56 w57 w58 w59 w60 w61", "w62", "w63 w64"),
    ("w7", "w70 w71 w72 w73", "w74 w75 w76 w77"),
]
PAD, EOS = 0, 1
VOCAB = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(98))]


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    transformers_logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCAB)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def hf_model(*, seed: int, **kind):
    """As `hf_llama`, with weights of another seed: policy and reference must differ."""
    model = hf_llama("llama3.1", pad_token_id=PAD, eos_token_id=EOS, **kind)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def our_model(kind: type, theirs, directory) -> Llama | RewardModel:
    """Our model with their weights, through the state dict."""
    theirs.save_pretrained(directory)
    model = kind(open_checkpoint(directory).config)
    state = theirs.state_dict()
    if kind is Llama:
        state = {name.removeprefix("model."): value for name, value in state.items()}
    model.load_state_dict({name: value.clone() for name, value in state.items()})
    return model


def settings(directory) -> dict:
    return dict(
        output_dir=str(directory),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=len(PAIRS),
        gradient_checkpointing=False,
        save_strategy="no",
    )


def rows(*, with_prompt: bool) -> datasets.Dataset:
    if with_prompt:
        return datasets.Dataset.from_list([{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in PAIRS])
    return datasets.Dataset.from_list([{"chosen": f"{p} {c}", "rejected": f"{p} {r}"} for p, c, r in PAIRS])


def their_batch(trainer) -> dict[str, torch.Tensor]:
    (inputs,) = trainer.get_train_dataloader()
    return dict(inputs)


def sequences(inputs: dict[str, torch.Tensor]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the chosen and of the rejected sequences of their batch, without padding."""
    ids = [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    return ids[: len(ids) // 2], ids[len(ids) // 2 :]


def pair_batch(chosen: list[list[int]], rejected: list[list[int]], prompt_lengths: list[int]) -> Batch:
    examples = []
    for better, worse, length in zip(chosen, rejected, prompt_lengths, strict=True):
        assert better[:length] == worse[:length]
        assert better[-1] == worse[-1] == EOS
        prompt = segment(better[:length], [0] * length)
        answers = (segment(better[length:], parent=0), segment(worse[length:], parent=0))
        examples.append(Example((prompt, *answers), pairs=((0, 1),)))
    return collate(examples)


def dpo_batch(inputs: dict[str, torch.Tensor]) -> Batch:
    """The same pairs, cut into prompt and answers where their completion mask says."""
    chosen, rejected = sequences(inputs)
    answer_lengths = inputs["completion_mask"].sum(1)[: len(chosen)].tolist()
    return pair_batch(chosen, rejected, [len(ids) - n for ids, n in zip(chosen, answer_lengths, strict=True)])


def assert_same_loss_and_gradients(their_loss, theirs, our_loss, ours) -> None:
    torch.testing.assert_close(our_loss, their_loss, atol=1e-5, rtol=0)
    their_loss.backward()
    our_loss.backward()
    prefix = "" if isinstance(ours, RewardModel) else "model."
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        grad = wanted[name if name in wanted else prefix + name]
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


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


def test_reward(words, tmp_path):
    theirs = hf_model(seed=3, kind=LlamaForSequenceClassification, num_labels=1)
    ours = our_model(RewardModel, theirs, tmp_path / "model")
    trainer = trl.RewardTrainer(
        theirs,
        args=trl.RewardConfig(**settings(tmp_path)),
        train_dataset=rows(with_prompt=False),
        processing_class=words,
    )
    inputs = their_batch(trainer)
    chosen, rejected = sequences(inputs)
    wanted = trainer.compute_loss(trainer.model, inputs)
    prompts = {" ".join(prompt.split()): len(prompt.split()) for prompt, _, _ in PAIRS}
    lengths = [next(n for text, n in prompts.items() if words.decode(ids).startswith(text + " ")) for ids in chosen]
    total, metrics = RewardTask()(ours, pair_batch(chosen, rejected, lengths))
    assert float(metrics["accuracy"]) / len(PAIRS) == pytest.approx(trainer._metrics["eval"]["accuracy"][0])
    assert_same_loss_and_gradients(wanted, theirs, total / len(PAIRS), ours)
