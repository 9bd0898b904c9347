"""Sampling from a Llama: the public face. Requests are checked and planned in `batches`, run in `decode`."""

from collections.abc import Callable, Sequence

import torch
from torch.distributed.tensor import DTensor

from umedtrain.model.llama import Llama
from umedtrain.sampling.batches import Prompt, check_requests, plan_batches
from umedtrain.sampling.decode import BatchRun
from umedtrain.sampling.params import Output, SamplingParams
from umedtrain.text.tokenizer import Tokenizer

Progress = Callable[[int, int], None]


class Sampler:
    """Continues prompts with a model, whose weights it reads anew at each call.

    A request's tokens are a function of the weights, its prompt and its parameters: each token is chosen by a
    hash of (seed, prompt, sample index, position), so neither the other requests of a call, their order, the
    budgets below nor `n` have a say in it; sample j of n = 4 is sample j of n = 16, and the same prompt with
    the same seed gets the same answers. This holds up to the rounding of the logits, which may differ in
    their last bits with the number of rows in a matrix product: where two tokens' logits tie within that
    rounding (greedy), or a uniform number falls within it of the edge between two tokens or of a truncation,
    either token may come out. With fp32 weights that is about one token in a million.

    Args:
        model: a whole (unsharded) model, on any device, in any floating dtype.
        tokenizer: encodes and decodes text; None when prompts are ids and no text is wanted.
        eos_ids: ids that end every answer; None for those of the checkpoint (`model.eos_ids`, if there) and
            of the tokenizer.
        max_rows: samples in one batch, at most.
        cache_bytes: memory of one batch's keys and values, at most.

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
    ) -> None:
        if not isinstance(model, Llama):
            raise ValueError(f"model is a {type(model).__name__}; only a Llama language model can be sampled from")
        if isinstance(model.embed_tokens.weight, DTensor):
            # Ranks with different prompts make different numbers of forward passes, and would hang.
            raise ValueError("model is sharded; pass gather_model(model, device, dtype=...) to Sampler")
        for name, value in (("max_rows", max_rows), ("cache_bytes", cache_bytes)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.cache_bytes = max_rows, cache_bytes
        if eos_ids is None:
            eos_ids = (*(getattr(model, "eos_ids", None) or ()), *(tokenizer.eos_ids if tokenizer else ()))
        self.eos_ids = tuple(sorted(set(eos_ids)))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[list[Output]]:
        """`outputs[i][j]` is sample j of prompt i.

        Args:
            prompts: each a list of token ids; or a string, encoded as plain text after the BOS token; or a
                list of messages, rendered as a chat up to the start of the assistant's turn.
            params: for all prompts, or a list with one for each.
            progress: called with (finished samples, all samples) whenever samples have finished.

        Raises:
            ValueError: naming the prompt that is empty, too long, not text or ids, or holds an unknown id, or
                that alone needs more than `cache_bytes`.
        """
        config = self.model.config
        requests = check_requests(prompts, params or SamplingParams(), self.tokenizer, config)
        outputs: list[list] = [[None] * request.params.n for request in requests]
        numbers_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        cache_tokens = self.cache_bytes // (numbers_per_token * self.model.lm_head_weight.element_size())
        batches = plan_batches(requests, max_rows=self.max_rows, max_cache_tokens=cache_tokens)
        finished_before, total = 0, sum(request.params.n for request in requests)
        for batch in batches:
            run = BatchRun(self.model, batch, self.eos_ids)
            finished = finished_before
            for finished_here in run.steps():
                if progress and finished_before + finished_here > finished:
                    finished = finished_before + finished_here
                    progress(finished, total)
            finished_before += sum(piece.count for piece in batch)
            for index, sample, tokens, logprobs, stopped in run.results():
                text_tokens = tokens[:-1] if stopped else tokens
                text = None if self.tokenizer is None else self.tokenizer.decode(text_tokens)
                outputs[index][sample] = Output(tokens, text, logprobs, "stop" if stopped else "length")
        return outputs
