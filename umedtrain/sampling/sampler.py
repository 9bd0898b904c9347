"""Sampling from a Llama: the public face of `Engine`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from torch.distributed.tensor import DTensor

from umedtrain.model.llama import Llama
from umedtrain.sampling import sequence as in_engine
from umedtrain.sampling.engine import Engine
from umedtrain.sampling.params import Output, SamplingParams
from umedtrain.sampling.requests import Prompt, check_requests
from umedtrain.text.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
Scorer = Callable[[list[int], list[Output]], Sequence[float]]


class Sampler:
    """Continues prompts with a model, whose weights it reads anew at each call.

    A request's tokens are a function of the weights, its prompt and its parameters: each token is chosen by a hash of
    (seed, prompt, sample index, place in the answer), so neither the other requests of a call, their order, the budgets
    below nor `n` have a say in it; sample j of n = 4 is sample j of n = 16, and the same prompt with the same seed gets
    the same answers.

    How far that reaches depends on the logits. On a CPU with a C++ compiler, with weights in fp32, bf16, int8 or int4,
    a token's logits have the same bits in every batch, after a preemption, behind a cached or a fresh prefix, and on
    any number of threads: tokens and logprobs are equal bit for bit. Elsewhere matrix products of other sizes round
    otherwise: where two logits tie within that rounding, or a random number falls within it of the edge between two
    tokens, either may come out; in fp32 for about one token in a million. `exact=True` gives all matrix products the
    same number of rows and attends token by token; that costs up to 32 times the arithmetic for a single sequence. It
    has been checked on CPUs only.

    Keys and values of earlier calls are kept and reused as long as no parameter is written to.

    Args:
        model: a whole (unsharded) model, on any device, in any floating dtype.
        tokenizer: encodes and decodes text; None when prompts are ids and no text is wanted.
        eos_ids: ids that end every answer; None for those of the checkpoint (`model.eos_ids`, if there) and of the
            tokenizer.
        max_rows: samples that are computed at once, at most.
        cache_bytes: memory of keys and values, at most.
        exact: see above.
        quantize: compute with copies of the projections in so many bits.
        draft_tokens: guess so many tokens ahead and confirm them in one pass, without a change to the answers; 0 for
            not. Pays where guesses are mostly right and few samples run at once.
        draft: a smaller model with the same vocabulary that guesses; without one, guesses are what followed the last
            tokens where they occurred before, in the prompt or the answer.

    Raises:
        ValueError: for a model that is not a language model, or is sharded.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer | None = None,
        *,
        eos_ids: Sequence[int] | None = None,
        max_rows: int = 1024,
        cache_bytes: int = 2 * 2**30,
        exact: bool = False,
        quantize: Literal["int8", "int4"] | None = None,
        draft: Llama | None = None,
        draft_tokens: int = 0,
    ) -> None:
        if not isinstance(model, Llama):
            raise ValueError(f"model is a {type(model).__name__}; only a Llama language model can be sampled from")
        if isinstance(model.embed_tokens.weight, DTensor):
            # Ranks with different prompts make different numbers of forward passes, and would hang.
            raise ValueError("model is sharded; pass gather_model(model, device, dtype=...) to Sampler")
        for name, value in (("max_rows", max_rows), ("cache_bytes", cache_bytes)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if draft_tokens < 0 or (draft is not None and not draft_tokens):
            raise ValueError(f"draft_tokens must be at least {0 if draft is None else 1}, got {draft_tokens}")
        if draft is not None and draft.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"draft has a vocabulary of {draft.config.vocab_size} tokens, model one of {model.config.vocab_size}; "
                "a draft model must use the same tokenizer"
            )
        self.model, self.tokenizer = model, tokenizer
        if eos_ids is None:
            eos_ids = (*(getattr(model, "eos_ids", None) or ()), *(tokenizer.eos_ids if tokenizer else ()))
        self.eos_ids = tuple(sorted(set(eos_ids)))
        options = {"max_rows": max_rows, "cache_bytes": cache_bytes, "exact": exact, "quantize": quantize}
        options |= {"draft": draft, "draft_tokens": draft_tokens}
        self.engine = Engine(model, tokenizer, eos_ids=self.eos_ids, **options)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
        scorer: Scorer | None = None,
    ) -> list[list[Output]]:
        """`outputs[i][j]` is sample j of prompt i.

        Args:
            prompts: each a list of token ids; or a string, encoded as plain text after the BOS token; or a list of
                messages, rendered as a chat up to the start of the assistant's turn.
            params: for all prompts, or a list with one for each.
            progress: called with (finished samples, all samples) whenever a prompt has all of its own.
            scorer: with `best_of`: (prompt's ids, its outputs) -> a number each, of which the largest are best; the
                mean logprob of their tokens if None.

        Raises:
            ValueError: naming the prompt that is empty, too long, not text or ids, or holds an unknown id, or that
                alone needs more than `cache_bytes`.
        """
        outputs: dict[int, list[Output]] = {}
        finished, total = 0, None
        for index, answers in self.stream(prompts, params, scorer=scorer):
            outputs[index] = answers
            if progress:
                total = total or sum(asked.n for asked in _for_each(params, prompts))
                finished += len(answers)
                progress(finished, total)
        return [outputs[index] for index in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        scorer: Scorer | None = None,
    ) -> Iterator[tuple[int, list[Output]]]:
        """(index of the prompt, its outputs) as soon as all of them have finished; otherwise like `generate`.

        Whatever is unfinished when the iterator is closed is dropped.
        """
        requests = check_requests(prompts, _for_each(params, prompts), self.tokenizer, self.model.config)
        for request in requests:
            self.engine.check_fits(request)
        # The longest first, so that none of them is left to finish alone.
        order = sorted(range(len(requests)), key=lambda i: -(len(requests[i].ids) + requests[i].limit))
        samples = {index: self.engine.submit(requests[index]) for index in order}
        index_of = {requests[index]: index for index in order}
        unfinished = {request: request.params.samples for request in requests}
        try:
            while unfinished:
                ended = [sequence.request for sequence in self.engine.step() if sequence.finished]
                for request in ended:
                    unfinished[request] -= 1
                for request in [r for r in dict.fromkeys(ended) if not unfinished[r]]:
                    del unfinished[request]
                    index = index_of[request]
                    yield index, self.outputs(samples.pop(index), scorer)
        finally:
            self.engine.cancel([sequence for sequences in samples.values() for sequence in sequences])

    def score(self, prompts: Sequence[Prompt]) -> list[list[float | None]]:
        """Log-probability of each token of the prompts, computed as in `generate`; None for the first."""
        params = SamplingParams(max_tokens=0, prompt_logprobs=True)
        return [outputs[0].prompt_logprobs for outputs in self.generate(prompts, params)]

    def outputs(self, sequences: Sequence[in_engine.Sequence], scorer: Scorer | None = None) -> list[Output]:
        """The answers to a request, all of whose sequences have finished: the best `n` of them. The server's too."""
        request = sequences[0].request
        answers = [self.output(sequence, sequences[0]) for sequence in sequences]
        return _best(answers, request.ids, request.params, scorer)

    def output(self, sequence: in_engine.Sequence, first: in_engine.Sequence) -> Output:
        """What a finished sequence has become; `first` is sample 0 of its request, which scored the prompt."""
        params, answer = sequence.request.params, sequence.answer
        return Output(
            answer,
            self._text(sequence),
            sequence.logprobs,
            "length" if sequence.stop_reason is None else "stop",
            sequence.draw_logprobs,
            sequence.stop_reason,
            sequence.top_logprobs if params.top_logprobs else None,
            [None, *first.prompt_logprobs] if params.prompt_logprobs else None,
            [None, *first.prompt_top_logprobs] if params.prompt_logprobs and params.top_logprobs else None,
        )

    def _text(self, sequence: in_engine.Sequence) -> str | None:
        if self.tokenizer is None or sequence.stopped_text is not None:
            return sequence.stopped_text
        ended_by_token = isinstance(sequence.stop_reason, int)
        return self.tokenizer.decode(sequence.answer[:-1] if ended_by_token else sequence.answer)


def _for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, prompts: Sequence[Prompt]
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    return params


def _best(outputs: list[Output], ids: list[int], params: SamplingParams, scorer: Scorer | None) -> list[Output]:
    if params.samples == params.n:
        return outputs
    means = [sum(output.logprobs) / max(1, len(output.logprobs)) for output in outputs]
    scores = means if scorer is None else list(scorer(ids, outputs))
    if len(scores) != len(outputs):
        raise ValueError(f"scorer gave {len(scores)} numbers for {len(outputs)} outputs; it must give one for each")
    order = sorted(range(len(outputs)), key=lambda index: (-scores[index], index))
    return [outputs[index] for index in order[: params.n]]
