"""The server under load, with clients that misbehave, failures inside, and its end."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import umedtrain as ut
from tests.sampling.serving import CHAT, POISON, environment, running, tiny_model, wait_for

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx2")
pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("load"))


def completion(url, body, **options):
    return httpx.post(f"{url}/v1/completions", json=body, timeout=30, **options)


def connect(live, body, *, receive_buffer=None, path="/v1/completions"):
    """A socket on which a request has been sent and nothing has been read."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect(("127.0.0.1", live.port))
    sock.sendall(head.encode() + data)
    return sock


# --- load


def mixed_requests(tokenizer, count):
    """Bodies that differ in everything, and the same for the sampler."""
    numbers = random.Random(0)
    for index in range(count):
        ids = [numbers.randrange(10, 400) for _ in range(numbers.randrange(1, 60))]
        shared = [5, 6, 7] * 10 if index % 3 == 0 else []
        asked = {
            "max_tokens": numbers.randrange(1, 50),
            "n": numbers.choice([1, 1, 2, 4]),
            "seed": index,
            "temperature": numbers.choice([0.0, 0.7, 1.0]),
            "top_p": numbers.choice([1.0, 0.9]),
            "stop": numbers.choice([(), ("e", "in")]),
            "ignore_eos": False,
        }
        yield shared + ids, asked


TOO_LONG_FOR_TWO = ([8] * 30, {"max_tokens": 440, "ignore_eos": True, "n": 2, "seed": 40, "stop": ()})
"""Two samples that do not fit into 40 pages of 16 tokens at once, however the others come and go."""


@pytest.mark.parametrize("pages", [40, 512])
def test_concurrent_clients_get_the_answers_they_get_alone(tiny, pages):
    """With few pages samples wait for each other and are thrown out again; nobody can tell."""
    model, tokenizer = tiny
    cases = [*mixed_requests(tokenizer, 40), TOO_LONG_FOR_TWO]
    alone = [ut.Sampler(model, tokenizer).generate([ids], ut.SamplingParams(**asked))[0] for ids, asked in cases]
    page_bytes = 2 * 2 * 2 * 8 * 16 * 4

    async def ask(client, ids, asked, kind):
        await asyncio.sleep(random.Random(asked["seed"]).random() * 0.3)
        asked = {**asked, "stop": list(asked["stop"]) or None}
        asked["extra_body"] = {"ignore_eos": asked.pop("ignore_eos")}
        if kind == 0:
            found = await client.completions.create(model="tiny", prompt=ids, **asked)
            return [choice.text for choice in found.choices]
        texts = [""] * asked["n"]
        async for chunk in await client.completions.create(model="tiny", prompt=ids, stream=True, **asked):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
            if kind == 2:
                await asyncio.sleep(0.01)  # a slow reader
        return texts

    async def all_of_them(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(ask(client, *case, index % 3) for index, case in enumerate(cases)))

    with running(model, tokenizer, engine={"cache_bytes": pages * page_bytes, "max_rows": 16}) as live:
        assert live.pool.num_pages == pages
        found = asyncio.run(all_of_them(live.url))
        assert live.idle()
        if pages == 40:
            assert live.sampler.engine.scheduler.preemptions > 0
    assert found == [[output.text for output in outputs] for outputs in alone]


def test_clients_that_leave_take_their_requests_along(tiny):
    body = {"prompt": [7] * 40, "max_tokens": 460, "n": 4, "ignore_eos": True}
    with running(*tiny) as live:
        for stream in (False, True):
            for patience in (0.0, 0.05, 0.15):
                gone = [connect(live, {**body, "stream": stream, "seed": seed}) for seed in range(4)]
                if patience:
                    wait_for(lambda: live.pool.in_use)
                    time.sleep(patience)
                for sock in gone:
                    sock.close()
                assert live.idle()
        tokens = live.sampler.engine.computed_tokens
        assert tokens < 24 * 4 * 460, "nothing was cut short"
        assert completion(live.url, {"prompt": "a", "max_tokens": 3}).status_code == 200
        left = 'status="499"'
        assert left in httpx.get(live.url + "/metrics").text


def test_a_reader_who_has_stopped_reading_does_not_stop_the_others(tiny):
    """What it does not take is not computed again, holds no pages, and is given up after a while."""
    with running(*tiny, send_buffer=4096, client_seconds=2.0) as live:
        body = {"prompt": "a", "max_tokens": 100, "n": 8, "logprobs": 20, "stream": True, "ignore_eos": True}
        stalled = connect(live, body, receive_buffer=4096)
        wait_for(lambda: live.sampler.engine.busy)
        assert completion(live.url, {"prompt": "b", "max_tokens": 20, "seed": 1}).status_code == 200
        wait_for(lambda: not live.sampler.engine.busy and live.pool.in_use == 0)
        assert live.server.gate.open == 1, "all was sent: the test does not test anything"
        assert live.idle()
        stalled.close()


