"""What every operator does besides its work."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from umedtrain.kernels._op import _on_its_device


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
