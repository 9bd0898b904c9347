import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.makers import ByteTokenizer
from umedtrain.config import PairsConfig
from umedtrain.data.care import (
    DUPLICATE,
    HELD_OUT,
    NOT_HIGHER,
    check_pairs,
    drop_duplicates,
    load_pairs,
    not_higher,
    prompt_key,
    shared_prompts,
    split_by_prompt,
)
from umedtrain.data.example import Dropped, encode_preference
from umedtrain.records import Preference, read_preferences

PLACES = iter(range(1, 10**6))


def pair(prompt="q", chosen="good", rejected="bad", *, scores=(), file="a.jsonl", line=None):
    metadata = {side: {"score": score} for side, score in zip(("chosen", "rejected"), scores, strict=False)}
    messages = ({"role": "user", "content": prompt},)
    return Preference(messages, chosen, rejected, metadata=metadata, source=file, line=line or next(PLACES))


def lines(pairs):
    return [(pair.source, pair.line) for pair in pairs]


def test_duplicates_go_within_and_across_files_and_the_first_stays():
    first = [pair(line=1), pair("other", line=2), pair(" q\n", "good ", line=3), pair(rejected="worse", line=4)]
    second = [pair(file="b.jsonl", line=1), pair("third", file="b.jsonl", line=2)]
    (kept, kept_too), repeated = drop_duplicates([first, second])
    assert lines(kept) == [("a.jsonl", 1), ("a.jsonl", 2), ("a.jsonl", 4)]
    assert lines(kept_too) == [("b.jsonl", 2)]
    assert lines(repeated) == [("a.jsonl", 3), ("b.jsonl", 1)]


def test_swapped_answers_and_another_role_are_no_duplicates():
    system = Preference(({"role": "system", "content": "q"},), "good", "bad")
    pairs = [pair(), pair(chosen="bad", rejected="good"), system]
    assert drop_duplicates([pairs]) == ([pairs], [])


def test_shared_prompts_are_found_whatever_their_answers():
    train = [pair("a", line=1), pair("b", line=2), pair("a ", "x", "y", line=3)]
    assert lines(shared_prompts(train, [pair("a", "other", "answers")])) == [("a.jsonl", 1), ("a.jsonl", 3)]
    assert shared_prompts(train, []) == []


@pytest.mark.parametrize(
    ("scores", "found"),
    [((5, 4.5), False), ((4, 4), True), ((3, 4), True), ((4,), False), ((), False), (("5", "6"), False)],
)
def test_pairs_whose_scores_contradict_their_order(scores, found):
    assert bool(not_higher([pair(scores=scores)])) == found


def findings():
    """Two files: a duplicate, a tie in line 3, a prompt of both files, and one that is held out."""
    first = [pair("a", line=1), pair("a", line=2), pair("b", scores=(2, 2), line=3), pair("c", scores=(2, 1), line=4)]
    second = [pair("c", "x", file="b.jsonl", line=1), pair("d", file="b.jsonl", line=2)]
    return [first, second], [pair("d"), pair("b", "x")]


def test_everything_found_is_counted_with_its_places_and_kept():
    sources, held_out = findings()
    kept, drops, report = check_pairs(sources, held_out)
    assert [len(pairs) for pairs in kept] == [3, 2]
    assert drops.summary() == {DUPLICATE: {"count": 1, "first": ["a.jsonl:2"]}}
    assert report == {
        "pairs": 5,
        "prompts": 4,
        "pairs with scores": 2,
        NOT_HIGHER: {"count": 1, "first": ["a.jsonl:3"]},
        HELD_OUT: {"count": 2, "first": ["a.jsonl:3", "b.jsonl:2"]},
        "prompt of a.jsonl stands in b.jsonl too": {"count": 1, "first": ["b.jsonl:1"]},
    }
    assert json.loads(json.dumps(report)) == report


def test_findings_are_dropped_if_asked_each_pair_once():
    sources, held_out = findings()
    kept, drops, report = check_pairs(sources, held_out, drop=[HELD_OUT, NOT_HIGHER])
    assert [lines(pairs) for pairs in kept] == [[("a.jsonl", 1), ("a.jsonl", 4)], [("b.jsonl", 1)]]
    assert drops.count() == {DUPLICATE: 1, NOT_HIGHER: 1, HELD_OUT: 1}
    assert report[HELD_OUT]["count"] == 2


def test_pairs_in_order_report_nothing():
    assert check_pairs([[pair("a", scores=(2, 1)), pair("b")]])[2] == {
        "pairs": 2,
        "prompts": 2,
        "pairs with scores": 1,
    }


