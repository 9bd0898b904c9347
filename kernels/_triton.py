"""Triton where it is installed, and a stand-in where it is not (macOS, Windows).

Kernels are decorated when their file is imported, so the names must exist everywhere; without Triton the decorated
functions are never called, because `_dispatch.use_triton` refuses.
"""

from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    def _jit(function: Any = None, **_: Any) -> Any:
        return (lambda inner: inner) if function is None else function

    triton = SimpleNamespace(jit=_jit)
    tl = SimpleNamespace(constexpr=Any, tensor=Any)

__all__ = ["HAS_TRITON", "tl", "triton"]
