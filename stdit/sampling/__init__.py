"""Samples frames from prompts and known frames, and reads and writes model folders. Imports models, vae, text,
diffusion, weights and prepare."""
