"""Open-Sora 1.2 from three downloads in one folder: sampled as its own code samples, trained, and written back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_tools import relative, shapes_of, weights
from open_sora_golden import (
    FPS,
    GUIDANCE,
    HEIGHT,
    SAMPLED,
    STDIT3,
    STEPS,
    WIDTH,
    given,
    kept,
    stdit3_json,
    vae_folder,
)
from references import randomise
from safetensors.torch import save_file
from tensor_files import load_file
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

import stdit
from stdit.cli.main import app, run_command
from stdit.cli.sample.command import sample
from stdit.sampling.model_folder import ModelFolder
from stdit.sampling.pipeline import Pipeline, SampleRequest
from stdit.text.small import build_word_tokenizer
from stdit.weights.families import family_of

pytest.importorskip("diffusers")
PROMPT = "A red circle, moves left. aesthetic score: 6.5."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As docs/open-weights.md has a user put it together."""
    place = tmp_path_factory.mktemp("OpenSora")
    vae_folder(place / "vae", 2)
    transformer = place / "transformer"
    transformer.mkdir()
    save_file(weights(shapes_of(kept()["0.shapes"])) | {"rope.freqs": torch.ones(6)}, transformer / "model.safetensors")
    (transformer / "config.json").write_text(json.dumps(stdit3_json()))
    tokenizer = build_word_tokenizer([PROMPT])
    config = T5Config(
        vocab_size=len(tokenizer), d_model=10, d_kv=5, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    randomise(T5EncoderModel(config), 0).save_pretrained(place / "text_encoder")
    tokenizer.save_pretrained(place / "tokenizer")
    (place / "model_index.json").write_text('{"_class_name": "OpenSoraPipeline"}\n')
    return place


class Told(nn.Module):
    """In place of a text encoder: what the original was given."""

    dim, max_length = 10, 300

    def __init__(self, text: Tensor) -> None:
        super().__init__()
        self.text = text

    def encode(self, texts: list[str], at_least: int = 0) -> list[Tensor]:
        return [self.text for _ in texts]


@pytest.mark.parametrize("name", SAMPLED)
def test_latents_are_those_of_open_soras_own_loop(name, folder):
    frames, known = SAMPLED[name]
    one = given(name)
    transformer, vae = stdit.load_transformer(folder).eval(), stdit.load_vae(folder).eval()
    pipe = Pipeline(transformer, vae, Told(one["text"]), family_of(transformer.config).scheduler(transformer.config))
    request = SampleRequest(
        ["a"], size=(WIDTH, HEIGHT), frames=frames, steps=STEPS, guidance=GUIDANCE, noise=one["noise"], fps=FPS,
        known={"image": one["image"].numpy()} if known else None,
    )  # fmt: skip
    (found,) = pipe.sample_latents(request)
    wanted = kept()[f"sampled.{name}"][0]
    assert found.shape == wanted.shape and relative(found, wanted) <= 5e-5
    print(name, relative(found, wanted))


def test_the_folder_is_sampled_by_one_command_and_goes_back(folder, tmp_path, capsys):
    parts = ModelFolder.load(folder)
    assert parts.text_encoder.tokenize([PROMPT + " <b>x</b>"]) == parts.text_encoder.tokenize([PROMPT.lower() + " x"])
    assert parts.text_encoder.max_length == 300
    assert (parts.scheduler["_class_name"], parts.settings.fps) == ("RFLOW", 24)
    words = ["--model", folder, "--prompt", PROMPT, "--size", "48x32", "--frames", 17, "--steps", 2, "--device", "cpu"]
    assert run_command(sample, [*map(str, words), "--out", str(tmp_path / "clips")], prog="stdit sample") == 0
    assert "48x32, 17 frames at 24 fps" in capsys.readouterr().out and len([*(tmp_path / "clips").glob("*.mp4")]) == 1

    pipe = Pipeline.load(folder)
    pipe.save(tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["transformer"] == ["opensora", "STDiT3"] and index["vae"] == ["opensora", "VideoAutoencoderPipeline"]
    first, again = (
        one([PROMPT], size=(48, 32), frames=1, steps=2)[0] for one in (pipe, Pipeline.load(tmp_path / "ours"))
    )
    assert np.array_equal(first, again) and first.std() > 1
    for part in ("transformer", "vae"):
        theirs = load_file(folder / part / "model.safetensors")
        ours = load_file(tmp_path / "ours" / part / "diffusion_pytorch_model.safetensors")
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items() if key != "rope.freqs")


def test_a_negative_prompt_takes_the_place_of_the_null_text(folder):
    pipe = Pipeline.load(folder)
    noise, settings = torch.randn(1, 4, 1, 4, 6), dict(size=(48, 32), frames=1, steps=2, guidance=3.0)
    (plain,), (same,), (other,) = (
        list(pipe.sample_latents(SampleRequest([PROMPT], negative_prompt=negative, noise=noise, **settings)))
        for negative in ("", "", "red")
    )
    assert torch.equal(plain, same) and not torch.allclose(plain, other)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_convert_keeps_both_apart(layout, folder, tmp_path):
    words = ["weights", "convert", str(folder), str(tmp_path), "--layout", layout, "--dtype", "bf16"]
    assert run_command(app, words, prog="stdit") == 0
    for part in ("transformer", "vae"):
        wanted = load_file(folder / part / "model.safetensors")
        found = load_file(tmp_path / part / "diffusion_pytorch_model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], t.bfloat16()) for key, t in wanted.items() if key != "rope.freqs")
    assert (tmp_path / "text_encoder").is_dir() == (layout == "diffusers")


def test_inspect_tells_both_models_and_what_lies_beside(folder, capsys):
    assert run_command(app, ["weights", "inspect", str(folder), "--json"], prog="stdit") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["part"], one["family"]) for one in found["models"]] == [
        ("transformer", "STDiT3 (Open-Sora 1.2)"), ("vae", "Open-Sora 1.2 VAE"),
    ]  # fmt: skip
    assert found["parts"]["text_encoder"] == "T5EncoderModel"
    assert STDIT3["depth"] == found["models"][0]["config"]["layers"]
