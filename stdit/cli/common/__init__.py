"""Shared by several commands: lazy groups, options, output paths, tables."""
