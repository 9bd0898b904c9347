"""Checkpoints of other people's formats, read into our models and written from them, tensor by tensor."""

from umedtrain.weights.checkpoint import Checkpoint, CheckpointError
from umedtrain.weights.convert import convert
from umedtrain.weights.export import save_model, save_stream
from umedtrain.weights.load import load_model, open_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "convert",
    "load_model",
    "open_checkpoint",
    "save_model",
    "save_stream",
]
