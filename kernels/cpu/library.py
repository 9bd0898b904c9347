"""The C++ of this folder, compiled for the machine that runs it when it is first wanted.

The library lies in ~/.cache/umedtrain (or $XDG_CACHE_HOME/umedtrain), under a name made from the sources, the compiler
and the processor, so that it is compiled once on each machine and a shared home folder holds one for each kind. Where
that folder cannot be written to, each process compiles its own. It uses the OpenMP runtime, and with it the threads,
that PyTorch has loaded already.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
# Products and sums are fused where the source says so, not where the compiler likes it.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fPIC", "-fopenmp")
_SOURCES = ("linear.cpp", "layers.cpp", "sample.cpp")

_POINTER, _INTEGER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "linear": [_POINTER] * 3 + [_INTEGER] * 2,
    "rms_norm": [_POINTER] * 2 + [_INTEGER] + [_POINTER] + [_INTEGER] * 2 + [_FLOAT],
    "llama_layers": [_POINTER] * 2 + [_INTEGER] + [_POINTER, _FLOAT],
    "softmax_statistics": [_POINTER] * 3 + [_INTEGER] * 2,
    "sample": [_POINTER] * 10 + [_INTEGER] * 2,
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library; None, after a warning that says why, where it cannot be made."""
    compiler = _compiler()
    if compiler is None:
        warnings.warn(
            "no C++ compiler (g++, c++ or $CXX): decoding on this CPU uses PyTorch's slower layers", stacklevel=2
        )
        return None
    try:
        return _compiled(compiler)
    except (subprocess.CalledProcessError, OSError) as error:
        detail = (getattr(error, "stderr", None) or "").strip() or str(error)
        warnings.warn(
            f"{compiler} could not make the decoding library, so PyTorch's slower layers are used: "
            f"{detail.splitlines()[0]}",
            stacklevel=2,
        )
        return None


def _compiler() -> str | None:
    return next((path for name in (os.environ.get("CXX"), "g++", "c++") if name and (path := shutil.which(name))), None)


def _compiled(compiler: str) -> ctypes.CDLL:
    name = f"decode-{_fingerprint(compiler)}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "umedtrain"
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / name).exists():
            return _load(folder / name)
        scratch = tempfile.TemporaryDirectory(dir=folder)
    except (OSError, RuntimeError):  # a read-only home, or none
        folder, scratch = None, tempfile.TemporaryDirectory()
    with scratch:
        path = _build(compiler, Path(scratch.name), name)
        if folder is not None:
            # Ranks that compile at the same time replace one another's equal files.
            path = path.replace(folder / name)
        return _load(path)


def _build(compiler: str, folder: Path, name: str) -> Path:
    objects = []
    for source in _SOURCES:
        objects.append(str(folder / f"{source}.o"))
        _run(compiler, *_FLAGS, "-c", str(_FOLDER / source), "-o", objects[-1])
    _run(compiler, "-shared", *objects, *_openmp(), "-o", str(folder / name))
    return folder / name


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _openmp() -> list[str]:
    """PyTorch's own runtime where it ships one: two runtimes would fight for the cores."""
    bundled = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    return [str(bundled[0]), f"-Wl,-rpath,{bundled[0].parent}"] if bundled else ["-fopenmp"]


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [version, platform.machine(), _processor(), torch.__version__, sys.platform, repr(_FLAGS)]
    parts += [path.read_text() for path in sorted((*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h")))]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


def _processor() -> str:
    """What decides the meaning of -march=native."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded
