"""Which implementation a call gets, and which architecture a launch is tuned for.

GPU tensors (CUDA and ROCm) go to Triton where it is installed, all others to the PyTorch twin. `impl="triton"` or
`impl="torch"`, or the same words in the environment variable UMEDTRAIN_KERNELS, override that; the argument wins.
Nothing here looks at a GPU before a tensor that lives on one is passed in.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from umedtrain.kernels._triton import HAS_TRITON, INTERPRETED, triton

Impl = Literal["auto", "triton", "torch"]
VARIABLE = "UMEDTRAIN_KERNELS"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
"""Architectures that configurations are kept for; a GPU gets those of the newest of its maker that is not newer."""

_assumed: str | None = None


def use_triton(tensor: torch.Tensor, impl: Impl | None = None) -> bool:
    """Whether a call with `tensor` runs the Triton kernel rather than the PyTorch twin.

    Raises:
        ValueError: for an unknown word, and where Triton was asked for but cannot run.
    """
    choice = impl or os.environ.get(VARIABLE, "auto")
    if choice not in ("auto", "triton", "torch"):
        source = "impl" if impl else f"environment variable {VARIABLE}"
        raise ValueError(f"{source} is {choice!r}; it must be 'auto', 'triton' or 'torch'")
    if choice == "torch" or (choice == "auto" and (tensor.device.type != "cuda" or not HAS_TRITON)):
        return False
    if not HAS_TRITON:
        raise ValueError("the Triton kernels need the package `triton`; install it or use impl='torch'")
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "the Triton kernels cannot run on a CPU tensor; use impl='torch', or set TRITON_INTERPRET=1 before "
            "importing umedtrain to run them in Triton's interpreter"
        )
    return True


def architecture() -> str:
    """The entry of `ARCHITECTURES` whose configurations the current device gets; "sm_90" in the interpreter."""
    if _assumed is not None:
        return _assumed
    if INTERPRETED:
        return "sm_90"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    return "sm_80" if target.arch < 90 else "sm_90" if target.arch < 100 else "sm_100"


@contextmanager
def assume_architecture(name: str) -> Iterator[None]:
    """Tune the launches inside for `name`, whatever the device: for tests and for compiling without a GPU."""
    global _assumed
    assert name in ARCHITECTURES
    previous, _assumed = _assumed, name
    try:
        yield
    finally:
        _assumed = previous


def pick(table: dict[str, Any], width: int) -> Any:
    """The configuration for `width` columns on the current architecture.

    `table` maps an architecture, or "default", to pairs (largest width, configuration) with growing widths.
    """
    rows = table.get(architecture(), table["default"])
    return next((config for up_to, config in rows if width <= up_to), rows[-1][1])
