"""Fused kernels. None yet: the model and the losses run on PyTorch's own operators on every device."""
