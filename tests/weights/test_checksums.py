"""`stdit weights inspect --verify`: files against the checksums that are published beside them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from stdit.cli.main import app, run_command

CONTENT = b"weights" * 1000
HASH = hashlib.sha256(CONTENT).hexdigest()


def verify(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    status = run_command(app, ["weights", "inspect", str(path), "--verify", "--json"], prog="stdit")
    out = capsys.readouterr()
    rows = json.loads(out.out)["checksums"] if out.out else []
    return status, {Path(row["file"]).name: row["verdict"] for row in rows}


def beside(file: Path) -> Path:
    (file.parent / f"{file.name}.sha256").write_text(f"{HASH.upper()}  {file.name}\r\n")
    return file


def listed(file: Path) -> Path:
    (file.parent / "SHA256SUMS").write_text(f"{'0' * 64}  other.safetensors\n{HASH} *./{file.name}\n")
    return file


def noted(file: Path) -> Path:
    notes = file.parents[1] / ".cache/huggingface/download" / file.parent.name
    notes.mkdir(parents=True)
    (notes / f"{file.name}.metadata").write_text(f"{'a' * 40}\n{HASH}\n1700000000.0\n")
    return file


def cached(file: Path) -> Path:
    blob = file.parents[1] / "blobs" / HASH
    blob.parent.mkdir()
    file.rename(blob)
    file.symlink_to(blob)
    return file


@pytest.mark.parametrize("place", [beside, listed, noted, cached])
def test_a_whole_file_is_ok_and_a_damaged_one_differs(place, tmp_path, capsys):
    (tmp_path / "transformer").mkdir()
    file = tmp_path / "transformer" / "model.safetensors"
    file.write_bytes(CONTENT)
    place(file)
    (file.parent / "unknown.safetensors").write_bytes(b"x")
    wanted = {"model.safetensors": "ok", "unknown.safetensors": "nothing to check against"}
    assert verify(file.parent, capsys) == (0, wanted)
    assert verify(file, capsys) == (0, {"model.safetensors": "ok"})
    assert verify(tmp_path, capsys)[1]["model.safetensors"] == "ok"
    with open(file, "r+b") as opened:
        opened.seek(3000)
        opened.write(b"!")
    assert verify(file.parent, capsys) == (1, wanted | {"model.safetensors": "differs"})
    assert run_command(app, ["weights", "inspect", str(file), "--verify"], prog="stdit") == 1
    shown = capsys.readouterr().out
    assert "differs" in shown and "wanted" in shown


def test_a_small_files_git_hash_is_no_checksum(tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(CONTENT)
    notes = tmp_path / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    (notes / "a.safetensors.metadata").write_text(f"{'a' * 40}\n{'b' * 40}\n1700000000.0\n")
    assert verify(tmp_path, capsys) == (0, {"a.safetensors": "nothing to check against"})


def test_mistakes_are_messages(tmp_path, capsys):
    assert run_command(app, ["weights", "inspect", str(tmp_path), "--verify"], prog="stdit") == 1
    assert "holds no file of weights" in capsys.readouterr().err
    (tmp_path / "a.safetensors").write_bytes(CONTENT)
    (tmp_path / "a.safetensors.sha256").write_text("md5 0123")
    assert run_command(app, ["weights", "inspect", str(tmp_path), "--verify"], prog="stdit") == 1
    assert "does not begin with a SHA-256" in capsys.readouterr().err
