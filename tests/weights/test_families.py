"""Every family of open weights against diffusers: outputs and gradients, released sizes, round trips bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from golden_tools import relative
from references import FAMILIES, randomise
from safetensors.torch import save_file
from tensor_files import load_file

import stdit
from stdit.errors import StditError
from stdit.models.transformer import STDiT
from stdit.weights import io
from stdit.weights.families import families, ltx
from stdit.weights.sources import find

pytest.importorskip("diffusers")

STEM = "diffusion_pytorch_model.safetensors"
CASES = [(name, number) for name, family in FAMILIES.items() for number in range(len(family.configs))]
RELEASED = [(name, release) for name, family in FAMILIES.items() for release in family.released]


def gradient_error(name: str, found, wanted) -> float:
    """Relative; of a key's bias, to the gradient of its weight: a bias that is not normed afterwards adds the same to
    all scores of a query, so its gradient is 0, and what is left of it is rounding."""
    like = name.replace("to_k.bias", "to_k.weight")
    return ((found[name] - wanted[name]).norm() / torch.maximum(wanted[name].norm(), wanted[like].norm())).item()


def inputs(ours, family, number, per):
    """Latents, noise levels, text and a mask that drops some of it where the family can."""
    grid, seed, length = family.grids[number], number, family.text_tokens
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, ours.config.latent_channels, *grid, generator=generator)
    frames = grid[0] // ours.config.patch[0]
    tokens = latents[0, 0].numel() // ours.config.patch_volume
    t = torch.rand({"clip": (2,), "frame": (2, frames), "token": (2, tokens)}[per], generator=generator)
    text = torch.randn(2, length, ours.config.text_dim, generator=generator)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, 3:] = not family.masks
    return latents, t, text, mask


def dialects(family, theirs, place: Path) -> dict[str, Path]:
    """The reference's weights in every dialect, each where `load_transformer` finds it."""
    theirs.save_pretrained(place / "diffusers")
    places = {"diffusers": place / "diffusers"}
    for dialect in family.converters:
        stdit.save_transformer(stdit.load_transformer(place / "diffusers"), place / dialect, "original")
        places[dialect] = place / dialect
        if dialect == "ComfyUI":
            alone = place / dialect / STEM
            save_file({f"model.diffusion_model.{name}": tensor for name, tensor in load_file(alone).items()}, alone)
    return places


def gradients_of(model, output, probe) -> dict[str, torch.Tensor]:
    """Of the sum of output × probe."""
    model.zero_grad()
    (output * probe).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("name", "number"), CASES)
def test_outputs_and_gradients_are_the_references(name, number, tmp_path, record_property):
    family = FAMILIES[name]
    config = family.configs[number]
    theirs = randomise(family.build(config), number)
    given = family.given(config)
    sources = {dialect: find("transformer", place) for dialect, place in dialects(family, theirs, tmp_path).items()}
    models = {dialect: io.load(source) for dialect, source in sources.items()}
    worst = {dialect: (0.0, 0.0) for dialect in sources}
    for per in family.per:
        latents, t, text, mask = inputs(models["diffusers"], family, number, per)
        leaf = latents.clone().requires_grad_()
        wanted = family.call(theirs, leaf, t, text, mask, given)
        probe = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(7))
        reference = gradients_of(theirs, wanted, probe)
        for dialect, ours in models.items():
            again = latents.clone().requires_grad_()
            found = ours.predict(again, t, text, mask, **given)
            zeros = {n: torch.zeros_like(tensor) for n, tensor in ours.state_dict().items()}  # what takes no part
            moved = dict(sources[dialect].table.to_foreign((zeros | gradients_of(ours, found, probe)).__getitem__))
            moved = family.converters[dialect](moved) if dialect in family.converters else moved
            errors = {n: gradient_error(n, moved, reference) for n in reference}
            errors["latents"] = relative(again.grad, leaf.grad)
            assert max(errors.values()) <= 1e-4, {n: e for n, e in errors.items() if e > 1e-4}
            output, gradient = worst[dialect]
            worst[dialect] = (max(output, relative(found, wanted)), max(gradient, *errors.values()))
    for dialect, (output, gradient) in worst.items():
        assert output <= 1e-5
        record_property("errors", (name, dialect, output, gradient))


