"""What a layout cannot hold is refused by name: every setting of every family, changed, in every layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import stdit3_golden
import torch
from references import FAMILIES

import stdit
from stdit.errors import StditError
from stdit.models.config import CHOICES, PRESETS, TransformerConfig
from stdit.models.transformer import STDiT
from stdit.vae.autoencoder import CausalVAE
from stdit.vae.config import PRESETS as VAES
from stdit.vae.config import VaeConfig
from stdit.vae.families.open_sora import OpenSoraConfig, OpenSoraVAE
from stdit.weights.families import families, family_of, on_meta
from stdit.weights.io import check_layout

pytest.importorskip("diffusers")

# What must change along with a setting for the result to be a network.
COMPANIONS: dict[str, dict[str, Any]] = {
    "attention": {"rotary": "none"},
    "rotary": {"rope_fps": 24.0},
    "modulation": {"cross_norm": "modulated", "level_condition": "none"},
    "cross_norm": {"modulation": "low_rank", "level_condition": "none"},
    "text_embedding": {"text_width": 8},
    "text_width": {"text_embedding": "gelu"},
    "position": {"position_base": 4, "position_max": (8, 8, 8)},
    "compressed": {"compression": 2, "attention": "spatial", "rotary": "none"},
    "compression": {"compressed": (0,), "attention": "spatial", "rotary": "none"},
    "layers": {"compressed": (), "compression": 1},
    "image_text_positions": {"image_text_dim": 8},
}


# Settings that follow from others of the family.
ALONE = {("PixArt", "rotary"), *(("Cosmos-Predict", f) for f in ("frequency_dim", "cross_norm", "modulation"))}
ALONE.add(("Cosmos-Predict", "level_condition"))


@cache
def base_of(name: str) -> TransformerConfig:
    """A small config of a family, as it is read from a reference's config.json."""
    from stdit.weights.families import stdit3

    if name == "STDiT3":
        return stdit3.FAMILY.config_from(stdit3_golden.GOLDEN.config_json(0), {})
    family = FAMILIES[name]
    found = {"_class_name": family.name, **{k: v for k, v in family.build(family.configs[0]).config.items()}}
    found = {k: v for k, v in found.items() if not k.startswith("_") or k == "_class_name"}
    module = next(known for known in families("transformer") if family.name in known.classes)
    return module.config_from(found, {})


NAMES = (*FAMILIES, "STDiT3")
TRIED = 1  # other values of a setting: one, for time; any number holds
FIELDS = [field.name for field in dataclasses.fields(TransformerConfig)]


def others(name: str, value: Any) -> Iterator[Any]:
    """Other values that a setting may have."""
    if name in CHOICES:
        yield from (choice for choice in CHOICES[name] if choice != value)
    elif name == "family":
        yield from (family.name for family in families("transformer") if family.name != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value * 2, value + 2, value * 3, value - 1, value // 2)
    elif isinstance(value, float):
        yield from (value * 2 + 1.5, value / 3)
    elif value is None:
        yield from (3e-4, 6)
    elif isinstance(value, tuple):
        yield from (tuple(2 * n or 3 for n in value), tuple(n + 1 for n in value), (0,), (*value[1:], *value[:1]))
    else:
        raise AssertionError(f"say here what other values {name} may have")


def changed(config: Any, name: str) -> list[Any]:
    """Configs with another value of one setting, and of what must go with it."""
    found = []
    for other in others(name, getattr(config, name)):
        for more in ({}, COMPANIONS.get(name, {})):
            settings = {name: other, **more}
            if settings.get("modulation", config.modulation) == "low_rank":
                settings["frequency_dim"] = settings.get("dim", config.dim)
            try:
                new = dataclasses.replace(config, **settings)
            except StditError:
                continue
            if getattr(new, name) == other and new != config:
                found.append(new)
                break
    return found[:TRIED]


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + 0.1)
    return model.eval()


