from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
from commands import every_command

from stdit import __version__
from stdit.cli.common.lazy import as_command, lazy_group
from stdit.cli.main import COMMANDS, app, run_command
from stdit.errors import Interrupted, StditError
from stdit.shipped import CONFIGS, find_shipped

ROOT = Path(__file__).parents[2]


def test_every_command_is_there_and_helps_with_an_example(capsys):
    seen = []
    for path, command in every_command(as_command(app)):
        with pytest.raises(SystemExit) as end:
            command.main(args=["--help"], prog_name=" ".join(path))
        assert end.value.code == 0
        help_text = " ".join(capsys.readouterr().out.split())
        seen.append(path[1:])
        for name in re.findall(r"(?:stdit train|train\.py|--config) ([a-z]\S*)", help_text):
            assert find_shipped(name, CONFIGS, ".yaml").is_file()  # what the examples name
        if hasattr(command, "list_commands"):  # a group: its commands have the examples
            continue
        example = re.search(r"Examples?: (.*)", help_text)
        assert example, f"{' '.join(path)} --help has no example"
        known = ("stdit ", f"python {path[-1]}.py", f"{path[-1]}.py", "torchrun ")
        assert example[1].startswith(known), f"{' '.join(path)}: {example[1][:60]}"
    assert {path[0] for path in seen if path} == set(COMMANDS)
    assert {("data", "scan"), ("data", "plan"), ("data", "encode"), ("data", "toy")} <= set(seen)


def test_help_imports_no_command():
    code = (
        "import sys; sys.argv = ['stdit', '--help']\nfrom stdit.cli.main import main\n"
        "try: main()\nexcept SystemExit as e: assert e.code == 0\n"
        "print([n for n in sys.modules if n.startswith(('torch', 'numpy', 'av', 'transformers', 'stdit.cli.data'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.rstrip().endswith("[]")
    assert all(name in run.stdout for name in COMMANDS)


def test_version(capsys):
    assert run_command(app, ["--version"], prog="stdit") == 0
    assert capsys.readouterr().out == f"stdit {__version__}\n"


def raising(error: BaseException):
    def command() -> None:
        """Example: stdit nothing"""
        raise error

    return command


class Wrapped(Exception):
    """As safetensors and pyarrow wrap what the system says."""


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (StditError("lr: 3 is too much.\nTake less."), 1, "error: lr: 3 is too much.\nTake less.\n"),
        (Interrupted("saved step 7; run it again"), 75, "saved step 7; run it again\n"),
        (Interrupted("saved", status=130), 130, "saved\n"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Abort(), 1, "stopped\n"),
        (typer.Exit(3), 3, ""),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a.safetensors"), 1, "runs/a.safetensors: no space"),
        (Wrapped("Error while serializing: I/O error: No space left on device (os error 28)"), 1, "no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 1, "error: /root/x: Permission denied"),
        (FileExistsError(errno.EEXIST, "File exists", "out"), 1, "error: out: File exists. Choose another path."),
        (OSError(errno.EIO, "Input/output error", "w.pth"), 1, "error: w.pth: Input/output error: the disk"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a.png"), 1, "error: a.png: Is a directory. Choose"),
    ],
)
def test_how_a_command_ends(error, status, message, capsys):
    assert run_command(raising(error), []) == status
    found = capsys.readouterr()
    assert found.out == "" and "Traceback" not in found.err
    assert found.err.startswith(message) or message in found.err


@pytest.mark.parametrize(
    ("args", "place", "advice"),
    [
        (
            "data encode m.parquet --config c.yaml --out cache",
            "stdit.training.config.load_config",
            "the same command goes on",
        ),
        (
            "data caption m.parquet --model m --out o.parquet",
            "stdit.data.manifests.read_manifests",
            "the same command goes",
        ),
        ("data scan . --out m.parquet", "stdit.data.scan.scan.scan", "when all files are probed"),
        ("sample --model m --prompt p --out clips", "stdit.sampling.pipeline.Pipeline.load", "are kept in --out"),
    ],
)
def test_ctrl_c_says_what_to_do(args, place, advice, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, stop)
    assert run_command(app, args.split(), prog="stdit") == 130
    error = capsys.readouterr().err
    assert re.search(rf"^stopped\. .*{advice}.*\n\Z", error, re.MULTILINE)  # after a progress bar, if there is one


@pytest.mark.parametrize("error", [ValueError("ours"), AssertionError("ours"), FileNotFoundError(2, "none", "x")])
def test_our_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)) as caught:
        run_command(raising(error), [])
    assert caught.value is error


def test_a_cause_that_is_a_full_disk_counts(capsys):
    def command() -> None:
        """Example: none"""
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "shard-3")
        except OSError as error:
            raise RuntimeError("writing failed") from error

    assert run_command(command, []) == 1
    assert "shard-3: no space left on the disk. Free some" in capsys.readouterr().err


