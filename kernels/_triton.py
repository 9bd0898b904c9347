"""Triton where it is installed, and a stand-in where it is not (macOS, Windows).

Kernels are decorated when their file is imported, so the names must exist everywhere; without Triton the decorated
functions are never called, because `_dispatch.use_triton` refuses.

INTERPRETED says whether they are decorated for Triton's interpreter. It is read here once, as they are: Triton looks at
the environment each time it is asked, which `torch.compile` cannot trace.
"""

from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON, INTERPRETED = True, bool(triton.knobs.runtime.interpret)
except ImportError:
    HAS_TRITON = INTERPRETED = False

    def _jit(function: Any = None, **_: Any) -> Any:
        return (lambda inner: inner) if function is None else function

    triton = SimpleNamespace(jit=_jit)
    tl = SimpleNamespace(constexpr=Any, tensor=Any)

__all__ = ["HAS_TRITON", "INTERPRETED", "tl", "triton"]
