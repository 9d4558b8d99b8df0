"""Loads the plan's clips as tensors, from files or from the cache. Imports all other rooms of data."""
