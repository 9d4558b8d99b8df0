"""Shared by several commands: lazy groups, options, output paths, progress bars, tables."""
