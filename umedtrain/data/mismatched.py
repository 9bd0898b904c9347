"""Prompts with answers to other prompts, from which KTO estimates how far the policy is from its reference."""

import numpy as np

from umedtrain.data.example import Example
from umedtrain.data.loader import Loader

_TRIES = 100


def mismatched_loader(loader: Loader) -> Loader:
    """One epoch of a loader's prompts, each with an answer that was given to another one, as many in a step.

    Who gets whose answer depends on the seed and the examples only. A prompt for which no such answer that fits into
    a micro-batch is soon found has no place in it: the mean over the others estimates the same.

    Raises:
        ValueError: when no prompt is left.
    """
    examples = loader.examples
    random = np.random.default_rng(loader.mixture.seed)
    order = random.permutation(len(examples))
    found = []
    for place, number in enumerate(order):
        prompt = examples[number].segments[0]
        room = loader.max_tokens - len(prompt.tokens)
        for step in range(1, min(_TRIES, len(order))):
            other = examples[order[(place + step) % len(order)]]
            answer = other.segments[1 + random.integers(len(other.segments) - 1)]
            if len(answer.tokens) <= room and not np.array_equal(other.segments[0].tokens, prompt.tokens):
                found.append(Example((prompt, answer), examples[number].source, examples[number].line))
                break
    if not found:
        raise ValueError("dpo.loss kto needs answers to other prompts beside each prompt, and there are none that fit")
    return Loader(
        [found],
        batch_size=loader.batch_size,
        max_tokens=loader.max_tokens,
        seed=loader.mixture.seed,
        rank=loader.rank,
        num_ranks=loader.num_ranks,
    )
