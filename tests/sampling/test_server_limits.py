"""What one client can cost all others, and who is answered at all."""

import pytest

from tests.sampling.serving import running, tiny_model

httpx = pytest.importorskip("httpx2")
pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("limits"))


@pytest.mark.parametrize(
    "field, value",
    [
        ("stop", ["x"] * 17),
        ("stop", "x" * 257),
        ("stop_token_ids", list(range(65))),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
    ],
    ids=["many stops", "a long stop", "stop ids", "biases"],
)
def test_what_costs_time_at_every_token_is_bounded(tiny, field, value):
    with running(*tiny) as live:
        answer = httpx.post(f"{live.url}/v1/completions", json={"prompt": "x", field: value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field
        assert "at most" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_text_that_cannot_fit_is_not_encoded_first(tiny, path, monkeypatch):
    text = "a" * (256 * tiny[0].config.max_position_embeddings + 1)
    with running(*tiny) as live:
        monkeypatch.setattr(type(live.sampler.tokenizer), "encode", None)
        body = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
        answer = httpx.post(live.url + path, json=body)
    assert answer.status_code == 400
    assert f"{len(text)} characters" in answer.json()["error"]["message"]


def test_an_answer_without_a_wanted_length_is_as_long_as_the_cache_allows(tiny):
    page_bytes = 2 * 2 * 2 * 8 * 16 * 4
    with running(*tiny, engine={"cache_bytes": 4 * page_bytes}) as live:
        chat = {"messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True}
        answer = httpx.post(f"{live.url}/v1/chat/completions", json=chat, timeout=30)
        usage = answer.json()["usage"]
        assert usage["total_tokens"] == 64
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        refused = httpx.post(f"{live.url}/v1/chat/completions", json=chat | {"max_tokens": 64})
        assert refused.status_code == 400
        assert "the cache has room for 64 in all" in refused.json()["error"]["message"]


def test_only_names_of_this_machine_are_answered_on_loopback(tiny):
    def status(live, host):
        return httpx.get(f"{live.url}/v1/models", headers={"Host": host, "Authorization": "Bearer k"}).status_code

    with running(*tiny) as live:
        for host in ("localhost", "LOCALHOST:80", f"127.0.0.1:{live.port}", "[::1]:9"):
            assert status(live, host) == 200
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"):
            assert status(live, host) == 421
    with running(*tiny, host="127.0.0.2") as live:
        assert status(live, "127.0.0.2") == status(live, "localhost") == 200
        assert status(live, "evil.example") == 421
    with running(*tiny, host="0.0.0.0") as live:
        assert status(live, "evil.example") == 200
    with running(*tiny, api_key="k") as live:
        assert status(live, "evil.example") == 200


def test_a_field_whose_name_is_no_text_is_unknown(tiny):
    with running(*tiny) as live:
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{live.url}/v1/completions", content=b'{"prompt": "x", "\\ud800": 3}', headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == r"'\ud800' is not a known field"
