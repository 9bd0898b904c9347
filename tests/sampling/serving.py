"""A tiny model behind a real server on loopback, for the tests of the server."""

import contextlib
import dataclasses
import os
import socket
import threading
import time
from pathlib import Path

import torch

import umedtrain as ut
from tests.text.material import chatml_json, small_sentencepiece

POISON = 400  # a token whose embedding is no number in `broken` models
CHAT = [{"role": "user", "content": "What regulates blood glucose?"}]


def tiny_model(directory: Path, *, broken=False, positions=512, extra_rows=0, seed=0):
    """(model, tokenizer); its logits are so flat that samples differ and end at all lengths."""
    tokenizer = small_sentencepiece(directory)
    model = _model(tokenizer.vocab_size + extra_rows, positions, seed)
    if broken:
        with torch.no_grad():
            model.embed_tokens.weight[POISON] = torch.nan
    return model, tokenizer


def _model(vocab_size, positions, seed):
    config = ut.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=positions,
        initializer_range=0.15,
    )
    model = ut.Llama(config)
    model.init_weights(seed=seed)
    return model


def chatml_model(directory: Path):
    """(model, tokenizer) with a tokenizer.json in the directory, which other programs can load too."""
    tokenizer = ut.load_tokenizer(chatml_json(directory))
    return _model(tokenizer.vocab_size, 512, 0), tokenizer


class Running:
    """A server in a thread of this process."""

    def __init__(self, server, sock):
        self.server, self.service, self.sampler = server, server.service, server.service.sampler
        self.pool = self.sampler.engine.pool
        self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)

    def idle(self, seconds=20):
        """Wait until nothing is under way, and check that nothing has been left behind."""
        engine, worker = self.sampler.engine, self.service.worker
        wait_for(lambda: not (self.server.gate.open or engine.busy or worker._inbox or worker._jobs), seconds)
        return self.pool.in_use == 0 and self.service._admitted == 0 and not engine._texts


@contextlib.contextmanager
def running(model, tokenizer, *, send_buffer=None, engine=None, **options):
    from umedtrain.sampling.server.protocol import Limits
    from umedtrain.sampling.server.run import Server

    names = {field.name for field in dataclasses.fields(Limits)}
    limits = Limits(**{name: options.pop(name) for name in names & options.keys()})
    options = {"name": "tiny", "drain_seconds": 5} | options
    server = Server(ut.Sampler(model, tokenizer, **(engine or {})), limits=limits, **options)
    with socket.socket() as sock:
        if send_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        live = Running(server, sock)
        live.thread.start()
        try:
            wait_for(lambda: server.started)
            yield live
        finally:
            server.should_exit = True
            live.thread.join(20)
            assert not live.thread.is_alive()


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.01)


def environment():
    root = Path(__file__).parents[2]
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
