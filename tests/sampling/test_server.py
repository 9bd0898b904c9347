"""The server's protocol, with the official client and lm-evaluation-harness."""

import json
import math

import pytest

import umedtrain as ut
from tests.sampling.serving import CHAT, chatml_model, running, tiny_model, wait_for

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx2")

STOPS = ["e", "in", "��"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with running(*tiny_model(tmp_path_factory.mktemp("served"))) as live:
        yield live


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0, timeout=30) as client:
        yield client
    assert served.idle()


@pytest.fixture(scope="module")
def direct(served):
    """The same model without a server in between."""
    model, tokenizer = served.sampler.model, served.sampler.tokenizer
    sampler = ut.Sampler(model, tokenizer)
    return lambda prompts, **asked: sampler.generate(prompts, ut.SamplingParams(**asked))


def post(served, path, body, **options):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | options.pop("headers", {})
    return httpx.post(served.url + path, content=content, headers=headers, timeout=30, **options)


# --- completions


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completions_are_the_samplers(client, direct):
    prompts = ["Insulin regulates", "Give 2.5 µg"]
    wanted = direct(prompts, max_tokens=40, n=3, seed=7, temperature=0.8, top_p=0.9)
    found = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=40, n=3, seed=7, temperature=0.8, top_p=0.9
    )
    outputs = [output for samples in wanted for output in samples]
    assert [choice.index for choice in found.choices] == list(range(6))
    assert [choice.text for choice in found.choices] == [output.text for output in outputs]
    assert [choice.finish_reason for choice in found.choices] == [output.finish_reason for output in outputs]
    assert {output.finish_reason for output in outputs} == {"stop", "length"}
    assert found.usage.completion_tokens == sum(len(output.tokens) for output in outputs)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_prompts_of_all_kinds(client, direct, served):
    tokenizer = served.sampler.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode("Insulin")]
    wanted = direct([ids], max_tokens=8, seed=1)[0][0].text
    for prompt, times in ((ids, 1), ("Insulin", 1), (["Insulin"], 1), ([ids, ids], 2)):
        found = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, seed=1)
        assert [choice.text for choice in found.choices] == [wanted] * times


def test_a_seed_means_equal_answers_and_none_means_different_ones(client):
    def texts(**options):
        return [c.text for c in client.completions.create(model="tiny", prompt="a", max_tokens=20, **options).choices]

    assert texts(seed=3) == texts(seed=3)
    assert texts() != texts()
    assert len(set(texts(seed=3, n=8))) > 6
    assert texts(seed=3, n=8)[:2] == texts(seed=3, n=2)


def test_the_samplers_other_parameters(client, direct):
    asked = {"max_tokens": 30, "n": 4, "seed": 2}
    more = {
        "top_k": 50,
        "min_p": 0.01,
        "min_tokens": 5,
        "repetition_penalty": 1.2,
        "ignore_eos": True,
        "stop_token_ids": list(range(60, 120)),
    }
    wanted = direct(["a"], **asked, **more, logit_bias={100: 5.0, 101: -100.0})[0]
    body = more | {"return_token_ids": True}
    bias = {"100": 5, "101": -100}
    found = client.completions.create(model="tiny", prompt="a", logit_bias=bias, extra_body=body, **asked)
    assert [choice.token_ids for choice in found.choices] == [output.tokens for output in wanted]
    assert any(output.finish_reason == "stop" for output in wanted)
    assert all(choice.prompt_token_ids == found.choices[0].prompt_token_ids for choice in found.choices)


def test_best_of_returns_the_likeliest(client, direct):
    wanted = direct(["a"], max_tokens=10, n=2, best_of=6, seed=1)[0]
    found = client.completions.create(model="tiny", prompt="a", max_tokens=10, n=2, best_of=6, seed=1)
    assert [choice.text for choice in found.choices] == [output.text for output in wanted]
    assert found.usage.completion_tokens > sum(len(output.tokens) for output in wanted)


