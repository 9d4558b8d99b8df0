"""Groups of commands that import a command's module only when it is called, so `--help` stays fast."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from stdit.heartbeat import HEARTBEAT


def lazy_group(commands: dict[str, tuple[str, str]], **settings: Any) -> typer.Typer:
    """A typer app of commands {name: (module, short help)}.

    A module holds either a typer app called `app`, or a function called like the command ("-" becomes "_").
    """

    class LazyGroup(TyperGroup):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for name, (_, text) in commands.items():  # for the list of commands
                self.commands.setdefault(name, TyperCommand(name, help=text, callback=lambda: None))

        def list_commands(self, ctx: Any) -> list[str]:
            return list(self.commands)

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            name, command, rest = super().resolve_command(ctx, args)
            if name in commands:
                command = load_command(name, commands[name][0])
                self.commands[name] = command
            return name, command, rest

    app = typer.Typer(cls=LazyGroup, add_completion=False, no_args_is_help=True, **settings)
    app.callback()(_no_options)
    return app


def _no_options() -> None:
    """The group has no options of its own."""


def load_command(name: str, module: str) -> Any:
    """Imports a module's command: its typer app `app`, or its function `name`."""
    found = importlib.import_module(module)
    if hasattr(found, "app"):
        return as_command(found.app)
    return as_command(getattr(found, name.replace("-", "_")), name)


def as_command(command: Any, name: str | None = None) -> Any:
    """The click command of a typer app, or of a function with typer's annotations."""
    if isinstance(command, typer.Typer):
        return _announced(typer.main.get_command(command))
    if callable(command) and not hasattr(command, "make_context"):
        app = typer.Typer(add_completion=False)
        app.command(name)(command)
        return _announced(typer.main.get_command(app))
    return command


def _announced(command: Any) -> Any:
    """Makes the command, or each command of a group, announce its start once its arguments are parsed."""
    if isinstance(command, TyperGroup):
        for member in command.commands.values():
            _announced(member)
        return command
    invoke = command.invoke

    def announce(context: Any) -> Any:
        HEARTBEAT.start(context.command_path)
        return invoke(context)

    command.invoke = announce
    return command
