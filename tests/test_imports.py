"""The direction of imports (the layout's list, top to bottom), and what may not be imported before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import stdit

PACKAGE = Path(stdit.__file__).parent

# A file may import from its own line and from the lines above. The parts on line 1 know nothing of one another.
LINES = [
    {"shapes", "keyed", "errors", "files", "text_files", "memory", "strict", "heartbeat", "locks"},
    {"models", "vae", "text", "diffusion", "data"},
    {"weights"},
    {"encode", "caption"},
    {"pipeline", "model_folder", "known_frames"},
    {"evaluation"},
    {"training"},
    {"config"},
    {"cli"},
]
LINE_OF = {part: number for number, line in enumerate(LINES) for part in line}
STRANGERS = LINES[1]
ONLY_IMPORTER = {"deepspeed": "training/engine.py"}


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import of a file, those inside functions too, relative ones resolved."""
    found = []
    package = ("stdit", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "stdit":
                found += [(node.lineno, f"stdit.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, module))
    return found


def part_of(path: Path) -> str:
    """The part of the layout that a file belongs to: its folder under stdit, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def offence(path: Path, name: str) -> str:
    """Why a file may not import a name, or ''."""
    top, *rest = name.split(".")
    if top in ONLY_IMPORTER and path.relative_to(PACKAGE).as_posix() != ONLY_IMPORTER[top]:
        return f"imports {top}; only stdit/{ONLY_IMPORTER[top]} may"
    if top != "stdit" or not rest or rest[0] not in LINE_OF:
        return ""
    here, there = part_of(path), rest[0]
    if here not in LINE_OF:
        return f"stdit/{here} has no place in the layout"
    if here in STRANGERS and there in STRANGERS and here != there:
        return f"{here} imports {there}; they know each other only through shapes and tensors"
    if LINE_OF[there] > LINE_OF[here]:
        return f"{here} imports {there}, which stands below it"
    return ""


def test_imports_point_upward():
    offenders = [
        f"stdit/{path.relative_to(PACKAGE)}:{line}: {why}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py"  # names of any part, imported when used
        for line, name in imported(path)
        if (why := offence(path, name))
    ]
    assert not offenders, "\n" + "\n".join(offenders)


@pytest.mark.parametrize(
    ("file", "name", "why"),
    [
        ("models/transformer.py", "stdit.vae.layers", "know each other"),
        ("data/loader.py", "stdit.training", "below"),
        ("shapes.py", "stdit.models", "below"),
        ("training/trainer.py", "deepspeed.runtime", "only"),
        ("training/engine.py", "deepspeed", ""),
        ("training/trainer.py", "stdit.config", "below"),
        ("config.py", "stdit.training.trainer", ""),
        ("pipeline.py", "stdit.encode", ""),
        ("vae/losses.py", "stdit.vae.layers", ""),
        ("vae/losses.py", "stdit.errors", ""),
        ("vae/losses.py", "stdit", ""),
        ("serve/app.py", "stdit.pipeline", "no place"),
    ],
)
def test_the_rule_itself(file, name, why):
    found = offence(PACKAGE / file, name)
    assert (why in found) if why else not found


def test_imports_are_found_wherever_they_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "vae").mkdir()
    path = tmp_path / "vae" / "a.py"
    path.write_text("import deepspeed as d\ndef f():\n    from stdit import shapes, data\n    from ..models import x\n")
    assert [name for _, name in imported(path)] == ["deepspeed", "stdit.shapes", "stdit.data", "stdit.models"]


HEAVY = ("torch", "torchvision", "transformers", "diffusers", "deepspeed", "av", "pyarrow", "pandas", "scipy", "timm")
HEAVY_TOO = (*HEAVY, "numpy", "matplotlib", "pydantic_core", "PIL")


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("stdit", HEAVY_TOO), ("stdit.shapes", HEAVY_TOO), ("stdit.keyed", HEAVY_TOO), ("stdit.cli.main", HEAVY)],
)
def test_heavy_modules_wait_until_they_are_used(module, heavy):
    code = f"import sys, {module}; print(*[name for name in {heavy!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert not run.stdout.split()
