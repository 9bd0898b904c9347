"""Reading and writing files of records."""

import hashlib
import json
import sys
from pathlib import Path

import pytest

from umedtrain.records import (
    Answered,
    Conversation,
    Preference,
    Prompt,
    RecordError,
    file_fingerprint,
    read_answered,
    read_conversations,
    read_preferences,
    read_prompts,
    write_jsonl,
)

SAMPLES = Path(__file__).parents[2] / "shared" / "data" / "ultramedical_samples"
USER = {"role": "user", "content": "What is insulin?"}
ASSISTANT = {"role": "assistant", "content": "A hormone."}
OTHER = {"role": "assistant", "content": "A bone."}
DIALOG = [USER, ASSISTANT]
ULTRAMEDICAL = {
    "id": "MedQA,1592",
    "type": "Exam",
    "conversations": [
        {"from": "human", "value": "Which?\n\nA. x\nB. y"},
        {"from": "gpt", "value": "So, the answer is B."},
    ],
    "answer": "B",
    "score": "Justification: hard. Score: 8",
}
ULTRAMEDICAL_PREFERENCE = {
    "prompt_id": "WikiInstruct,8304",
    "label_type": "hard",
    "prompt": "What is insulin?",
    "chosen": DIALOG,
    "rejected": [USER, OTHER],
    "metadata": {"golden_answer": None, "chosen": {"model": "gpt-4", "rank": 1, "score": 5}},
}


def jsonl(folder, *rows):
    path = folder / "data.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_ultramedical_conversation(tmp_path):
    path = jsonl(tmp_path, ULTRAMEDICAL)
    messages = (
        {"role": "user", "content": "Which?\n\nA. x\nB. y"},
        {"role": "assistant", "content": "So, the answer is B."},
    )
    assert read_conversations(path) == [Conversation(messages, "MedQA,1592", "Exam", "B", str(path), 1)]
    assert read_prompts(path) == [Prompt(messages[:1], "MedQA,1592", "Exam", "B", str(path), 1)]


def test_ultramedical_preference(tmp_path):
    path = jsonl(tmp_path, ULTRAMEDICAL_PREFERENCE)
    metadata = ULTRAMEDICAL_PREFERENCE["metadata"]
    pair = Preference((USER,), "A hormone.", "A bone.", "WikiInstruct,8304", "hard", metadata, str(path), 1)
    assert read_preferences(path) == [pair]
    assert [prompt.messages for prompt in read_prompts(path)] == [(USER,)]


@pytest.mark.parametrize(
    "row, messages",
    [
        ({"messages": DIALOG}, DIALOG),
        ({"messages": DIALOG, "id": None, "answer": None}, DIALOG),
        ({"conversations": DIALOG}, DIALOG),
        (
            {"conversations": [{"from": "user", "value": USER["content"]}, {"from": "chatgpt", "value": "Yes."}]},
            [USER, {"role": "assistant", "content": "Yes."}],
        ),
        ({"messages": [*DIALOG, USER]}, [*DIALOG, USER]),
        ({"messages": [{"role": "system", "content": ""}, *DIALOG]}, [{"role": "system", "content": ""}, *DIALOG]),
        ({"system": "Be brief.", "conversations": DIALOG}, [{"role": "system", "content": "Be brief."}, *DIALOG]),
        ({"prompt": "What is insulin?", "completion": "A hormone."}, DIALOG),
        ({"prompt": [USER], "completion": [ASSISTANT]}, DIALOG),
    ],
)
def test_conversation_layouts(tmp_path, row, messages):
    [conversation] = read_conversations(jsonl(tmp_path, row))
    assert list(conversation.messages) == messages


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"prompt": "What is insulin?", "chosen": "A hormone.", "rejected": "A bone."}, [USER]),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]}, [USER]),
        ({"prompt": [USER], "chosen": DIALOG, "rejected": [USER, OTHER]}, [USER]),
        ({"chosen": DIALOG, "rejected": [USER, OTHER]}, [USER]),
        # White space around a prompt is not another prompt.
        ({"prompt": " What is insulin?\n", "chosen": DIALOG, "rejected": [USER, OTHER]}, [USER]),
        # A string prompt that is the first of several turns.
        (
            {"prompt": "What is insulin?", "chosen": [*DIALOG, USER, ASSISTANT], "rejected": [*DIALOG, USER, OTHER]},
            [*DIALOG, USER],
        ),
    ],
)
def test_preference_layouts(tmp_path, row, prompt):
    path = jsonl(tmp_path, row)
    [pair] = read_preferences(path)
    assert (list(pair.prompt), pair.chosen, pair.rejected) == (prompt, "A hormone.", "A bone.")
    assert [list(record.messages) for record in read_prompts(path)] == [prompt]


