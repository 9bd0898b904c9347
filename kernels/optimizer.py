"""AdamW as a `torch.optim.Optimizer`, on the kernel that updates all shards in one launch."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from umedtrain.kernels._adamw_twin import BLOCK, State8
from umedtrain.kernels._dispatch import Impl
from umedtrain.kernels.adamw import adamw_step, check_hyperparameters


class AdamW(torch.optim.Optimizer):
    """AdamW for plain and DTensor parameters (FSDP2, tensor parallel), each rank on its own shards.

    Takes the place of `torch.optim.AdamW`: same formula, defaults and parameter groups, and its checkpoints of fp32
    parameters load. The states are always fp32, or 8-bit; 16-bit parameters get fp32 master weights, of which they are
    the roundings. A step is one launch for each combination of types, of all parameters of a group that have done
    equally many steps. Nothing waits for the device, so a group's `lr` may be a tensor on it.

    State of a parameter: `step` (one fp32 element on the CPU, as PyTorch's), `exp_avg` and `exp_avg_sq`; `master` for
    16-bit ones; with 8-bit states, where the two hold codes, also `exp_avg_scale` and `exp_avg_sq_scale`, one fp32
    number for 256 elements. All but `step` are DTensors where the parameter is one, placed alike, so distributed
    checkpoints can be read by another number of ranks.

    Args:
        params: as of any optimizer; fp32, bf16 or fp16.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; settings of a group.
        state_bits: 32, or 8 for tensors of two or more dimensions whose last, or the part of it that a rank has, is a
            multiple of 256: the matrices of a Llama, but not the vectors of its norms, which stay at 32.
        seed: of the stochastic rounding of 8-bit states.
        impl: "triton" or "torch"; by default chosen by the device.

    Raises:
        ValueError: for settings out of range, and, from `step`, for parameters that are not contiguous.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: Literal[8, 32] = 32,
        seed: int = 0,
        impl: Impl | None = None,
    ) -> None:
        if state_bits not in (8, 32):
            raise ValueError(f"state_bits is {state_bits}; it must be 8 or 32")
        check_hyperparameters(lr, betas, eps, weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.state_bits, self.seed, self.impl = state_bits, seed, impl

    def __getstate__(self) -> dict[str, Any]:
        """What copying and pickling take along; the base class knows of groups and states only."""
        own = {name: getattr(self, name) for name in ("state_bits", "seed", "impl")}
        return {**super().__getstate__(), **own}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: torch.Tensor | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: evaluates the loss again, with gradients; its result is returned.
            grad_scale: one fp32 element on the device, a factor of all gradients, as from `clip_factor`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            alike: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    state = self._state(param)
                    state["step"] += 1
                    alike.setdefault((param.device, int(state["step"])), []).append(param)
            for (_, step), params in alike.items():
                self._update(params, group, step, self.seed + index, grad_scale)
        return loss

    def _update(
        self, params: list[torch.Tensor], group: dict[str, Any], step: int, seed: int, scale: torch.Tensor | None
    ) -> None:
        states = [{key: _local(value) for key, value in self.state[param].items()} for param in params]
        adamw_step(
            [_local(param) for param in params],
            [_local(param.grad) for param in params],
            [_moment(state, "exp_avg") for state in states],
            [_moment(state, "exp_avg_sq") for state in states],
            master=[state.get("master") for state in states],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            grad_scale=scale,
            seed=seed,
            impl=self.impl,
        )

    def _state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameter's state, made where there is none yet."""
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        narrow = self.state_bits == 8 and _has_whole_blocks(param)
        for name, code in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=code if narrow else torch.float32)
                if narrow:
                    state[name + "_scale"] = _zero_scales(param)
        if param.dtype != torch.float32 and "master" not in state:
            state["master"] = param.detach().float()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, from `state_dict` of this class or of `torch.optim.AdamW`, in the types that it has here.

        The base class would give every floating state, and the codes, the type of the parameter.

        Raises:
            ValueError: for other groups than this optimizer's, and for states of another number of bits.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        pairs = list(zip(ids, params, strict=False))  # the base class raises where they do not match
        saved = state_dict["state"]
        loaded = {param: self._loaded(index, param, saved[index]) for index, param in pairs if index in saved}
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(loaded)

    def _loaded(self, index: Any, param: torch.Tensor, saved: dict[str, Any]) -> dict[str, torch.Tensor]:
        narrow = self.state_bits == 8 and _has_whole_blocks(param)
        if ("exp_avg_scale" in saved) != narrow:
            has, wants = (8, 32) if "exp_avg_scale" in saved else (32, 8)
            raise ValueError(
                f"the state of parameter {index} has {has} bits; state_bits of this optimizer asks for {wants}"
            )
        loaded = {"step": torch.as_tensor(saved["step"], dtype=torch.float32, device="cpu").clone()}
        for name in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "master"):
            if name in saved:
                dtype = saved[name].dtype if narrow and name in ("exp_avg", "exp_avg_sq") else torch.float32
                loaded[name] = saved[name].detach().to(device=param.device, dtype=dtype, copy=True)
        return loaded


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor; other tensors as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _moment(state: dict[str, torch.Tensor], name: str) -> torch.Tensor | State8:
    scales = state.get(name + "_scale")
    return state[name] if scales is None else State8(state[name], scales)


def _has_whole_blocks(param: torch.Tensor) -> bool:
    """Whether no block of an 8-bit state crosses a row or a rank's edge: the same answer on every rank."""
    if param.ndim < 2:
        return False
    columns = param.shape[-1]
    for dimension, placement in enumerate(getattr(param, "placements", ())):
        if placement.is_shard(param.ndim - 1):
            ranks = param.device_mesh.size(dimension)
            if columns % ranks:
                return False
            columns //= ranks
    return columns % BLOCK == 0


def _zero_scales(param: torch.Tensor) -> torch.Tensor:
    """fp32 zeros [..., columns / 256], placed as the parameter is."""
    local = _local(param)
    scales = local.new_zeros((*local.shape[:-1], local.shape[-1] // BLOCK), dtype=torch.float32)
    if local is param or not hasattr(param, "placements"):
        return scales
    from torch.distributed.tensor import DTensor

    shape = torch.Size((*param.shape[:-1], param.shape[-1] // BLOCK))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(scales, param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride)
