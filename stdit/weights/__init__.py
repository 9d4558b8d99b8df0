"""Weights in every layout, in and out, strictly. Imports models, vae and text."""