@pytest.mark.parametrize(
    "row, messages",
    [
        ({"prompt": "What is insulin?"}, [USER]),
        ({"prompt": "What is insulin?", "completion": "A hormone."}, [USER]),
        ({"prompt": [*DIALOG, USER]}, [*DIALOG, USER]),
        ({"messages": [USER]}, [USER]),
        ({"messages": [*DIALOG, USER, ASSISTANT]}, [*DIALOG, USER]),
        ({"system": "Be brief.", "prompt": "What is insulin?"}, [{"role": "system", "content": "Be brief."}, USER]),
    ],
)
def test_prompt_layouts(tmp_path, row, messages):
    [prompt] = read_prompts(jsonl(tmp_path, row))
    assert list(prompt.messages) == messages


@pytest.mark.parametrize(
    "row, prompt, answers",
    [
        ({"prompt": "What is insulin?", "answer": "A hormone."}, [USER], ["A hormone."]),
        ({"prompt": "What is insulin?", "completion": "A hormone."}, [USER], ["A hormone."]),
        ({"prompt": [USER], "completion": [ASSISTANT]}, [USER], ["A hormone."]),
        # Beside anything that can be judged, `answer` is the reference answer.
        ({"prompt": "What is insulin?", "completion": "A bone.", "answer": "A hormone."}, [USER], ["A bone."]),
        ({"conversations": DIALOG, "answer": "B"}, [USER], ["A hormone."]),
        ({"messages": [*DIALOG, USER, OTHER]}, [*DIALOG, USER], ["A bone."]),
        (
            {"system": "Be brief.", "messages": DIALOG},
            [{"role": "system", "content": "Be brief."}, USER],
            ["A hormone."],
        ),
        ({"messages": [USER], "completions": ["A", "", "B"], "logprobs": [0, 0, 0]}, [USER], ["A", "", "B"]),
        ({"prompt": "What is insulin?", "completions": ["A"]}, [USER], ["A"]),
        ({"prompt": "What is insulin?", "chosen": "A", "rejected": "B"}, [USER], ["A", "B"]),
        ({"chosen": DIALOG, "rejected": [USER, OTHER]}, [USER], ["A hormone.", "A bone."]),
    ],
)
def test_answered_layouts(tmp_path, row, prompt, answers):
    path = jsonl(tmp_path, "", {**row, "id": 7})
    assert read_answered(path) == [Answered(tuple(prompt), tuple(answers), "7", str(path), 2)]


def test_numeric_ids_become_text(tmp_path):
    assert read_prompts(jsonl(tmp_path, {"id": 7, "prompt": "Why?"}))[0].id == "7"


