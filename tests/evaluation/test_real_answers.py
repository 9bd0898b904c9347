"""Answers that six models gave to MedQA questions, and UltraMedical's own records."""

import json
from pathlib import Path

import pytest

from umedtrain.evaluation.extraction import extract, extract_letter
from umedtrain.evaluation.questions import format_question, read_questions

SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "ultramedical_samples"
pytestmark = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no ../shared/data/ultramedical_samples")

# One letter per model; - where a model named none, or several ("A, C, and D").
EXPECTED = {
    "medqa,0": "B-DDDD",
    "medqa,1": "AAAAAA",
    "medqa,2": "DABCCC",
    "medqa,3": "AAACCA",
    "medqa,5": "C-DCCB",
    "medqa,6": "DDDDDD",
    "medqa,8": "--BBBD",
    "medqa,9": "CDDD-D",
    "medqa,10": "C-CDCC",
}


def test_letters_of_six_models():
    path = SAMPLES / "candidates.json"
    rows = json.loads(path.read_text())
    read = {}
    for row, question in zip(rows, read_questions(path), strict=True):
        texts = [text for output in row["model_outputs"] for text in output.values()]
        read[row["id"]] = "".join(extract(question, text) or "-" for text in texts)
    assert read == EXPECTED


def test_ultramedical_records_read_back_exactly(tmp_path):
    rows = [row for row in json.loads((SAMPLES / "instructions.json").read_text()) if row["answer"]]
    path = tmp_path / "graded.json"
    path.write_text(json.dumps(rows))
    questions = read_questions(path)
    asked = [row["conversations"][0]["value"] for row in rows]
    assert [format_question(question) for question in questions] == asked
    choices = [(q, row) for q, row in zip(questions, rows, strict=True) if q.options]
    assert len(choices) == 25
    for question, row in choices:
        answer = row["conversations"][1]["value"]
        assert extract_letter(answer, len(question.options), question.options) == row["answer"]
        assert question.answer == row["answer"]
