import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.material import DIALOG, DIALOGS, MEDICAL, SPELLED, chatml_json, llama2_style, small_sentencepiece
from umedtrain.text.chat import TEMPLATES, render_chat, render_prompt_and_answer
from umedtrain.text.specials import SMOLLM2_SYSTEM
from umedtrain.text.tiktoken_bpe import TiktokenTokenizer
from umedtrain.text.tokenizer import load_tokenizer

KINDS = ["tiktoken", "sentencepiece", "llama2", "chatml"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"\n\n": 256, b":\n": 257, b"\n\n\n": 258, b" \n": 259}
    return {
        "tiktoken": TiktokenTokenizer(ranks),
        "sentencepiece": small_sentencepiece(directory),
        "llama2": load_tokenizer(llama2_style(directory)),
        "chatml": load_tokenizer(chatml_json(directory)),
    }


def _templates(kind):
    if kind == "chatml":
        return ["chatml", "plain"]
    return ["plain"] if kind == "llama2" else ["llama3", "llama3.1", "plain"]


CASES = [(kind, template) for kind in KINDS for template in _templates(kind)]


def _text(template, messages, *, trim, prompt):
    """The text that the ids must spell, written plainly."""
    trim = trim and template != "chatml"
    turns = [(m["role"], m["content"].strip() if trim else m["content"]) for m in messages]
    if template == "chatml":
        turns = turns if turns[0][0] == "system" else [("system", SMOLLM2_SYSTEM), *turns]
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        return text + "<|im_start|>assistant\n" * prompt
    if template == "plain":
        ends = {"system": "\n\n", "user": "\n\n", "assistant": "[END]"}
        text = "".join(f"{role.title()}:\n{content}{ends[role]}" for role, content in turns)
        return "[BOS]" + text + "Assistant:\n" * prompt
    if template == "llama3.1":
        system, turns = (turns[0][1], turns[1:]) if turns[0][0] == "system" else ("", turns)
        dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
        turns = [("system", dates + system), *turns]
    text = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>" for role, content in turns)
    return "<|begin_of_text|>" + text + "<|start_header_id|>assistant<|end_header_id|>\n\n" * prompt


def _ends(tokenizer, template):
    name = {"llama3": "<|eot_id|>", "llama3.1": "<|eot_id|>", "chatml": "<|im_end|>"}.get(template)
    if name is None:
        names = ("<|end_of_text|>", "<|endoftext|>", "</s>")
        name = next(n for n in names if tokenizer.special_id(n) is not None)
    return name


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize(("kind", "template"), CASES)
def test_text_and_mask(made, kind, template, trim):
    tokenizer = made[kind]
    end = _ends(tokenizer, template)
    bos = "" if tokenizer.bos_id is None else tokenizer.decode([tokenizer.bos_id])
    for messages in DIALOGS:
        prompt = messages[-1]["role"] != "assistant"
        ids, mask = render_chat(messages, tokenizer, template=template, trim=trim, add_generation_prompt=prompt)
        assert len(ids) == len(mask)
        wanted = _text(template, messages, trim=trim, prompt=prompt).replace("[BOS]", bos).replace("[END]", end)
        assert tokenizer.decode(ids) == wanted
        strip = trim and template != "chatml"
        answers = [m["content"].strip() if strip else m["content"] for m in messages if m["role"] == "assistant"]
        trained = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
        assert trained.lstrip() == "".join(a + end for a in answers).lstrip()
        assert sum(m and i == tokenizer.special_id(end) for i, m in zip(ids, mask, strict=True)) == len(answers)


contents = st.one_of(st.text(max_size=12), st.sampled_from([*MEDICAL, *SPELLED, "\n", "\n\nx", " y", "z \n"]))


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize(("kind", "template"), CASES)
def test_prompt_is_a_prefix_and_mask_covers_the_answer(made, kind, template, trim):
    tokenizer = made[kind]
    end = tokenizer.special_id(_ends(tokenizer, template))

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), contents), max_size=3), contents, contents
    )
    def check(turns, question, answer):
        prompt = [*({"role": r, "content": c} for r, c in turns), {"role": "user", "content": question}]
        options = {"template": template, "trim": trim}
        prompt_ids, answer_ids = render_prompt_and_answer(prompt, answer, tokenizer, **options)
        full, mask = render_chat([*prompt, {"role": "assistant", "content": answer}], tokenizer, **options)
        assert prompt_ids + answer_ids == full
        assert (prompt_ids, mask[: len(prompt_ids)]) == (
            full[: len(prompt_ids)],
            render_chat(prompt, tokenizer, add_generation_prompt=True, **options)[1],
        )
        # The answer's ids are all trained on up to and with the end; after it comes at most ChatML's line break.
        trained = mask[len(prompt_ids) :]
        length = answer_ids.index(end) + 1
        assert trained == [True] * length + [False] * (len(answer_ids) - length)
        assert tokenizer.decode(answer_ids[length:]) == ("\n" if template == "chatml" else "")
        strip = trim and template != "chatml"
        shown = tokenizer.decode(answer_ids[: length - 1])
        assert shown.lstrip(" ") == (answer.strip() if strip else answer).lstrip(" ")

    check()


