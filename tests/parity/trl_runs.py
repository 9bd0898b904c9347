"""TRL's trainers on a few pairs of words, and our batches of the very token ids that they make."""

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.data.makers import segment
from tests.parity.llamas import hf_llama
from umedtrain.data.batch import Batch, collate
from umedtrain.data.example import Example
from umedtrain.model.heads import RewardModel
from umedtrain.model.llama import Llama
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


def word_tokenizer() -> PreTrainedTokenizerFast:
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
