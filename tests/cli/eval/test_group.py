"""`stdit data toy` and `stdit eval toy` as they are called: render, scan, measure a small model of random weights."""

from __future__ import annotations

import json

import pytest
import torch

from stdit.cli.main import app, run_command
from stdit.data.manifest import read_manifest
from stdit.data.toy import all_specs, still_specs
from stdit.diffusion.solvers import unipc_config
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.sampling.pipeline import FolderSettings, Pipeline
from stdit.text.encoders import TextEncoder
from stdit.text.small import build_word_tokenizer, small_umt5
from stdit.vae.autoencoder import CausalVAE, VaeConfig

CAPTIONS = [spec.caption for spec in all_specs(held_out=False) + still_specs()]


def stdit(*words: object) -> int:
    return run_command(app, [str(word) for word in words], prog="stdit")


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    few = ("--clips", 4, "--held-out", 2, "--seconds", "0.7", "--shapes", "32x32,48x32", "--images", 0.3)
    assert stdit("data", "toy", folder, *few) == 0
    return folder, few


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = build_word_tokenizer(CAPTIONS)
    config = TransformerConfig(dim=24, heads=2, layers=1, ffn_dim=32, in_channels=4, out_channels=4, text_dim=16)
    sizes = VaeConfig(base_dim=4, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True), z_dim=4)
    encoder = TextEncoder(small_umt5(len(tokenizer), 16, 1, 2), tokenizer)
    settings = FolderSettings(fps=8, shapes=("32x32x5", "48x32x5"), text_padding=16)
    path = tmp_path_factory.mktemp("model")
    Pipeline(STDiT(config), CausalVAE(sizes), encoder, unipc_config(), settings).save(path)
    return path


def test_toy_clips_are_scanned_like_any_folder(toy_folder, capsys):
    folder, few = toy_folder
    assert stdit("data", "toy", folder, *few) == 0
    assert "is complete already" in capsys.readouterr().out
    assert stdit("data", "toy", folder, *few, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rendered"] == 0
    assert stdit("data", "scan", folder / "train", "--out", folder / "m.parquet") == 0
    manifest = read_manifest(folder / "m.parquet")
    clips = [manifest[row] for row in range(len(manifest))]
    assert len(clips) == 4 and {clip.captions[0].text for clip in clips} <= set(CAPTIONS)
    assert stdit("data", "toy", folder, "--clips", 5, "--seed", 1) == 1
    assert "has a different toy set" in capsys.readouterr().err
    assert stdit("data", "toy", folder, "--seconds", "long") == 1
    assert "--seconds is 'long'" in capsys.readouterr().err


def test_eval_toy_measures_a_model_folder(model, toy_folder, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("")  # a run folder
    few = ("--prompts", 3, "--steps", 2, "--guidance", 2, "--held-out", toy_folder[0], "--device", "cpu")
    assert stdit("eval", "toy", "--model", model, "--out", tmp_path, *few) == 0
    printed = capsys.readouterr().out
    assert "48x32x5 samples" in printed and "2 held-out files" in printed and "report.html" in printed
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert [one["kind"] for one in result["sets"]][:2] == ["trained", "trained"] and len(result["sets"]) == 4
    assert all(cell["total"] == 3 for one in result["sets"] for cell in one["samples"].values())
    assert all(cell["share"] == 1 for one in result["sets"] for cell in one["rendered"].values())
    assert (tmp_path / "report.html").stat().st_size > 10_000
    one = ("--shape", "32x32x5", "--prompts", 1, "--steps", 1, "--json", "--device", "cpu")
    assert stdit("eval", "toy", "--model", model, "--out", tmp_path / "one", *one) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["prompts"] == 1


def test_eval_toy_says_what_is_wrong(model, tmp_path, capsys):
    assert stdit("eval", "toy", "--model", tmp_path, "--out", tmp_path) == 1
    assert "model_index.json" in capsys.readouterr().err
    assert stdit("eval", "toy", "--model", model, "--out", tmp_path, "--shape", "33x32x5") == 1
    assert "33x32" in capsys.readouterr().err
    assert stdit("eval", "toy", "--model", model, "--out", tmp_path, "--prompts", 73) == 2
