import functools
import json
import math

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.runs import CONFIG, conversations, gradients, pairs, run
from umedtrain.data.batch import collate
from umedtrain.losses import token_logprobs
from umedtrain.model.heads import RewardModel
from umedtrain.model.layout import Layout
from umedtrain.model.llama import Llama, initial_weight


def plain(kind):
    model = kind(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(5 * initial_weight(name, parameter.shape, CONFIG, seed=1))
    return model


@functools.cache
def one_by_one(task_name):
    """The same 16 examples in one process, each answer in a forward pass of its own, written out by hand."""
    if task_name == "sft":
        model, total, count = plain(Llama), 0.0, 0
        for example in conversations(16):
            segment = example.segments[0]
            tokens = torch.from_numpy(segment.tokens).long()
            logp = model.logits(model(tokens, Layout.packed([len(tokens)]))).log_softmax(-1)
            for place in range(1, len(tokens)):
                if segment.loss_mask[place]:
                    total, count = total - logp[place - 1, tokens[place]], count + 1
    else:
        model = plain(RewardModel if task_name == "reward" else Llama)
        total, count = 0.0, 16
        for example in pairs(16):
            prompt, *answers = (torch.from_numpy(segment.tokens).long() for segment in example.segments)
            values = []
            for answer in answers:
                tokens = torch.cat([prompt, answer])
                out = model(tokens, Layout.packed([len(tokens)]))
                if task_name == "dpo":
                    rows = model.logits(out).log_softmax(-1)[len(prompt) - 1 : -1]
                    sum_ = rows.gather(1, answer[:, None]).sum()
                    out = [0.5 * (sum_ - sum_.detach())]
                values.append(out[0])
            total = total - torch.nn.functional.logsigmoid(values[0] - values[1])
    (total / count).backward()
    return (total / count).item(), count, {n: p.grad for n, p in model.named_parameters()}


TASKS = ("sft", "dpo", "reward")


def all_gradients(world, budgets):
    return {(name, budget): gradients(world, name, budget) for name in TASKS for budget in budgets}


@pytest.mark.parametrize(("num_ranks", "budgets"), [(1, (1000, 24)), (2, (60,)), (4, (24,))])
def test_invariant_2_loss_and_gradient_do_not_depend_on_micro_batches_or_ranks(num_ranks, budgets):
    for results in run_ranks(num_ranks, all_gradients, budgets):
        for (name, budget), (loss, count, micro_batches, grads) in results.items():
            expected_loss, expected_count, expected_grads = one_by_one(name)
            assert (micro_batches == 1) == (budget == 1000)
            assert count == expected_count
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            for parameter, grad in grads.items():
                error = (grad - expected_grads[parameter]).norm() / expected_grads[parameter].norm()
                assert error < 1e-4, (name, budget, parameter)


def test_invariant_3_dpo_starts_at_ln_2(tmp_path):
    (totals, _), *_ = run_ranks(2, run, str(tmp_path), "dpo", {"max_tokens": 40})
    assert totals["loss"] == pytest.approx(math.log(2), abs=1e-7)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["reward_chosen"] == 0.0
    assert first["reward_rejected"] == 0.0
    assert first["accuracy"] == 0.5


@pytest.mark.parametrize("task_name", ["sft", "dpo", "reward"])
def test_training_lowers_the_loss(tmp_path, task_name):
    run_ranks(1, run, str(tmp_path), task_name, {"epochs": 12, "lr": 5e-3})
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]


def few_examples(world, folder):
    """Fewer examples than ranks: some ranks have none, and must still take part."""
    totals, weights = run(world, folder, "reward", {"count": 1, "batch": 1})
    others, _ = run(world, folder + "-sft", "sft", {"count": 1, "batch": 1})
    return totals["loss"], others["loss"], weights["score.weight"]


def test_ranks_without_examples_stay_in_step(tmp_path):
    alone = run_ranks(1, few_examples, str(tmp_path / "one"))[0]
    for result in run_ranks(4, few_examples, str(tmp_path / "four")):
        assert result[0] == pytest.approx(alone[0], rel=1e-5)
        assert result[1] == pytest.approx(alone[1], rel=1e-5)
        torch.testing.assert_close(result[2], alone[2], rtol=1e-4, atol=1e-6)


def test_a_batch_without_targets_is_legal_and_connected():
    model = plain(Llama)
    batch = collate([])
    hidden = model(batch.tokens_T, batch.layout)
    loss = -token_logprobs(hidden[batch.rows_N], model.lm_head_weight, batch.targets_N).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert batch.num_targets == 0
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def explode(world, folder):
    try:
        run(world, folder, "sft", {"lr": 1e30, "epochs": 6})
    except FloatingPointError as error:
        return str(error)
    return None


def test_a_gradient_that_is_not_finite_stops_every_rank(tmp_path):
    messages = run_ranks(2, explode, str(tmp_path))
    assert all("the gradient norm is nan" in message or "inf" in message for message in messages)
    assert messages[0] == messages[1]