def test_a_sender_who_has_stopped_sending_is_told_so(tiny):
    with running(*tiny, client_seconds=0.5) as live, socket.create_connection(("127.0.0.1", live.port)) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        sock.settimeout(20)
        assert sock.recv(4096).startswith(b"HTTP/1.1 408")
        assert live.idle()


def test_bodies_of_all_sizes(tiny):
    with running(*tiny, body_bytes=10_000) as live:
        headers = {"Content-Type": "application/json"}
        for size, status in ((0, 400), (9_999, 400), (10_000, 400), (10_001, 413), (150_000, 413), (3_000_000, 413)):
            try:
                answer = httpx.post(f"{live.url}/v1/completions", content=b"x" * size, headers=headers, timeout=20)
            except httpx.TransportError:  # the server has hung up on a client that goes on and on
                assert size > 160_000
                continue
            assert answer.status_code == status
            assert answer.json()["error"]["message"]
        chunks = (b"x" * 1000 for _ in range(50))
        assert httpx.post(f"{live.url}/v1/completions", content=chunks, headers=headers).status_code == 413
        for garbage in (b"\x00" * 500, b"GET\r\n\r\n", b"POST /v1/completions HTTP/9.9\r\n\r\n", os.urandom(2000), b""):
            with socket.create_connection(("127.0.0.1", live.port)) as sock:
                sock.sendall(garbage)
        assert completion(live.url, {"prompt": "a", "max_tokens": 3}).status_code == 200
        assert live.idle()


def test_a_full_queue_is_429(tiny):
    with running(*tiny, queue=4, n=8) as live:
        with connect(live, {"prompt": "a", "max_tokens": 500, "n": 3, "ignore_eos": True}):
            wait_for(lambda: live.service._admitted == 3)
            assert completion(live.url, {"prompt": "b", "max_tokens": 1}).status_code == 200
            refused = completion(live.url, {"prompt": "b", "max_tokens": 1, "n": 2})
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["Retry-After"]) <= 60
            assert refused.json()["error"]["code"] == "queue_full"
        never = completion(live.url, {"prompt": "b", "max_tokens": 1, "n": 5})
        assert never.status_code == 400, "asking again would not help"
        assert live.idle()


def test_an_address_that_is_taken(tiny):
    from umedtrain.sampling.server.run import Server

    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1, port {port}: .*in use"):
            Server(ut.Sampler(*tiny), name="tiny", port=port).run()


def test_limits_on_tokens(tiny):
    with running(*tiny, prompt_tokens=20, max_tokens=30, n=2) as live:
        for body, param in (
            ({"prompt": [5] * 21}, "prompt"),
            ({"prompt": "a", "max_tokens": 31}, "max_tokens"),
            ({"prompt": "a", "n": 3}, "n"),
        ):
            answer = completion(live.url, body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        chat = {"messages": CHAT[:1], "ignore_eos": True}
        answer = httpx.post(
            f"{live.url}/v1/chat/completions", json={**chat, "messages": [{"role": "user", "content": ""}]}
        )
        assert answer.json()["usage"]["completion_tokens"] == 30
    with running(*tiny, engine={"cache_bytes": 5 * 2048}) as live:
        answer = completion(live.url, {"prompt": "a", "max_tokens": 200})
        assert answer.status_code == 400
        assert "cache_bytes" in answer.json()["error"]["message"]
        assert live.idle()


def test_api_key(tiny):
    with running(*tiny, api_key="secret") as live:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer é"},
        ):
            encoded = {name: value.encode() for name, value in headers.items()}
            for path in ("/v1/models", "/metrics", "/openapi.json"):
                answer = httpx.get(live.url + path, headers=encoded)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(live.url + "/health").status_code == 200
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="secret") as client:
            assert client.completions.create(model="tiny", prompt="a", max_tokens=1).usage.completion_tokens == 1


# --- failures inside


