"""Proving kernels without a GPU: interpreting, sanitizing, compiling, measuring and linting them."""
