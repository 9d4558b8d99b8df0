"""Adapters (LoRA) of every layout, in and out."""
