import pytest
import torch

from tests.sampling.test_sampler import PROMPTS, tiny
from umedtrain.kernels import cpu
from umedtrain.sampling import Sampler, SamplingParams
from umedtrain.sampling.graphs import GraphedDecoder


@pytest.fixture
def in_pytorch(monkeypatch):
    """The path that GPUs take, on the CPU."""
    monkeypatch.setattr(cpu, "available", lambda: False)


def graphed(model, recorded, **options):
    """A sampler whose recordings are functions that run again what was recorded."""
    sampler = Sampler(model, eos_ids=(3,), **options)
    engine = sampler.engine

    def capture(run):
        recorded.append(run)
        run()
        return run

    engine.decoder = GraphedDecoder(engine.decoder, scratch_page=engine.pool.num_pages, table_width=4, capture=capture)
    return sampler


def test_replayed_passes_give_what_plain_ones_give(in_pytorch):
    model, recorded = tiny(), []
    params = [SamplingParams(max_tokens=3 + 5 * i, temperature=0.8, seed=1, n=2) for i in range(len(PROMPTS))]
    plain = Sampler(model, eos_ids=(3,), exact=True).generate(PROMPTS, params)
    replayed = graphed(model, recorded, exact=True).generate(PROMPTS, params)
    assert [[o.tokens for o in many] for many in replayed] == [[o.tokens for o in many] for many in plain]
    assert [[o.logprobs for o in many] for many in replayed] == [[o.logprobs for o in many] for many in plain]
    assert 1 < len(recorded) < 8  # one for each bucket of rows, not for each number of them


def test_surplus_rows_leave_the_cache_of_others_alone(in_pytorch):
    model, recorded = tiny(), []
    sampler = graphed(model, recorded)
    pages = sampler.engine.cache.keys[0]
    pages[:-1] = float("nan")
    outputs = sampler.generate(PROMPTS[:3], SamplingParams(max_tokens=8, temperature=0))
    assert all(torch.tensor(many[0].logprobs).isfinite().all() for many in outputs)
    used = pages[:-1].isfinite().all(-1).all(-1).sum()
    written = sum(len(prompt) + len(many[0].tokens) - 1 for prompt, many in zip(PROMPTS[:3], outputs, strict=True))
    assert used <= written + 3 * 16  # rounds run on after a stop token


def test_recordings_do_not_outlive_a_change_of_weights(in_pytorch):
    model, recorded = tiny(), []
    sampler, params = graphed(model, recorded), SamplingParams(max_tokens=5, temperature=0)
    sampler.generate(PROMPTS[:1], params)
    before = len(recorded)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    changed = sampler.generate(PROMPTS[:1], params)
    assert len(recorded) > before
    assert changed[0][0].logprobs == pytest.approx(
        Sampler(model, eos_ids=(3,)).generate(PROMPTS[:1], params)[0][0].logprobs
    )