def output(model: STDiT) -> torch.Tensor:
    """Of the same random clip, text and conditions for all models of one config."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    pt, ph, pw = config.patch
    size = (2 * pt, 2 * ph * config.compression, 3 * pw * config.compression)
    draw = {
        "fps": lambda: 30.0,
        "size": lambda: (96, 64),
        "image": lambda: torch.randn(1, config.image_channels, *size, generator=generator),
        "image_text": lambda: torch.randn(
            1, config.image_text_positions or 5, config.image_text_dim, generator=generator
        ),
    }
    latents = torch.randn(1, config.latent_channels, *size, generator=generator)
    text = torch.randn(1, 5, config.text_dim, generator=generator)
    given = {name: draw[name]() for name in config.conditions}
    with torch.no_grad():
        return model.predict(latents, torch.tensor([0.4]), text, **given)


def refusal(config: Any, layout: str) -> str:
    try:
        check_layout(config, layout)
    except StditError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("field", FIELDS)
def test_every_setting_comes_back_or_is_refused_by_name(field, name, layout, tmp_path):
    config = base_of(name)
    tried = changed(config, field)
    assert tried or (name, field) in ALONE, f"{name}: no other value of {field}: say in COMPANIONS what goes with it"
    for number, other in enumerate(tried):
        differing = [f for f in FIELDS if getattr(other, f) != getattr(config, f)]
        if said := refusal(other, layout):
            assert field == "family" or any(f"{f}=" in said or (f in differing and f in said) for f in FIELDS), said
            with pytest.raises(StditError):
                stdit.save_transformer(STDiT(other), tmp_path / str(number), layout)
            assert not (tmp_path / str(number)).exists()
            continue
        model = randomised(STDiT(other))
        stdit.save_transformer(model, tmp_path / str(number), layout)
        again = stdit.load_transformer(tmp_path / str(number))
        assert torch.equal(output(again), output(model)), differing
        assert again.config.text_padding == other.text_padding


@pytest.mark.parametrize("name", NAMES)
def test_the_families_own_settings_are_held_by_both_layouts(name):
    for layout in ("diffusers", "original"):
        assert not refusal(base_of(name), layout)


# ComfyUI reads no config.json: what it makes of a file is held against its rules in our own words
# (comfy/model_detection.py and the classes' defaults, as of October 2025).


def comfyui_makes(shapes: dict[str, tuple[int, ...]], carried: dict[str, Any]) -> dict[str, Any]:
    """Our settings of what ComfyUI builds for tensors of these names and shapes."""
    blocks = len({name.split(".")[1] for name in shapes if name.split(".")[0] in ("blocks", "transformer_blocks")})
    if "adaln_single.emb.timestep_embedder.linear_1.bias" in shapes and "pos_embed.proj.bias" not in shapes:
        width, _ = shapes["transformer_blocks.0.attn2.to_k.weight"]
        found = {"num_attention_heads": 32, "attention_head_dim": width // 32, "in_channels": 128, **carried}
        heads = found["num_attention_heads"]
        return {
            "heads": heads,
            "dim": heads * found["attention_head_dim"],
            "layers": found.get("num_layers", blocks),
            "in_channels": found["in_channels"],
            "out_channels": found["in_channels"],
            "text_dim": found.get("caption_channels", 4096),
            "rope_theta": found.get("positional_embedding_theta", 10000.0),
            "rope_scale": tuple(found.get("positional_embedding_max_pos", (20, 2048, 2048))),
            "rotary": "inner_causal" if found.get("causal_temporal_positioning", False) else "inner",
            "patch": (1, 1, 1),
        }
    if "t_block.1.weight" in shapes:
        side = int(shapes["pos_embed"][1] ** 0.5) if "pos_embed" in shapes else 32
        sized = "ar_embedder.mlp.0.weight" in shapes
        return {
            "heads": 16,
            "dim": 1152,
            "layers": blocks,
            "in_channels": 4,
            "out_channels": 8,
            "patch": (1, 2, 2),
            "text_dim": 4096,
            "position_base": side,
            "position_stretch": side * 2 // 64,
            "level_condition": "size" if sized else "none",
            "attention": "spatial",
            "compressed": (),
        }
    if "head.modulation" in shapes:
        dim = shapes["head.modulation"][-1]
        return {
            "dim": dim,
            "heads": dim // 128,
            "layers": blocks,
            "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
            "in_channels": shapes["patch_embedding.weight"][1],
            "out_channels": shapes["head.head.weight"][0] // 4,
            "patch": (1, 2, 2),
            "text_dim": 4096,
            "frequency_dim": 256,
            "eps": 1e-6,
            "qk_norm": "across_heads",
            "cross_norm": "affine",
            "image_text_dim": 1280 if "img_emb.proj.0.bias" in shapes else 0,
            "image_text_positions": shapes.get("img_emb.emb_pos", (0, 0))[1],
            "text_padding": 512,
            "rope_theta": 10000.0,
            "norm": "layer",
            "activation": "gelu_tanh",
            "time_scale": 1000.0,
        }
    dim = shapes["x_embedder.proj.1.weight"][0]
    one = "blocks.block0.blocks.0.block.attn.to_q.0.weight" in shapes
    channels = shapes["x_embedder.proj.1.weight"][1] // 4 - 1
    scales = {16: (1.0, 4.0, 4.0), 17: (1.0, 3.0, 3.0) if dim == 2048 else (0.8333333333333334, 2.0, 2.0)}
    of_one = (2.0, 1.0, 1.0) if dim == 4096 else (2.0, 2.0, 2.0)
    return {
        "dim": dim,
        "heads": {2048: 16, 4096: 32, 5120: 40}.get(dim, 0),
        "layers": 36 if dim == 5120 else 28,
        "in_channels": channels,
        "out_channels": 16,
        "patch": (1, 2, 2),
        "text_dim": 1024,
        "text_embedding": "none",
        "modulation_rank": 256,
        "position": "learned" if one else "none",
        "rope_scale": of_one if one else scales.get(channels, ()),
    }


COMFYUI = {
    "Wan": dataclasses.replace(PRESETS["small"], layers=1),
    "Wan 5B": dataclasses.replace(PRESETS["5B"], layers=2),
    "LTX-Video": {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "cross_attention_dim": 64},
    "PixArt": {"num_layers": 2, "sample_size": 64, "caption_channels": 4096},
    "Cosmos-Predict": {},
}


def comfyui_base(name: str) -> TransformerConfig:
    from stdit.weights.families import cosmos, ltx, pixart

    changes = COMFYUI[name]
    if isinstance(changes, TransformerConfig):
        return changes
    module = {"LTX-Video": ltx, "PixArt": pixart, "Cosmos-Predict": cosmos}[name]
    return module.FAMILY.config_from({"_class_name": module.FAMILY.classes[0], **changes}, {})


@pytest.mark.parametrize("name", COMFYUI)
def test_comfyui_opens_what_is_written_for_it_as_itself_or_it_is_refused_by_name(name):
    import json

    base = comfyui_base(name)
    assert not refusal(base, "comfyui")
    accepted = 0
    for field in (
        FIELDS if name != "Cosmos-Predict" else ("dim", "heads", "layers", "text_dim", "rope_scale", "position")
    ):
        for config in [base, *changed(base, field)]:
            if said := refusal(config, "comfyui"):
                assert any(f"{f}=" in said or f in said for f in FIELDS), said
                continue
            family = family_of(config)
            native = {key: tuple(tensor.shape) for key, tensor in on_meta(config).state_dict().items()}
            shapes = family.keymap(config, "original").table(native).foreign_shapes
            shapes |= {key: tuple(make().shape) for key, make in family.keymap(config, "original").computed.items()}
            carried = json.loads(family.metadata(config)["config"])["transformer"] if name == "LTX-Video" else {}
            made = comfyui_makes(shapes, carried)
            assert {key: getattr(config, key) for key in made} == made, field
            accepted += config != base
    assert accepted or name == "Cosmos-Predict"


@pytest.mark.parametrize("name", ["Latte", "Allegro", "STDiT3"])
def test_comfyui_has_no_such_family(name, tmp_path):
    with pytest.raises(StditError, match=r"ComfyUI has no (Latte|Allegro|STDiT3)"):
        stdit.save_transformer(STDiT(base_of(name)), tmp_path / "out", "comfyui")
    assert not (tmp_path / "out").exists()


def test_presets_have_heads_that_all_programs_take_from_the_width():
    for name, config in PRESETS.items():
        assert (config.head_dim == 128) == (name != "toy")
        assert bool(refusal(config, "comfyui")) == bool(refusal(config, "original")) == (name == "toy")
        assert not refusal(config, "diffusers")


@pytest.mark.parametrize(
    "change",
    [{"norm": "rms"}, {"activation": "gelu"}, {"time_scale": 1.0}, {"rope_scale": [2, 1, 1]}, {"qk_eps": 0.1},
     {"rotary": "none"}, {"attention": "spatial", "rotary": "none"}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_training_whose_model_no_layout_holds_is_refused_before_it_starts(change):
    from stdit.training.config import LoraConfig, from_dict
    from stdit.training.setup.footprint import build_on_meta
    from stdit.training.setup.objective import check_export, make_transformer
    from stdit.training.setup.resolve import resolve

    config = resolve(from_dict({"run": {"path": "x"}, "model": {"preset": "toy", "layers": 1, **change}}, "test"))
    for make in (lambda: make_transformer(config, 4, 8), lambda: build_on_meta(config)):
        with pytest.raises(StditError, match=rf"run/model will .*'diffusers' cannot hold ({'|'.join(change)})="):
            make()
    model = TransformerConfig.preset("toy", layers=1, **change)
    config.model.lora = LoraConfig()  # whose model folder holds the adapter alone
    check_export(config.model, model)
    config.model.lora.merged = True
    with pytest.raises(StditError, match="cannot hold"):
        check_export(config.model, model)


# VAEs.

VAE_BASE = VaeConfig(base_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, False), z_dim=3)
OPEN_SORA = OpenSoraConfig(
    widths=(32, 64), blocks=1, filters=8, multipliers=(1, 2), temporal_blocks=1, temporal_downsample=(True,), z_dim=2,
    groups=4, group=5,
)  # fmt: skip
VAE_COMPANIONS: dict[str, dict[str, Any]] = {
    "dim_mult": {"temporal_downsample": (True,)},
    "patch_size": {},
    "groups": {"base_dim": 8},
}


@pytest.mark.parametrize("layout", ["diffusers", "original", "comfyui"])
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(VaeConfig)])
def test_every_setting_of_a_vae_comes_back_or_is_refused_by_name(field, layout, tmp_path):
    base = VAES["wan2.1"] if layout == "comfyui" else VAE_BASE
    values: dict[str, list[Any]] = {"groups": [2], "residual": [True], "decoder_base_dim": [8]}
    values |= {"latents_mean": [(0.5, -1.0, 2.0, *(0.1,) * 13)[: base.z_dim]], "dim_mult": [(1, 2), (2, 2, 4)]}
    values |= {"latents_std": [(0.5, 1.0, 2.0, *(0.1,) * 13)[: base.z_dim]]}
    values |= {"temporal_downsample": [(False, True), (True, True, False)]}
    tried = 0
    for value in values.get(field) or [getattr(base, field) + 1, getattr(base, field) * 2]:
        try:
            config = dataclasses.replace(base, **{field: value, **VAE_COMPANIONS.get(field, {})})
        except StditError:
            continue
        tried += 1
        if said := refusal(config, layout):
            assert field in said or (layout == "comfyui" and "=" in said), said
            continue
        assert layout != "comfyui"
        vae = randomised(CausalVAE(config))
        stdit.save_vae(vae, tmp_path / str(tried), layout)
        again = stdit.load_vae(tmp_path / str(tried))
        assert again.config == config
        video = torch.rand(1, 3, 1 + 2 * config.stride[0], 2 * config.stride[1], config.stride[2]) * 2 - 1
        with torch.no_grad():
            assert torch.equal(again.encode(video), vae.encode(video))
    assert tried or (layout, field) == ("comfyui", "z_dim")  # whose means are a channel each


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(OpenSoraConfig)])
def test_every_setting_of_open_soras_vae_comes_back(field, tmp_path):
    values = {"widths": (32, 96), "multipliers": (1, 3), "temporal_downsample": (False,), "groups": 2}
    values |= {"group": 7, "filters": 16}
    config = dataclasses.replace(OPEN_SORA, **{field: values.get(field) or getattr(OPEN_SORA, field) + 1})
    stdit.save_vae(OpenSoraVAE(config), tmp_path)
    assert stdit.load_vae(tmp_path).config == config
    with pytest.raises(StditError, match="ComfyUI has no Open-Sora"):
        stdit.save_vae(OpenSoraVAE(config), tmp_path / "out", "comfyui")


def test_released_vaes_are_comfyuis_and_others_are_not():
    assert not refusal(VAES["wan2.1"], "comfyui") and not refusal(VAES["wan2.2"], "comfyui")
    assert "base_dim=16" in refusal(VAES["toy"], "comfyui")
    measured = dataclasses.replace(VAES["wan2.1"], latents_mean=(0.1,) * 16)
    assert "latents_mean" in refusal(measured, "comfyui") and not refusal(measured, "diffusers")
