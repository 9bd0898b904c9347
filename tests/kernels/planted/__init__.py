"""Kernels with a fault each, beside one without: what `check` must find, and what it must let pass."""
