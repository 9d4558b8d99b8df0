"""What is measured of decoded frames: scene cuts, scores, fingerprints. Runs in the decoder's process: no torch, no
pyarrow. Imports decode."""