talks, pairs, prompts, answered = read_conversations, read_preferences, read_prompts, read_answered
MALFORMED_ROWS = [
    # reader, row, field, part of the message
    (talks, [1, 2], None, "must be an object, not a list"),
    (talks, {}, None, "its fields are: none"),
    (talks, {"text": "x", "prompt": "y"}, None, "its fields are: prompt, text"),
    (talks, {"messages": "hello"}, "messages", "must be a list of messages, not a string"),
    (talks, {"messages": []}, "messages", "empty list"),
    (talks, {"messages": ["hello"]}, "messages[0]", "must be an object with role and content"),
    (talks, {"messages": [{"content": "x"}]}, "messages[0].role", "unknown role None"),
    (talks, {"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "unknown role ['user']"),
    (talks, {"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from", "unknown role 'bot'"),
    (talks, {"messages": [USER, {"role": "assistant"}]}, "messages[1].content", "must be a string, not missing"),
    (talks, {"messages": [USER, {"role": "assistant", "content": 3}]}, "messages[1].content", "not a number"),
    (talks, {"messages": [USER, {"role": "assistant", "content": " \n"}]}, "messages[1].content", "is empty"),
    (talks, {"messages": [{"role": "user", "content": ""}, ASSISTANT]}, "messages[0].content", "is empty"),
    (talks, {"messages": [USER]}, "messages", "no assistant turn"),
    (talks, {"prompt": "x", "completion": [USER]}, "completion", "no assistant turn"),
    (talks, {"messages": DIALOG, "conversations": DIALOG}, "messages", "beside `conversations`"),
    (talks, {"system": "x", "messages": [{"role": "system", "content": "y"}, *DIALOG]}, "system", "beside"),
    (talks, {"system": 1, "messages": DIALOG}, "system", "must be a string"),
    (talks, {"prompt": "x", "completion": ""}, "completion", "is empty"),
    (talks, {"prompt": "", "completion": "x"}, "prompt", "is empty"),
    (talks, {"prompt": "x", "completion": {"a": 1}}, "completion", "not an object"),
    (talks, {"messages": DIALOG, "id": ["x"]}, "id", "must be a string, not a list"),
    (talks, {"messages": DIALOG, "id": True}, "id", "not true or false"),
    (talks, {"messages": DIALOG, "type": 1.5}, "type", "not a number"),
    (talks, {"messages": DIALOG, "answer": {"a": 1}}, "answer", "not an object"),
    (talks, '{"prompt": "x", "completion": "\\ud800"}', "completion", "surrogate"),
    (pairs, {"prompt": "x", "chosen": "y"}, None, "needs `chosen` and `rejected`"),
    (pairs, {"prompt": "x", "chosen": "y", "rejected": None}, None, "needs `chosen` and `rejected`"),
    (pairs, {"prompt": "x", "chosen": "y", "rejected": ""}, "rejected", "is empty"),
    (pairs, {"prompt": "x", "chosen": "y", "rejected": "y"}, "rejected", "equals `chosen`"),
    (pairs, {"prompt": "x", "chosen": 1, "rejected": "y"}, "chosen", "not a number"),
    (pairs, {"chosen": "y", "rejected": "z"}, None, "needs `prompt`"),
    (pairs, {"prompt": [ASSISTANT], "chosen": "y", "rejected": "z"}, "prompt", "end with the user's turn"),
    (pairs, {"prompt": "other", "chosen": DIALOG, "rejected": [USER, OTHER]}, "prompt", "is not the prompt"),
    (pairs, {"chosen": DIALOG, "rejected": [{"role": "user", "content": "?"}, OTHER]}, "rejected", "another prompt"),
    (pairs, {"prompt": "What is insulin?", "chosen": DIALOG, "rejected": "A bone."}, "rejected", "another prompt"),
    (pairs, {"chosen": [USER], "rejected": [USER, OTHER]}, "chosen[0]", "must be the assistant's turn"),
    (pairs, {**ULTRAMEDICAL_PREFERENCE, "metadata": "x"}, "metadata", "must be an object, not a string"),
    (pairs, {**ULTRAMEDICAL_PREFERENCE, "label_type": 3}, "label_type", "must be a string"),
    (prompts, {"question": "x"}, None, "needs `prompt`"),
    (prompts, {"prompt": ["x"]}, "prompt[0]", "must be an object"),
    (prompts, {"prompt": DIALOG}, "prompt", "no user turn"),
    (prompts, {"messages": [ASSISTANT]}, "messages", "no user turn"),
    (answered, {"text": "x"}, None, "needs `prompt` with `answer`, `completion` or `completions`"),
    (answered, {"prompt": "x"}, None, "its fields are: prompt"),
    (answered, {"completions": ["x"]}, None, "needs `messages` or `prompt` beside `completions`"),
    (answered, {"prompt": "x", "answer": ""}, "answer", "is empty"),
    (answered, {"prompt": "x", "completion": 3}, "completion", "not a number"),
    (answered, {"prompt": "x", "completion": [USER]}, "completion[0]", "must be the assistant's turn"),
    (answered, {"prompt": DIALOG, "answer": "x"}, "prompt", "no user turn right before the answer"),
    (answered, {"messages": [USER]}, "messages[0]", "must be the assistant's turn"),
    (answered, {"messages": [ASSISTANT]}, "messages", "no user turn right before the answer"),
    (answered, {"messages": DIALOG, "completions": ["x"]}, "messages", "no user turn right before the answer"),
    (answered, {"messages": [USER], "completions": []}, "completions", "is an empty list"),
    (answered, {"messages": [USER], "completions": "x"}, "completions", "must be a list of texts, not a string"),
    (answered, {"messages": [USER], "completions": ["x", 3]}, "completions[1]", "must be a string, not a number"),
    (answered, {"prompt": "x", "chosen": "y"}, None, "needs `chosen` and `rejected`"),
]  # fmt: skip


@pytest.mark.parametrize("read, row, field, message", MALFORMED_ROWS)
def test_malformed_rows_name_file_line_and_field(tmp_path, read, row, field, message):
    # A sound row and a blank line stand before it: the number must be the file's, not the row's.
    path = jsonl(tmp_path, {**ULTRAMEDICAL_PREFERENCE, "messages": DIALOG}, "", row)
    with pytest.raises(RecordError) as caught:
        read(path)
    error = caught.value
    assert (error.path, error.line, error.field) == (str(path), 3, field)
    place = f"{path}, line 3, {field}: " if field else f"{path}, line 3: "
    assert str(error).startswith(place)
    assert message in error.problem
    assert "\n" not in str(error)


GOOD_LINE = json.dumps({"messages": DIALOG}).encode()
MALFORMED_FILES = [
    # name, bytes, line, part of the message
    ("a.jsonl", b"", None, "is empty"),
    ("a.jsonl", b"\n \n", None, "is empty"),
    ("a.jsonl", b"\xef\xbb\xbf", None, "is empty"),
    ("a.json", b"", None, "is empty"),
    ("a.json", b"[]", None, "is empty"),
    ("a.jsonl", GOOD_LINE + b"\n{'a': 1}\n", 2, "not valid JSON at column 2"),
    ("a.jsonl", GOOD_LINE + b"\n" + GOOD_LINE[:-9], 2, "may be cut off"),
    ("a.jsonl", GOOD_LINE + b'\n{"messages": "\xc3', 2, "may be cut off"),
    ("a.jsonl", GOOD_LINE + b'\n{"messages": "\xff"}\n', 2, "not UTF-8 at byte 15 of the line"),
    ("a.jsonl", GOOD_LINE.decode().encode("utf-16"), 1, "not UTF-8"),
    ("a.jsonl", b"[" * 100_000 + b"\n", 1, "not JSON that can be read"),
    ("a.jsonl", b'{"id": ' + b"1" * 5000 + b"}\n", 1, "not JSON that can be read"),
    ("a.json", b'[\n{"a": 1},\n{"b" 2}]', 3, "not valid JSON at column 6"),
    ("a.json", b'[\n{"a": "\xff"}]', 2, "not UTF-8 at byte 10 of the file"),
    ("a.json", GOOD_LINE + b"\n" + GOOD_LINE, 2, "belongs in a .jsonl file"),
    ("a.json", GOOD_LINE, None, "must hold an array of objects, not an object"),
    ("a.json", b"[" + GOOD_LINE + b", 5]", 2, "must be an object, not a number"),
    ("a.csv", b"x", None, "unknown kind of file; known are .json, .jsonl, .parquet"),
]


@pytest.mark.parametrize("name, content, line, message", MALFORMED_FILES)
def test_malformed_files(tmp_path, name, content, line, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RecordError) as caught:
        read_conversations(path)
    assert caught.value.path == str(path)
    assert caught.value.line == line
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_line_errors_do_not_speak_of_a_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{]\n")
    with pytest.raises(RecordError) as caught:
        read_conversations(path)
    assert "cut off" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "folder.json"])
def test_unreadable_files(tmp_path, name):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(RecordError, match="cannot be read"):
        read_conversations(tmp_path / name)
    with pytest.raises(RecordError, match="cannot be read"):
        file_fingerprint(tmp_path / name)


def test_byte_order_mark_and_unusual_line_ends_are_read(tmp_path):
    separator = "one\u2028two\x85three"
    row = json.dumps({"prompt": separator, "completion": "x"}, ensure_ascii=False).encode()
    lines, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n" + row)
    array.write_bytes(b"\xef\xbb\xbf[" + row + b"]")
    assert [(record.messages[0]["content"], record.line) for record in read_conversations(lines)] == [
        (separator, 1),
        (separator, 3),
    ]
    assert read_conversations(array)[0].messages[0]["content"] == separator


def test_json_and_parquet_errors_name_the_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": DIALOG}, {"messages": [USER]}], indent=2))
    with pytest.raises(RecordError, match=r"a\.json, row 2, messages: has no assistant turn"):
        read_conversations(path)


def test_parquet_equals_json(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    for read, row in ((read_conversations, ULTRAMEDICAL), (read_preferences, ULTRAMEDICAL_PREFERENCE)):
        table, array = tmp_path / "a.parquet", tmp_path / "a.json"
        rows = [row, {key: value for key, value in row.items() if key not in ("id", "prompt_id", "answer")}]
        parquet.write_table(pyarrow.Table.from_pylist(rows), table)
        array.write_text(json.dumps(rows))
        from_table, from_array = read(table), read(array)
        assert [record.line for record in from_table] == [1, 2]
        for one, other in zip(from_table, from_array, strict=True):
            first, second = dict(vars(one)), dict(vars(other))
            for fields in (first, second):
                del fields["source"]
            if read is read_preferences:
                # A column has one shape for all rows, so parquet may add keys whose value is null.
                first["metadata"], second["metadata"] = (fields["metadata"]["chosen"] for fields in (first, second))
            assert first == second


def test_damaged_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([ULTRAMEDICAL] * 50), path)
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[:-20], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(RecordError, match=r"a\.parquet: not a parquet file"):
            read_conversations(path)
    parquet.write_table(pyarrow.Table.from_pylist([], pyarrow.schema([("id", pyarrow.string())])), path)
    with pytest.raises(RecordError, match="is empty"):
        read_conversations(path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RecordError, match=r"umedtrain\[data\]"):
        read_conversations(path)


def test_write_jsonl_is_read_back(tmp_path):
    path = tmp_path / "out.jsonl"
    write_jsonl(path, [{"prompt": "é\u2028\n", "completion": "x"}, ULTRAMEDICAL])
    assert [record.line for record in read_conversations(path)] == [1, 2]
    assert read_conversations(path)[0].messages[0]["content"] == "é\u2028\n"
    assert file_fingerprint(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("bad", [{"a": float("nan")}, {"a": "\ud800"}, {"a": object()}])
def test_failed_write_leaves_the_old_file(tmp_path, bad):
    path = tmp_path / "out.jsonl"
    write_jsonl(path, [{"a": 1}])
    with pytest.raises((ValueError, TypeError)):
        write_jsonl(path, [{"a": 2}, bad])
    assert path.read_text() == '{"a": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not SAMPLES.exists(), reason="samples of the released data are not here")
def test_released_samples():
    conversations = read_conversations(SAMPLES / "instructions.json")
    raw = json.loads((SAMPLES / "instructions.json").read_text())
    assert [record.messages[1]["content"] for record in conversations] == [
        row["conversations"][1]["value"] for row in raw
    ]
    assert {record.type for record in conversations} == {row["type"] for row in raw}
    assert [record.answer for record in conversations] == [row["answer"] for row in raw]
    pairs = read_preferences(SAMPLES / "preference.jsonl")
    assert len(pairs) == 45
    assert [pair.line for pair in pairs] == list(range(1, 46))
    assert [prompt.messages for prompt in read_prompts(SAMPLES / "preference.jsonl")] == [pair.prompt for pair in pairs]
    assert len(read_prompts(SAMPLES / "candidates.json")) == 9
