"""What is asked of the sampler, and what it answers."""

import math
import operator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    The distribution is softmax(logits / temperature), cut to the `top_k` likeliest tokens, of which the
    smallest set that holds `top_p` of the remaining mass is kept (Holtzman et al. 2020, arXiv 1904.09751).
    Among equally likely tokens at either edge the lowest ids are kept.

    Attributes:
        max_tokens: tokens to generate at most, the stop token included. The model's `max_position_embeddings`
            is a second limit, on prompt and answer together.
        temperature: 0 takes the likeliest token, the lowest id among equals.
        top_p: in (0, 1]; 1 keeps all.
        top_k: 0 keeps all.
        n: samples of the prompt.
        seed: any integer; None draws one for each prompt from PyTorch's default generator.
        stop_token_ids: ids that end an answer, besides the sampler's own.

    Raises:
        ValueError: naming the field that is out of range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("top_k", 0), ("n", 1), ("seed", -math.inf)):
            if (value := getattr(self, name)) is None and name == "seed":
                continue
            if not _is_integer(value) or value < least:
                bound = "" if name == "seed" else f" of at least {least}"
                raise ValueError(f"{name} must be an integer{bound}, got {value!r}")
            object.__setattr__(self, name, operator.index(value))
        # Written so that NaN, which compares false with everything, is refused.
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p!r}")
        stops = tuple(self.stop_token_ids)
        if not all(_is_integer(stop) and stop >= 0 for stop in stops):
            raise ValueError(f"stop_token_ids must be token ids, got {self.stop_token_ids!r}")
        object.__setattr__(self, "stop_token_ids", tuple(operator.index(stop) for stop in stops))


@dataclass(frozen=True, slots=True)
class Output:
    """One sample of one prompt.

    Attributes:
        tokens: generated ids, with the stop token that ended them, if one did.
        text: the tokens before the stop token, decoded; None when the sampler has no tokenizer.
        logprobs: natural-log probability of each token under the model itself: temperature 1, nothing cut
            off.
        finish_reason: "stop" after a stop token, "length" when a limit came first.
    """

    tokens: list[int]
    text: str | None
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


def _is_integer(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