def test_echo_with_logprobs(client, direct, served):
    prompt = [1, 70, 71, 300, 301, 302]
    (wanted,) = direct([prompt], max_tokens=3, temperature=0.0, top_logprobs=2, prompt_logprobs=True, ignore_eos=True)
    (choice,) = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=3, temperature=0, logprobs=2, echo=True, extra_body={"ignore_eos": True}
    ).choices
    told = choice.logprobs
    assert told.token_logprobs == wanted[0].prompt_logprobs + wanted[0].logprobs
    assert told.token_logprobs[0] is told.top_logprobs[0] is None
    assert choice.text == served.sampler.tokenizer.decode(prompt) + wanted[0].text
    assert len(told.tokens) == len(told.text_offset) == len(told.top_logprobs) == 9
    for logprob, top in zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True):
        assert logprob in top.values()
    # The drawn tokens are the likeliest: the very same number stands in both places.
    assert told.token_logprobs[-3:] == [max(top.values()) for top in told.top_logprobs[-3:]]


def test_echo_without_new_tokens_only_scores(client, direct):
    found = client.completions.create(model="tiny", prompt="Insulin", max_tokens=0, logprobs=0, echo=True)
    wanted = direct(["Insulin"], max_tokens=0, prompt_logprobs=True)[0][0]
    assert found.choices[0].logprobs.token_logprobs == wanted.prompt_logprobs
    assert found.choices[0].text == "Insulin"
    assert found.usage.completion_tokens == 0
    offsets = found.choices[0].logprobs.text_offset
    assert offsets == sorted(offsets)
    assert offsets[0] == offsets[1] == 0


# --- chats


def test_chat_is_the_samplers(client, direct):
    wanted = direct([CHAT], max_tokens=20, n=2, seed=1, top_logprobs=3)[0]
    found = client.chat.completions.create(
        model="tiny", messages=CHAT, max_completion_tokens=20, n=2, seed=1, logprobs=True, top_logprobs=3, user="me"
    )
    for choice, output in zip(found.choices, wanted, strict=True):
        assert choice.message.content == output.text
        assert choice.message.role == "assistant"
        assert choice.finish_reason == output.finish_reason
        told = choice.logprobs.content
        assert [token.logprob for token in told] == output.logprobs
        assert [[top.logprob for top in token.top_logprobs] for token in told] == [
            [logprob for _, logprob in top] for top in output.top_logprobs
        ]
        spelled = [token for token in told if "\ufffd" not in token.token]
        assert spelled
        assert all(bytes(token.bytes).decode() == token.token for token in spelled)


def test_a_chat_goes_on_with_its_own_answers(client):
    first = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=5, seed=1).choices[0].message
    parts = [{"type": "text", "text": "And "}, {"type": "text", "text": "then?"}]
    dialog = [{"role": "developer", "content": "Be brief."}, *CHAT, first.model_dump()]
    answers = [
        client.chat.completions.create(
            model="tiny", messages=[*dialog, {"role": "user", "content": c}], max_tokens=9, seed=1
        )
        for c in (parts, "And then?")
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_without_max_tokens_a_chat_ends_at_the_models_positions(client, served):
    found = client.chat.completions.create(model="tiny", messages=CHAT, seed=1, extra_body={"ignore_eos": True})
    assert found.usage.total_tokens == served.service.positions
    assert found.choices[0].finish_reason == "length"


# --- streams


@pytest.mark.parametrize("seed", range(4))
def test_a_streamed_completion_is_the_whole_one(client, seed):
    asked = {
        "model": "tiny",
        "prompt": ["Insulin", "β-cells"],
        "max_tokens": 60,
        "n": 3,
        "seed": seed,
        "stop": STOPS,
        "logprobs": 1,
        "echo": seed % 2 == 1,
        "extra_body": {"return_token_ids": True, "min_tokens": seed},
    }
    whole = client.completions.create(**asked)
    texts, tokens, offsets, ids, reasons = ({i: [] for i in range(6)} for _ in range(5))
    usage = None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index].append(choice.text)
            tokens[choice.index] += choice.logprobs.token_logprobs
            offsets[choice.index] += choice.logprobs.text_offset
            ids[choice.index] += choice.token_ids
            reasons[choice.index].append(choice.finish_reason)
    assert usage == whole.usage
    for choice in whole.choices:
        assert "".join(texts[choice.index]) == choice.text
        assert tokens[choice.index] == choice.logprobs.token_logprobs
        assert offsets[choice.index] == choice.logprobs.text_offset
        assert ids[choice.index] == choice.token_ids
        assert reasons[choice.index][-1] == choice.finish_reason
        assert set(reasons[choice.index][:-1]) <= {None}
    assert "stop" in {choice.finish_reason for choice in whole.choices}


