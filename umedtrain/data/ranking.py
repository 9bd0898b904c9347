"""Pairs of the same prompt as one example: the prompt and every answer once, and which answer is better than which."""

from collections.abc import Iterator, Sequence

from umedtrain.data.example import Example, Segment


def merge_pairs(examples: Sequence[Example], *, max_tokens: int) -> list[Example]:
    """Examples with the same prompt as trees of one prompt and its different answers, with all their pairs.

    What a reward model learns from K answers of a prompt it then learns in one step (Ouyang et al. 2022,
    arXiv 2203.02155, section 3.5: pairs of one prompt that are shuffled apart make it overfit), and it computes each
    answer once however many pairs it stands in. Equal pairs count once, with the first margin that is known. Where a
    prompt's answers do not fit into `max_tokens` together, its pairs are shared out, in order, over as many examples as
    that takes.

    Args:
        examples: of `encode_preference`: prompt, chosen, rejected.
        max_tokens: longest example; none of `examples` is longer.

    Returns:
        In the order of each prompt's first pair.
    """
    by_prompt: dict[bytes, list[Example]] = {}
    for example in examples:
        by_prompt.setdefault(example.segments[0].tokens.tobytes(), []).append(example)
    return [merged for group in by_prompt.values() for merged in _merge(group, max_tokens)]


def _merge(group: Sequence[Example], max_tokens: int) -> Iterator[Example]:
    """One prompt's pairs, in as few examples as first-come-first-served gives."""
    prompt = group[0].segments[0]
    answers: dict[bytes, tuple[int, Segment]] = {}
    pairs: dict[tuple[int, int], float | None] = {}
    first, size = group[0], len(prompt.tokens)
    for example in group:
        new = {segment.tokens.tobytes(): segment for segment in example.segments[1:]}
        growth = sum(len(segment.tokens) for key, segment in new.items() if key not in answers)
        if size + growth > max_tokens:
            yield _tree(prompt, answers, pairs, first)
            answers, pairs, first, size = {}, {}, example, len(prompt.tokens)
            growth = sum(len(segment.tokens) for segment in new.values())
        places = tuple(answers.setdefault(key, (len(answers), segment))[0] for key, segment in new.items())
        if pairs.get(places) is None:
            pairs[places] = example.margins[0] if example.margins else None
        size += growth
    yield _tree(prompt, answers, pairs, first)


def _tree(
    prompt: Segment,
    answers: dict[bytes, tuple[int, Segment]],
    pairs: dict[tuple[int, int], float | None],
    first: Example,
) -> Example:
    segments = (prompt, *(segment for _, segment in answers.values()))
    margins = tuple(pairs.values()) if first.margins else ()
    return Example(segments, first.source, first.line, pairs=tuple(pairs), margins=margins)
