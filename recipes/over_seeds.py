"""One table over several seeds of `recipes/ultramedical.py`: every seed's figures, their means, and the steps.

    python recipes/over_seeds.py runs/demo runs/demo1 runs/demo2

Prints Markdown. The runs must have evaluated the same split, each with its own seed.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from umedtrain.evaluation.benchmark import METHODS
from umedtrain.evaluation.statistics import over_seeds
from umedtrain.evaluation.table import Cell, markdown_table
from umedtrain.recipes.ultramedical import MODELS, SHOWN, comparisons

Summary = dict[str, Any]


def read_summaries(runs: list[Path]) -> list[Summary]:
    """The runs' summaries by rising seed.

    Raises:
        ValueError: for a run that is not finished, two runs with one seed, or runs on different splits.
    """
    summaries = []
    for run in runs:
        path = run / "summary.json"
        if not path.exists():
            raise ValueError(f"{path} is not there: {run} is not a finished run of recipes/ultramedical.py")
        summaries.append(json.loads(path.read_text()))
    seeds = [summary["seed"] for summary in summaries]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the runs have the seeds {seeds}; every run needs its own")
    if len({summary["split"] for summary in summaries}) > 1:
        raise ValueError(f"the runs evaluated different splits: {', '.join(s['split'] for s in summaries)}")
    return sorted(summaries, key=lambda summary: summary["seed"])


def accuracies(summaries: list[Summary]) -> str:
    """Every model's figures, a row for each seed and one for their mean and range."""
    rows: list[list[Cell]] = []
    for model in MODELS:
        figures = [_figures(summary[model]) for summary in summaries]
        rows += [[model, str(s["seed"]), *row] for s, row in zip(summaries, figures, strict=True)]
        rows.append([model, "all", *(over_seeds(column) for column in zip(*figures, strict=True))])
    columns = [*(METHODS[method] for method in SHOWN), "unparsed", "reward accuracy"]
    return markdown_table(["model", "seed", *columns], rows)


def _figures(result: dict[str, Any]) -> list[float]:
    accuracy = [result["accuracy"][method]["value"] for method in SHOWN]
    return [*accuracy, result["unparsed"]["greedy"], result["reward_accuracy"]["value"]]


def steps(summaries: list[Summary]) -> str:
    """The paired differences of every seed, and their mean and range."""
    tables = [comparisons(summary) for summary in summaries]
    rows = []
    for same_step in zip(*tables, strict=True):
        differences = [comparison.difference for _, comparison in same_step]
        rows.append([same_step[0][0], *(comparison for _, comparison in same_step), over_seeds(differences)])
    return markdown_table(["step", *(f"seed {summary['seed']}" for summary in summaries), "all"], rows)


def main(runs: Annotated[list[Path], tyro.conf.Positional]) -> None:
    """Print the tables of several runs of recipes/ultramedical.py.

    Args:
        runs: Output folders, one per seed.
    """
    summaries = read_summaries(runs)
    first = summaries[0]["SFT"]
    print(f"{summaries[0]['split']} split, {first['questions']} questions a seed, chance {first['chance']:.3f}")
    print("majority class " + ", ".join(f"{summary['SFT']['majority_class']:.3f}" for summary in summaries) + "\n")
    print(accuracies(summaries))
    print(steps(summaries))


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