@pytest.mark.parametrize(("kind", "template"), CASES)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_spelled_specials_change_nothing(made, kind, template, role):
    tokenizer = made[kind]
    specials = set(tokenizer.special_tokens.values())

    def structure(content):
        messages = [{"role": role, "content": content}, {"role": "user", "content": "Why?"}]
        return [i for i in render_chat(messages, tokenizer, template=template)[0] if i in specials]

    for text in SPELLED:
        assert structure(text) == structure("harmless")


def test_a_line_break_before_content_joins_the_header_as_published(made):
    """Untrimmed ChatML: "user\\n" + "\\n\\nx" is one text for the tokenizer; an answer stays apart."""
    tokenizer = made["chatml"]
    one, two = tokenizer.encode("\n"), tokenizer.encode("\n\n")
    assert len(one) == len(two) == 1
    ids, _ = render_chat([{"role": "user", "content": "\n\nx"}], tokenizer)
    header = tokenizer.encode("user")
    at = ids.index(header[-1]) + 1
    assert ids[at : at + 2] == two + one
    prompt_ids, answer_ids = render_prompt_and_answer([{"role": "user", "content": "x"}], "\n\nx", tokenizer)
    assert prompt_ids[-1:] == one
    assert answer_ids[:2] == one * 2


def test_llama2_gets_no_space_after_headers(made):
    tokenizer = made["llama2"]
    prompt_ids, answer_ids = render_prompt_and_answer([{"role": "user", "content": "Hi"}], "Insulin.", tokenizer)
    assert tokenizer.decode(prompt_ids) == "<s>User:\nHi\n\nAssistant:\n"
    assert tokenizer.decode([prompt_ids[0], *answer_ids]) == "<s>Insulin.</s>"


def test_date(made):
    tokenizer = made["tiktoken"]
    ids, _ = render_chat(DIALOG, tokenizer, template="llama3.1", date="1 Feb 2025")
    assert "Today Date: 1 Feb 2025\n\nYou are a careful physician.<|eot_id|>" in tokenizer.decode(ids)
    with pytest.raises(ValueError, match="date='1 Feb 2025' has no place in the 'llama3' template"):
        render_chat(DIALOG, tokenizer, date="1 Feb 2025")


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hello", "must be a list of messages, not str"),
        (USER, "must be a list of messages, not dict"),
        ([USER, "hello"], r"messages\[1\] must have 'role' and 'content', but is str"),
        ([{"content": "x"}], r"messages\[0\] has no 'role'"),
        ([USER, {"role": "assistant"}], r"messages\[1\] has no 'content'"),
        (
            [{"role": "human", "content": "x"}],
            r"messages\[0\]\['role'\] is 'human'; use one of system, user, assistant",
        ),
        ([USER, {"role": "assistant", "content": None}], r"messages\[1\]\['content'\] must be text, not NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\['content'\] must be text, not list"),
        ([{"role": 3, "content": "x"}], r"messages\[0\]\['role'\] must be text, not int"),
        ([{**USER, "tool_calls": [1]}], r"messages\[0\]\['tool_calls'\] is set"),
    ],
)
def test_bad_messages_are_named(made, messages, message):
    with pytest.raises(ValueError, match=message):
        render_chat(messages, made["tiktoken"])


def test_bad_options_are_named(made):
    done = [USER, {"role": "assistant", "content": "y"}]
    with pytest.raises(ValueError, match=r"add_generation_prompt: messages\[1\] is already the assistant's"):
        render_chat(done, made["tiktoken"], add_generation_prompt=True)
    with pytest.raises(ValueError, match=r"template='llama4' is unknown; use one of llama3, llama3.1, chatml, plain"):
        render_chat(done, made["tiktoken"], template="llama4")
    for template in set(TEMPLATES) - {"plain"}:
        with pytest.raises(ValueError, match=r"vocabulary has no '<\|"):
            render_chat(done, made["llama2"], template=template)
