"""Finds, checks, loads, saves and converts weights of every family. Imports models, vae, text and diffusion."""
