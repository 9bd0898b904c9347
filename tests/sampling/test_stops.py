"""Text as it grows, and where an answer ends."""

import random

import pytest

import umedtrain as ut
from tests.sampling.serving import tiny_model
from tests.sampling.test_sampler import LetterTokenizer, tiny
from tests.text.material import MEDICAL, chatml_json, llama2_style, small_sentencepiece
from umedtrain.sampling import Sampler, SamplingParams
from umedtrain.sampling.stops import GrowingText, find_stop, held_back
from umedtrain.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece", "unigram", "llama2"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte-level":
        return load_tokenizer(chatml_json(folder))
    if request.param == "llama2":
        return load_tokenizer(llama2_style(folder))
    model_type = "unigram" if request.param == "unigram" else "bpe"
    return small_sentencepiece(folder, model_type=model_type)


def texts_of(tokenizer):
    """Real ones, random ids, bytes that are no characters, and special tokens in between."""
    numbers = random.Random(0)
    rare = [tokenizer.encode(text) for text in ("🙂", "👩🏽‍⚕️", "糖", "\x00", "é")]
    pieces = [i for ids in rare for i in ids]
    yield from (tokenizer.encode(text) for text in MEDICAL)
    for length in (1, 2, 3, 10, 60):
        for _ in range(8):
            yield [numbers.randrange(tokenizer.vocab_size) for _ in range(length)]
            yield [numbers.choice(pieces) for _ in range(length)]
            yield [numbers.choice([*tokenizer.eos_ids, *tokenizer.encode(" a b")]) for _ in range(length)]


def test_growing_text_is_the_text_of_the_whole(tokenizer):
    for ids in texts_of(tokenizer):
        text = GrowingText(tokenizer)
        shown = ""
        for i in ids:
            shown += text.push(i)
            assert shown == text.text
        shown += text.flush()
        assert shown == text.text == tokenizer.decode(ids), ids


def test_characters_of_several_tokens_are_shown_when_they_are_whole(tokenizer):
    for character in ("🙂", "糖", "👩🏽‍⚕️"):
        text, ids = GrowingText(tokenizer), tokenizer.encode(f"x{character}y")
        pushed = [text.push(i) for i in ids]
        assert "\ufffd" not in "".join(pushed)
        assert "".join(pushed) == f"x{character}y"


def test_an_answer_of_broken_characters_takes_no_square_time():
    """A byte that never becomes a character does not make each later token decode all before it."""

    class Counting(LetterTokenizer):
        decoded = 0

        def decode(self, ids, **options):
            Counting.decoded += len(ids)
            return "\ufffd" * len(ids)

    text = GrowingText(Counting())
    for _ in range(2000):
        text.push(1)
    text.flush()
    assert text.text == "\ufffd" * 2000
    assert Counting.decoded < 2000 * 100


# --- stop strings


