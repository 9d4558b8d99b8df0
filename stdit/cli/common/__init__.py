"""Shared by several commands: lazy groups, progress bars, devices, output paths, number ranges."""
