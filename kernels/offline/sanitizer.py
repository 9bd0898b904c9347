"""A sanitizer and a traffic meter for kernels that run in Triton's interpreter.

    with watch() as watched:
        rms_norm(x, weight, impl="triton")
    watched.launches[0].loaded / watched.launches[0].unique_loaded

Raises `SanitizerError` for what a GPU leaves to chance, although the interpreter, which runs one program after
another, gives a result:

    bounds  a lane outside the storage of every tensor that was passed (stock: garbage, or a segmentation fault)
    races   two programs storing to one element; a program loading what another stores; a program storing what another
            loads (a kernel that works in place); an atomic update beside a plain access of another program;
            two lanes of one store with different values for one element;
            a program loading what it has itself stored, without `tl.debug_barrier()` between: other threads did that

Bytes are what the kernel asks the memory system for; caches are not modelled, so requested / unique above 1 is data
that is read again, from L2 at best. An atomic counts as one load and one store.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from triton.runtime import interpreter as stock

from umedtrain.kernels.offline import interpreter
from umedtrain.kernels.offline.interpreter import Handle

_SHADOW_LIMIT = 1 << 28
"""Larger storages, in bytes, are checked for bounds only: what is remembered takes 13 bytes for each element."""
_NOBODY, _SEVERAL = 0, -1


class SanitizerError(AssertionError):
    """A kernel did what a GPU gives no defined result for."""


@dataclass
class Traffic:
    """One launch: programs, bytes requested and distinct, and floating-point operations of its `tl.dot`s."""

    name: str
    programs: int = 0
    loaded: int = 0
    stored: int = 0
    unique_loaded: int = 0
    unique_stored: int = 0
    dot_flops: int = 0


class Watched:
    """What `watch` saw: `launches`, in order."""

    def __init__(self, races: bool, bounds: bool) -> None:
        self.launches: list[Traffic] = []
        self._races, self._bounds = races, bounds
        self._program = 0
        self._starts = self._ends = np.zeros(0, np.uint64)
        self._shadows: dict[int, _Shadow] = {}
        self._barriers = 0

    def begin(self, name: str, tensors: list[Any]) -> None:
        """A launch of the kernel `name` on `tensors` starts."""
        self.launches.append(Traffic(name))
        sizes, widths = {}, {}
        for tensor in tensors:
            start = tensor.untyped_storage().data_ptr()
            sizes[start] = tensor.untyped_storage().nbytes()
            widths[start] = min(tensor.element_size(), widths.get(start, 8))
        spans = sorted((start, start + size) for start, size in sizes.items() if size)
        self._starts, self._ends = np.array(spans, dtype=np.uint64).reshape(-1, 2).T
        small = [i for i, (start, end) in enumerate(spans) if end - start <= _SHADOW_LIMIT]
        self._shadows = {i: _Shadow(sizes[spans[i][0]], widths[spans[i][0]]) for i in small}

    def end(self) -> None:
        """The launch is over."""
        launch = self.launches[-1]
        launch.unique_loaded = sum(
            s.width * int(np.count_nonzero((s.reader != _NOBODY) | s.atomic)) for s in self._shadows.values()
        )
        launch.unique_stored = sum(s.width * int(np.count_nonzero(s.writer)) for s in self._shadows.values())
        self._shadows = {}

    def enter_program(self, program: int) -> None:
        """Accesses from here on are those of `program`, counted from 1."""
        self._program = program
        self._barriers += 1

    def barrier(self) -> None:
        """What this program stored is visible to all its threads."""
        self._barriers += 1

    def access(self, kind: str, pointers: Handle, mask: Any, values: Any = None) -> None:
        """One load, store or atomic ("load", "store", "atomic") of a block of lanes."""
        shape = np.broadcast_shapes(pointers.data.shape, np.shape(mask))
        active = np.broadcast_to(mask, shape)
        addresses = np.broadcast_to(pointers.data, shape)[active]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        launch = self.launches[-1]
        launch.loaded += addresses.size * size * (kind != "store")
        launch.stored += addresses.size * size * (kind != "load")
        if not addresses.size:
            return
        if kind == "store" and self._races:
            self._check_lanes(addresses, np.broadcast_to(values, shape)[active])
        storage = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        inside = storage >= 0
        inside[inside] = addresses[inside] + np.uint64(size) <= self._ends[storage[inside]]
        if self._bounds and not inside.all():
            self._fail_bounds(kind, addresses, storage, inside)
        for i in {*storage[inside].tolist()}:
            if i in self._shadows:
                lanes = addresses[inside & (storage == i)]
                self._touch(kind, self._shadows[i], (lanes - self._starts[i]).astype(np.int64), size)

    def _touch(self, kind: str, shadow: "_Shadow", offsets: np.ndarray, size: int) -> None:
        where = shadow.elements(offsets, size)
        if self._races:
            self._check_races(kind, shadow, where)
        if kind == "load":
            shadow.reader[where] = self._joined(shadow.reader[where])
        if kind != "load":
            shadow.writer[where] = self._joined(shadow.writer[where])
            shadow.atomic[where] = kind == "atomic"
            shadow.written_after[where] = self._barriers

    def _joined(self, programs: np.ndarray) -> np.ndarray:
        return np.where((programs == _NOBODY) | (programs == self._program), self._program, _SEVERAL)

    def _others(self, programs: np.ndarray) -> np.ndarray:
        return (programs != _NOBODY) & (programs != self._program)

    def _check_races(self, kind: str, shadow: "_Shadow", where: np.ndarray) -> None:
        writer, reader, atomic = shadow.writer[where], shadow.reader[where], shadow.atomic[where]
        stored = self._others(writer) & ~(atomic & (kind == "atomic"))
        verb = {"load": "loads", "store": "stores to", "atomic": "atomically updates"}[kind]
        if stored.any():
            self._fail(f"program {self._program - 1} {verb} an element that {_who(writer[stored][0])} stored to")
        loaded = self._others(reader)
        if kind != "load" and loaded.any():
            self._fail(f"program {self._program - 1} {verb} an element that {_who(reader[loaded][0])} loaded")
        if kind == "load" and ((writer == self._program) & (shadow.written_after[where] == self._barriers)).any():
            self._fail(f"program {self._program - 1} loads what it stored without a tl.debug_barrier() between")

    def _check_lanes(self, addresses: np.ndarray, values: np.ndarray) -> None:
        if (addresses[1:] > addresses[:-1]).all():  # as nearly always
            return
        order = np.argsort(addresses, kind="stable")
        left, right = values[order[:-1]], values[order[1:]]
        differ = (left != right) & ~((left != left) & (right != right))  # NaN equals NaN
        if (differ & (addresses[order[1:]] == addresses[order[:-1]])).any():
            self._fail(f"two lanes of one store in program {self._program - 1} have different values for one element")

    def _fail_bounds(self, kind: str, addresses: np.ndarray, storage: np.ndarray, inside: np.ndarray) -> None:
        first = int(np.argmin(inside))
        near = max(0, int(storage[first])) if self._starts.size else None
        place = f"address {int(addresses[first])}"
        if near is not None:
            start, end = int(self._starts[near]), int(self._ends[near])
            place = f"byte {int(addresses[first]) - start} of a storage of {end - start} bytes"
        outside = int((~inside).sum())
        self._fail(
            f"{kind} out of bounds in program {self._program - 1}: {outside} of {inside.size} lanes, first {place}"
        )

    def _fail(self, message: str) -> None:
        raise SanitizerError(f"{self.launches[-1].name}: {message}")


class _Shadow:
    """For each element of a storage: the program that loaded it, that stored to it, how, and before which barrier."""

    def __init__(self, size: int, width: int) -> None:
        self.width = width  # bytes of an element: the narrowest that a tensor on the storage has
        elements = -(-size // width)
        self.reader, self.writer = np.zeros(elements, np.int32), np.zeros(elements, np.int32)
        self.written_after, self.atomic = np.zeros(elements, np.int32), np.zeros(elements, np.bool_)

    def elements(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """Indices of the elements that accesses of `size` bytes at byte `offsets` touch."""
        if size % self.width or (offsets % self.width).any():  # a pointer that was cast to a narrower type
            for name in ("reader", "writer", "written_after", "atomic"):
                setattr(self, name, np.repeat(getattr(self, name), self.width))
            self.width = 1
        first, count = offsets // self.width, size // self.width
        return first if count == 1 else (first[:, None] + np.arange(count)).reshape(-1)


def _who(program: int) -> str:
    return "several programs" if program == _SEVERAL else f"program {program - 1}"


@contextmanager
def watch(races: bool = True, bounds: bool = True) -> Iterator[Watched]:
    """Watch every launch inside; see the header of the file for what raises `SanitizerError`.

    `races=False` is for kernels that order their programs themselves, with locks or counters.
    """
    interpreter.install()
    watched = Watched(races, bounds)
    builder, executor = stock.interpreter_builder.__class__, stock.GridExecutor
    stock.interpreter_builder.__class__ = type("WatchedBuilder", (_WatchedBuilder,), {"watched": watched})
    stock.GridExecutor = type("WatchedExecutor", (_WatchedExecutor,), {"watched": watched})
    try:
        yield watched
    finally:
        stock.interpreter_builder.__class__, stock.GridExecutor = builder, executor


class _WatchedExecutor(interpreter.GridExecutor):
    """A launch that says when it begins and ends, and raises what the sanitizer raised as it is."""

    watched: Watched

    def _init_args_hst(self, args_dev: Any, kwargs: dict[str, Any]) -> Any:
        args, named = super()._init_args_hst(args_dev, kwargs)
        self.watched.begin(self.fn.__name__, _tensors((*args, *named.values())))
        return args, named

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Launch."""
        try:
            super().__call__(*args, **kwargs)
        except stock.InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, SanitizerError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None
        self.watched.end()