def test_arguments_of_a_function(capsys):
    def command(steps: int, name: Annotated[str, typer.Option()] = "a", rest: list[str] | None = None) -> None:
        print(json.dumps([steps, name, rest]))

    assert run_command(command, ["3", "--name", "b"], prog="train.py") == 0
    assert json.loads(capsys.readouterr().out) == [3, "b", None]
    for args, message in (([], "Missing argument"), (["x"], "integer"), (["3", "--nam=b"], "--nam")):
        assert run_command(command, args, prog="train.py") == 2
        error = capsys.readouterr().err
        assert "Usage: train.py" in error and "error: " in error and message in error


def test_a_returned_integer_is_the_status():
    assert run_command(lambda: 75, []) == 75
    assert run_command(lambda: True, []) == 0
    assert run_command(lambda: None, []) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [(["dta"], "No such command 'dta'"), (["--nope"], "No such option"), (["data", "plann"], "No such command")],
)
def test_wrong_arguments_are_status_2(args, message, capsys):
    assert run_command(app, args, prog="stdit") == 2
    assert message in capsys.readouterr().err


def test_no_arguments_print_the_help(capsys):
    assert run_command(app, [], prog="stdit") == 2
    text = "".join(capsys.readouterr())
    assert all(name in text for name in COMMANDS)


def test_a_command_is_the_function_of_its_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mod_function.py").write_text("def do_it(n: int) -> int:\n    return n\n")
    group = lazy_group("group", "Help.", {"do-it": ("mod_function", "Does it.")})
    assert run_command(group, ["do-it", "4"]) == 4
    assert run_command(lazy_group("outer", "Help.", {"inner": group}), ["inner", "do-it", "5"]) == 5


def test_a_closed_pipe_is_quiet():
    code = (
        "import sys\nfrom stdit.cli.main import run_command\n"
        "def command() -> None:\n    [print('x' * 99) for _ in range(100_000)]\n"
        "sys.exit(run_command(command, []))"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -n 1; echo ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == ["x" * 99, "1"]
    assert run.stderr == "-c: starting …\n"


@pytest.mark.parametrize("place", ["/proc/x", "file", "locked"])
@pytest.mark.parametrize(
    "args",
    [
        "data scan FOLDER --out PLACE/m.parquet",
        "data scan FOLDER --out PLACE/in/m.parquet",
        "data toy PLACE/toy",
        "train toy/dit run=PLACE/run",
    ],
)
def test_a_place_that_cannot_be_written_to_is_named(args, place, tmp_path, capsys):
    if place == "/proc/x" and not os.path.isdir("/proc/self"):
        pytest.skip("no /proc here")
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o500)
    if place == "locked" and os.access(tmp_path / "locked", os.W_OK):  # root: not in /sys, either
        place = "/sys/locked"
    place = str(tmp_path / place)
    for name, value in {"PLACE": place, "FOLDER": str(tmp_path), "ROOT": str(ROOT)}.items():
        args = args.replace(name, value)
    assert run_command(app, args.split(), prog="stdit") == 1
    error = capsys.readouterr().err
    assert f"error: {place}" in error and "hoose another path" in error


def test_a_users_mistake_in_a_real_command():
    run = subprocess.run(
        [sys.executable, "-m", "stdit.cli.main", "data", "scan", "/no/such/folder", "--out", "x.parquet"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 1
    assert run.stderr.count("error: ") == 1 and "/no/such/folder" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "words",
    [
        "eval captions --model m --out o --levels 9223372036854775808",
        "eval captions --model m --out o --guidance nan",
        "eval toy --model m --out o --steps 1e300",
        "eval toy --model m --out o --guidance inf",
        "eval vae videos --model m --out o --fps nan",
        "data scan videos --out o.parquet --timeout inf",
        "data scan videos --out o.parquet --timeout nan",
        "data plan m.parquet --config c.yaml --world-size 1000000000",
        "data encode m.parquet --config c.yaml --out o --crops 9223372036854775807",
        "sample --model m --prompt a --out o --lora m:1e300",
    ],
)
def test_numbers_out_of_range_are_wrong_arguments(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("m").touch()
    assert run_command(app, words.split(), "stdit") == 2
    assert "error: " in capsys.readouterr().err and [file.name for file in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("words", [["weights", "convert", "", "o"], ["data", "scan", "v", "--out="], ["train", " "]])
def test_a_blank_path_is_not_the_current_folder(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(app, words, "stdit") == 2
    assert "is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("Symlink loop from '/a/loop'"),
        OSError(errno.ELOOP, "Too many levels of symbolic links", "loop"),
    ],
)
def test_what_the_machine_lacks_is_one_line(error, capsys):
    def fails() -> None:
        raise error

    assert run_command(fails, [], "stdit") == 1
    said = capsys.readouterr().err.strip().removeprefix("stdit: starting …\n")
    assert said.startswith("error: ") and "\n" not in said and ("out of memory" in said) == ("oop" not in said)
