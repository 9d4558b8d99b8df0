"""`stdit eval vae` as it is called, on a small VAE of random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from stdit.cli.main import app, run_command
from stdit.data.decode.write import write_video
from stdit.data.remote.local_cache import LocalCache
from stdit.data.remote.storage import STORAGE
from stdit.vae.autoencoder import CausalVAE, VaeConfig
from stdit.weights.io import load_vae, save_vae


def stdit(*words: object) -> int:
    return run_command(app, [str(word) for word in words], prog="stdit")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A folder: a video of 22 frames, an image, something that is neither, and a picture that is too small."""
    folder = tmp_path_factory.mktemp("clips")
    frames = np.random.default_rng(0).integers(0, 256, (22, 24, 34, 3)).astype(np.uint8)
    write_video(folder / "a.mp4", frames, 8)
    Image.fromarray(frames[0]).save(folder / "b.png")
    Image.fromarray(frames[0, :8]).save(folder / "small.png")
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    torch.manual_seed(0)
    config = VaeConfig(base_dim=4, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True), z_dim=4)
    save_vae(CausalVAE(config), tmp_path / "model" / "vae")
    return tmp_path / "model"


def test_a_folder_of_clips(clips, model, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("eval", "vae", clips, "--model", model, "--out", out, "--device", "cpu", "--frames", 20)
    assert stdit(*words) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 clips" in printed and "grey levels of 255" in printed and "broken.mp4" in printed
    assert printed.count("over all clips the median") == 2  # motion and sharpness
    result = json.loads((out / "evaluation-vae.json").read_text())
    assert [clip["shape"] for clip in result["clips"]] == ["32x24x17", "32x24x1"]  # legal sizes, 1+4k frames
    assert len(result["failures"]) == 2 and "24x34" not in result["failures"][0]
    assert any("8" in failure and "smaller than 11" in failure for failure in result["failures"])
    psnrs = [clip["measures"]["psnr"] for clip in result["clips"]]
    assert result["measures"]["psnr"] == pytest.approx(sum(psnrs) / 2) and result["measures"]["lpips"] is None
    assert result["clips"][0]["latents"]["count"] == 5 * 6 * 8  # latent frames, rows, columns
    assert (out / result["clips"][0]["picture"]).stat().st_size > 500

    record = out / "evaluation-vae.jsonl"
    lines = record.read_text().splitlines()
    assert len(lines) == 3
    marked = lines[1].replace('"psnr": ', '"psnr": 7')  # what is there is taken, what was cut off is done again
    record.write_text("\n".join([lines[0], marked, lines[2][:40]]))
    assert stdit(*words, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["clips"][0]["measures"]["psnr"] > 70
    assert again["clips"][1] == result["clips"][1]
    assert stdit(*words, "--size", "16x12", "--limit", 1, "--json") == 0  # other settings: from the beginning
    other = json.loads(capsys.readouterr().out)
    assert [clip["shape"] for clip in other["clips"]] == ["16x12x17"] and other["measures"]["psnr"] < 70
    assert stdit(*words, "--size", "16x12", "--limit", 1, "--sample", "--json") == 0
    drawn = json.loads(capsys.readouterr().out)
    assert drawn["settings"]["sample"] and drawn["latents"]["mean"] != other["latents"]["mean"]


def test_the_normalisation_is_written(clips, model, tmp_path, capsys):
    words = ("eval", "vae", clips, "--model", model, "--out", tmp_path / "out", "--device", "cpu", "--pictures", 0)
    assert stdit(*words, "--write-normalisation") == 0
    assert "latents_mean" in capsys.readouterr().out and not (tmp_path / "out" / "evaluation-vae").exists()
    vae = load_vae(model)
    result = json.loads((tmp_path / "out" / "evaluation-vae.json").read_text())
    assert vae.config.latents_mean == pytest.approx(result["latents"]["mean"])
    assert vae.config.latents_std == pytest.approx(result["latents"]["std"])


def test_clips_at_a_url(clips, model, tmp_path, monkeypatch, capsys):
    """Of a folder and of a manifest there; one has a long name."""
    monkeypatch.setattr(STORAGE, "local_cache", LocalCache(tmp_path / "copies", 1 << 30))
    there, long = fsspec.filesystem("memory"), "é" * 118
    there.pipe(f"/eval/{long}.mp4", (clips / "a.mp4").read_bytes())
    shutil.copy(clips / "a.mp4", tmp_path / f"{long}.mp4")
    assert stdit("data", "scan", tmp_path, "--out", tmp_path / "clips.parquet", "--allow-uncaptioned", "--json") == 0
    there.pipe("/eval/clips.parquet", (tmp_path / "clips.parquet").read_bytes())
    capsys.readouterr()
    for place in ("memory://eval", "memory://eval/clips.parquet"):
        out = tmp_path / "out" / Path(place).name
        words = ("eval", "vae", place, "--model", model, "--out", out, "--device", "cpu", "--frames", 5, "--json")
        assert stdit(*words) == 0
        (one,) = json.loads(capsys.readouterr().out)["clips"]
        assert one["path"] == f"memory://eval/{long}.mp4" and (out / one["picture"]).is_file()


def test_what_is_wrong_is_said(clips, model, tmp_path, capsys):
    def fails(*words: object) -> str:
        if "--out" not in words:
            words = (*words, "--out", tmp_path / "out")
        assert stdit("eval", "vae", *words, "--device", "cpu") == 1
        return capsys.readouterr().err

    assert "WIDTHxHEIGHT alone" in fails(clips, "--model", model, "--size", "32x24x5")
    assert "size 8x8: SSIM takes at least 11" in fails(clips, "--model", model, "--size", "8x8")
    assert stdit("eval", "vae", clips, "--model", model, "--out", tmp_path, "--fps", "inf") == 2
    (tmp_path / "file").write_text("")
    assert "file: is a file, not a folder" in fails(clips, "--model", model, "--out", tmp_path / "file")
    assert "no clip could be measured" in fails(clips, "--model", model, "--size", "64x64")
    assert "no such file or folder" in fails(clips, "--model", model, "--lpips", tmp_path / "none")
    save_vae(load_vae(model), tmp_path / "original", layout="original")
    late = ("--out", tmp_path / "late", "--write-normalisation")  # said before anything is measured
    assert "stdit weights convert" in fails(clips, "--model", tmp_path / "original", *late)
    diffusers = pytest.importorskip("diffusers", reason="other families' VAEs: pip install 'stdit[vaes]'")
    diffusers.AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path / "other" / "vae")
    assert "diffusers defines the normalisation" in fails(clips, "--model", tmp_path / "other", *late)
    assert not (tmp_path / "late").exists()
