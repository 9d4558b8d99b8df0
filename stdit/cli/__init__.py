"""Thin commands: they parse arguments, show progress and print. The work is done by other parts, none of which imports
this one."""
