"""Any checkpoint that can be opened -> a Hugging Face directory with its tokenizer."""

import warnings
from pathlib import Path

import torch

from umedtrain.text.tokenizer import Tokenizer, load_tokenizer
from umedtrain.weights.checkpoint import CheckpointError
from umedtrain.weights.export import check_target, save_stream
from umedtrain.weights.load import open_checkpoint

_HF_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    rope_factor: float | None = None,
) -> None:
    """Write the checkpoint at `source` as a Hugging Face directory, tensor by tensor.

    The tokenizer comes along: the files of a Hugging Face directory unchanged, a tokenizer.model beside
    Meta's, or what a .gguf file carries. Where there is none only the weights are written, with a warning.

    Args:
        source: anything that `open_checkpoint` opens.
        target: the directory to write; see `save_stream`.
        dtype: of the written weights, default that of the source (fp32 for quantised ones).
        rope_factor: for Meta's format only, see `umedtrain.weights.meta.open_meta`.

    Raises:
        ValueError: for a source that cannot be opened, a tokenizer that does not fit it, or a taken target.
        OSError: when the target cannot be written; what was there is untouched.
    """
    source = Path(source)
    check_target(Path(target))
    checkpoint = open_checkpoint(source, rope_factor=rope_factor)
    tokenizer, files = _tokenizer_of(source)
    if tokenizer is None and not files:
        warnings.warn(f"{source}: no tokenizer is there; only the weights are written", stacklevel=2)
    if tokenizer is not None and tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{source}: its tokenizer has {tokenizer.vocab_size} tokens, its model only "
            f"{checkpoint.config.vocab_size} embeddings"
        )
    save_stream(
        checkpoint.config,
        checkpoint.is_reward_model,
        ((name, checkpoint.tensor(name)) for name in checkpoint.names),
        target,
        tokenizer=tokenizer,
        extra_files=files,
        dtype=dtype,
        eos_ids=checkpoint.eos_ids,
        bos_id=checkpoint.bos_id,
        pad_id=checkpoint.pad_id,
    )


def _tokenizer_of(source: Path) -> tuple["Tokenizer | None", list[Path]]:
    """The tokenizer to write again or, where the source has the right files already, those files."""
    if source.is_file():
        from umedtrain.weights.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(source), []
    if (source / "config.json").exists():
        return None, [source / name for name in _HF_TOKENIZER_FILES if (source / name).exists()]
    if (source / "tokenizer.model").exists():
        return load_tokenizer(source / "tokenizer.model"), []
    return None, []
