"""Groups of commands that import a command's module only when it is called, so `--help` stays fast."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from stdit.heartbeat import HEARTBEAT

WORDS: ContextVar[tuple[str, ...]] = ContextVar("WORDS", default=())  # of the command line that runs, "stdit" first


def lazy_group(name: str, help: str, commands: Mapping[str, tuple[str, str] | typer.Typer]) -> typer.Typer:
    """A typer app of commands {name: (module, short help)} and of other groups {name: app}.

    A module holds a function of the command's name ("-" becomes "_").
    """

    class LazyGroup(TyperGroup):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for name, place in commands.items():
                if isinstance(place, typer.Typer):
                    self.commands[name] = as_command(place)
                else:  # for the list of commands
                    self.commands[name] = TyperCommand(name, help=place[1], callback=lambda: None)

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            name, command, rest = super().resolve_command(ctx, args)
            if name and isinstance(place := commands.get(name), tuple):
                function = getattr(importlib.import_module(place[0]), name.replace("-", "_"))
                command = as_command(function, name)
            return name, command, rest

    app = typer.Typer(name=name, cls=LazyGroup, add_completion=False, no_args_is_help=True, help=help)
    app.callback()(lambda: None)
    return app


def as_command(command: Callable[..., Any] | typer.Typer, name: str | None = None) -> Any:
    """The click command of a lazy group, or of a function with typer's annotations, which announces its start."""
    if isinstance(command, typer.Typer):
        return typer.main.get_command(command)
    app = typer.Typer(add_completion=False)
    app.command(name)(command)
    found: Any = typer.main.get_command(app)
    invoke = found.invoke

    def announce(context: Any) -> Any:
        HEARTBEAT.start(context.command_path)
        return invoke(context)

    found.invoke = announce
    return found
