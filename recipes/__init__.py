"""Recipes: one readable file per torchrun launch."""
