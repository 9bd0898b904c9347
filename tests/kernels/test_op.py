"""What every operator does besides its work."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from umedtrain.kernels import _dispatch, use_triton
from umedtrain.kernels._op import _on_its_device
from umedtrain.model.fused import kernels_for


@pytest.mark.parametrize("as_list", (False, True))
@pytest.mark.parametrize(("device", "entered"), (("cuda:1", ["cuda:1"]), ("cuda:0", []), ("cpu", [])))
def test_launches_on_the_gpu_of_its_tensors(device, entered, as_list):
    """Triton launches on the current GPU, where another one's tensors are no valid addresses."""
    seen = []

    @contextmanager
    def current(index):
        seen.append(str(index))
        yield

    with (
        FakeTensorMode(),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(torch.cuda, "device", current),
    ):
        x = torch.empty(3, device=device)
        assert _on_its_device(lambda *args: len(args))(None, [x] if as_list else x, 0.5) == 3
    assert seen == entered


@pytest.mark.parametrize(
    ("device", "variable", "impl", "installed", "expected"),
    (
        ("cpu", "auto", None, True, False),
        ("cpu", "triton", None, True, True),  # in the interpreter
        ("cpu", "triton", "torch", True, False),
        ("cuda", "auto", None, True, True),
        ("cuda", "auto", None, False, False),
        ("cuda", "torch", None, True, False),
        ("cuda", "torch", "triton", True, True),
        ("meta", "auto", None, True, False),
        ("meta", "auto", "triton", True, True),  # to be compiled only
    ),
)
def test_where_a_call_goes(monkeypatch, device, variable, impl, installed, expected):
    monkeypatch.setenv("UMEDTRAIN_KERNELS", variable)
    monkeypatch.setattr(_dispatch, "HAS_TRITON", installed)
    with FakeTensorMode():
        x = torch.empty(3, device=device)
        assert use_triton(x, impl) == expected
        if impl is None:
            assert (kernels_for(x) is not None) == expected
            assert kernels_for(x.double()) is None


def test_what_cannot_run_is_refused(monkeypatch):
    x = torch.empty(3)
    with pytest.raises(ValueError, match="impl is 'cuda'; it must be 'auto', 'triton' or 'torch'"):
        use_triton(x, "cuda")
    monkeypatch.setenv("UMEDTRAIN_KERNELS", "fast")
    for call in (use_triton, kernels_for):
        with pytest.raises(ValueError, match="environment variable UMEDTRAIN_KERNELS is 'fast'"):
            call(x)
    monkeypatch.setenv("UMEDTRAIN_KERNELS", "triton")
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="cannot run on a CPU tensor"):
        kernels_for(x)
    monkeypatch.setattr(_dispatch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="need the package `triton`"):
        kernels_for(x)
