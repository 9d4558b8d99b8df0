"""`stdit eval captions` as it is called, on a small model of random weights; and the configs it is shown with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from stdit.cli.main import app, run_command
from stdit.data.decode.write import write_video
from stdit.data.manifest import Caption, Clip, Manifest, write_manifest
from stdit.diffusion.solvers import unipc_config
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.sampling.pipeline import FolderSettings, Pipeline
from stdit.shipped import CONFIGS
from stdit.text.encoders import TextEncoder
from stdit.text.small import build_word_tokenizer, small_umt5
from stdit.training.config import load_config
from stdit.vae.autoencoder import CausalVAE, VaeConfig

CAPTIONS = ("A person in red signs yes.", "A person in red signs no.", "A person in blue signs no.")


def stdit(*words: object) -> int:
    return run_command(app, [str(word) for word in words], prog="stdit")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder: config.yaml and model/, beside three clips."""
    folder = tmp_path_factory.mktemp("run")
    clips = []
    for number, text in enumerate(CAPTIONS):
        path = folder / f"{number}.mp4"
        write_video(path, np.full((5, 32, 32, 3), 80 * number, np.uint8), 8)
        clips.append(Clip(f"{number:064x}", str(path), (Caption(text),), 5, 8.0, 32, 32, 0.0, 5 / 8, "0" * 64))
    write_manifest(Manifest.of(clips, folder), folder / "manifest.parquet")
    config = {"data": {"manifest": str(folder / "manifest.parquet"), "shapes": ["32x32x5"], "fps": 8}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"eval": {"steps": 2, "guidance": 1.5}}))

    torch.manual_seed(0)
    tokenizer = build_word_tokenizer(CAPTIONS)
    model = TransformerConfig(dim=24, heads=2, layers=1, ffn_dim=32, in_channels=4, out_channels=4, text_dim=16)
    sizes = VaeConfig(base_dim=4, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True), z_dim=4)
    encoder = TextEncoder(small_umt5(len(tokenizer), 16, 1, 2), tokenizer)
    settings = FolderSettings(fps=8, shapes=("32x32x5",), text_padding=16)
    Pipeline(STDiT(model), CausalVAE(sizes), encoder, unipc_config(), settings).save(folder / "model")
    return folder


def test_a_run_folder_is_enough(run, capsys):
    few = ("--levels", 2, "--draws", 1, "--device", "cpu")
    assert stdit("eval", "captions", "--model", run / "model", "--out", run, "--group", "in (.+) signs", *few) == 0
    printed = capsys.readouterr().out
    assert "3 clips, 3 captions" in printed and "of its group" in printed and "dB PSNR" in printed
    result = json.loads((run / "evaluation-captions.json").read_text())
    assert result["measures"]["same_group"]["total"] == 2  # yes and no in red, both ways
    assert result["settings"]["steps"] == 2 and result["settings"]["guidance"] == 1.5  # the config's
    assert (run / "evaluation-captions.png").stat().st_size > 500

    other = ("--config", run / "config.yaml", "--clips", 2, "--steps", 1, "--guidance", 1, "--json")
    assert stdit("eval", "captions", "--model", run / "model", "--out", run / "few", *other, *few) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["clips"]) == 2 and result["measures"]["same_group"] is None


def test_what_is_wrong_is_said(run, tmp_path, capsys):
    assert stdit("eval", "captions", "--model", run / "model", "--out", tmp_path) == 1
    assert "config.yaml cannot be read" in capsys.readouterr().err
    assert stdit("eval", "captions", "--model", run / "model", "--out", run, "--group", "signs") == 1
    assert "it needs exactly one" in capsys.readouterr().err


def test_the_configs_for_real_clips_fit_together():
    told = (CONFIGS / "asl.yaml").read_text().replace("\\\n#", "")
    (line,) = (line for line in told.splitlines() if "stdit train vae/asl" in line)
    vae, dit = load_config("vae/asl", line.split()[4:]), load_config("asl")
    assert dit.vae.path == f"{vae.run.path}/model/vae"
    assert (vae.data.manifest, vae.data.shapes, vae.data.fps) == (dit.data.manifest, dit.data.shapes, dit.data.fps)
    vae.data.check()
    dit.data.check()
