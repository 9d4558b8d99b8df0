"""`stdit data caption`, as it is called."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_captioners

from stdit.cli.main import app, run_command
from stdit.data.decode.write import write_video
from stdit.data.manifest import read_manifest
from stdit.data.scan.scan import scan


@pytest.fixture
def caption(tmp_path, capsys):
    """A function that captions three videos, one of them gone, with a tiny video model and tells what was said."""
    for number in range(3):
        frames = np.random.default_rng(number).integers(0, 256, (6, 32, 32 + 16 * number, 3), dtype=np.uint8)
        write_video(tmp_path / f"{number}.mp4", frames, 8)
    scan(tmp_path, out=tmp_path / "m.parquet", uncaptioned=True)
    (tmp_path / "2.mp4").unlink()
    tiny_captioners.save("qwen2_vl", tmp_path / "model")

    def call(*options, out="o.parquet"):
        arguments = [str(tmp_path / "m.parquet"), "--model", str(tmp_path / "model"), "--out", str(tmp_path / out)]
        options = ["--frames", "2", "--max-new-tokens", "5", "--device", "cpu", *options]
        capsys.readouterr()  # what was logged before, such as by DeepSpeed as transformers imports it
        status = run_command(app, ["data", "caption", *arguments, *options], "stdit")
        return status, capsys.readouterr()

    return call


def test_captions_then_again_then_with_another_prompt(caption, tmp_path):
    status, said = caption("--json")
    answer = json.loads(said.out)
    assert status == 0 and (answer["clips"], answer["captioned"], answer["reused"]) == (3, 2, 0)
    assert [one["reason"] for one in answer["failures"]] == ["missing"]
    found = read_manifest(tmp_path / "o.parquet")
    assert found.hash == answer["hash"] and [len(clip.captions) for clip in found] == [1, 1, 0]
    assert len({clip.captions for clip in found}) == 3
    status, said = caption("--batch", "2")
    assert status == 0 and "0 clips captioned, 2 reused, 1 failed" in said.out
    assert "2.mp4: no such file" in said.out
    for changed in (["--prompt", "red"], ["--frames", "1"], ["--max-new-tokens", "4"], ["--dtype", "bfloat16"]):
        assert json.loads(caption("--json", *changed)[1].out)["captioned"] == 2


def test_errors_name_the_option(caption, tmp_path):
    status, said = caption(out="o.csv")
    assert status == 1 and "name it " in said.err and "o.parquet." in said.err
    (tmp_path / "model" / "config.json").unlink()
    status, said = caption()
    assert status == 1 and "--model: " in said.err and "config.json" in said.err
