"""Where the model's operations run: on the package's Triton kernels for GPU tensors, on PyTorch's operators for others.

Each place that has both asks `kernels_for` and is otherwise unaware of devices.
"""

import os
from types import ModuleType

import torch


def kernels_for(x: torch.Tensor) -> ModuleType | None:
    """`umedtrain.kernels` if operations on `x` are to use it, None for PyTorch's operators.

    UMEDTRAIN_KERNELS=torch or =triton overrides what the device says (see `umedtrain.kernels`). The kernels are
    imported only where they are used: Triton takes half a second to load, which a run on a CPU need not pay. They do
    not take float64.
    """
    if x.dtype == torch.float64:
        return None
    if not x.is_cuda and os.environ.get("UMEDTRAIN_KERNELS", "auto") in ("auto", "torch"):
        return None
    from umedtrain import kernels

    return kernels if kernels.use_triton(x) else None
