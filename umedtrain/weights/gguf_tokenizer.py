"""The tokenizer inside a .gguf file, as the content of a tokenizer.json and its tokenizer_config.json."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from umedtrain.weights.checkpoint import CheckpointError
from umedtrain.weights.gguf import field, read_gguf

if TYPE_CHECKING:
    from umedtrain.text.hf_json import HFTokenizer

_CONTROL, _USER_DEFINED = 3, 4
_LLAMA3_SPLITS = ("llama-bpe", "llama3", "llama-v3")


def gguf_tokenizer(path: str | Path) -> "HFTokenizer":
    """The byte-level BPE tokenizer that a .gguf file carries, with its chat template.

    Raises:
        CheckpointError: when the file carries another kind, or splits words in a way that is not known here.
        ImportError: without the `gguf` and `tokenizers` packages (`pip install 'umedtrain[gguf]'`).
    """
    from umedtrain.text.hf_json import HFTokenizer

    path = Path(path)
    reader = read_gguf(path)

    def metadata(key: str, *default: Any) -> Any:
        return field(reader, f"tokenizer.{key}", path, *default)

    if metadata("ggml.model") != "gpt2":
        raise CheckpointError(
            f"{path}: its tokenizer is of kind {metadata('ggml.model')!r}, only byte-level BPE ('gpt2') is "
            "implemented; load the model and save it with a tokenizer of your own"
        )
    tokens, types = metadata("ggml.tokens"), metadata("ggml.token_type")
    names = {
        f"{kind}_token": tokens[i]
        for kind, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (i := metadata(f"ggml.{key}_token_id", None)) is not None
    }
    pre_kind = metadata("ggml.pre", "missing")
    begins = metadata("ggml.add_bos_token", pre_kind in _LLAMA3_SPLITS)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], **flags, "special": kind == _CONTROL}
            for i, kind in enumerate(types)
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(pre_kind, path),
        "post_processor": _begin(names["bos_token"], tokens) if begins and "bos_token" in names else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # Llama 3 takes a whole word that is in the vocabulary, even where the merges lead elsewhere.
            "ignore_merges": pre_kind in _LLAMA3_SPLITS,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata("ggml.merges")],
        },
    }
    template = metadata("chat_template", None)
    config = {**names, "chat_template": template} if template else names
    return HFTokenizer(spec, config=config, file=path)


def _pre_tokenizer(kind: str, path: Path) -> dict[str, Any]:
    """How words are split before merging: GGUF names the rule, tokenizer.json spells it out."""
    from umedtrain.text.tiktoken_bpe import SPLIT_PATTERN

    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if kind == "gpt-2":
        return level
    if kind == "smollm":
        steps = [{"type": "Digits", "individual_digits": True}, level]
    elif kind in _LLAMA3_SPLITS:
        split = {
            "type": "Split",
            "pattern": {"Regex": SPLIT_PATTERN},
            "behavior": "Isolated",
            "invert": False,
        }
        steps = [split, level | {"use_regex": False}]
    else:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre is {kind!r}, only gpt-2, smollm and {', '.join(_LLAMA3_SPLITS)} are known"
        )
    return {"type": "Sequence", "pretokenizers": steps}


def _begin(name: str, tokens: list[str]) -> dict[str, Any]:
    """Put the begin token before a text when a caller asks for special tokens."""
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": n}} for n, which in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, {"SpecialToken": {"id": name, "type_id": 1}}, second],
        "special_tokens": {name: {"id": name, "ids": [tokens.index(name)], "tokens": [name]}},
    }