def _tensors(args: tuple[Any, ...]) -> list[Any]:
    found = []
    for arg in args:
        if isinstance(arg, tuple):
            found += _tensors(arg)
        else:
            arg = stock._unwrap_tensor(getattr(arg, "base", None) if isinstance(arg, stock.TensorDescriptor) else arg)
            found += [arg] if hasattr(arg, "untyped_storage") else []
    return found


class _WatchedBuilder(interpreter.GpuBuilder):
    """Reports every access to memory; all loads and stores end in the masked ones."""

    watched: Watched

    def set_grid_dim(self, *grid: int) -> None:
        super().set_grid_dim(*grid)
        self.watched.launches[-1].programs = int(np.prod(grid))

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        super().set_grid_idx(x, y, z)
        self.watched.enter_program(1 + (x * self.grid_dim[1] + y) * self.grid_dim[2] + z)

    def create_masked_load(self, ptrs: Handle, mask: Handle, *rest: Any, **named: Any) -> Handle:
        self.watched.access("load", ptrs, _array(mask))
        return super().create_masked_load(ptrs, mask, *rest, **named)

    def create_masked_store(self, ptrs: Handle, value: Handle, mask: Handle, *rest: Any, **named: Any) -> Any:
        self.watched.access("store", ptrs, _array(mask), value.data)
        return super().create_masked_store(ptrs, value, mask, *rest, **named)

    def create_atomic_rmw(self, op: Any, ptr: Handle, val: Handle, mask: Handle, *rest: Any) -> Handle:
        self.watched.access("atomic", ptr, _array(mask))
        return super().create_atomic_rmw(op, ptr, val, mask, *rest)

    def create_atomic_cas(self, ptr: Handle, *rest: Any) -> Handle:
        self.watched.access("atomic", ptr, np.True_)
        return super().create_atomic_cas(ptr, *rest)

    def create_barrier(self) -> None:
        self.watched.barrier()

    def create_dot(self, a: Handle, b: Handle, *rest: Any) -> Handle:
        self.watched.launches[-1].dot_flops += 2 * a.data.size * b.data.shape[-1]
        return super().create_dot(a, b, *rest)


def _array(mask: Any) -> np.ndarray:
    return np.asarray(mask.data, dtype=np.bool_)
