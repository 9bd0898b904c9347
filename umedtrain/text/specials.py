"""Names of special tokens, and what they say about a vocabulary: which end a turn, which chat template fits.

Everything here is a pure function of names, so that all tokenizers answer alike.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping

LLAMA3_NUM_SPECIALS = 256
TURN_ENDS = ("<|eot_id|>", "<|im_end|>")
DOCUMENT_ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>")
OTHER_ENDS = ("<|eom_id|>",)
DOCUMENT_STARTS = ("<|begin_of_text|>", "<s>")
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_LOOKS_SPECIAL = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
PLAIN_MARK = "'User:\\n'"  # how our own plain template is known again when it is read back


def llama3_specials() -> tuple[str, ...]:
    """The 256 names that follow Llama-3's 128,000 byte ranks, as Llama-3.1 names them (same ids in 3, 3.1, 3.2)."""
    names = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    }
    reserved = iter(range(LLAMA3_NUM_SPECIALS))
    return tuple(
        names[i] if i in names else f"<|reserved_special_token_{next(reserved)}|>" for i in range(LLAMA3_NUM_SPECIALS)
    )


def end_ids(special_id: Callable[[str], int | None], extra: tuple[int | None, ...] = ()) -> tuple[int, ...]:
    """Every id that ends a turn or a document, turn ends first, without repeats.

    `extra`: ids that the tokenizer's own file declares (its eos), in front of nothing but after the known names.
    """
    found = [special_id(name) for name in (*TURN_ENDS, *DOCUMENT_ENDS, *OTHER_ENDS)]
    return tuple(dict.fromkeys(i for i in (*found, *extra) if i is not None))


def template_name(jinja: str | None, special_id: Callable[[str], int | None], *, where: str = "tokenizer") -> str:
    """Name of the chat template: by the jinja text when there is one, else by the special tokens of the vocabulary.

    Warns when a jinja text is there that none of our templates renders.
    """
    by_vocabulary = "plain"
    if special_id("<|start_header_id|>") is not None and special_id("<|eot_id|>") is not None:
        by_vocabulary = "llama3"
    elif special_id("<|im_start|>") is not None and special_id("<|im_end|>") is not None:
        by_vocabulary = "chatml"
    if not jinja:
        return by_vocabulary
    if "Cutting Knowledge Date" in jinja:
        return "llama3.1"
    if "<|start_header_id|>" in jinja:
        return "llama3"
    if "<|im_start|>" in jinja:
        if SMOLLM2_SYSTEM not in jinja:
            warnings.warn(
                f"{where}: its ChatML template has not SmolLM2's default system prompt, which our 'chatml' adds to "
                "dialogs without a system message; give a system message in each dialog.",
                stacklevel=3,
            )
        return "chatml"
    if PLAIN_MARK in jinja:
        return "plain"
    warnings.warn(
        f"{where}: its chat template is none that umedtrain renders; dialogs will be rendered as {by_vocabulary!r}.",
        stacklevel=3,
    )
    return by_vocabulary


def jinja_of(config: Mapping[str, object]) -> str | None:
    """The jinja text in a tokenizer_config.json: a string, or the entry named "default" of a list of templates."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def looks_special(name: str) -> bool:
    """Whether an added or user-defined token is written as special tokens are, "<name>" or "[NAME]", and not a word."""
    return _LOOKS_SPECIAL.fullmatch(name) is not None


def check_text(text: str) -> None:
    """Refuse what is no text: another type (TypeError), or half of a surrogate pair, which UTF-8 cannot hold."""
    if not isinstance(text, str):
        raise TypeError(f"encode takes a str, not {type(text).__name__}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text holds half of a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}, "
            "which is not valid Unicode; repair the text (for example text.encode('utf-8', 'replace').decode())."
        ) from None
