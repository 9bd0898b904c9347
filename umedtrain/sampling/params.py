"""What is asked of the sampler, and what it answers."""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    A token is drawn from softmax(adjusted logits / temperature), cut to the `top_k` likeliest tokens, of which the
    smallest set that holds `top_p` of the remaining mass is kept (Holtzman et al. 2020, arXiv 1904.09751), of which
    those with at least `min_p` times the likeliest one's probability (Nguyen et al. 2024, arXiv 2407.01082). Among
    equally likely tokens at an edge the lowest ids are kept.

    Attributes:
        max_tokens: tokens to generate at most, the stop token included. The model's `max_position_embeddings` is a
            second limit, on prompt and answer together. 0, with `prompt_logprobs`, only scores the prompt.
        temperature: 0 takes the likeliest token, the lowest id among equals.
        top_p: in (0, 1]; 1 keeps all.
        top_k: 0 keeps all.
        n: samples of the prompt.
        seed: any integer; None draws one for each prompt from PyTorch's default generator.
        stop_token_ids: ids that end an answer, besides the sampler's own.
        min_p: in [0, 1]; 0 keeps all.
        min_tokens: tokens to generate before a stop token can be drawn or a stop string is looked for.
        repetition_penalty: logits of tokens that occurred in prompt or answer are divided by it where positive and
            multiplied where negative (Keskar et al. 2019, arXiv 1909.05858); 1 for none.
        logit_bias: added to the logits of these token ids; -inf forbids them.
        stop: strings that end an answer; they may begin inside a token and run over several.
        best_of: samples to make, of which the best `n` are returned; None for n.
        top_logprobs: so many likeliest tokens are reported at each place.
        prompt_logprobs: report the prompt's own log-probabilities too.
        ignore_eos: go on after the sampler's own stop ids.

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
    min_p: float = 0.0
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    best_of: int | None = None
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._check_integers()
        # Written so that NaN, which compares false with everything, is refused.
        if not (_is_real(self.temperature) and 0 <= self.temperature < math.inf):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature!r}")
        if not (_is_real(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p!r}")
        if not (_is_real(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p!r}")
        if not (_is_real(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf):
            raise ValueError(f"repetition_penalty must be a positive number, got {self.repetition_penalty!r}")
        if self.max_tokens == 0 and not self.prompt_logprobs:
            raise ValueError("max_tokens must be an integer of at least 1, or prompt_logprobs be set, got 0")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must not exceed max_tokens={self.max_tokens}, got {self.min_tokens}")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of must be at least n={self.n}, got {self.best_of}")
        if self.top_logprobs > MAX_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs must be at most {MAX_TOP_LOGPROBS}, got {self.top_logprobs}")
        self._check_collections()

    def _check_integers(self) -> None:
        least_of = {"max_tokens": 0, "top_k": 0, "n": 1, "seed": -math.inf, "min_tokens": 0, "best_of": 1}
        for name, least in {**least_of, "top_logprobs": 0}.items():
            if (value := getattr(self, name)) is None and name in ("seed", "best_of"):
                continue
            if not _is_integer(value) or value < least:
                bound = "" if name == "seed" else f" of at least {max(1, least) if name == 'max_tokens' else least}"
                raise ValueError(f"{name} must be an integer{bound}, got {value!r}")
            object.__setattr__(self, name, operator.index(value))

    def _check_collections(self) -> None:
        stops = _listed(self.stop_token_ids)
        if stops is None or not all(_is_integer(stop) and stop >= 0 for stop in stops):
            raise ValueError(f"stop_token_ids must be token ids, got {self.stop_token_ids!r}")
        object.__setattr__(self, "stop_token_ids", tuple(dict.fromkeys(operator.index(stop) for stop in stops)))
        strings = (self.stop,) if isinstance(self.stop, str) else _listed(self.stop)
        if strings is None or not all(isinstance(string, str) and string for string in strings):
            raise ValueError(f"stop must be strings that are not empty, got {self.stop!r}")
        object.__setattr__(self, "stop", strings)
        bias = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else [(None, None)]
        # NaN is not below infinity.
        if not all(_is_integer(i) and i >= 0 and _is_real(b) and b < math.inf for i, b in bias):
            raise ValueError(f"logit_bias must map token ids to numbers below infinity, got {self.logit_bias!r}")
        object.__setattr__(self, "logit_bias", {operator.index(i): float(b) for i, b in bias})
        for name in ("prompt_logprobs", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")

    @property
    def samples(self) -> int:
        """Samples to make of the prompt."""
        return self.best_of or self.n

    @property
    def adjusts_logits(self) -> bool:
        """Whether tokens are drawn from other logits than the model's."""
        return self.repetition_penalty != 1 or bool(self.logit_bias) or self.min_tokens > 0


TopLogprobs = Sequence[tuple[int, float]]
"""The likeliest tokens of one place with their log-probabilities, likeliest first."""


@dataclass(frozen=True, slots=True)
class Output:
    """One sample of one prompt.

    Attributes:
        tokens: generated ids, with the token that ended them, if one did.
        text: the answer decoded, up to where it was ended: without the stop token or stop string; None when the
            sampler has no tokenizer.
        logprobs: natural-log probability of each token under the model itself: temperature 1, nothing adjusted or
            cut off. These are the trainer's.
        draw_logprobs: under the distribution that the token was drawn from; 0 for greedy ones.
        finish_reason: "stop" after a stop token or stop string, "length" when a limit came first.
        stop_reason: the token id or string that ended it, or None.
        top_logprobs: for each token, the likeliest ones of its place under the model itself; None if not asked for.
        prompt_logprobs: for each token of the prompt, None for the first; None if not asked for.
        prompt_top_logprobs: the same for `top_logprobs`.
    """

    tokens: list[int]
    text: str | None
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    draw_logprobs: list[float] = field(default_factory=list)
    stop_reason: int | str | None = None
    top_logprobs: list[TopLogprobs] | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[TopLogprobs | None] | None = None


def _listed(value: object) -> tuple | None:
    return tuple(value) if isinstance(value, Iterable) else None


def _is_integer(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