def first_match(text, stops):
    """By the end of the match, as an answer that grows by characters meets it; of several there, the longest."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return end - len(stop), stop
    return None


def test_found_stops_begin_first_and_are_longest():
    assert find_stop("abcabc", ["c", "bc"]) == (1, "bc")
    assert find_stop("abcabc", ["c", "bc"], known=3) == (4, "bc")
    assert find_stop("abcabc", ["x"]) is None
    assert find_stop("aaa", ["aa"], known=2) == (1, "aa")
    assert find_stop("", ["a"]) is None


def test_held_back_is_what_a_stop_may_begin_with():
    assert held_back("some ##", ["###"]) == 2
    assert held_back("some ", ["###"]) == 0
    assert held_back("User", ["User:", "er..."]) == 4
    assert held_back("a", ["a"]) == 0  # a whole match is no beginning of one
    assert held_back("", ["abc"]) == held_back("abc", []) == 0


class PairTokenizer(LetterTokenizer):
    """Each id is two or three letters of {a, b, c}, so that stop strings lie across tokens."""

    eos_ids = ()

    def decode(self, ids, *, skip_special=False):
        return "".join("".join("abc"[i // 3**k % 3] for k in range(2 + i % 2)) for i in ids)


def test_answers_are_cut_at_the_first_match_and_end_with_its_token():
    model, tokenizer, numbers = tiny(), PairTokenizer(), random.Random(0)
    free = SamplingParams(max_tokens=25, n=4, seed=1)
    prompts = [[1], [2, 3]]
    whole = Sampler(model, tokenizer, eos_ids=()).generate(prompts, free)
    crossing = 0
    for _ in range(25):
        stops = tuple(
            "".join(numbers.choice("abc") for _ in range(numbers.randrange(1, 7)))
            for _ in range(numbers.randrange(1, 4))
        )
        asked = SamplingParams(max_tokens=25, n=4, seed=1, stop=stops)
        for uncut, cut in zip(whole, Sampler(model, tokenizer, eos_ids=()).generate(prompts, asked), strict=True):
            for all_of_it, answer in zip(uncut, cut, strict=True):
                match = first_match(all_of_it.text, stops)
                if match is None:
                    assert answer == all_of_it
                    continue
                assert answer.finish_reason == "stop"
                assert answer.stop_reason in stops
                count = len(answer.tokens)
                assert answer.tokens == all_of_it.tokens[:count]
                assert answer.logprobs == all_of_it.logprobs[:count]
                # It ends with the token that completed a match, and its text before the match that begins first.
                decoded, shorter = (tokenizer.decode(answer.tokens[:end]) for end in (count, count - 1))
                assert not any(stop in shorter for stop in stops)
                at = min(found for stop in stops if (found := decoded.find(stop)) >= 0)
                assert answer.text == decoded[:at]
                assert decoded.startswith(answer.stop_reason, at)
                crossing += at < len(shorter)
    assert crossing > 5


def test_stop_strings_wait_for_min_tokens():
    model, tokenizer = tiny(), PairTokenizer()
    asked = {"max_tokens": 25, "n": 4, "seed": 1}
    whole = Sampler(model, tokenizer, eos_ids=()).generate([[1]], SamplingParams(**asked))[0]
    late = Sampler(model, tokenizer, eos_ids=()).generate([[1]], SamplingParams(**asked, stop="a", min_tokens=7))[0]
    for all_of_it, answer in zip(whole, late, strict=True):
        assert answer.tokens == all_of_it.tokens[: len(answer.tokens)]
        early = len(tokenizer.decode(answer.tokens[:6]))
        assert len(answer.tokens) >= 7
        assert "a" not in answer.text[early:]


def test_a_stop_token_wins_over_a_string_and_is_not_in_the_text():
    model, tokenizer = tiny(), PairTokenizer()
    asked = {"max_tokens": 30, "n": 20, "seed": 1}
    sampler = Sampler(model, tokenizer, eos_ids=(5, 6, 7, 8, 9))
    outputs = sampler.generate([[1]], SamplingParams(**asked, stop="bbb"))[0]
    assert {type(answer.stop_reason) for answer in outputs} >= {int, str}
    for answer in outputs:
        if isinstance(answer.stop_reason, int):
            assert answer.tokens[-1] == answer.stop_reason
            assert answer.text == tokenizer.decode(answer.tokens[:-1])
    ignoring = sampler.generate([[1]], SamplingParams(**asked, ignore_eos=True, stop_token_ids=(9,)))[0]
    assert all(answer.stop_reason in (9, None) for answer in ignoring)
    assert any({5, 6, 7, 8} & set(answer.tokens) for answer in ignoring)


def test_stop_strings_on_real_tokenizers(tokenizer):
    """Strings taken from the middle of free answers are found there again, whatever the tokens."""
    model = tiny(vocab_size=tokenizer.vocab_size)
    free = Sampler(model, tokenizer, eos_ids=()).generate([[5]], SamplingParams(max_tokens=20, seed=3, n=4))[0]
    for sample, answer in enumerate(free):
        stop = answer.text[len(answer.text) // 2 :][:3]
        asked = SamplingParams(max_tokens=20, seed=3, n=4, stop=stop)
        ended = Sampler(model, tokenizer, eos_ids=()).generate([[5]], asked)[0][sample]
        assert ended.text == answer.text[: answer.text.index(stop)]
        assert ended.stop_reason == stop
        assert ended.tokens == answer.tokens[: len(ended.tokens)]


def test_the_text_before_a_stop_string_is_that_which_was_searched(tmp_path):
    # Bytes that are no text: decoded in one piece, this tokenizer shows other characters for them than in parts.
    model, tokenizer = tiny_model(tmp_path)
    ut.save_model(model, tmp_path / "saved", tokenizer=tokenizer)
    tokenizer = ut.load_tokenizer(tmp_path / "saved")
    alone = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    bias = {i: 20.0 for i, text in enumerate(alone) if text == "\ufffd"} | {tokenizer.encode("a")[-1]: 21.0}
    params = [ut.SamplingParams(max_tokens=40, stop="a", seed=seed, logit_bias=bias) for seed in range(40)]
    stopped = 0
    for (output,) in ut.Sampler(model, tokenizer).generate([[5, 6]] * len(params), params):
        growing = GrowingText(tokenizer)
        for token in output.tokens:
            growing.push(token)
        if output.stop_reason == "a":
            stopped += "\ufffd" in output.text
            assert output.text == growing.text[: growing.text.index("a")]
    assert stopped > 5
