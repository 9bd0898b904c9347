"""How a kernel is offered to PyTorch: a custom operator for tracers, a direct call in eager mode.

`torch.compile`, fake tensors, selective checkpointing and `opcheck` need an operator that the dispatcher knows. In
plain eager mode the dispatcher's detour costs some 30 microseconds a call on the host, several times a small
kernel's own time, so there the same functions run as an ordinary `autograd.Function`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch


def kernel_op(
    name: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    mutates: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make the function that does the work an operator `umedtrain::name`, called with positional arguments.

    The function's annotations are the operator's schema. It must return new tensors, never an input or a view of one.

    Args:
        name: of the operator.
        fake: same signature; returns empty tensors of the right shape, dtype and device.
        setup_context: (ctx, inputs, output), as in `torch.autograd.Function`; saves what `backward` needs.
        backward: (ctx, *output_gradients) -> one gradient or None per input. Launches only through other operators.
        mutates: names of arguments that are written to.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        forward = _on_its_device(function)
        op = torch.library.custom_op(f"umedtrain::{name}", forward, mutates_args=mutates)
        op.register_fake(fake)
        direct = forward
        if backward is not None:
            op.register_autograd(backward, setup_context=setup_context)
            members = {"forward": forward, "setup_context": setup_context, "backward": backward}
            node = type(name, (torch.autograd.Function,), {k: staticmethod(v) for k, v in members.items()})
            direct = node.apply

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return op(*args) if torch.compiler.is_compiling() or _is_watched(args) else direct(*args)

        return call

    return wrap


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with the GPU of its first tensor as the current one: Triton launches there, whatever it is given."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        device = next((x.device for x in map(_first, args) if isinstance(x, torch.Tensor)), None)
        if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*args)
        with torch.cuda.device(device):
            return function(*args)

    return call


def _first(arg: Any) -> Any:
    return arg[0] if isinstance(arg, list | tuple) and arg else arg


def _is_watched(args: tuple[Any, ...]) -> bool:
    """Whether something between the call and the kernel wants to see an operator: a mode or a tensor subclass."""
    if torch._C._len_torch_dispatch_stack():
        return True
    return any(isinstance(arg, torch.Tensor) and type(arg) not in _PLAIN for arg in args)


_PLAIN = (torch.Tensor, torch.nn.Parameter)
