"""Compile what host code launches, for GPUs that are not there.

    with capture("sm_90") as launches:
        rms_norm(torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta"), weight, impl="triton")
    resources(launches[0].kernel)

Triton asks a driver for the device, its target and how to launch. The one here names an absent GPU and records launches
instead of making them, so unmodified host code, on meta tensors that cost no memory, is specialised (16-byte alignment,
arguments equal to 1, heuristics) and compiled to a cubin or hsaco exactly as on that GPU. Nothing is executed and no
time is measured. A process that has TRITON_INTERPRET=1 cannot compile: kernels are decorated for one or the other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime import driver

from umedtrain.kernels._dispatch import assume_architecture

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_PROPERTIES = {
    "sm_80": {"max_shared_mem": 166912, "multiprocessor_count": 108, "max_num_regs": 65536, "warpSize": 32},
    "sm_90": {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32},
    "sm_100": {"max_shared_mem": 232448, "multiprocessor_count": 148, "max_num_regs": 65536, "warpSize": 32},
    "gfx942": {"max_shared_mem": 65536, "multiprocessor_count": 304, "max_num_regs": 65536, "warpSize": 64},
}
"""What a driver reports of A100, H100, B200 and MI300X, as far as Triton and launchers ask."""

_MAX_THREADS = 1024


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded: the kernel's name, its grid, and what was compiled."""

    name: str
    grid: tuple[int, int, int]
    kernel: CompiledKernel


@contextmanager
def capture(target: str) -> Iterator[list[Launch]]:
    """Compile and record the launches inside for a key of `TARGETS`; launchers take that architecture's configurations.

    Raises (from the launches inside) what Triton raises: a compilation error, or `OutOfResources` for a kernel that
    asks for more shared memory or threads than the GPU has.
    """
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}; it must be one of {', '.join(TARGETS)}")
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels of this process are interpreted and cannot be compiled")
    offline = _OfflineDriver(target)
    previous, run = driver._active, CompiledKernel.run
    driver.set_active(offline)
    CompiledKernel.run = property(lambda kernel: offline.launcher_of(kernel, run))
    try:
        with assume_architecture(target):
            yield offline.launches
    finally:
        CompiledKernel.run, driver._active = run, previous


class _OfflineDriver(DriverBase):
    """The calls that Triton's launcher makes to a driver, answered for a GPU that is absent."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.launches: list[Launch] = []
        self.utils = self
        self.current: CompiledKernel | None = None

    def launcher_of(self, kernel: CompiledKernel, run: property) -> Any:
        """The launcher of `kernel`, which is about to be launched; launchers outlive the driver that made them."""
        self.current = kernel
        return run.fget(kernel)

    @property
    def launcher_cls(self) -> type:
        return _Launcher

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        """(module, function, registers, spills, largest number of threads); a launch uses only the last."""
        return object(), object(), 0, 0, _MAX_THREADS

    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(_PROPERTIES[self.name])

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> int:
        # Compiled kernels are cached by device: one index for each target, far from those of real GPUs.
        return 1000 + list(TARGETS).index(self.name)

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("this kernel asks to be autotuned, which needs the GPU that it is compiled for")


class _Launcher:
    """Made once for each compiled kernel; records a launch with the driver that is active then."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.name

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, *_: Any) -> None:
        offline = driver.active
        offline.launches.append(Launch(self.name, (grid_x, grid_y, grid_z), offline.current))
