"""Llama over packed streams."""
