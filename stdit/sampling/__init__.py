"""Prompts and known frames to frames: the pipeline and the model folder. Imports models, vae, text, diffusion,
weights and prepare."""
