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
    {"shapes", "keyed", "errors", "downloads", "files", "text_files", "machine", "settings", "heartbeat", "locks"}
    | {"pixels", "shipped"},
    {"models", "vae", "text", "diffusion", "data"},
    {"weights"},
    {"prepare"},
    {"sampling"},
    {"evaluation"},
    {"training"},
    {"cli"},
]
LINE_OF = {part: number for number, line in enumerate(LINES) for part in line}
STRANGERS = LINES[1]
# The same inside a part: a room (or a file beside the rooms) imports from its own line and from the lines above.
ROOMS = {
    "keyed": [{"seeds"}, {"stream"}, {"weights"}],
    "data": [
        {"remote"}, {"decode"}, {"measure"}, {"workers"}, {"read_ahead"},
        {"config", "captions", "manifest", "manifests", "parts", "toy"}, {"scan"}, {"plan"}, {"load"},
    ],
    "models": [
        {"config", "positions", "operators"}, {"sequence"}, {"packing"}, {"attention", "fused"}, {"blocks"},
        {"variants"}, {"transformer"},
    ],
    "training": [
        {"engine"}, {"objectives"}, {"config"}, {"setup"}, {"batches"}, {"outputs"},
        {"bad_clips", "out_of_memory", "resume", "stop_signal", "watch"}, {"trainer"}, {"run"},
    ],
    "evaluation": [{"metrics", "curves"}, {"measures", "toy"}, {"captions", "harness", "report", "vae"}],
    "weights": [
        {"keymap", "tensor_files", "identity"}, {"families"},
        {"quantised", "refused"}, {"sources"}, {"io", "image_vae", "lora"},
    ],
    "vae": [
        {"config", "clips", "tiles"}, {"streaming"}, {"cpu"}, {"layers"}, {"networks"}, {"autoencoder"},
        {"families", "training"},
    ],
    "cli": [{"common"}, {"dry_run"}, {"data", "eval", "sample", "train", "weights"}, {"main"}],
}  # fmt: skip
LIGHT = (
    "data/decode",
    "data/measure",
    "data/workers",
    "data/remote",
)  # the decoder's process: neither torch nor pyarrow
ONLY_IMPORTER = {"deepspeed": "training/engine/zero.py"}
MOST_FILES, MOST_LINES = 12, 400


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
    return within_part(path, rest) if here == there else ""


def within_part(path: Path, rest: list[str]) -> str:
    """The same for the rooms of one part."""
    line_of = {room: number for number, line in enumerate(ROOMS.get(rest[0], [])) for room in line}
    parts = path.relative_to(PACKAGE).parts
    if len(parts) < 2 or len(rest) < 2:
        return ""
    here, there = parts[1].removesuffix(".py"), rest[1]
    if line_of.get(there, -1) > line_of.get(here, len(line_of)):
        return f"{rest[0]}/{here} imports {rest[0]}/{there}, which stands below it"
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


def module_of(path: Path) -> str:
    return ".".join(("stdit", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def test_no_module_imports_itself_through_others():
    """No circle, not even of imports inside functions or for types alone."""
    modules = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        found = edges[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names} & modules.keys()
            elif isinstance(node, ast.ImportFrom) and node.module:
                members = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                found |= members or ({node.module} & modules.keys())
        found.discard(module)
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        assert module not in trail, " → ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for other in sorted(edges[module]):
                visit(other, [*trail, module])
            done.add(module)

    for module in edges:
        visit(module, [])


def test_every_folder_says_what_lives_there_and_stays_small():
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        init = folder / "__init__.py"
        assert init.exists() and ast.get_docstring(ast.parse(init.read_text())), f"{init}: says nothing"
        files = [path for path in folder.glob("*.py") if path != init]
        assert len(files) <= MOST_FILES, f"{folder}: {len(files)} files"
        for path in files:
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= MOST_LINES, f"{path}: {lines} lines"


def test_tests_mirror_the_package():
    """tests/ROOM/test_NAME.py has a module stdit/ROOM/NAME.py, or its folder is one of the package's."""
    tests = Path(__file__).parent
    for path in tests.rglob("test_*.py"):
        folder = path.relative_to(tests).parent
        assert (PACKAGE / folder).is_dir(), f"{path}: the package has no stdit/{folder}"


def test_the_decoders_process_needs_neither_torch_nor_pyarrow():
    names = [module_of(path) for room in LIGHT for path in sorted((PACKAGE / room).rglob("*.py"))]
    code = f"import sys, importlib; [importlib.import_module(n) for n in {names!r}]; "
    code += "print(*[n for n in ('torch', 'pyarrow') if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert not run.stdout.split()


@pytest.mark.parametrize(
    ("file", "name", "why"),
    [
        ("models/transformer.py", "stdit.vae.layers", "know each other"),
        ("data/load/loader.py", "stdit.training", "below"),
        ("data/decode/video.py", "stdit.data.scan.scan", "below"),
        ("data/manifest.py", "stdit.data.plan.planner", "below"),
        ("data/load/loader.py", "stdit.data.manifest", ""),
        ("shapes.py", "stdit.models", "below"),
        ("training/trainer.py", "deepspeed.runtime", "only"),
        ("training/engine/zero.py", "deepspeed", ""),
        ("training/config.py", "stdit.training.trainer", "below"),
        ("training/trainer.py", "stdit.training.config", ""),
        ("sampling/pipeline.py", "stdit.prepare.encode", ""),
        ("vae/losses.py", "stdit.vae.layers", ""),
        ("vae/losses.py", "stdit.errors", ""),
        ("vae/losses.py", "stdit", ""),
        ("serve/app.py", "stdit.sampling.pipeline", "no place"),
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
