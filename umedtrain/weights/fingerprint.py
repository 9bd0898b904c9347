"""A short name for the weights of a checkpoint, by which caches of what they computed are kept apart."""

import hashlib
from pathlib import Path

_PIECE = 1 << 20
_WEIGHTS = ("*.safetensors", "consolidated.*.pth", "*.gguf")


def weights_fingerprint(path: str | Path) -> str:
    """SHA-256, in hex, over name, size, beginning, middle and end (1 MiB each) of every file of weights.

    Training changes all weights, so pieces tell checkpoints apart without reading hundreds of gigabytes. Where the
    files lie does not matter.

    Raises:
        ValueError: when no file of weights is there.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for pattern in _WEIGHTS for file in path.glob(pattern))
    if not files:
        raise ValueError(f"{path}: no file of weights is there ({', '.join(_WEIGHTS)})")
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            for start in (0, max(0, size // 2 - _PIECE // 2), max(0, size - _PIECE)):
                opened.seek(start)
                digest.update(opened.read(_PIECE))
    return digest.hexdigest()
