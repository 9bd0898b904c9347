"""AdamW in PyTorch's own operators, and the 8-bit states that it shares with the kernel in `adamw.py`.

The header of `adamw.py` states the formulas and the code of the states.

Shape suffixes: B blocks of 256, K elements of a block.
"""

import math
from typing import NamedTuple

import torch

BLOCK = 256
"""Neighbours in the flat shard that share a scale."""
AVG_TOP, SQ_TOP = 127, 255  # largest codes of m and of sqrt(v)
TINY = 1e-30  # divides in place of the scale of a block of zeros


class State8(NamedTuple):
    """A state in 8 bits; zeros in both tensors are a state of zero. `decode_state` gives the values."""

    codes: torch.Tensor
    """int8 for the first moment, uint8 for the second; in the shape of the shard."""
    scales: torch.Tensor
    """fp32, one for each 256 elements of the flat shard, the last of which may be fewer."""


def decode_state(state: State8) -> torch.Tensor:
    """The fp32 values of an 8-bit state, in the shape of its codes; of the second moment v, not its root."""
    first = state.codes.dtype == torch.int8
    code_BK = _blocks(state.codes.float())
    x_BK = code_BK * code_BK.abs() * (state.scales.reshape(-1, 1) * (1 / (AVG_TOP if first else SQ_TOP) ** 2))
    return _unblocked(x_BK if first else x_BK * x_BK, state.codes.shape)


def encode_state(values: torch.Tensor, bits: torch.Tensor, state: State8) -> None:
    """Write `values` to `state`, each rounded up or down by its 16 random bits (int64, 0 to 65535)."""
    first = state.codes.dtype == torch.int8
    top = AVG_TOP if first else SQ_TOP
    x_BK = _blocks(values.abs() if first else values.sqrt())
    x_BK = torch.where(x_BK.isnan(), math.inf, x_BK)
    scale_B1 = x_BK.amax(1, keepdim=True)
    x_BK = x_BK * (top**2 / scale_B1.clamp(min=TINY))
    low_BK = x_BK.sqrt().floor()
    below_BK, above_BK = low_BK * low_BK, (low_BK + 1) * (low_BK + 1)
    gap_BK, part_BK = above_BK - below_BK, x_BK - below_BK
    if not first:
        gap_BK, part_BK = gap_BK * (above_BK + below_BK), part_BK * (x_BK + below_BK)
    draw_BK = _blocks(bits.float() + 0.5)
    code_BK = (low_BK + (draw_BK * gap_BK < part_BK * 65536)).clamp(0 if first else 1, top).nan_to_num(0)
    code = _unblocked(code_BK, values.shape)
    state.codes.copy_(torch.where(values < 0, -code, code))
    state.scales.copy_(scale_B1.view(state.scales.shape))


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """[blocks, 256], with zeros behind the last element."""
    return torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def _unblocked(x_BK: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return x_BK.reshape(-1)[: shape.numel()].view(shape)


def random_bits(
    shape: torch.Size, seed: int, shard: int, step: int | torch.Tensor, device: torch.device
) -> torch.Tensor:
    """int64, values below 2^32: Philox4x32-10. int64 products wrap, which leaves both of their 32-bit halves right."""
    low = 0xFFFFFFFF
    quad = torch.arange(-(-shape.numel() // 4), device=device)
    counter = [quad & low, torch.full_like(quad, shard), torch.zeros_like(quad) + step, quad >> 32]
    key0, key1 = seed & low, seed >> 32
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(b >> 32 & low) ^ counter[1] ^ key0, b & low, (a >> 32 & low) ^ counter[3] ^ key1, a & low]
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return torch.stack(counter, 1).view(-1)[: shape.numel()].view(shape)


def adamw_twin(
    weights: list[torch.Tensor],
    grads: list[torch.Tensor],
    avgs: list[torch.Tensor],
    sqs: list[torch.Tensor],
    copies: list[torch.Tensor],
    grad_scale: torch.Tensor | None,
    scalars: torch.Tensor | None,
    numbers: list[float],
) -> None:
    """One step with fp32 states; arguments as of the operator in `adamw.py`."""
    decay, step_size, root = numbers[:3] if scalars is None else scalars[:3].unbind()
    rate1, beta2, rate2, eps = numbers[3:]
    grads = [grad.float() for grad in grads]
    if grad_scale is not None:
        grads = torch._foreach_mul(grads, grad_scale.reshape(()))
    torch._foreach_lerp_(avgs, grads, rate1)
    torch._foreach_mul_(sqs, beta2)
    torch._foreach_addcmul_(sqs, grads, grads, rate2)
    denominators = torch._foreach_sqrt(sqs)
    torch._foreach_div_(denominators, root)
    torch._foreach_add_(denominators, eps)
    torch._foreach_mul_(weights, decay)
    updates = torch._foreach_mul(avgs, -step_size)
    torch._foreach_div_(updates, denominators)
    torch._foreach_add_(weights, updates)
    if copies:
        torch._foreach_copy_(copies, weights)


def adamw_8_twin(
    weights: list[torch.Tensor],
    grads: list[torch.Tensor],
    avgs: list[torch.Tensor],
    sqs: list[torch.Tensor],
    copies: list[torch.Tensor],
    avg_scales: list[torch.Tensor],
    sq_scales: list[torch.Tensor],
    positions: list[int],
    grad_scale: torch.Tensor | None,
    scalars: torch.Tensor | None,
    numbers: list[float],
    step: int,
    seed: int,
) -> None:
    """One step with 8-bit states; arguments as of the operator in `adamw.py`."""
    counter = step if scalars is None else scalars[3].to(torch.int64)
    for i, weight in enumerate(weights):
        first, second = State8(avgs[i], avg_scales[i]), State8(sqs[i], sq_scales[i])
        avg, sq = decode_state(first), decode_state(second)
        adamw_twin([weight], [grads[i]], [avg], [sq], [copies[i]] if copies else [], grad_scale, scalars, numbers)
        bits = random_bits(weight.shape, seed, positions[i], counter, weight.device)
        encode_state(avg, bits & 0xFFFF, first)
        encode_state(sq, bits >> 16, second)
