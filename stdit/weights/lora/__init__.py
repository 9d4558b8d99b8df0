"""Reads, writes, converts and merges adapters (LoRA) of every layout."""
