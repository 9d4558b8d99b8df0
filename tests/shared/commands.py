"""The commands of `stdit`, as the tests of the command line go through them."""

from __future__ import annotations

import typer


def every_command(command, path: tuple[str, ...] = ("stdit",)):
    """(path, command) of a group and of all below it, each imported."""
    yield path, command
    names = command.list_commands(None) if hasattr(command, "list_commands") else []
    for name in names:
        context = typer.Context(command, info_name=path[-1])
        yield from every_command(command.resolve_command(context, [name])[1], (*path, name))
