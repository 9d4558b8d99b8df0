"""Prepares a manifest for training, once: caches latents and embeddings, captions clips. Imports data, text, vae and
weights."""
