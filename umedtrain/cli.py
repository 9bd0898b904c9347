"""The console command `umedtrain`: what is not a training launch."""

import sys
from pathlib import Path
from typing import Literal

import tyro


def convert(
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    rope_factor: float | None = None,
) -> None:
    """Convert a checkpoint to a Hugging Face directory, tokenizer included.

    Args:
        source: Hugging Face directory, Meta directory (params.json and consolidated.*.pth) or GGUF file.
        target: Directory to write.
        dtype: Dtype of the written weights.
        rope_factor: RoPE scaling factor of a Meta directory, which its params.json leaves out: 32 for Llama 3.2.
    """
    import torch

    from umedtrain import weights

    weights.convert(source, target, dtype=getattr(torch, dtype), rope_factor=rope_factor)
    print(f"wrote {target}")


def chat(
    model: tyro.conf.Positional[Path],
    *,
    system: str = "",
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_tokens: int = 256,
    seed: int = 0,
    remember: bool = True,
) -> None:
    """Talk to a model in the terminal. An empty line or end of input leaves, `/new` starts over.

    Args:
        model: Checkpoint directory.
        system: System message.
        temperature: 0 takes the most likely token every time.
        top_p: Draw from the smallest set of tokens with this much probability.
        max_tokens: Longest answer, in tokens.
        seed: Seed of sampling.
        remember: Show the model the whole dialog. False for models trained on single questions.
    """
    from umedtrain import Sampler, SamplingParams, load_model, load_tokenizer

    sampler = Sampler(load_model(model), load_tokenizer(model))
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    opening = [{"role": "system", "content": system}] if system else []
    dialog = list(opening)
    while True:
        try:
            question = input("> ")
        except EOFError:
            return
        if not question.strip():
            return
        if question.strip() == "/new" or not remember:
            dialog = list(opening)
        if question.strip() == "/new":
            continue
        dialog.append({"role": "user", "content": question})
        answer = sampler.generate([dialog], params)[0][0].text.strip()
        print(answer, flush=True)
        dialog.append({"role": "assistant", "content": answer})


def main() -> None:
    """Entry point of the console command; users' mistakes end in one sentence and exit code 1."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"convert": convert, "chat": chat},
            description="Post-training for Llama-3.",
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
