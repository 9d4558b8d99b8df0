"""Files that come with the package are found by name, and a wheel has them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stdit.errors import StditError
from stdit.shipped import CONFIGS, DEEPSPEED, find_shipped

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("given", ["toy/dit", "toy/dit.yaml", "configs/toy/dit.yaml"])
def test_a_name_is_a_file_of_the_package(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy" / "dit").mkdir(parents=True)  # a folder is no config
    assert find_shipped(given, CONFIGS, ".yaml") == CONFIGS / "toy" / "dit.yaml"


def test_a_file_of_that_path_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero2").write_text("{}")
    assert find_shipped("zero2", DEEPSPEED, ".json") == Path("zero2")
    assert find_shipped("zero3", DEEPSPEED, ".json") == DEEPSPEED / "zero3.json"


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(StditError, match=r"zro2.json cannot be read: .* only zero1, zero2, .* mean 'zero2'"):
        find_shipped("zro2.json", DEEPSPEED, ".json")


def output_of(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=1200).stdout


@pytest.mark.slow
def test_a_wheel_has_every_file_and_leaves_the_tree_clean(tmp_path):
    status = ("git", "status", "--porcelain", "--untracked-files=all")
    before = output_of(*status)
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack files of an earlier build again
    output_of(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--wheel-dir", str(tmp_path))
    assert output_of(*status) == before
    (wheel,) = tmp_path.glob("stdit-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("stdit/")}
    assert held == set(output_of("git", "ls-files", "stdit").split())
