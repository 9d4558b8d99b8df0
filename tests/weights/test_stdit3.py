"""STDiT3 against Open-Sora's own code, whose outputs and gradients are kept in goldens/stdit3_golden.npz."""

from __future__ import annotations

import json
from pathlib import Path

import golden_tools
import numpy as np
import pytest
import stdit3_golden as golden
import torch
from golden_tools import relative, shapes_of
from safetensors.torch import save_file

import stdit
from stdit.errors import StditError
from stdit.weights import io
from stdit.weights.families import stdit3


@pytest.fixture(scope="module")
def kept():
    with np.load(golden.GOLDEN) as file:
        return dict(file)


def release(place: Path, kept, number: int) -> Path:
    """The original's folder: its tensors, rope.freqs among them, and its config.json."""
    place.mkdir(exist_ok=True)
    tensors = golden_tools.weights(shapes_of(kept[f"{number}.shapes"]))
    save_file(tensors | {"rope.freqs": torch.ones(6)}, place / "model.safetensors")
    config = {"architectures": ["STDiT3"], "model_type": "STDiT3", "input_size": [None] * 3, "torch_dtype": "float32"}
    config |= {"model_max_length": 6, **golden.CONFIGS[number], "transformers_version": "4.36.2"}
    (place / "config.json").write_text(json.dumps(config))
    return place


def test_outputs_and_gradients_are_open_soras(tmp_path, kept):
    worst, worst_gradient = 0.0, 0.0
    for number in range(len(golden.CONFIGS)):
        place, given = release(tmp_path / str(number), kept, number), golden.inputs(number)
        ours = stdit.load_transformer(place)
        table, patch = io.find("transformer", place).table, ours.config.patch
        for per in ("clip", "frame"):
            t = given["t"] if per == "clip" else given["t"][:, None] * given["denoised"]
            used = given["denoised"].repeat_interleave(patch[0], 1)[:, None, :, None, None] if per == "frame" else 1
            latents = given["latents"].clone().requires_grad_()
            conditions = {"fps": golden.FPS[number], "size": golden.SIZES[number]}
            found = ours.predict(latents, t, given["text"], given["text_mask"], **conditions) * used
            ours.zero_grad()
            (found * given["probe"]).sum().backward()
            key = f"{number}.{per}."
            worst = max(worst, relative(found, kept[f"{key}output"]))
            errors = {"latents": relative(latents.grad, kept[f"{key}latents"])}
            gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
            gradients["null_text"] = ours.null_text
            theirs = dict(table.to_foreign(gradients.__getitem__))
            errors |= golden_tools.gradient_errors(theirs, kept, key)
            assert max(errors.values()) <= 1e-4, {n: e for n, e in errors.items() if e > 1e-4}
            worst_gradient = max(worst_gradient, *errors.values())
    print(f"\nSTDiT3 original: outputs {worst:.1e}, gradients {worst_gradient:.1e}")
    assert worst <= 1e-5


def test_the_released_size_lacks_no_key_and_has_none_too_many(kept):
    config = stdit3.config_from({"model_type": "STDiT3"}, shapes_of(kept["released"]))
    golden_tools.check_released(stdit3, config, kept, "rope.freqs")


@pytest.mark.parametrize("number", range(len(golden.CONFIGS)))
def test_round_trips_are_bit_for_bit(number, tmp_path, kept):
    golden_tools.check_round_trip(release(tmp_path / "theirs", kept, number), tmp_path / "ours", "rope.freqs")


def test_what_it_needs_is_named(tmp_path, kept):
    place = release(tmp_path / "theirs", kept, 0)
    ours, given = stdit.load_transformer(place), golden.inputs(0)
    with pytest.raises(StditError, match="need the condition `size`"):
        ours.predict(given["latents"], given["t"], given["text"], fps=24)
    with pytest.raises(StditError, match="need the condition `fps`"):
        ours.predict(given["latents"], given["t"], given["text"], size=(64, 64))
    (place / "config.json").unlink()
    with pytest.raises(StditError, match="needs its config"):
        stdit.load_transformer(place)
