"""Every command prints a line before it imports what may take long: on a cold disk torch alone takes many seconds."""

from __future__ import annotations

import sys

import pytest
from children import Child
from commands import every_command

from stdit.cli.common.lazy import as_command
from stdit.cli.main import app

HEAVY = ("torch", "transformers", "deepspeed", "numpy", "pyarrow", "av", "matplotlib", "PIL", "fsspec", "timm")
# Runs `stdit` and stops it, with status 9, at the first import of something heavy.
CODE = """
import os, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy}:
            os.write(2, f"imports {{name}}\\n".encode())
            os._exit(9)
sys.meta_path.insert(0, Stop())
sys.argv = {args}
from stdit.cli.main import main
main()
"""
MORE = {("sample",): ["--model", "x", "--out", "y", "--prompt", "a dog"]}  # what is wanted, though it has a default


def arguments(command) -> list[str]:
    """Something for everything that a command requires."""
    found = []
    for parameter in command.params:
        if parameter.required:
            found += ["x"] if parameter.param_type_name == "argument" else [parameter.opts[0], "x"]
    return found


LEAVES = {path[1:]: command for path, command in every_command(as_command(app)) if not hasattr(command, "commands")}


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_a_command_speaks_before_it_imports_anything_heavy(path, tmp_path):
    args = ["stdit", *path, *arguments(LEAVES[path]), *MORE.get(path, [])]
    child = Child([sys.executable, "-c", CODE.format(heavy=HEAVY, args=args)], cwd=tmp_path)
    assert child.status() in (9, 1), child.output  # 1: what is wrong with an argument is seen without heavy imports
    assert child.output.splitlines()[0] == f"stdit {' '.join(path)}: starting …"


@pytest.mark.parametrize("path", [(), ("data",), ("eval",), ("weights",), *LEAVES], ids=" ".join)
def test_help_imports_nothing_heavy(path, tmp_path):
    args = ["stdit", *path, "--help"]
    child = Child([sys.executable, "-c", CODE.format(heavy=HEAVY, args=args)], cwd=tmp_path)
    assert "Usage: stdit" in child.finish() and "starting" not in child.output
