"""Loading keeps one copy of the model and saving one shard: measured on 200 MB of weights, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# The process's anonymous memory is read whenever a tensor is asked for or was handed over. Pages of mapped files do not
# count: the system takes them back when it needs them.
PROGRAM = """
import sys
from pathlib import Path
import torch
from umedtrain.model.config import LlamaConfig
from umedtrain.weights import load_model, save_stream
from umedtrain.weights.checkpoint import Checkpoint, expected_shapes

path = Path(sys.argv[1])
config = LlamaConfig(2000, 1024, 2816, 4, 16, 16, 64)
samples = []

def sample():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            samples.append(int(line.split()[1]) * 1024)

def stream(config):
    for name, shape in expected_shapes(config, False).items():
        yield name, torch.full(shape, 0.5)
        sample()

# What the libraries allocate once, on first use, is not ours.
save_stream(LlamaConfig(20, 16, 16, 1, 2, 2, 8), False, stream(LlamaConfig(20, 16, 16, 1, 2, 2, 8)), path)
load_model(path)

samples.clear()
sample()
save_stream(config, False, stream(config), path, max_shard_bytes=40_000_000)
saving = max(samples) - samples[0]

read = Checkpoint.tensor
def measured(self, name):
    sample()
    return read(self, name)
Checkpoint.tensor = measured
samples.clear()
sample()
model = load_model(path)
sample()
print(4 * config.num_parameters, saving, max(samples) - samples[0], samples[-1] - samples[0])
assert all((parameter == 0.5).all() for parameter in model.parameters())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_one_copy_when_loading_one_shard_when_saving(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=200,
        # glibc then gives every freed tensor back at once, so that what is held is what is counted.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    model_bytes, saving, loading, loaded = map(int, done.stdout.split())
    assert model_bytes > 200_000_000
    assert saving < 40_000_000 + 20_000_000  # a shard and the tensor that did not fit into it
    assert loaded > 0.95 * model_bytes
    assert loading < 1.1 * model_bytes
