"""Frames of one video or picture file, by PyAV and Pillow. Runs in the decoder's process: no torch, no pyarrow.
Imports remote/paths."""
