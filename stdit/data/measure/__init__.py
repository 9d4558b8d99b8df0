"""Measures decoded frames: scene cuts, scores, fingerprints. Runs in the decoder's process, without torch and pyarrow.
Imports decode."""