def test_logits_that_are_no_numbers_end_their_request_only(tmp_path):
    model, tokenizer = tiny_model(tmp_path, broken=True)
    with running(model, tokenizer) as live:
        body = {"prompt": "a", "max_tokens": 200, "seed": 1, "ignore_eos": True, "logit_bias": {str(POISON): -100}}
        alone = completion(live.url, body).json()["choices"]
        with connect(live, body) as sock:
            wait_for(lambda: live.sampler.engine.busy)
            for more in ({}, {"n": 3}, {"max_tokens": 0, "echo": True, "logprobs": 1}):
                failed = completion(live.url, {"prompt": [5, POISON, 6], "max_tokens": 5, **more})
                assert failed.status_code == 500
                assert "not finite" in failed.json()["error"]["message"]
            streamed = completion(live.url, {"prompt": [5, POISON, 6], "max_tokens": 5, "stream": True})
            assert "not finite" in json.loads(streamed.text.removeprefix("data: "))["error"]["message"]
            sock.settimeout(20)
            received = b""
            while b"}}" not in received:
                received += sock.recv(65536)
        assert json.loads(received.partition(b"\r\n\r\n")[2])["choices"] == alone
        assert httpx.get(live.url + "/health").status_code == 200
        assert live.idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_engine_ends_everything_and_is_not_hidden(tmp_path, stream):
    model, tokenizer = tiny_model(tmp_path)
    with running(model, tokenizer) as live:
        body = {"prompt": "a", "max_tokens": 500, "n": 8, "ignore_eos": True, "stream": stream}
        socks = [connect(live, body) for _ in range(3)]
        wait_for(lambda: len(live.sampler.engine.scheduler.running) == 24)
        with torch.no_grad():
            model.norm.weight.mul_(1.0)  # weights must not change while requests run
        for sock in socks:
            sock.settimeout(20)
            received = b""
            while b"weights" not in received:
                more = sock.recv(65536)
                assert more, received[-300:]
                received += more
            assert received.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 500")
            assert b'"type":"server_error"' in received
            sock.close()
        health = httpx.get(live.url + "/health")
        assert (health.status_code, health.json()) == (503, {"status": "failed"})
        assert completion(live.url, {"prompt": "a"}).status_code == 500
        wait_for(lambda: not live.server.gate.open)


# --- the end


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    model, tokenizer = tiny_model(directory, positions=8192)
    ut.save_model(model, directory / "tiny", tokenizer=tokenizer)
    return directory / "tiny"


