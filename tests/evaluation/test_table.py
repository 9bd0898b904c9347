import json
import math

import pytest

from umedtrain.evaluation.statistics import Comparison, Estimate, Spread
from umedtrain.evaluation.table import format_cell, markdown_table, text_table, write_results
from umedtrain.evaluation.votes import SampledScores

COLUMNS = ["model", "accuracy", "n"]
ROWS = [["SFT", Estimate(0.72345, 0.69, 0.7534, 800), 800], ["a|b", None, 80]]


def test_cells():
    assert format_cell(Estimate(0.72345, 0.69, 0.7534, 800)) == "0.723 [0.690, 0.753]"
    assert format_cell(Comparison(0.0312, 0.002, 0.06, 0.0371, 800)) == "+0.031 [+0.002, +0.060] p=0.037"
    assert format_cell(Comparison(-0.03, -0.06, 0.0, 0.0004, 800), digits=2) == "-0.03 [-0.06, +0.00] p<0.001"
    assert format_cell(Spread(0.72, 0.7, 0.74, 0.02, 3), digits=2) == "0.72 (0.70 to 0.74, sd 0.02)"
    assert format_cell(Spread(0.72, 0.72, 0.72, None, 1), digits=2) == "0.72 (0.72 to 0.72)"
    assert [format_cell(cell) for cell in (0.5, 7, "x", None)] == ["0.500", "7", "x", "-"]


def test_text():
    assert text_table(COLUMNS, ROWS) == (
        "model              accuracy    n\n"
        "-----  --------------------  ---\n"
        "SFT    0.723 [0.690, 0.753]  800\n"
        "a|b                       -   80\n"
    )


def test_markdown():
    assert markdown_table(COLUMNS, ROWS) == (
        "| model | accuracy | n |\n| --- | ---: | ---: |\n| SFT | 0.723 [0.690, 0.753] | 800 |\n| a\\|b | - | 80 |\n"
    )


def test_rows_must_fit():
    for table in (text_table, markdown_table):
        with pytest.raises(ValueError, match="row 1 has 2 cells, the table 3 columns"):
            table(COLUMNS, [ROWS[0], ROWS[1][:2]])


def test_json(tmp_path):
    path = tmp_path / "run" / "results.json"
    scores = SampledScores(2, {"mean": (0.5, 1.0)}, 0.25, None)
    write_results(path, {"set": "MedQA", "accuracy": ROWS[0][1], "sampled": scores, "models": [path]})
    assert json.loads(path.read_text()) == {
        "set": "MedQA",
        "accuracy": {"value": 0.72345, "low": 0.69, "high": 0.7534, "n": 800},
        "sampled": {"k": 2, "scores": {"mean": [0.5, 1.0]}, "unparsed_rate": 0.25, "truncated_rate": None},
        "models": [str(path)],
    }
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON"):
        write_results(path, {"accuracy": math.nan})
    with pytest.raises(TypeError, match="set"):
        write_results(path, {"ids": {1}})
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]
