"""Reads and writes frames of video and picture files with PyAV and Pillow. Runs in the decoder's process, without torch
and pyarrow. Imports remote/paths."""
