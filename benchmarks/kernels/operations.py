"""The same operations by our kernels and by Liger-Kernel's own, unmodified host code: forward and backward each.

`operations(side, shape, rows, device)` gives callables that launch on tensors of any device: `meta` and the offline
driver for compiling, the CPU and the interpreter for counting bytes, a GPU for timing.
"""

from collections.abc import Callable

import torch

from umedtrain.kernels.offline.cases import LlamaShape

SIDES = ("ours", "liger")
NAMES = ("rms_norm", "add_rms_norm", "rope", "swiglu", "cross_entropy", "attention")
BF16 = torch.bfloat16


def operations(side: str, shape: LlamaShape, rows: int, device: str) -> dict[str, Callable[[], None]]:
    """Name -> one forward and backward pass on `rows` tokens in bf16; Liger has no attention."""

    def tensor(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        empty = torch.empty(*size, dtype=dtype, device=device)
        return (empty if device == "meta" else empty.normal_()).requires_grad_()

    inputs = {
        "rms_norm": lambda: (tensor(rows, shape.hidden), tensor(shape.hidden)),
        "add_rms_norm": lambda: (tensor(rows, shape.hidden), tensor(rows, shape.hidden), tensor(shape.hidden)),
        "rope": lambda: (
            tensor(rows, shape.heads, shape.head_dim),
            tensor(rows, shape.kv_heads, shape.head_dim),
            tensor(rows, shape.head_dim // 2, dtype=torch.float32).detach(),
            tensor(rows, shape.head_dim // 2, dtype=torch.float32).detach(),
        ),
        "swiglu": lambda: (tensor(rows, shape.intermediate), tensor(rows, shape.intermediate)),
        "cross_entropy": lambda: (tensor(rows, shape.vocab), torch.zeros(rows, dtype=torch.int64, device=device)),
        "attention": lambda: (
            tensor(rows, shape.heads, shape.head_dim),
            tensor(rows, shape.kv_heads, shape.head_dim),
            tensor(rows, shape.kv_heads, shape.head_dim),
        ),
    }
    functions = (_ours if side == "ours" else _liger)(rows)

    def run(name: str) -> None:
        outputs = functions[name](*inputs[name]())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    return {name: lambda name=name: run(name) for name in NAMES if name in functions}


def _ours(rows: int) -> dict[str, Callable[..., object]]:
    from umedtrain.kernels.attention import attention
    from umedtrain.kernels.attention_plan import attention_plan
    from umedtrain.kernels.cross_entropy import cross_entropy
    from umedtrain.kernels.norm import add_rms_norm, rms_norm
    from umedtrain.kernels.rope import rope
    from umedtrain.kernels.swiglu import swiglu

    def attend(q_THK: torch.Tensor, k_TGK: torch.Tensor, v_TGK: torch.Tensor) -> torch.Tensor:
        return attention(q_THK, k_TGK, v_TGK, attention_plan([rows], device=q_THK.device), impl="triton")

    return {
        "rms_norm": lambda x, w: rms_norm(x, w, 1e-5, casting="hf", impl="triton"),
        "add_rms_norm": lambda x, r, w: add_rms_norm(x, r, w, 1e-5, casting="hf", impl="triton"),
        "rope": lambda q, k, cos, sin: rope(q, k, cos, sin, impl="triton"),
        "swiglu": lambda gate, up: swiglu(gate, up, casting="hf", impl="triton"),
        "cross_entropy": lambda logits, targets: cross_entropy(logits, targets, impl="triton"),
        "attention": attend,
    }


def _liger(rows: int) -> dict[str, Callable[..., object]]:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> object:
        heads_first = [x.transpose(0, 1)[None] for x in (q, k)]
        # As the library that it patches has them: both halves, in the dtype of the model.
        tables = [torch.cat([table, table], -1)[None].to(q.dtype) for table in (cos, sin)]
        return LigerRopeFunction.apply(*heads_first, *tables)

    return {
        "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-5, 0.0, "llama", False),
        "add_rms_norm": lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-5, 0.0, "llama", False),
        "rope": rope,
        "swiglu": lambda gate, up: LigerSiLUMulFunction.apply(gate, up),
        "cross_entropy": lambda logits, targets: LigerCrossEntropyFunction.apply(logits, targets, None)[0],
    }