@given(
    prompts=st.text("abcdefgh", max_size=40),
    share=st.sampled_from([0.25, 0.5]),
    seed=st.integers(0, 5),
)
def test_a_split_keeps_a_prompts_pairs_together_and_their_order(prompts, share, seed):
    pairs = [pair(prompt) for prompt in [*"abcdefgh", *prompts]]
    rest, part = split_by_prompt(pairs, share, seed)
    assert not {prompt_key(p) for p in rest} & {prompt_key(p) for p in part}
    assert len({prompt_key(p) for p in part}) == 8 * share
    assert sorted(lines(rest + part)) == sorted(lines(pairs))
    assert lines(rest) == sorted(lines(rest))
    backwards = split_by_prompt(pairs[::-1], share, seed)[1]
    assert lines(backwards) == lines(part)[::-1]


def test_a_split_depends_on_the_seed_and_refuses_an_empty_part():
    pairs = [pair(str(number)) for number in range(50)]
    assert lines(split_by_prompt(pairs, 0.5, 1)[1]) != lines(split_by_prompt(pairs, 0.5, 2)[1])
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="share must be between 0 and 1"):
            split_by_prompt(pairs, share, 0)
    with pytest.raises(ValueError, match="of 1 prompts leaves one part without any"):
        split_by_prompt(pairs[:1], 0.5, 0)


@given(max_tokens=st.integers(1, 200), chosen=st.integers(1, 60), rejected=st.integers(1, 60))
def test_a_pair_is_whole_or_dropped_never_cut_on_one_side(max_tokens, chosen, rejected):
    one = pair(chosen="c" * chosen, rejected="r" * rejected)
    result = encode_preference(one, ByteTokenizer(), max_tokens=max_tokens)
    if isinstance(result, Dropped):
        assert encode_preference(one, ByteTokenizer(), max_tokens=10**6).num_tokens > max_tokens
    else:
        assert [len(segment.tokens) for segment in result.segments[1:]] == [chosen + 1, rejected + 1]
        assert all(segment.tokens[-1] in ByteTokenizer.eos_ids for segment in result.segments[1:])


def write(path, *rows):
    keys = ("prompt", "chosen", "rejected")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    return str(path)


def encode(one):
    return encode_preference(one, ByteTokenizer(), max_tokens=100)


def test_load_pairs_counts_what_care_and_encoding_drop(tmp_path):
    path = write(tmp_path / "a.jsonl", ("p", "x", "y"), ("p", "x", "y"), ("q", "x" * 200, "y"), ("h", "x", "y"))
    held_out = write(tmp_path / "h.jsonl", ("h", "1", "2"))
    sources, drops, report = load_pairs([path], PairsConfig(held_out=(held_out,), drop_held_out=True), encode)
    assert [[example.line for example in examples] for examples in sources] == [[1]]
    assert drops.count() == {DUPLICATE: 1, HELD_OUT: 1, "pair longer than 100 tokens": 1}
    assert report[HELD_OUT] == {"count": 1, "first": [f"{path}:4"]}


def test_a_file_that_care_empties_is_named_with_the_reason(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", ("p", "x", "y")) for name in "ab"]
    with pytest.raises(ValueError, match=r"b\.jsonl: no pair is left to train on \(same prompt and answers.*: 1\)"):
        load_pairs(files, PairsConfig(), encode)
    with pytest.raises(ValueError, match=r"data\.files is empty"):
        load_pairs([], PairsConfig(), encode)


def test_a_share_of_the_prompts_is_kept_out_and_written_to_be_read_again(tmp_path):
    rows = [(f"p{number % 8}", f"x{number}", "y") for number in range(16)]
    files = [write(tmp_path / "a.jsonl", *rows[:10]), write(tmp_path / "b.jsonl", *rows[10:])]
    kept_out = tmp_path / "held_out.jsonl"
    sources, drops, report = load_pairs(files, PairsConfig(keep_out=0.25), encode, kept_out=kept_out)
    apart = read_preferences(kept_out)
    assert len(apart) == report["kept out of training"]["count"] == 4
    assert report["kept out of training"]["prompts"] == len(set(map(prompt_key, apart))) == 2
    left = {(example.source, example.line) for examples in sources for example in examples}
    trained = [one for path in files for one in read_preferences(path) if (one.source, one.line) in left]
    assert len(trained) == 12
    assert not shared_prompts(trained, apart)
    assert drops.rows == []
    with pytest.raises(ValueError, match=r"^pairs\.keep_out: share must be between 0 and 1, got 1\.5"):
        load_pairs(files, PairsConfig(keep_out=1.5), encode)
