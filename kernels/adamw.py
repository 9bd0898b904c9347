"""AdamW over many shards in one launch, with fp32 or 8-bit states (Loshchilov & Hutter, arXiv 1711.05101).

    g = grad * grad_scale
    m = m + (1 - beta1) (g - m)
    v = beta2 v + (1 - beta2) g g
    w = (1 - lr weight_decay) w - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

in fp32 and in this order, which is that of PyTorch's single-tensor AdamW; a copy of w in another dtype is rounded to
nearest in the same pass. The kernel neither contracts products and sums nor uses approximate roots and quotients
where the weights are concerned, so weights come out with the same bits on every GPU and in the interpreter.

Bytes per element, with bf16 gradients and a bf16 copy: 28 with fp32 states (reads 2 g + 4 m + 4 v + 4 w, writes
4 m + 4 v + 4 w + 2 copy), 16 with 8-bit states. `grad_scale`, the factor of gradient clipping, is read from device
memory: clipping costs neither a pass nor a synchronisation.

8-bit states. Blocks of 256 neighbours share an fp32 scale s, the largest |x| among them. What is stored is
x = m and x = sqrt(v), by a square code, whose levels lie denser towards zero, as the values do:

    m        = s * c |c| / 127^2    c = -127 .. 127
    sqrt(v)  = s * c c / 255^2      c = 1 .. 255

Near the block's maximum neighbouring levels are 1.6 % (m) and 0.8 % (sqrt(v)) apart. v has no level at zero: the
smallest is 1.5e-5 of the block's maximum, so an element with small gradients is at worst moved too little, and none is
divided by eps alone. Between two levels the rounding is stochastic, such that the mean of m, and of v itself, is kept
(to 2^-17 of a level): rounding to nearest would swallow every decay by (1 - beta2). The random bits are a pure
function of (seed, step, position of the shard in the list, element): Philox4x32-10 with key = seed and counter =
(element // 4 low, shard, step, element // 4 high), word element % 4, low half for m, high half for v.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version

from umedtrain.kernels._adamw_twin import BLOCK, State8, adamw_8_twin, adamw_twin
from umedtrain.kernels._dispatch import Impl, pick, use_triton
from umedtrain.kernels._op import kernel_op
from umedtrain.kernels._shards import HALVES, check_shard, shard_table
from umedtrain.kernels._triton import tl, triton

# Elements of a program's tile, elements at a time, warps. At 4 elements a thread fp32 moves in 16 bytes; with 8 the
# compiler would lay the bf16 tensors out differently and exchange them through shared memory.
CONFIGS_32 = {"default": ((1, (4096, 512, 4)),), "gfx942": ((1, (4096, 1024, 4)),)}
CONFIGS_8 = {
    "default": ((1, (4096, 512, 4)),),
    "sm_80": ((1, (4096, 1024, 8)),),
    "gfx942": ((1, (4096, 1024, 8)),),
}


@triton.jit
def _moments(g, m, v, rate1, beta2, rate2):
    """New m and v; rate1 and rate2 are 1 - beta1 and 1 - beta2."""
    return m + rate1 * (g - m), v * beta2 + rate2 * g * g


@triton.jit
def _new_weight(w, m, root_v, decay, step_size, root, eps):
    return w * decay + tl.div_rn(-step_size * m, tl.div_rn(root_v, root) + eps)


@triton.jit
def _scalars(scalars_ptr, decay, step_size, root, step):
    """The four numbers that change from step to step, from device memory where they were made there."""
    if scalars_ptr is not None:
        decay = tl.load(scalars_ptr)
        step_size = tl.load(scalars_ptr + 1)
        root = tl.load(scalars_ptr + 2)
        step = tl.load(scalars_ptr + 3).to(tl.int32)
    return decay, step_size, root, step


@triton.jit
def _chunk_32(
    w_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, rest, scale, decay, step_size, root, rate1, beta2, rate2, eps,
    MASKED: tl.constexpr, COPY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    offset = tl.arange(0, CHUNK)
    inside = offset < rest if MASKED else None
    g = tl.load(g_ptr + offset, mask=inside).to(tl.float32) * scale
    m = tl.load(m_ptr + offset, mask=inside)
    v = tl.load(v_ptr + offset, mask=inside)
    w = tl.load(w_ptr + offset, mask=inside)
    m, v = _moments(g, m, v, rate1, beta2, rate2)
    w = _new_weight(w, m, tl.sqrt_rn(v), decay, step_size, root, eps)
    tl.store(m_ptr + offset, m, mask=inside)
    tl.store(v_ptr + offset, v, mask=inside)
    tl.store(w_ptr + offset, w, mask=inside)
    if COPY:
        tl.store(copy_ptr + offset, w.to(copy_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _adamw_kernel(
    rows_ptr, tiles_ptr, grad_scale_ptr, scalars_ptr, decay, step_size, root, rate1, beta2, rate2, eps,
    GRAD: tl.constexpr, COPY: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * 2
    row_ptr = rows_ptr + tl.load(tile_ptr).to(tl.int64) * 8
    start = tl.load(tile_ptr + 1).to(tl.int64) * TILE
    w_ptr = tl.load(row_ptr).to(tl.pointer_type(tl.float32)) + start
    g_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(GRAD)) + start
    m_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32)) + start
    v_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.float32)) + start
    copy_ptr = tl.load(row_ptr + 4).to(tl.pointer_type(GRAD if COPY is None else COPY)) + start
    size = tl.minimum(tl.load(row_ptr + 5) - start, TILE).to(tl.int32)
    aligned = tl.load(row_ptr + 6) != 0
    scale = 1.0 if grad_scale_ptr is None else tl.load(grad_scale_ptr)
    decay, step_size, root, _ = _scalars(scalars_ptr, decay, step_size, root, 0)
    for done in range(0, size, CHUNK):
        # A mask that ends anywhere forbids wide loads, so whole chunks go without.
        if aligned & (size - done >= CHUNK):
            _chunk_32(
                tl.multiple_of(w_ptr, 16), tl.multiple_of(g_ptr, 16), tl.multiple_of(m_ptr, 16),
                tl.multiple_of(v_ptr, 16), tl.multiple_of(copy_ptr, 16), CHUNK, scale, decay, step_size, root, rate1,
                beta2, rate2, eps, False, COPY is not None, CHUNK,
            )  # fmt: skip
        else:
            _chunk_32(
                w_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, size - done, scale, decay, step_size, root, rate1, beta2, rate2,
                eps, True, COPY is not None, CHUNK,
            )  # fmt: skip
        w_ptr += CHUNK
        g_ptr += CHUNK
        m_ptr += CHUNK
        v_ptr += CHUNK
        copy_ptr += CHUNK


@triton.jit
def _random_bits(seed, first, shard, step, QUADS: tl.constexpr):
    """uint32 [QUADS / 64, 64, 4]: the bits of the elements `first` (a multiple of 4 QUADS) and following."""
    quad = tl.arange(0, QUADS // 64)[:, None, None] * 64 + tl.arange(0, 64)[None, :, None]
    low = (first // 4).to(tl.uint32) + quad.to(tl.uint32)
    high = ((first // 4) >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, low, shard.to(tl.uint32), step.to(tl.uint32), high)
    word = tl.arange(0, 4)[None, None, :]
    return tl.where(word < 2, tl.where(word == 0, r0, r1), tl.where(word == 2, r2, r3))


@triton.jit
def _chunk_8(
    w_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, m_scale_ptr, v_scale_ptr, seed, first, shard, step, rest, scale, decay,
    step_size, root, rate1, beta2, rate2, eps, MASKED: tl.constexpr, COPY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    block = tl.arange(0, CHUNK // 256)[:, None, None]
    offset = block * 256 + tl.arange(0, 64)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    inside = offset < rest if MASKED else None
    block_inside = block * 256 < rest if MASKED else None
    g = tl.load(g_ptr + offset, mask=inside).to(tl.float32) * scale
    m_code = tl.load(m_ptr + offset, mask=inside).to(tl.float32)
    v_code = tl.load(v_ptr + offset, mask=inside).to(tl.float32)
    m_scale = tl.load(m_scale_ptr + block, mask=block_inside)
    v_scale = tl.load(v_scale_ptr + block, mask=block_inside)
    w = tl.load(w_ptr + offset, mask=inside)
    m = m_code * tl.abs(m_code) * (m_scale * (1 / 16129))
    root_v = v_code * v_code * (v_scale * (1 / 65025))
    m, v = _moments(g, m, root_v * root_v, rate1, beta2, rate2)
    root_v = tl.sqrt_rn(v)
    w = _new_weight(w, m, root_v, decay, step_size, root, eps)
    tl.store(w_ptr + offset, w, mask=inside)
    if COPY:
        tl.store(copy_ptr + offset, w.to(copy_ptr.dtype.element_ty), mask=inside)

    # tl.max passes over NaN; infinity makes the block's scale, and with it the block, unusable for good.
    size_m = tl.where(m == m, tl.abs(m), float("inf"))
    root_v = tl.where(root_v == root_v, root_v, float("inf"))
    if MASKED:
        size_m = tl.where(inside, size_m, 0.0)
        root_v = tl.where(inside, root_v, 0.0)
    m_scale = tl.max(tl.max(size_m, 2, keep_dims=True), 1, keep_dims=True)
    v_scale = tl.max(tl.max(root_v, 2, keep_dims=True), 1, keep_dims=True)
    tl.store(m_scale_ptr + block, m_scale, mask=block_inside)
    tl.store(v_scale_ptr + block, v_scale, mask=block_inside)

    bits = _random_bits(seed, first, shard, step, CHUNK // 4)
    x = size_m * tl.div_rn(16129.0, tl.maximum(m_scale, 1e-30))
    low = tl.floor(tl.sqrt(x))
    draw = (bits & 0xFFFF).to(tl.float32) + 0.5
    code = low + (draw * (2 * low + 1) < (x - low * low) * 65536).to(tl.float32)
    code = tl.minimum(code, 127.0)
    tl.store(m_ptr + offset, tl.where(m < 0, -code, code).to(tl.int8), mask=inside)

    x = root_v * tl.div_rn(65025.0, tl.maximum(v_scale, 1e-30))
    low = tl.floor(tl.sqrt(x))
    below = low * low
    above = (low + 1) * (low + 1)
    draw = (bits >> 16).to(tl.float32) + 0.5
    # v's own distances, not those of its root: (x - below)(x + below) is x^2 - below^2 without the cancellation.
    gap = (above - below) * (above + below)
    code = low + (draw * gap < (x - below) * (x + below) * 65536).to(tl.float32)
    code = tl.minimum(tl.maximum(code, 1.0), 255.0)
    tl.store(v_ptr + offset, code.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["seed", "step"])
def _adamw_8_kernel(
    rows_ptr, tiles_ptr, grad_scale_ptr, scalars_ptr, seed, step, decay, step_size, root, rate1, beta2, rate2,
    eps, GRAD: tl.constexpr, COPY: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * 2
    row_ptr = rows_ptr + tl.load(tile_ptr).to(tl.int64) * 10
    start = tl.load(tile_ptr + 1).to(tl.int64) * TILE
    w_ptr = tl.load(row_ptr).to(tl.pointer_type(tl.float32)) + start
    g_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(GRAD)) + start
    m_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.int8)) + start
    v_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.uint8)) + start
    copy_ptr = tl.load(row_ptr + 4).to(tl.pointer_type(GRAD if COPY is None else COPY)) + start
    m_scale_ptr = tl.load(row_ptr + 5).to(tl.pointer_type(tl.float32)) + start // 256
    v_scale_ptr = tl.load(row_ptr + 6).to(tl.pointer_type(tl.float32)) + start // 256
    size = tl.minimum(tl.load(row_ptr + 7) - start, TILE).to(tl.int32)
    aligned = tl.load(row_ptr + 8) != 0
    shard = tl.load(row_ptr + 9)
    scale = 1.0 if grad_scale_ptr is None else tl.load(grad_scale_ptr)
    decay, step_size, root, step = _scalars(scalars_ptr, decay, step_size, root, step)
    for done in range(0, size, CHUNK):
        first = start + done
        if aligned & (size - done >= CHUNK):
            _chunk_8(
                tl.multiple_of(w_ptr, 16), tl.multiple_of(g_ptr, 16), tl.multiple_of(m_ptr, 16),
                tl.multiple_of(v_ptr, 16), tl.multiple_of(copy_ptr, 16), m_scale_ptr, v_scale_ptr, seed,
                first, shard, step, CHUNK, scale, decay, step_size, root, rate1, beta2, rate2, eps, False,
                COPY is not None, CHUNK,
            )  # fmt: skip
        else:
            _chunk_8(
                w_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, m_scale_ptr, v_scale_ptr, seed, first, shard, step,
                size - done, scale, decay, step_size, root, rate1, beta2, rate2, eps, True, COPY is not None, CHUNK,
            )  # fmt: skip
        w_ptr += CHUNK
        g_ptr += CHUNK
        m_ptr += CHUNK
        v_ptr += CHUNK
        copy_ptr += CHUNK
        m_scale_ptr += CHUNK // 256
        v_scale_ptr += CHUNK // 256


def _fake(*_: Any) -> None:
    return None


@kernel_op("adamw", fake=_fake, mutates=("weights", "avgs", "sqs", "copies"))
def _adamw(
    weights: list[torch.Tensor],
    grads: list[torch.Tensor],
    avgs: list[torch.Tensor],
    sqs: list[torch.Tensor],
    copies: list[torch.Tensor],
    grad_scale: torch.Tensor | None,
    scalars: torch.Tensor | None,
    numbers: list[float],
    use_kernel: bool,
) -> None:
    """fp32 states. `numbers`: decay, step_size, root, 1 - beta1, beta2, 1 - beta2, eps. No copies: an empty list.

    `scalars`, if given, has decay, step_size, root and step on the device; those in `numbers` do not count then.
    """
    if not use_kernel:
        adamw_twin(weights, grads, avgs, sqs, copies, grad_scale, scalars, numbers)
        return
    tile, chunk, warps = pick(CONFIGS_32, 0)
    table = shard_table(weights, tile)
    if table.num_tiles:
        _adamw_kernel[(table.num_tiles,)](
            table.rows((weights, grads, avgs, sqs, copies)), table.tiles, grad_scale, scalars, *numbers,
            GRAD=_triton_type(grads), COPY=_triton_type(copies), TILE=tile, CHUNK=chunk,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    increment_version([*weights, *avgs, *sqs, *copies])


@kernel_op("adamw_8bit", fake=_fake, mutates=("weights", "avgs", "sqs", "copies", "avg_scales", "sq_scales"))
def _adamw_8(
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
    use_kernel: bool,
) -> None:
    """8-bit states; `positions` number the shards for the random bits. The rest as in `_adamw`."""
    roles = weights, grads, avgs, sqs, copies, avg_scales, sq_scales
    if not use_kernel:
        adamw_8_twin(*roles, positions, grad_scale, scalars, numbers, step, seed)
        return
    tile, chunk, warps = pick(CONFIGS_8, 0)
    table = shard_table(weights, tile)
    if table.num_tiles:
        _adamw_8_kernel[(table.num_tiles,)](
            table.rows(roles, positions), table.tiles, grad_scale, scalars, seed, step, *numbers,
            GRAD=_triton_type(grads), COPY=_triton_type(copies), TILE=tile, CHUNK=chunk,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    increment_version([*weights, *avgs, *sqs, *copies, *avg_scales, *sq_scales])


def _triton_type(tensors: Sequence[torch.Tensor]) -> Any:
    return getattr(tl, str(tensors[0].dtype).removeprefix("torch.")) if tensors else None


def adamw_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor | State8],
    exp_avg_sqs: Sequence[torch.Tensor | State8],
    *,
    master: Sequence[torch.Tensor | None] | None = None,
    copies: Sequence[torch.Tensor | None] | None = None,
    lr: float | torch.Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int | torch.Tensor,
    grad_scale: torch.Tensor | None = None,
    seed: int = 0,
    impl: Impl | None = None,
) -> None:
    """One AdamW step on many tensors in place: one launch for each combination of types among them.

    The formula, its order and the bytes moved stand in the header of this file. Nothing waits for the device, and the
    result depends on the arguments only, bit for bit.

    Args:
        params: contiguous plain tensors of any shapes, empty ones included; fp32, or bf16 or fp16 with a `master`.
        grads: fp32, bf16 or fp16 of the same shapes; only read.
        exp_avgs, exp_avg_sqs: the states m and v of the same shapes: fp32, or `State8`, both, for a parameter.
        master: fp32 weights, of which `params` are roundings; None entries for parameters that are fp32 themselves.
        copies: bf16 or fp16 tensors that get fp32 `params` rounded in the same pass; None entries for none.
        lr: a number, or a one-element tensor on the parameters' device, which the host does not read.
        betas, eps, weight_decay: as in PyTorch; the decay is decoupled from the gradient and multiplied by lr.
        step: the number of this update, from 1; or a one-element tensor of it (8-bit states: below 2^24).
        grad_scale: one fp32 element on the device, a factor of all gradients; see `clip_factor`.
        seed: non-negative, of the random bits of 8-bit states.
        impl: "triton" or "torch"; by default chosen by the device.

    Raises:
        ValueError: naming the argument, for numbers out of range, lists of different lengths and tensors of the wrong
            kind, shape, type or device.
    """
    check_hyperparameters(lr, betas, eps, weight_decay)
    _check_counters(step, seed)
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "master": master, "copies": copies}
    for name, entries in lists.items():
        if entries is not None and len(entries) != len(params):
            raise ValueError(f"{name} has {len(entries)} entries; it must have one for each of {len(params)} params")
    if not len(params):
        return
    device = params[0].device
    if grad_scale is not None:
        check_shard("grad_scale", grad_scale, (torch.float32,), 1, device)
    groups: dict[tuple[Any, ...], list[list[Any]]] = {}
    for i, param in enumerate(params):
        shard = _shard(i, device, param, *(None if column is None else column[i] for column in lists.values()))
        kind = tuple(None if tensor is None else tensor.dtype for tensor in shard)
        groups.setdefault(kind, []).append([i, *shard])
    numbers, scalars = _numbers(lr, betas, eps, weight_decay, step, device)
    use_kernel = use_triton(params[0], impl)
    with torch.no_grad():
        for shards in groups.values():
            positions, *roles, copied, avg_scales, sq_scales = (list(column) for column in zip(*shards, strict=True))
            roles.append([] if copied[0] is None else copied)
            if avg_scales[0] is None:
                _adamw(*roles, grad_scale, scalars, numbers, use_kernel)
            else:
                number = step if scalars is None else 0
                scales = avg_scales, sq_scales
                _adamw_8(*roles, *scales, positions, grad_scale, scalars, numbers, number, seed, use_kernel)


def _numbers(
    lr: float | torch.Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int | torch.Tensor,
    device: torch.device,
) -> tuple[list[float], torch.Tensor | None]:
    """`numbers` and `scalars` of the operators. Bias corrections are differences of near numbers, hence float64."""
    beta1, beta2 = betas
    fixed = [1 - beta1, beta2, 1 - beta2, eps]
    if not isinstance(lr, torch.Tensor) and not isinstance(step, torch.Tensor):
        return [1 - lr * weight_decay, lr / (1 - beta1**step), (1 - beta2**step) ** 0.5, *fixed], None
    rate, count = (torch.as_tensor(x, dtype=torch.float64, device=device).reshape(()) for x in (lr, step))
    changing = 1 - rate * weight_decay, rate / (1 - beta1**count), (1 - beta2**count).sqrt(), count
    return [0.0, 0.0, 0.0, *fixed], torch.stack(changing).float()


def _shard(
    i: int,
    device: torch.device,
    param: torch.Tensor,
    grad: torch.Tensor,
    avg: torch.Tensor | State8,
    sq: torch.Tensor | State8,
    master: torch.Tensor | None,
    copy: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """Weight, gradient, m, v, copy, scale of m, of v: what the kernels read and write; None for what is not there."""
    size, fp32 = param.numel(), (torch.float32,)
    if master is None:
        check_shard(f"params[{i}]", param, fp32, size, device, note=", or have a master")
        weight = param
    else:
        if copy is not None:
            raise ValueError(f"copies[{i}] must be None where there is a master: params[{i}] is the copy")
        check_shard(f"params[{i}]", param, HALVES, size, device, note=" where there is a master")
        check_shard(f"master[{i}]", master, fp32, size, device)
        weight, copy = master, param
    check_shard(f"grads[{i}]", grad, (torch.float32, *HALVES), size, device, contiguous=False)
    if copy is not None:
        check_shard(f"copies[{i}]", copy, HALVES, size, device)
    if isinstance(avg, State8) != isinstance(sq, State8):
        raise ValueError(f"exp_avgs[{i}] and exp_avg_sqs[{i}] must both be State8 or both be tensors")
    if not isinstance(avg, State8):
        check_shard(f"exp_avgs[{i}]", avg, fp32, size, device)
        check_shard(f"exp_avg_sqs[{i}]", sq, fp32, size, device)
        return weight, grad.contiguous(), avg, sq, copy, None, None
    for name, state, code in (("exp_avgs", avg, torch.int8), ("exp_avg_sqs", sq, torch.uint8)):
        check_shard(f"{name}[{i}].codes", state.codes, (code,), size, device)
        check_shard(f"{name}[{i}].scales", state.scales, fp32, -(-size // BLOCK), device)
    return weight, grad.contiguous(), avg.codes, sq.codes, copy, avg.scales, sq.scales


def check_hyperparameters(
    lr: float | torch.Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    """Raise ValueError for what is out of range."""
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr has shape {tuple(lr.shape)}; it must have one element")
    elif not lr >= 0:
        raise ValueError(f"lr is {lr}; it must be at least 0")
    if not eps >= 0 or not weight_decay >= 0:
        raise ValueError(f"eps and weight_decay must be at least 0, are {eps} and {weight_decay}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas is {betas}; it must be two numbers, at least 0 and below 1")


def _check_counters(step: int | torch.Tensor, seed: int) -> None:
    if isinstance(step, torch.Tensor):
        if step.numel() != 1:
            raise ValueError(f"step has shape {tuple(step.shape)}; it must have one element")
    elif step < 1:
        raise ValueError(f"step is {step}; the first is 1")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2^63")
