"""Clips of the plan as tensors, from files or from the cache. Imports the rooms before it."""