@pytest.mark.parametrize(("name", "release"), RELEASED)
def test_released_sizes_lack_no_key_and_have_none_too_many(name, release, tmp_path):
    family = FAMILIES[name]
    with torch.device("meta"):
        theirs = family.build(family.released[release])
    module = next(one for one in families("transformer") if family.name in one.classes)
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    found = {"_class_name": family.name, **{k: v for k, v in theirs.config.items() if not k.startswith("_")}}
    config = module.config_from(found, shapes)
    with torch.device("meta"):
        ours = STDiT(config)
    native = {key: tuple(tensor.shape) for key, tensor in ours.state_dict().items()}
    foreign = module.keymap(config, "diffusers").table(native)
    assert not foreign.differences(shapes) and foreign.foreign_shapes.keys() == shapes.keys()
    for convert in {family.converters[dialect] for dialect in family.converters}:
        original = module.keymap(config, "original").table(native).foreign_shapes
        converted = convert({key: torch.empty(shape, device="meta") for key, shape in original.items()})
        assert {key: tuple(tensor.shape) for key, tensor in converted.items()} == shapes
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
    print(f"{release}: {count:,} parameters, {len(shapes)} tensors")


@pytest.mark.parametrize(("name", "number"), CASES)
def test_round_trips_are_bit_for_bit(name, number, tmp_path):
    """diffusers → stdit → diffusers → stdit → original → stdit → original, and diffusers reads the original."""
    family = FAMILIES[name]
    theirs = randomise(family.build(family.configs[number]), number)
    wanted = dict(theirs.named_parameters())
    theirs.save_pretrained(tmp_path / "theirs")
    model = stdit.load_transformer(tmp_path / "theirs")
    for layout in ("diffusers", *(dialect for dialect in family.converters if dialect != "ComfyUI")):
        stdit.save_transformer(model, tmp_path / layout, layout)
        again = stdit.load_transformer(tmp_path / layout)
        assert again.config == model.config
        assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
        tensors = load_file(tmp_path / layout / STEM)
        stdit.save_transformer(again, tmp_path / "again" / layout, layout)
        twice = load_file(tmp_path / "again" / layout / STEM)
        assert twice.keys() == tensors.keys() and all(torch.equal(twice[key], tensors[key]) for key in tensors)
        back = tensors if layout == "diffusers" else family.converters[layout](tensors)
        assert back.keys() >= wanted.keys() and all(torch.equal(back[key], wanted[key]) for key in wanted)
    lost = {name: theirs.config[name] for name in family.kept if name in family.configs[number]}
    opened, report = type(theirs).from_pretrained(tmp_path / "diffusers", output_loading_info=True, **lost)
    assert not any(report.values())
    given = (*inputs(model, family, number, family.per[-1]), family.given(family.configs[number]))
    with torch.no_grad():
        assert torch.equal(family.call(opened, *given), family.call(theirs, *given))
    written, first = (
        {k: v for k, v in model.config.items() if not k.startswith("_") and k not in family.kept}
        for model in (opened, theirs)
    )
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in written.items()} == first


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
@pytest.mark.parametrize(("name", "heads"), [("LTX-Video", 32)])
def test_a_single_file_tells_its_size_by_its_shapes(name, heads, prefix, tmp_path):
    from references.video import ltx_config

    theirs = randomise(FAMILIES[name].build(ltx_config(heads, 4, (5, 7), 19, 2)), 0)
    theirs.save_pretrained(tmp_path / "diffusers")
    model = stdit.load_transformer(tmp_path / "diffusers")
    stdit.save_transformer(model, tmp_path / "original", "original")
    tensors = load_file(tmp_path / "original" / STEM)
    alone = {prefix + key: tensor for key, tensor in tensors.items()}
    if prefix:
        alone["vae.decoder.conv_in.weight"] = torch.ones(2)
    save_file(alone, tmp_path / "alone.safetensors")
    again = stdit.load_transformer(tmp_path / "alone.safetensors", heads=heads)
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def test_ltx_where_the_first_latent_frame_is_one_frame_long(tmp_path):
    """0.9.5 and later: diffusers' LTXConditionPipeline gives such coordinates, the original's config says so."""
    family, grid, fps = FAMILIES["LTX-Video"], (3, 5, 4), 24
    theirs = randomise(family.build(family.configs[0]), 0)
    theirs.save_pretrained(tmp_path / "theirs")
    known = stdit.load_transformer(tmp_path / "theirs")
    causal = dataclasses.replace(known.config, rotary="inner_causal")
    for dialect in ("original", "diffusers"):
        assert ltx.FAMILY.config_from(ltx.FAMILY.written(causal, dialect), {}) == causal
    released = {k: v for k, v in ltx.FAMILY.written(causal, "original").items() if k != "_stdit"}
    assert released["causal_temporal_positioning"] and ltx.FAMILY.config_from(released, {}) == causal
    ours = STDiT(causal)
    ours.load_state_dict(known.state_dict())
    latents, t, text, mask = inputs(ours, family, 0, "clip")
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")).flatten(1).float()
    frames = (places[0] * 8 + 1 - 8).clamp(min=0) * (1 / fps)
    coordinates = torch.stack([frames, places[1] * 32, places[2] * 32]).expand(2, -1, -1)
    x = latents.flatten(2).transpose(1, 2)
    with torch.no_grad():
        wanted = theirs(x, text, t[:, None] * 1000, mask.float(), video_coords=coordinates, return_dict=False)[0]
        found = ours.predict(latents, t, text, mask, fps=fps)
        assert relative(found.flatten(2).transpose(1, 2), wanted) <= 1e-5
        assert relative(known.predict(latents, t, text, mask, fps=fps), found) > 1e-2


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("LTX-Video", {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'; stdit runs such models with 'rms_norm_ac"),
        ("LTX-Video", {"cross_attention_dim": 5}, "cross_attention_dim 5 is not 28"),
        ("LTX-Video", {"num_layers": 9}, "the config says 9 blocks, the tensors are of 3"),
        ("LTX-Video", {"num_layers": "3"}, "num_layers is '3', not of the kind of 28"),
        ("LTX-Video", {"caption_chanels": 19}, "unknown key 'caption_chanels'. Did you mean 'caption_channels'"),
        ("PixArt", {"caption_channels": None}, "caption_channels is missing"),
        ("PixArt", {"norm_type": "ada_norm"}, "norm_type is 'ada_norm'"),
        ("Latte", {"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
        ("Allegro", {"patch_size_t": 2}, "patch_size_t is 2"),
        ("Cosmos-Predict", {"img_context_dim_in": 8}, "img_context_dim_in is 8"),
    ],
)
def test_configs_that_cannot_be_are_named(name, change, message, tmp_path):
    family = FAMILIES[name]
    family.build(family.configs[0]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StditError, match=message) as error:
        stdit.load_transformer(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_condition_that_is_needed_or_not_taken_is_named(tmp_path):
    for name, number, given, message in [
        ("PixArt", 0, {}, "need the condition `size`"),
        ("LTX-Video", 0, {"size": (64, 64)}, "condition 'size': these weights take text and fps only"),
        ("Wan I2V", 0, {}, r"these weights take `image`, \(B, 2, T, H, W\)"),
        ("Wan I2V", 0, {"image": torch.zeros(2, 2, 3, 4, 6)}, "give `image_text`"),
        ("Wan I2V", 0, {"image": torch.zeros(2, 1, 3, 4, 6)}, "condition 'image' is"),
    ]:
        family, place = FAMILIES[name], tmp_path / name
        family.build(family.configs[number]).save_pretrained(place)
        ours = stdit.load_transformer(place)
        latents, t, text, _ = inputs(ours, family, number, "clip")
        with pytest.raises(StditError, match=message):
            ours.predict(latents, t, text[:, :6], **given)


def test_cosmos_predict1_is_told_what_its_pipeline_tells_it_of_a_noise_level(tmp_path):
    """A level is σ/(σ + 1); CosmosTextToWorldPipeline gives the network its scheduler's timesteps, log(σ)/4."""
    from diffusers import EDMEulerScheduler

    family = FAMILIES["Cosmos-Predict"]
    theirs = randomise(family.build(family.configs[2]), 2)
    theirs.save_pretrained(tmp_path)
    ours = stdit.load_transformer(tmp_path)
    latents, _, text, _ = inputs(ours, family, 2, "clip")
    scheduler, padding = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0), latents.new_zeros(1, 1, *latents.shape[3:])
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for sigma, told in zip(scheduler.sigmas, scheduler.timesteps):
            t = (sigma.double() / (sigma.double() + 1)).expand(2)
            wanted = theirs(latents, told.expand(2), text, fps=30, padding_mask=padding, return_dict=False)[0]
            assert relative(ours.predict(latents, t, text, fps=30), wanted) <= 1e-5
    with pytest.raises(StditError, match=r"t of 1 is σ = t/\(1 − t\) = ∞"):
        ours.predict(latents, torch.tensor([0.3, 1.0]), text, fps=30)
