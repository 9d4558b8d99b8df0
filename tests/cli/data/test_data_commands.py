"""`stdit data scan` and `stdit data encode`, as they are called."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import stdit
from stdit.cli.main import app, run_command
from stdit.data.decode.write import write_video


@pytest.fixture
def folder(tmp_path):
    """Two captioned videos, one without a caption and one that is none."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, width in enumerate([32, 64, 32]):
        frames = np.random.default_rng(number).integers(0, 256, (6, 32, width, 3), dtype=np.uint8)
        write_video(videos / f"{number}.mp4", frames, 8)
    (videos / "broken.mp4").write_bytes(b"not a video")
    (videos / "captions.csv").write_text("file,caption\n0.mp4,zero\n1.mp4,one\nbroken.mp4,broken\n")
    return videos


def scan(folder, *options):
    return run_command(app, ["data", "scan", str(folder), "--out", str(folder / "m.parquet"), *options], "stdit")


def test_scan_says_what_was_skipped_and_why(folder, capsys):
    assert scan(folder) == 0
    out = capsys.readouterr().out
    assert "not_media" in out and "no_caption" in out and "2 videos, 0 images; 2 files skipped" in out
    assert scan(folder, "--allow-uncaptioned", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (
        answer["reused"] == 4
        and answer["clips"] == 3
        and [(s["file"], s["reason"]) for s in answer["skipped"]] == [("broken.mp4", "not_media")]
    )


def test_scan_names_what_looks_alike(folder, capsys):
    frames = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)  # 0.mp4's
    write_video(folder / "copy.mp4", frames, 8, crf=20)
    assert scan(folder, "--allow-uncaptioned", "--scores") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Look like others" in out and "looks like 0.mp4." in out
    assert scan(folder, "--allow-uncaptioned", "--scores", "--json") == 0
    assert [s["file"] for s in json.loads(capsys.readouterr().out)["repeats"]] == ["copy.mp4"]


def test_scan_of_nothing_is_an_error(tmp_path, capsys):
    assert scan(tmp_path) == 1
    assert "none is a video or an image" in capsys.readouterr().err
    assert not (tmp_path / "m.parquet").exists()
    assert run_command(app, ["data", "scan", str(tmp_path), "--out", str(tmp_path / "m.csv")], "stdit") == 1
    assert f"name it {tmp_path / 'm.parquet'}" in capsys.readouterr().err


def test_encode_then_again_then_after_a_move(folder, tmp_path, capsys):
    from stdit.vae.autoencoder import CausalVAE, VaeConfig

    torch.manual_seed(0)
    scan(folder)
    vae = CausalVAE(VaeConfig(base_dim=4, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,), z_dim=2))
    stdit.save_vae(vae, tmp_path / "vae")
    config = {"data": {"shapes": ["32x32x5"], "fps": 8}, "vae": {"path": str(tmp_path / "vae")}}
    (tmp_path / "c.yaml").write_text(json.dumps(config))  # JSON is YAML
    capsys.readouterr()

    def encode(*options):
        args = [str(folder / "m.parquet"), "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "cache")]
        status = run_command(app, ["data", "encode", *args, "--json", *options], "stdit")
        return status, capsys.readouterr()

    status, said = encode("--memory", "1kB")
    assert status == 1 and "memory 1000: " in said.err
    status, said = encode()
    assert status == 0 and json.loads(said.out) | {"cache": ""} == {
        "cache": "", "clips": 2, "reused": 0, "texts": 0, "retries": 0, "failures": [], "left_out": {},
        "long_captions": None,
    }  # fmt: skip
    status, said = encode("--crops", "3")  # cut at random: none of those is there
    assert status == 0 and (json.loads(said.out)["clips"], json.loads(said.out)["reused"]) == (6, 0)
    shutil.move(folder / "0.mp4", folder / "moved.mp4")
    (folder / "captions.csv").write_text("file,caption\nmoved.mp4,zero\n1.mp4,one\n")
    scan(folder)
    capsys.readouterr()
    status, said = encode()
    assert status == 0 and json.loads(said.out)["reused"] == 2
    status, said = encode("data.shapes=[8x8x65]")
    assert status == 1 and "no clip fits one of data.shapes (2 short)" in said.err
    status, said = encode("vae.path=null")
    assert status == 1 and "sets no vae.path" in said.err


@pytest.mark.parametrize(
    "command", ["data plan MANIFEST --config", "data encode MANIFEST --out cache --config", "train"]
)
def test_a_vae_that_is_not_there_yet_is_told_how_to_get(folder, command, tmp_path, monkeypatch, capsys):
    scan(folder)
    monkeypatch.chdir(tmp_path)
    manifest = str(folder / "m.parquet")
    settings = [f"data.manifest={manifest}", "data.cache=null", "data.shapes=[32x32x5]"]
    words = [manifest if word == "MANIFEST" else word for word in command.split()]
    config = "pretrain"
    assert run_command(app, [*words, config, *settings], prog="stdit") == 1
    assert "runs/mine/vae/model/vae: no such file or folder. Train a VAE first" in capsys.readouterr().err
