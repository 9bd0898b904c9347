"""Records to examples: what is learned, what is dropped and why."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.data.makers import ByteTokenizer, pair, segment
from umedtrain.data.example import (
    Dropped,
    Drops,
    Example,
    encode_all,
    encode_answers,
    encode_conversation,
    encode_preference,
    score_margin,
)
from umedtrain.data.sources import load_sources
from umedtrain.records import Conversation, Preference, RecordError, read_conversations, read_preferences
from umedtrain.text.chat import render_chat, render_prompt_and_answer

SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "ultramedical_samples"
TOKENIZER = ByteTokenizer()
MESSAGES = (
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cde"},
    {"role": "user", "content": "fg"},
    {"role": "assistant", "content": "hi"},
)
CONVERSATION = Conversation(MESSAGES, source="talk.jsonl", line=7)
PREFERENCE = Preference(MESSAGES[:3], "good", "not good", source="pairs.jsonl", line=9)


def learned_text(example: Example) -> str:
    """The targets as text, the end of a turn written as a bar."""
    ids = np.concatenate([part.tokens[part.loss_mask] for part in example.segments])
    return "".join("|" if id_ == 3 else chr(id_ - 10) for id_ in ids)


def test_conversation_learns_the_assistant_only():
    example = encode_conversation(CONVERSATION, TOKENIZER, max_tokens=1000)
    ids, mask = render_chat(list(MESSAGES), TOKENIZER)
    assert example.segments[0].tokens.tolist() == ids
    assert example.segments[0].loss_mask.tolist() == mask
    assert (example.segments[0].tokens.dtype, example.segments[0].loss_mask.dtype) == (np.int32, np.bool_)
    assert learned_text(example) == "cde|hi|"
    assert (example.num_tokens, example.num_targets) == (len(ids), 7)
    assert (example.source, example.line, example.full_tokens) == ("talk.jsonl", 7, None)


def test_conversation_learns_all():
    example = encode_conversation(CONVERSATION, TOKENIZER, max_tokens=1000, train_on="all")
    assert example.segments[0].loss_mask.all()
    # Nothing predicts the first token.
    assert example.num_targets == example.num_tokens - 1


def test_template_and_trim_are_passed_on():
    padded = Conversation(({"role": "user", "content": " a "}, {"role": "assistant", "content": " b "}))
    for template in ("llama3", "llama3.1", "chatml", "plain"):
        for trim in (True, False):
            example = encode_conversation(padded, TOKENIZER, max_tokens=1000, template=template, trim=trim)
            ids, _ = render_chat(list(padded.messages), TOKENIZER, template=template, trim=trim)
            assert example.segments[0].tokens.tolist() == ids
    auto = encode_conversation(padded, ByteTokenizer("plain"), max_tokens=1000, template="auto")
    assert auto.segments[0].tokens.tolist() == render_chat(list(padded.messages), TOKENIZER, template="plain")[0]


def test_long_conversation_is_dropped():
    length = encode_conversation(CONVERSATION, TOKENIZER, max_tokens=1000).num_tokens
    assert isinstance(encode_conversation(CONVERSATION, TOKENIZER, max_tokens=length), Example)
    dropped = encode_conversation(CONVERSATION, TOKENIZER, max_tokens=length - 1)
    assert dropped == Dropped(f"longer than {length - 1} tokens", "talk.jsonl", 7)


def test_truncation_cuts_the_end():
    whole = encode_conversation(CONVERSATION, TOKENIZER, max_tokens=1000)
    cut = encode_conversation(CONVERSATION, TOKENIZER, max_tokens=whole.num_tokens - 2, too_long="truncate")
    assert cut.segments[0].tokens.tolist() == whole.segments[0].tokens.tolist()[:-2]
    assert learned_text(cut) == "cde|h"
    assert cut.full_tokens == whole.num_tokens


def test_conversation_whose_targets_are_all_cut_is_dropped():
    first = int(np.flatnonzero(encode_conversation(CONVERSATION, TOKENIZER, max_tokens=1000).segments[0].loss_mask)[0])
    cut = partial(encode_conversation, CONVERSATION, TOKENIZER, too_long="truncate")
    assert cut(max_tokens=first) == Dropped(f"nothing to learn in the first {first} tokens", "talk.jsonl", 7)
    assert learned_text(cut(max_tokens=first + 1)) == "c"


@pytest.mark.parametrize("option", [{"too_long": "cut"}, {"train_on": "user"}])
def test_unknown_choice(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        encode_conversation(CONVERSATION, TOKENIZER, max_tokens=10, **option)


def test_preference_is_a_prompt_with_two_children():
    example = encode_preference(PREFERENCE, TOKENIZER, max_tokens=1000)
    prompt_ids, chosen_ids = render_prompt_and_answer(list(PREFERENCE.prompt), "good", TOKENIZER)
    _, rejected_ids = render_prompt_and_answer(list(PREFERENCE.prompt), "not good", TOKENIZER)
    assert [part.tokens.tolist() for part in example.segments] == [prompt_ids, chosen_ids, rejected_ids]
    assert [part.parent for part in example.segments] == [None, 0, 0]
    # The earlier answer "cde" in the prompt is context, not a target.
    assert learned_text(example) == "good|not good|"
    assert example.num_targets == len(chosen_ids) + len(rejected_ids)


def test_answers_end_with_the_token_that_ends_the_turn():
    for template, end in (("llama3", 3), ("chatml", 5)):
        example = encode_preference(PREFERENCE, TOKENIZER, max_tokens=1000, template=template)
        assert [part.tokens[-1] for part in example.segments[1:]] == [end, end]


def test_long_pair_is_dropped_whole():
    length = encode_preference(PREFERENCE, TOKENIZER, max_tokens=1000).num_tokens
    assert isinstance(encode_preference(PREFERENCE, TOKENIZER, max_tokens=length), Example)
    dropped = encode_preference(PREFERENCE, TOKENIZER, max_tokens=length - 1)
    assert dropped == Dropped(f"pair longer than {length - 1} tokens", "pairs.jsonl", 9)


def test_pair_that_trimming_makes_equal_is_dropped():
    spaced = Preference(MESSAGES[:1], "good", " good\n", source="pairs.jsonl", line=2)
    dropped = encode_preference(spaced, TOKENIZER, max_tokens=1000)
    assert dropped == Dropped("chosen and rejected are the same tokens", "pairs.jsonl", 2)
    assert isinstance(encode_preference(spaced, TOKENIZER, max_tokens=1000, trim=False), Example)


@pytest.mark.parametrize(
    ("metadata", "margin"),
    [
        ({"chosen": {"score": 4.5}, "rejected": {"score": 3}}, 1.5),
        ({"chosen": {"score": 1}, "rejected": {"score": 5}}, -4.0),
        ({}, None),
        ({"chosen": {"score": 4}}, None),
        ({"chosen": {"score": 4}, "rejected": "bad"}, None),
        ({"chosen": {"score": "4"}, "rejected": {"score": 3}}, None),
        ({"chosen": {"score": True}, "rejected": {"score": 0}}, None),
        ({"chosen": {"score": math.nan}, "rejected": {"score": 0}}, None),
        ({"chosen": {"score": math.inf}, "rejected": {"score": 0}}, None),
    ],
)
def test_the_margin_of_a_pair_is_the_difference_of_its_scores(metadata, margin):
    scored = dataclasses.replace(PREFERENCE, metadata=metadata)
    assert score_margin(scored) == margin
    assert encode_preference(scored, TOKENIZER, max_tokens=1000, margins=True).margins == (margin,)
    assert encode_preference(scored, TOKENIZER, max_tokens=1000).margins == ()


def test_answers_are_encoded_as_those_of_pairs_are():
    for template in ("llama3", "chatml"):
        pair = encode_preference(PREFERENCE, TOKENIZER, max_tokens=1000, template=template)
        texts = [PREFERENCE.rejected, "", PREFERENCE.chosen]
        prompt, answers = encode_answers(PREFERENCE.prompt, texts, TOKENIZER, template=template)
        assert prompt == pair.segments[0].tokens.tolist()
        assert [answers[2], answers[0]] == [part.tokens.tolist() for part in pair.segments[1:]]
        assert answers[1] == answers[0][-1:], "an empty answer is the end of the turn"


def test_targets_of_roots_and_children():
    assert segment([1, 2, 3], [1, 1, 0]).num_targets == 1
    assert segment([1, 2, 3], [1, 1, 0], parent=0).num_targets == 2
    assert pair().num_targets == 6


def test_drops_count_reasons_and_keep_the_first_places():
    drops = Drops()
    for line in range(1, 9):
        drops.add(Dropped("long", "a.jsonl", line))
    drops.add(Dropped("odd", "b.jsonl", 3))
    assert drops.count() == {"long": 8, "odd": 1}
    summary = drops.summary(first=2)
    assert summary == {
        "long": {"count": 8, "first": ["a.jsonl:1", "a.jsonl:2"]},
        "odd": {"count": 1, "first": ["b.jsonl:3"]},
    }
    assert json.loads(json.dumps(summary)) == summary
    assert len(drops.rows) == 9


def talk(answer: str, line: int) -> Conversation:
    return Conversation((MESSAGES[0], {"role": "assistant", "content": answer}), source="talk.jsonl", line=line)


def test_encode_all_keeps_order_and_counts_everything():
    records = [talk("x", 1), talk("x" * 500, 2), talk("y", 3), talk("z" * 500, 4)]
    encode = partial(encode_conversation, tokenizer=TOKENIZER, max_tokens=100)
    examples, drops = encode_all(records, encode)
    assert [example.line for example in examples] == [1, 3]
    assert [(row.line, row.reason) for row in drops.rows] == [
        (2, "longer than 100 tokens"),
        (4, "longer than 100 tokens"),
    ]
    examples, drops = encode_all(records, partial(encode, too_long="truncate"), progress="reading")
    assert [example.line for example in examples] == [1, 2, 3, 4]
    assert drops.count() == {"kept, truncated to 100 tokens": 2}


def test_nothing_left_names_file_and_reasons():
    encode = partial(encode_conversation, tokenizer=TOKENIZER, max_tokens=3)
    with pytest.raises(ValueError, match=r"talk\.jsonl: no example is left .*longer than 3 tokens: 2"):
        encode_all([talk("x", 1), talk("y", 2)], encode)
    with pytest.raises(ValueError, match="no records"):
        encode_all([], encode)


def test_load_sources(tmp_path):
    for name, answers in (("a", ["x", "y" * 500]), ("b", ["z"])):
        rows = [{"prompt": "q", "completion": answer} for answer in answers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    encode = partial(encode_conversation, tokenizer=TOKENIZER, max_tokens=100)
    sources, drops = load_sources(files, read_conversations, encode)
    assert [[learned_text(example) for example in source] for source in sources] == [["x|"], ["z|"]]
    assert drops.summary() == {"longer than 100 tokens": {"count": 1, "first": [f"{files[0]}:2"]}}
    with pytest.raises(ValueError, match=r"data\.files is empty"):
        load_sources([], read_conversations, encode)
    with pytest.raises(RecordError, match="line 1: needs `chosen`"):
        load_sources(files, read_preferences, encode)


@pytest.mark.skipif(not SAMPLES.exists(), reason="samples of the released data are not here")
def test_released_samples():
    conversations = read_conversations(SAMPLES / "instructions.json")
    examples, drops = encode_all(conversations, partial(encode_conversation, tokenizer=TOKENIZER, max_tokens=10_000))
    assert len(examples) == 50
    assert not drops.rows
    assert [learned_text(example)[:-1].encode("latin-1").decode() for example in examples] == [
        record.messages[1]["content"].strip() for record in conversations
    ]
    pairs = read_preferences(SAMPLES / "preference.jsonl")
    examples, drops = encode_all(pairs, partial(encode_preference, tokenizer=TOKENIZER, max_tokens=10_000))
    assert len(examples) + len(drops.rows) == 45
    assert all(len(example.segments) == 3 for example in examples)
