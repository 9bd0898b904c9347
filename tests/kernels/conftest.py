"""Kernels in these tests run in Triton's interpreter, with the arithmetic of a GPU."""

import os
import sys

import pytest
import torch

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "triton was imported without TRITON_INTERPRET=1, so kernels of this process would be compiled; "
        "set it before pytest starts, or in tests/conftest.py"
    )
os.environ["TRITON_INTERPRET"] = "1"

from umedtrain.kernels.offline import interpreter

interpreter.install()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
