"""Thin commands: arguments, progress and printing. Every command ends in a function of another part. Nothing imports
it."""