class Process:
    """`umedtrain serve` as its users start it."""

    def __init__(self, saved, *options):
        command = [sys.executable, "-m", "umedtrain.cli", "serve", saved, "--port", "0", *options]
        self.process = subprocess.Popen(
            list(map(str, command)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        line = self.process.stdout.readline()
        assert line.startswith("serving tiny at http://127.0.0.1:"), line + self.process.stdout.read()
        self.url = line.split()[3].removesuffix("/v1,")
        self.port = int(self.url.rpartition(":")[2])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def test_sigterm_lets_answers_finish_and_refuses_new_ones(saved):
    body = {"prompt": "a", "max_tokens": 400, "n": 4, "seed": 1, "ignore_eos": True, "stream": True}
    with Process(saved, "--drain-seconds", "60") as served:
        keep = httpx.Client(base_url=served.url, timeout=60)
        assert keep.get("/health").status_code == 200
        with httpx.stream("POST", served.url + "/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            wait_for(lambda: keep.get("/health").status_code == 503)
            assert keep.get("/health").json() == {"status": "draining"}
            refused = keep.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            assert refused.status_code == 503
            assert "Retry-After" in refused.headers
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        ends = [c["finish_reason"] for event in events[:-1] for c in json.loads(event)["choices"] if c["finish_reason"]]
        assert ends == ["length"] * 4
        assert served.process.wait(20) == 0
        keep.close()


LONG = {"prompt": "a", "max_tokens": 8000, "n": 64, "ignore_eos": True}


def test_the_end_waits_only_so_long(tmp_path):
    with running(*tiny_model(tmp_path, positions=8192), drain_seconds=0.3) as live:
        sock, streaming = connect(live, LONG), connect(live, LONG | {"stream": True, "seed": 1})
        wait_for(lambda: len(live.sampler.engine.scheduler.running) > 100)
        live.server.handle_exit(signal.SIGTERM, None)
        live.thread.join(20)
        assert not live.thread.is_alive()
        assert live.pool.in_use == 0
        for open_sock, status in ((sock, 503), (streaming, 200)):
            received = b"".join(iter(lambda s=open_sock: s.recv(65536), b""))
            assert received.startswith(f"HTTP/1.1 {status}".encode())
            assert b"the server is shutting down" in received
            open_sock.close()


def test_connections_that_never_ask_are_closed(tiny):
    with running(*tiny, client_seconds=0.5) as live:
        silent, slow = (socket.create_connection(("127.0.0.1", live.port), timeout=10) for _ in range(2))
        kept = connect(live, {"prompt": [7], "max_tokens": 1})
        with silent, slow, kept:
            kept.settimeout(10)
            assert kept.recv(4096).startswith(b"HTTP/1.1 200")
            began = time.monotonic()
            with contextlib.suppress(OSError):  # closed in our face
                for byte in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100:
                    slow.sendall(bytes([byte]))
                    time.sleep(0.05)
            assert time.monotonic() - began < 4
            assert silent.recv(1) == b""
            # A second head on a connection that has had its answer has as long.
            with contextlib.suppress(OSError):
                kept.sendall(b"GET /health HT")
                while kept.recv(4096):
                    pass
            assert time.monotonic() - began < 8


def test_sigterm_ends_it_when_nobody_reads_what_it_says(saved):
    with Process(saved) as live:
        live.process.stdout.close()
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(20) == 0


def test_a_second_signal_does_not_wait(tmp_path):
    with running(*tiny_model(tmp_path, positions=8192), drain_seconds=60) as live, connect(live, LONG):
        wait_for(lambda: live.sampler.engine.busy)
        for _ in range(2):
            live.server.handle_exit(signal.SIGINT, None)
        live.thread.join(20)
        assert not live.thread.is_alive()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--port", "70000"], "port must lie in"),
        (["--max-n", "0"], "n must be positive"),
        (["--device", "nowhere"], "device='nowhere' cannot be used"),
        (["--cache-gib", "0"], "cache_gib must be a positive number"),
        (["--cache-gib", "nan"], "cache_gib must be a positive number, got nan"),
        (["--cache-gib", "1e-7"], "has no room for a page of 16 tokens"),
        (["--max-running", "0"], "max_running must be at least 1"),
        (["--drain-seconds", "-1"], "drain_seconds must be 0 or a number of seconds, got -1"),
        (["--drain-seconds", "nan"], "drain_seconds must be 0 or a number of seconds, got nan"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line(saved, options, message, monkeypatch, capsys):
    from umedtrain import cli

    monkeypatch.setattr(sys, "argv", ["umedtrain", "serve", str(saved), *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


# --- the terminal


def chat(monkeypatch, capsys, saved, lines, *options):
    """What `umedtrain chat` shows to someone who types these lines; None is Ctrl-C."""
    from umedtrain import cli

    typed = iter(lines)

    def prompted(prompt):
        print(prompt, end="")
        line = next(typed, EOFError)
        if line is None or line is EOFError:
            raise EOFError if line else KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", prompted)
    monkeypatch.setattr(sys, "argv", ["umedtrain", "chat", str(saved), *options])
    cli.main()
    return capsys.readouterr()


def test_chat_remembers_until_told_otherwise(saved, monkeypatch, capsys):
    sampler = ut.Sampler(ut.load_model(saved), ut.load_tokenizer(saved))
    params = ut.SamplingParams(max_tokens=6, temperature=0.0)
    first, second = ({"role": "user", "content": text} for text in ("Hello", "And then?"))

    def answer(*dialog):
        return sampler.generate([list(dialog)], params)[0][0].text.strip()

    told = answer(first)
    again = answer(first, {"role": "assistant", "content": told}, second)
    assert again != answer(second)
    lines = ["Hello", "And then?", None, "/new", "Hello", "/quit", "Hello"]
    shown = chat(monkeypatch, capsys, saved, lines, "--max-tokens", "6").out
    assert shown == f"> {told}\n> {again}\n> \n> > {told}\n> "
    forgetful = chat(monkeypatch, capsys, saved, ["Hello", "Hello"], "--max-tokens", "6", "--remember", "False").out
    assert forgetful == f"> {told}\n> {told}\n> "


def test_a_dialog_that_has_grown_too_long_can_be_started_over(saved, monkeypatch, capsys):
    shown = chat(monkeypatch, capsys, saved, ["x " * 9000, "/new", "Hello"], "--max-tokens", "3")
    assert "the dialog has" in shown.err
    assert "/new starts over" in shown.err
    assert shown.out.count("> ") == 4


def test_ctrl_c_stops_the_answer_and_not_the_program(saved, monkeypatch, capsys):
    from umedtrain.sampling.engine import Engine

    step, steps, sizes = Engine.step, [], []

    def interrupted(self, *arguments):
        steps.append(self)
        if len(steps) == 12:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(Engine, "step", interrupted)
    monkeypatch.setattr(
        Engine,
        "submit",
        lambda self, request, submit=Engine.submit: sizes.append(len(request.ids)) or submit(self, request),
    )
    shown = chat(
        monkeypatch, capsys, saved, ["Hello", "And?"], "--max-tokens", "50", "--temperature", "1", "--seed", "3"
    )
    assert 12 < len(steps) <= 62
    assert steps[0].pool.in_use == 0
    assert shown.out.count("> ") >= 3
    assert sizes[1] > sizes[0] + 10, "what had been shown is part of the dialog"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
