"""Writing a tokenizer so that other libraries load it offline: tokenizer.json, tokenizer.model, settings, jinja.

The JSON is written by hand, without the `tokenizers` library, from the same ranks or pieces that we encode with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from umedtrain.text import sentencepiece_proto as proto
from umedtrain.text.chat import DEFAULT_DATE, TEMPLATES, TRIMMED, plain_end
from umedtrain.text.hf_json import HFTokenizer
from umedtrain.text.sentencepiece import SPACE, SentencePieceTokenizer
from umedtrain.text.specials import SMOLLM2_SYSTEM
from umedtrain.text.tiktoken_bpe import SPLIT_PATTERN, TiktokenTokenizer, dump_ranks
from umedtrain.text.tokenizer import Tokenizer

_KEPT_CONFIG = ("bos_token", "eos_token", "pad_token", "unk_token", "model_max_length")


def save_tokenizer(
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    template: str | None = None,
    trim: bool = True,
) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and, where there is one, tokenizer.model.

    `transformers.AutoTokenizer` loads the directory and gives our ids; its `apply_chat_template` gives the ids of
    `render_chat` with the same `template` and `trim`. `load_tokenizer` reads it back. Where the other library's ids
    must differ: text that spells a special token (it becomes the special id) or holds U+2581, SentencePiece's sign
    for the space; an untrimmed content that begins with white space; unigram models where two ways to cut a run are
    exactly equally likely; the first id of a text that begins with a space, for models that put one there themselves
    (Llama-2's).

    Raises ValueError for a SentencePiece model that normalises text, which tokenizer.json cannot state exactly, and
    TypeError for a tokenizer that `load_tokenizer` did not make.
    """
    if isinstance(tokenizer, TiktokenTokenizer):
        spec, model = _tiktoken_spec(tokenizer), dump_ranks(tokenizer.ranks)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        spec, model = _sentencepiece_spec(tokenizer), tokenizer.serialized
    elif isinstance(tokenizer, HFTokenizer):
        spec, model = tokenizer.spec, None
    else:
        raise TypeError(f"save_tokenizer cannot write a {type(tokenizer).__name__}; use one from load_tokenizer.")
    template = tokenizer.chat_template if template is None else template
    names = _named_tokens(tokenizer, template)
    config = {
        **names,
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it stands
        "clean_up_tokenization_spaces": False,
        "chat_template": jinja_template(template, trim=trim, bos="bos_token" in names),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", {k: v for k, v in names.items() if k.endswith("_token")})
    if model is not None:
        (directory / "tokenizer.model").write_bytes(model)


def jinja_template(template: str, *, trim: bool = True, bos: bool = True) -> str:
    """The jinja text that renders as `render_chat` does; `bos`: whether the plain template starts with bos_token."""
    assert template in TEMPLATES
    strip = " | trim" if trim and template in TRIMMED else ""
    if template == "chatml":
        start = f"{{{{ '<|im_start|>system\\n{SMOLLM2_SYSTEM}<|im_end|>\\n' }}}}"
        return (
            f"{{% if messages[0]['role'] != 'system' %}}{start}{{% endif %}}{{% for message in messages %}}"
            "{{ '<|im_start|>' + message['role'] + '\\n' + message['content']" + strip + " + '<|im_end|>\\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
        )
    if template == "plain":
        return (
            "{% set headers = {'system': 'System:\\n', 'user': 'User:\\n', 'assistant': 'Assistant:\\n'} %}"
            + ("{{ bos_token }}" if bos else "")
            + "{% for message in messages %}{{ headers[message['role']] + message['content']"
            + strip
            + " }}"
            "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n\\n' }}{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}{{ headers['assistant'] }}{% endif %}"
        )
    head = "{% set rest = messages %}{{ bos_token }}"
    if template == "llama3.1":
        head = (
            "{% if messages[0]['role'] == 'system' %}"
            "{% set system = messages[0]['content']" + strip + " %}{% set rest = messages[1:] %}"
            "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}"
            "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: '"
            f" + (date_string if date_string is defined else '{DEFAULT_DATE}') + '\\n\\n' + system + '<|eot_id|>' }}}}"
        )
    return (
        head + "{% for message in rest %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        " + message['content']" + strip + " + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    )


def _named_tokens(tokenizer: TiktokenTokenizer | SentencePieceTokenizer | HFTokenizer, template: str) -> dict[str, Any]:
    names = {i: tokenizer.decode([i]) for i in (tokenizer.bos_id, plain_end(tokenizer)) if i is not None}
    own = tokenizer.config if isinstance(tokenizer, HFTokenizer) else {}
    kept: dict[str, Any] = {key: own[key] for key in _KEPT_CONFIG if own.get(key) is not None}
    if tokenizer.bos_id is not None:
        kept["bos_token"] = names[tokenizer.bos_id]
    # What ends an assistant's turn: generation in other libraries stops at it, and the plain template writes it.
    ends = {"llama3": "<|eot_id|>", "llama3.1": "<|eot_id|>", "chatml": "<|im_end|>"}
    kept["eos_token"] = ends[template] if template in ends else names[plain_end(tokenizer)]
    for key, name in (("pad_token", "<|finetune_right_pad_id|>"), ("unk_token", "<unk>")):
        if tokenizer.special_id(name) is not None:
            kept.setdefault(key, name)
    return kept


def _tiktoken_spec(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    shown = _visible_bytes()
    ranks = tokenizer.ranks
    vocab = {"".join(shown[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = [
        ["".join(shown[byte] for byte in part) for part in pair] for pair in _merges(ranks, order=ranks.__getitem__)
    ]
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = _bpe(vocab, merges, ignore_merges=True)
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, level]}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return _spec(tokenizer, model, pre_tokenizer=pre_tokenizer, decoder=decoder)


def _sentencepiece_spec(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    source = tokenizer.model
    if source.charsmap or source.remove_extra_whitespaces or not source.escape_whitespaces:
        raise ValueError(
            "This SentencePiece model normalises text (or does not escape spaces), which tokenizer.json cannot state "
            "exactly; only models with identity normalisation and all white space kept can be exported."
        )
    if source.algorithm not in (proto.BPE, proto.UNIGRAM):
        raise ValueError("Only BPE and unigram SentencePiece models can be exported, not word or character models.")
    pre_tokenizer = None
    if source.add_dummy_prefix:
        pre_tokenizer = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    unknown = source.pieces[source.unk_id].text
    if source.algorithm == proto.BPE:
        learned = {piece.text: piece.score for piece in source.pieces if piece.type == proto.NORMAL}
        vocab = {piece.text: i for i, piece in enumerate(source.pieces)}
        merges = [list(pair) for pair in _merges(learned, order=lambda whole: -learned[whole])]
        model = _bpe(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=source.byte_fallback)
    else:
        # The library would find the names of bytes in a text that spells them: never let it see one whole.
        names = {
            "type": "Split",
            "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"},
            "behavior": "MergedWithPrevious",
            "invert": False,
        }
        steps = [names] if pre_tokenizer is None else [pre_tokenizer, names]
        pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
        scores = [[piece.text, piece.score] for piece in source.pieces]
        model = {"type": "Unigram", "unk_id": source.unk_id, "vocab": scores, "byte_fallback": source.byte_fallback}
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if source.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    ordinary = [piece.text for piece in source.pieces if piece.type == proto.USER_DEFINED]
    return _spec(
        tokenizer,
        model,
        normalizer=spaces,
        pre_tokenizer=pre_tokenizer,
        decoder={"type": "Sequence", "decoders": steps},
        ordinary={text: i for i, text in enumerate(p.text for p in source.pieces) if text in ordinary},
    )


def _spec(
    tokenizer: TiktokenTokenizer | SentencePieceTokenizer,
    model: dict[str, Any],
    *,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    normalizer: dict[str, Any] | None = None,
    ordinary: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    added = {i: (name, True) for name, i in tokenizer.special_tokens.items()}
    for name, i in (ordinary or {}).items():
        added.setdefault(i, (name, False))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": special} for i, (name, special) in sorted(added.items())
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _begin_token(tokenizer),
        "decoder": decoder,
        "model": model,
    }


def _begin_token(tokenizer: TiktokenTokenizer | SentencePieceTokenizer) -> dict[str, Any] | None:
    """Put the begin token before a text when the caller asks for special tokens, as Llama's own files do."""
    if tokenizer.bos_id is None:
        return None
    name = {i: name for name, i in tokenizer.special_tokens.items()}[tokenizer.bos_id]
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": n}} for n, which in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, {"SpecialToken": {"id": name, "type_id": 1}}, second],
        "special_tokens": {name: {"id": name, "ids": [tokenizer.bos_id], "tokens": [name]}},
    }


def _bpe(vocab: dict[str, int], merges: list[list[str]], **options: object) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    } | options


def _merges(vocab: Iterable[Any], *, order: Any) -> Iterable[tuple[Any, Any]]:
    """Every way to join two entries into a third, in the order in which the third is due.

    Ranks and scores order the results of joins only; among several ways to one result any order gives the same ids
    (random vocabularies and texts showed no difference).
    """
    known = set(vocab)
    for whole in sorted(known, key=order):
        for cut in range(len(whole) - 1, 0, -1):
            if whole[:cut] in known and whole[cut:] in known:
                yield whole[:cut], whole[cut:]


def _visible_bytes() -> dict[int, str]:
    """The printable character that byte-level BPE files write for each byte (GPT-2's table)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def _write_json(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")
