"""Families against their own code, whose outputs and gradients are kept in goldens/."""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path

import cosmos_golden
import latte_golden
import numpy as np
import pixart_golden
import pytest
import stdit3_golden
import torch
from golden_tools import Golden, gradient_errors, hash_of, relative, shapes_of, weights
from references import FAMILIES
from safetensors.torch import save_file
from tensor_files import load_file

import stdit
from stdit.errors import StditError
from stdit.models.transformer import STDiT
from stdit.weights.families import cosmos
from stdit.weights.sources import find

ALL = (*pixart_golden.GOLDENS.values(), latte_golden.GOLDEN, stdit3_golden.GOLDEN)
GOLDENS = {golden.name: golden for golden in ALL}
CASES = [(name, number) for name, golden in GOLDENS.items() for number in range(golden.count)]


@cache
def kept_of(golden: Golden) -> dict[str, np.ndarray]:
    with np.load(golden.file) as file:
        return dict(file)


def release(place: Path, golden: Golden, number: int) -> Path:
    """The original's folder. What is computed has values there that nobody may use."""
    place.mkdir(exist_ok=True)
    tensors = weights(shapes_of(kept_of(golden)[f"{number}.shapes"]))
    save_file(tensors | {name: torch.ones(6) for name in golden.computed}, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(golden.config_json(number)))
    return place


@pytest.mark.parametrize(("name", "number"), CASES)
def test_outputs_and_gradients_are_the_originals(name, number, tmp_path, record_property):
    golden = GOLDENS[name]
    kept, place = kept_of(golden), release(tmp_path / "theirs", golden, number)
    ours, table, worst, worst_gradient = stdit.load_transformer(place), find("transformer", place).table, 0.0, 0.0
    for run in golden.runs(number):
        key = f"{number}.{run.key}"
        ours.zero_grad()
        latents = run.arguments["latents"].clone().requires_grad_()
        found = ours.predict(**{**run.arguments, "latents": latents}) * run.counts
        (found * run.probe).sum().backward()
        worst = max(worst, relative(found, kept[f"{key}output"]))
        gradients = {name: parameter.grad for name, parameter in ours.named_parameters()} | dict(ours.named_buffers())
        errors = gradient_errors(dict(table.to_foreign(gradients.__getitem__)), kept, key)
        errors["latents"] = relative(latents.grad, kept[f"{key}latents"])
        assert max(errors.values()) <= 1e-4, {n: e for n, e in errors.items() if e > 1e-4}
        worst_gradient = max(worst_gradient, *errors.values())
    assert worst <= 1e-5
    record_property("errors", (name, "original", float(worst), float(worst_gradient)))  # xdist takes no numpy


@pytest.mark.parametrize("name", GOLDENS)
def test_released_sizes_lack_no_key_and_have_none_too_many(name):
    golden = GOLDENS[name]
    family, kept = importlib.import_module(f"stdit.weights.families.{golden.family}").FAMILY, kept_of(golden)
    shapes = shapes_of(kept["released"])
    config = family.config_from({"model_type": "STDiT3"} if name == "STDiT3" else {}, shapes)
    sides = {"PixArt-α": (64, 2.0), "PixArt-Σ 2K": (128, 4.0), "Latte": (32, 1.0), "STDiT3": (512, 1.0)}
    assert (config.head_dim, config.position_base, config.position_stretch) == (72, *sides[name])
    with torch.device("meta"):
        ours = STDiT(config)
    table = family.keymap(config, "original").table({n: tuple(t.shape) for n, t in ours.state_dict().items()})
    assert not table.differences(shapes) and set(shapes) - set(table.foreign_shapes) == set(golden.computed)
    count = sum(parameter.numel() for parameter in ours.parameters())
    print(f"{name}: {count:,} parameters, {len(shapes)} tensors")
    assert count == int(kept["parameters"])


@pytest.mark.parametrize("name", cosmos_golden.RELEASES)
def test_cosmos_originals_hold_what_their_own_networks_do(name):
    with np.load(cosmos_golden.FILE) as file:
        kept = {key: file[f"{name}.{key}"] for key in ("shapes", "computed", "parameters")}
    shapes, family = shapes_of(kept["shapes"]), cosmos.FAMILY
    config = family.config_from({}, shapes)
    assert config == family.config_from(FAMILIES["Cosmos-Predict"].released[name], {})  # as diffusers has it
    with torch.device("meta"):
        ours = STDiT(config)
    table = family.keymap(config, "original").table({n: tuple(t.shape) for n, t in ours.state_dict().items()})
    assert not table.differences(shapes)
    counters = {key for key in shapes if key.startswith("accum_")}
    assert set(shapes) - set(table.foreign_shapes) - counters == set(table.computed)
    assert {f"{key} {hash_of(make())}" for key, make in table.computed.items()} == set(kept["computed"])
    assert sum(parameter.numel() for parameter in ours.parameters()) == int(kept["parameters"])


@pytest.mark.parametrize(("name", "number"), CASES)
def test_round_trips_are_bit_for_bit(name, number, tmp_path):
    """original → stdit → original: every tensor, what their code computes among them."""
    golden, kept = GOLDENS[name], kept_of(GOLDENS[name])
    first = release(tmp_path / "theirs", golden, number)
    ours, wanted = stdit.load_transformer(first), load_file(first / "model.safetensors")
    stdit.save_transformer(ours, tmp_path / "ours", "original")
    found = load_file(tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
    assert stdit.load_transformer(tmp_path / "ours").config == ours.config
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found if name not in golden.computed)
    assert [f"{name} {hash_of(found[name])}" for name in golden.computed] == list(kept[f"{number}.computed"])


def test_each_frame_of_a_clip_is_an_image_of_its_own(tmp_path):
    golden = GOLDENS["PixArt-Σ 2K"]
    ours, given = stdit.load_transformer(release(tmp_path / "theirs", golden, 0)), golden.runs(0)[0].arguments
    frames = given["latents"].transpose(0, 2)  # (1, C, 2, H, W)
    with torch.no_grad():
        found = ours.predict(frames, given["t"][:1], given["text"][:1])
        alone = [ours.predict(frames[:, :, n : n + 1], given["t"][:1], given["text"][:1]) for n in range(2)]
    torch.testing.assert_close(found, torch.cat(alone, dim=2), rtol=1e-5, atol=1e-5)


def test_diffusers_has_no_place_for_compressed_keys(tmp_path):
    ours = stdit.load_transformer(release(tmp_path / "theirs", GOLDENS["PixArt-Σ 2K"], 0))
    with pytest.raises(StditError, match="write layout 'original'"):
        stdit.save_transformer(ours, tmp_path / "ours")


def test_what_stdit3_needs_is_named(tmp_path):
    golden = GOLDENS["STDiT3"]
    place = release(tmp_path / "theirs", golden, 0)
    ours, given = stdit.load_transformer(place), golden.runs(0)[0].arguments
    for absent in ("size", "fps"):
        with pytest.raises(StditError, match=f"need the condition `{absent}`"):
            ours.predict(**{name: value for name, value in given.items() if name != absent})
    (place / "config.json").unlink()
    with pytest.raises(StditError, match="needs its config"):
        stdit.load_transformer(place)
