"""Measures trained models: toy scores, captions, VAEs; metrics on arrays; the report of a run. Imports sampling and
everything above it."""
