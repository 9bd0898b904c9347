"""One sample of one request on its way through the engine."""

from umedtrain.sampling.pages import Digest
from umedtrain.sampling.params import TopLogprobs
from umedtrain.sampling.requests import Request

_NOTHING: list = []


class Sequence:
    """Tokens, cached pages and results of a sample.

    Attributes:
        request, sample: whose, and which of its samples.
        key: stands for the sample in the random numbers.
        tokens: prompt and answer.
        pages: of the cache, from the first token on.
        digests: of the full pages of the prompt.
        published: pages of the prompt that others can find, or could already.
        awaits: a page of the prompt that another sequence is about to compute.
        computed: tokens whose keys and values are in the cache.
        logprobs, draw_logprobs, top_logprobs: of the answer's tokens so far.
        prompt_logprobs, prompt_top_logprobs: of the prompt's tokens after the first so far.
        stop_reason: what ended it.
        stop_at: where in the answer's text the stop string begins that ended it.
        stopped_text: the text before it, which has been decoded token by token; the whole answer's may differ where
            tokens are no valid text.
    """

    __slots__ = (
        "awaits", "computed", "digests", "draw_logprobs", "finished", "key", "logprobs", "pages", "prompt_logprobs",
        "prompt_top_logprobs", "published", "request", "sample", "stop_at", "stop_reason", "stopped_text", "tokens",
        "top_logprobs",
    )  # fmt: skip

    def __init__(self, request: Request, sample: int, digests: list[Digest]) -> None:
        self.request, self.sample = request, sample
        self.key = request.sample_key(sample)
        self.tokens = list(request.ids)
        self.pages: list[int] = []
        self.digests = digests
        self.computed = 0
        self.published = 0
        self.awaits: Digest | None = None
        self.logprobs: list[float] = []
        self.draw_logprobs: list[float] = []
        # Not lists of their own where nothing will be put in: many thousand sequences are common.
        scores_prompt = sample == 0 and request.params.prompt_logprobs
        self.top_logprobs: list[TopLogprobs] = [] if request.params.top_logprobs else _NOTHING
        self.prompt_logprobs: list[float] = [] if scores_prompt else _NOTHING
        self.prompt_top_logprobs: list[TopLogprobs] = [] if scores_prompt else _NOTHING
        self.stop_reason: int | str | None = None
        self.stop_at: int | None = None
        self.stopped_text: str | None = None
        self.finished = False

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.ids)

    @property
    def answer(self) -> list[int]:
        """The answer's tokens so far."""
        return self.tokens[len(self.request.ids) :]

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be drawn."""
        return len(self.tokens) - self.computed

    @property
    def in_prompt(self) -> bool:
        """Whether several tokens are still to be computed, in chunks: the prompt, or all after a preemption."""
        return self.pending > 1 or self.computed < len(self.request.ids)
