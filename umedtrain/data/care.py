"""What a run says of its preference pairs before it trains on them, and splits that keep a prompt's pairs together.

Exact duplicates are dropped and counted. Prompts that stand in several files, or in files held out for evaluation, and
pairs whose own scores do not put the chosen answer higher are counted with their first places, and dropped if asked.
A pair is never cut: `encode_preference` drops one that is too long whole, so truncation cannot reach one side only.

Two prompts are the same if their messages are, white space around each aside, for rendering trims it.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from umedtrain.config import PairsConfig
from umedtrain.data.example import Dropped, Drops, Example, encode_all, score_margin
from umedtrain.data.sources import check_files
from umedtrain.records import Preference, read_preferences, write_jsonl

PromptKey = tuple[tuple[str, str], ...]

DUPLICATE = "same prompt and answers as an earlier pair"
NOT_HIGHER = "chosen does not score higher than rejected"
HELD_OUT = "prompt stands in a held-out file"
KEPT_OUT = "kept out of training"


def load_pairs(
    files: Sequence[str],
    config: PairsConfig,
    encode: Callable[[Preference], Example | Dropped],
    *,
    kept_out: Path | None = None,
) -> tuple[list[list[Example]], Drops, dict[str, Any]]:
    """Read, check and encode files of pairs.

    Args:
        files: of pairs.
        config: what is done about questionable ones.
        encode: see `encode_preference`.
        kept_out: where the pairs of `config.keep_out` are written; None to write them nowhere.

    Returns:
        The examples of each file; all that was dropped; and the report of `check_pairs`.

    Raises:
        RecordError: for a file that cannot be read or a malformed row.
        ValueError: without files, or for a file none of whose pairs can be used.
    """
    check_files(files)
    held_out = [pair for path in config.held_out for pair in read_preferences(path)]
    asked = {HELD_OUT: config.drop_held_out, NOT_HIGHER: config.drop_not_higher}
    pairs_by_file, drops, report = check_pairs(
        [read_preferences(path) for path in files], held_out, drop=[finding for finding in asked if asked[finding]]
    )
    if config.keep_out:
        pairs_by_file, apart = _keep_out(pairs_by_file, config.keep_out)
        report[KEPT_OUT] = {"count": len(apart), "prompts": len(set(map(prompt_key, apart)))}
        if kept_out is not None:
            write_jsonl(kept_out, map(_row, apart))
    sources = []
    for path, pairs in zip(files, pairs_by_file, strict=True):
        if not pairs:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in drops.count().items())
            raise ValueError(f"{path}: no pair is left to train on ({reasons}); leave the file out or mend it")
        examples, unused = encode_all(pairs, encode)
        sources.append(examples)
        drops.rows.extend(unused.rows)
    return sources, drops, report


def check_pairs(
    sources: Sequence[Sequence[Preference]], held_out: Iterable[Preference] = (), *, drop: Collection[str] = ()
) -> tuple[list[list[Preference]], Drops, dict[str, Any]]:
    """Drop exact duplicates, and look for what else may be wrong.

    Args:
        sources: the pairs of each file.
        held_out: pairs that are kept for evaluation.
        drop: findings whose pairs are dropped, of `HELD_OUT` and `NOT_HIGHER`.

    Returns:
        The pairs that are left of each source; what was dropped and why; and a report for the run's summary: how many
        pairs, prompts and pairs with scores there are without duplicates, and for every finding, whether dropped or
        not, {"count": pairs, "first": the places of the first few}.
    """
    sources, repeated = drop_duplicates(sources)
    pairs = [pair for source in sources for pair in source]
    findings = {NOT_HIGHER: not_higher(pairs), HELD_OUT: shared_prompts(pairs, held_out)}
    gone = {id(pair): finding for finding in drop for pair in findings[finding]}
    for (first, earlier), (second, later) in combinations(_by_file(pairs).items(), 2):
        findings[f"prompt of {first} stands in {second} too"] = shared_prompts(later, earlier)
    report = {
        "pairs": len(pairs),
        "prompts": len(set(map(prompt_key, pairs))),
        "pairs with scores": sum(score_margin(pair) is not None for pair in pairs),
        **{finding: _places(found) for finding, found in findings.items() if found},
    }
    drops = Drops([Dropped(DUPLICATE, pair.source, pair.line) for pair in repeated])
    drops.rows += [Dropped(gone[id(pair)], pair.source, pair.line) for pair in pairs if id(pair) in gone]
    return [[pair for pair in source if id(pair) not in gone] for source in sources], drops, report


def prompt_key(pair: Preference) -> PromptKey:
    """What pairs of the same prompt have in common."""
    return tuple((message["role"], message["content"].strip()) for message in pair.prompt)


def drop_duplicates(sources: Iterable[Iterable[Preference]]) -> tuple[list[list[Preference]], list[Preference]]:
    """Each source without the pairs whose prompt and answers came before, in it or an earlier one; and those pairs."""
    seen: set[tuple[PromptKey, str, str]] = set()
    repeated: list[Preference] = []
    kept: list[list[Preference]] = []
    for source in sources:
        kept.append([])
        for pair in source:
            key = (prompt_key(pair), pair.chosen.strip(), pair.rejected.strip())
            (repeated if key in seen else kept[-1]).append(pair)
            seen.add(key)
    return kept, repeated


def shared_prompts(pairs: Iterable[Preference], others: Iterable[Preference]) -> list[Preference]:
    """The pairs whose prompt stands among `others` too."""
    prompts = set(map(prompt_key, others))
    return [pair for pair in pairs if prompt_key(pair) in prompts]


def not_higher(pairs: Iterable[Preference]) -> list[Preference]:
    """The pairs whose metadata give the chosen answer no higher score than the rejected one; see `score_margin`."""
    margins = ((pair, score_margin(pair)) for pair in pairs)
    return [pair for pair, margin in margins if margin is not None and margin <= 0]


def split_by_prompt(pairs: Sequence[Preference], share: float, seed: int) -> tuple[list[Preference], list[Preference]]:
    """Pairs in two parts, all pairs of a prompt in the same; both in the order of `pairs`.

    The second part gets the rounded `share` of all prompts, drawn by a hash of seed and prompt: the draw does not
    depend on the order of the pairs.

    Raises:
        ValueError: for a share that is not between 0 and 1, or that leaves one part empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    prompts = sorted(set(map(prompt_key, pairs)), key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    count = round(share * len(prompts))
    if not 0 < count < len(prompts):
        raise ValueError(f"a share of {share} of {len(prompts)} prompts leaves one part without any")
    second = set(prompts[:count])
    parts: tuple[list[Preference], list[Preference]] = ([], [])
    for pair in pairs:
        parts[prompt_key(pair) in second].append(pair)
    return parts


def _keep_out(sources: Sequence[Sequence[Preference]], share: float) -> tuple[list[list[Preference]], list[Preference]]:
    """Each source without the pairs of that share of all prompts; and those pairs."""
    try:
        _, apart = split_by_prompt([pair for source in sources for pair in source], share, seed=0)
    except ValueError as error:
        raise ValueError(f"pairs.keep_out: {error}") from None
    gone = set(map(id, apart))
    return [[pair for pair in source if id(pair) not in gone] for source in sources], apart


def _row(pair: Preference) -> dict[str, Any]:
    values = {"id": pair.id, "label_type": pair.label_type, "prompt": pair.prompt, "metadata": pair.metadata}
    return values | {"chosen": pair.chosen, "rejected": pair.rejected}


def _by_file(pairs: Iterable[Preference]) -> dict[str, list[Preference]]:
    files: dict[str, list[Preference]] = {}
    for pair in pairs:
        files.setdefault(pair.source, []).append(pair)
    return files


def _places(pairs: Sequence[Preference], *, first: int = 5) -> dict[str, Any]:
    return {"count": len(pairs), "first": [f"{pair.source}:{pair.line}" for pair in pairs[:first]]}
