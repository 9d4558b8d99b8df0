"""PixArt-Σ with compressed keys and values against its own code, whose outputs are kept in goldens/."""

from __future__ import annotations

import json
from pathlib import Path

import golden_tools
import numpy as np
import pixart_sigma_golden as golden
import pytest
import torch
from golden_tools import relative
from safetensors.torch import save_file

import stdit
from stdit.errors import StditError
from stdit.weights import io
from stdit.weights.families import pixart


@pytest.fixture(scope="module")
def kept():
    with np.load(golden.GOLDEN) as file:
        return dict(file)


def release(place: Path, kept, number: int) -> Path:
    """The original's tensors, and the config.json that stdit writes beside such."""
    place.mkdir(exist_ok=True)
    save_file(golden_tools.weights(golden_tools.shapes_of(kept[f"{number}.shapes"])), place / "model.safetensors")
    config = golden.CONFIGS[number]
    known = {
        "heads": config["num_heads"],
        "position_base": config["input_size"] // config.get("patch_size", 2),
        "position_stretch": config.get("pe_interpolation", 1.0),
        "text_padding": 0,
    }
    (place / "config.json").write_text(json.dumps({"_class_name": "PixArtMS", "_stdit": {"format": 1, **known}}))
    return place


def test_outputs_and_gradients_are_the_originals(tmp_path, kept):
    worst, worst_gradient = 0.0, 0.0
    for number, config in enumerate(golden.CONFIGS):
        place, given, key = release(tmp_path / str(number), kept, number), golden.inputs(number), f"{number}."
        ours = stdit.load_transformer(place)
        assert ours.config.compressed == tuple(config["kv_compress_config"]["kv_compress_layer"])
        latents = given["latents"].clone().requires_grad_()
        sized = {"size": golden.SIZE} if config.get("micro_condition") else {}
        found = ours.predict(latents[:, :, None], given["t"], given["text"], given["text_mask"], **sized)[:, :, 0]
        (found * given["probe"]).sum().backward()
        worst = max(worst, relative(found, kept[f"{key}output"]))
        gradients = {name: parameter.grad for name, parameter in ours.named_parameters()} | dict(ours.named_buffers())
        theirs = dict(io.find("transformer", place).table.to_foreign(gradients.__getitem__))
        errors = golden_tools.gradient_errors(theirs, kept, key)
        errors["latents"] = relative(latents.grad, kept[f"{key}latents"])
        assert max(errors.values()) <= 1e-4, {n: e for n, e in errors.items() if e > 1e-4}
        worst_gradient = max(worst_gradient, *errors.values())
    print(f"\nPixArt-Σ with compressed keys, original: outputs {worst:.1e}, gradients {worst_gradient:.1e}")
    assert worst <= 1e-5


def test_each_frame_of_a_clip_is_an_image_of_its_own(tmp_path, kept):
    ours, given = stdit.load_transformer(release(tmp_path / "theirs", kept, 0)), golden.inputs(0)
    frames = given["latents"].transpose(0, 1)[None]  # (1, C, 2, H, W)
    with torch.no_grad():
        found = ours.predict(frames, given["t"][:1], given["text"][:1])
        alone = [ours.predict(frames[:, :, n : n + 1], given["t"][:1], given["text"][:1]) for n in range(2)]
    torch.testing.assert_close(found, torch.cat(alone, dim=2), rtol=1e-5, atol=1e-5)


def test_the_released_2k_model_lacks_no_key_and_has_none_too_many(kept):
    config = pixart.config_from({}, golden_tools.shapes_of(kept["released"]))
    assert (config.heads, config.position_base, config.position_stretch) == (16, 128, 4.0)
    golden_tools.check_released(pixart, config, kept, "pos_embed")


@pytest.mark.parametrize("number", range(len(golden.CONFIGS)))
def test_round_trips_are_bit_for_bit(number, tmp_path, kept):
    golden_tools.check_round_trip(release(tmp_path / "theirs", kept, number), tmp_path / "ours", "pos_embed")


def test_diffusers_has_no_place_for_it(tmp_path, kept):
    ours = stdit.load_transformer(release(tmp_path / "theirs", kept, 0))
    with pytest.raises(StditError, match="write layout 'original'"):
        stdit.save_transformer(ours, tmp_path / "ours")
