"""Where commands write: a URL that cannot be, no name, a file in a folder's place are told before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stdit.cli.main import app, run_command
from stdit.shipped import CONFIGS

ROOT = Path(__file__).parents[3]
CONFIG = CONFIGS / "toy" / "dit.yaml"
MANIFESTS = ["data scan . --out OUT", "data caption m.parquet --model m --out OUT"]
STORES = [f"data encode m.parquet --config {CONFIG} --out OUT"]
FOLDERS = [
    "data toy OUT",
    "sample --model m --prompt p --out OUT",
    "weights convert m OUT",
    "eval toy --model m --out OUT",
    "eval vae m.parquet --model m --out OUT",
    "eval captions --model m --out OUT",
]
FILES = [f"data plan m.parquet --config {CONFIG} --picture OUT"]
RUN = f"train {CONFIG} run=OUT"


def ends(command: str, out: str) -> int:
    return run_command(app, [word.replace("OUT", out) for word in command.split()], prog="stdit")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "file").write_text("mine")
    yield
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("out", ["", " "])
@pytest.mark.parametrize("command", [*MANIFESTS, *STORES, *FOLDERS, *FILES])
def test_no_name_is_no_place(command, out, capsys):
    assert ends(command, out) == 2
    error = capsys.readouterr().err
    assert "must be a path" in error or "is empty" in error


@pytest.mark.parametrize("out", ["s3://bucket/key", "memory://key", "https://example.org/key?a=b"])
@pytest.mark.parametrize("command", [*FOLDERS, *FILES, RUN])
def test_a_url_that_cannot_be_is_refused(command, out, capsys):
    assert ends(command, out) == (1 if command == RUN else 2)
    assert f"{out}: a URL. Only a path on this machine can be written to" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file", "file/deep/er", "./file"])
@pytest.mark.parametrize("command", [*STORES, *(command for command in FOLDERS if "convert" not in command), RUN])
def test_a_file_is_no_folder(command, out, capsys):
    assert ends(command, out) == 1
    assert "file: is a file, not a folder. Choose another path" in capsys.readouterr().err


@pytest.mark.parametrize("command", [*MANIFESTS, *FILES])
def test_a_folder_is_no_file(command, tmp_path, capsys):
    for out, said in ((".", "is a folder. Name the file in it"), ("file/m.parquet", "file: is a file, not a folder")):
        assert ends(command, out) == 1
        assert said in capsys.readouterr().err


def test_a_name_that_no_manifest_can_hold_is_told(tmp_path, capsys):
    bad = os.fsdecode(b"bad\xff")
    (tmp_path / bad).mkdir()
    try:
        assert run_command(app, ["data", "scan", bad, "--out", "m.parquet"], prog="stdit") == 1
        assert "bad\\udcff' is not UTF-8" in capsys.readouterr().err
        for out in (f"{bad}.parquet", f"{bad}/m.parquet"):
            assert run_command(app, ["data", "scan", ".", "--out", out], prog="stdit") == 2
            assert "it must be a path, in UTF-8" in capsys.readouterr().err
    finally:
        (tmp_path / bad).rmdir()


def test_the_home_folder_is_the_home_folder(tmp_path, capsys):
    """No shell writes out the ~ of --out=~/m.parquet."""
    assert run_command(app, ["data", "scan", "none", "--out=~/m.txt"], prog="stdit") == 1
    assert f"{tmp_path / 'home' / 'm.txt'}: manifests are written as Parquet; name it" in capsys.readouterr().err