@pytest.mark.parametrize("stop", [None, STOPS])
def test_a_streamed_chat_is_the_whole_one(client, stop):
    asked = {"model": "tiny", "messages": CHAT, "max_tokens": 80, "n": 4, "seed": 5, "stop": stop, "logprobs": True}
    whole = client.chat.completions.create(**asked)
    texts, logprobs, chunks = [""] * 4, [[] for _ in range(4)], 0
    roles = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            chunks += 1
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            if choice.logprobs:
                logprobs[choice.index] += [token.logprob for token in choice.logprobs.content]
    assert texts == [choice.message.content for choice in whole.choices]
    assert logprobs == [[token.logprob for token in choice.logprobs.content] for choice in whole.choices]
    assert roles == ["assistant"] * 4
    assert chunks > 12
    if stop:
        assert not any(string in text for string in stop for text in texts)


def test_an_answer_ends_at_its_first_stop_string(direct, served):
    """Also where the token that brings it brings it twice."""
    tokenizer = served.sampler.tokenizer
    twice = next(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "--------"[:2])
    wanted = {"max_tokens": 3, "stop": ("-",), "logit_bias": {twice: 100.0}, "temperature": 0.0}
    assert direct(["a"], **wanted)[0][0].text == ""


def test_events_on_the_wire(served):
    body = {"prompt": "a", "max_tokens": 3, "seed": 1, "stream": True, "stream_options": {"include_usage": True}}
    answer = post(served, "/v1/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    parsed = [json.loads(event.removeprefix("data: ")) for event in events]
    assert parsed[-1]["choices"] == []
    assert parsed[-1]["usage"]["completion_tokens"] == 3
    assert all(event["usage"] is None for event in parsed[:-1])


# --- mistakes

LONG = 600


@pytest.mark.parametrize(
    "changes, param",
    [
        ({"prompt": "long " * LONG}, "prompt"),
        ({"prompt": [5] * LONG}, "prompt"),
        ({"prompt": [[5], [99_999]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**40]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": ["a"] * 2000}, "prompt"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 10**30}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"min_tokens": 99, "max_tokens": 9}, "min_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [5000]}, "stop_token_ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5000": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1e308}}, "logit_bias.5"),
        ({"suffix": "x"}, "suffix"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": "other"}, "model"),
        ({"temprature": 1}, "temprature"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_in_completions(served, changes, param):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2} | changes
    answer = post(served, "/v1/completions", body)
    assert answer.status_code == (404 if "model" in changes else 400), answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert param.partition(".")[0].partition("[")[0] in error["message"]
    assert error["type"] in ("invalid_request_error", "not_found_error")
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    "changes, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "nobody", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "long " * LONG}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"echo": True}, "echo"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_in_chats(served, changes, param):
    answer = post(served, "/v1/chat/completions", {"messages": CHAT, "max_tokens": 2} | changes)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_fields_of_the_official_client_that_ask_for_nothing(client):
    found = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        max_tokens=2,
        frequency_penalty=0.0,
        presence_penalty=0,
        response_format={"type": "text"},
        tool_choice="none",
        user="someone",
        metadata={"a": "b"},
        service_tier="auto",
        store=False,
    )
    assert found.usage.completion_tokens == 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"prompt": "a", "seed": 1' + b"0" * 9000 + b"}",
    ],
    ids=lambda body: repr(body[:12]),
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_garbage(served, path, body):
    answer = post(served, path, body)
    assert answer.status_code == 400
    assert "body" in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_wrong_places(served):
    assert post(served, "/v1/nothing", {}).status_code == 404
    assert httpx.get(served.url + "/v1/completions").status_code == 405
    # A page in a browser can send this without asking: it must not make a server on loopback work.
    answer = post(served, "/v1/completions", {"prompt": "a"}, headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400
    assert "Content-Type" in answer.json()["error"]["message"]


def test_the_official_client_understands_errors(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", n=1000)
    assert caught.value.param == "n"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="a")
    assert caught.value.code == "model_not_found"


# --- health and metrics


def test_health_and_metrics(served, client):
    assert httpx.get(served.url + "/health").json() == {"status": "ok"}

    def numbers():
        lines = httpx.get(served.url + "/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = numbers()
    client.completions.create(model="tiny", prompt="a", max_tokens=12, n=2, extra_body={"ignore_eos": True})
    answered = 'umedtrain_requests_total{endpoint="/v1/completions",status="200"}'
    wait_for(lambda: numbers()[answered] == before.get(answered, 0) + 1)
    after = numbers()
    assert after["umedtrain_generated_tokens_total"] == before["umedtrain_generated_tokens_total"] + 24
    assert after["umedtrain_prompt_tokens_total"] == before["umedtrain_prompt_tokens_total"] + 2
    assert after["umedtrain_first_token_seconds_count"] == before["umedtrain_first_token_seconds_count"] + 1
    assert after["umedtrain_token_seconds_count"] == before["umedtrain_token_seconds_count"] + 1
    assert after["umedtrain_computed_tokens_total"] > before["umedtrain_computed_tokens_total"]
    assert (
        after["umedtrain_samples_waiting"] == after["umedtrain_samples_running"] == after["umedtrain_pages_in_use"] == 0
    )
    assert after["umedtrain_pages"] == served.pool.num_pages


# --- models and tokenizers that do not fit


def test_a_tokenizer_of_another_model_is_refused_at_the_start(tmp_path):
    from umedtrain.sampling.server.run import Server

    model, tokenizer = tiny_model(tmp_path, extra_rows=-20)
    with pytest.raises(ValueError, match="the tokenizer has 420 tokens, but the model only 400 embeddings"):
        Server(ut.Sampler(model, tokenizer), name="tiny")
    with pytest.raises(ValueError, match="only with its tokenizer"):
        Server(ut.Sampler(model), name="tiny")


def test_tokens_beyond_the_tokenizer_are_no_text(tmp_path):
    model, tokenizer = tiny_model(tmp_path, extra_rows=400)
    with running(model, tokenizer) as live:
        for stream in (False, True):
            body = {"prompt": "a", "max_tokens": 30, "n": 8, "seed": 1, "stop": ["zzz"], "stream": stream}
            answer = post(live, "/v1/completions", body | {"logprobs": 1, "return_token_ids": True})
            assert answer.status_code == 200
            assert "error" not in answer.text
        ids = [
            i
            for choice in post(live, "/v1/completions", body | {"stream": False, "return_token_ids": True}).json()[
                "choices"
            ]
            for i in choice["token_ids"]
        ]
        assert max(ids) >= tokenizer.vocab_size
        assert live.idle()


# --- lm-evaluation-harness


def test_lm_evaluation_harness(tmp_path, monkeypatch):
    """Likelihoods and generations of `local-completions`, offline, are those of the sampler."""
    lm_eval = pytest.importorskip("lm_eval")
    transformers = pytest.importorskip("transformers")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    from lm_eval.tasks import TaskManager

    model, tokenizer = chatml_model(tmp_path)
    as_theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    as_theirs.save_pretrained(tmp_path / "theirs")
    questions = [
        {"question": f"Question: {text}\nAnswer:", "choices": [" yes", " no", " maybe, 糖尿病"], "label": index % 3}
        for index, text in enumerate(["Is insulin a hormone?", "HbA1c 48?", "β-blocker?", "Typhoid fever?", "GFR 38?"])
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    likelihood = {
        "task": "likelihood",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
    }
    generation = {
        "task": "generation",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 12, "temperature": 0.0},
    }
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for task in (likelihood, generation):
        (tasks / f"{task['task']}.yaml").write_text(json.dumps(data | task))  # JSON is YAML

    with running(model, tokenizer) as live:
        result = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": "tiny",
                "base_url": f"{live.url}/v1/completions",
                "tokenizer": str(tmp_path / "theirs"),
                "tokenizer_backend": "huggingface",
                "num_concurrent": 1,
                "max_length": 511,
            },
            batch_size=4,
            tasks=["likelihood", "generation"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
        assert live.idle()
    sampler = ut.Sampler(model, tokenizer)
    assert len(result["samples"]["likelihood"]) == len(questions)
    for sample in result["samples"]["likelihood"]:
        context = tokenizer.encode(sample["doc"]["question"])
        for choice, ((found, _),) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            whole = tokenizer.encode(sample["doc"]["question"] + choice)
            (scored,) = sampler.score([whole])
            assert found == pytest.approx(sum(scored[len(context) :]), abs=1e-9)
    prompts = [tokenizer.encode(sample["doc"]["question"]) for sample in result["samples"]["generation"]]
    wanted = sampler.generate(prompts, ut.SamplingParams(max_tokens=12, temperature=0.0, stop=("e", "<|endoftext|>")))
    assert [sample["resps"][0][0] for sample in result["samples"]["generation"]] == [o[0].text for o in wanted]
