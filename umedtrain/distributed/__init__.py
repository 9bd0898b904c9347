"""Processes, sharding and gathering."""
