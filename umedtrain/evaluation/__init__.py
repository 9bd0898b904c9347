"""Benchmarks, answer extraction, votes, reward accuracy, and how sure the figures are."""
