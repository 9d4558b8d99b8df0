"""The VAE's key map and configs in both dialects."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import stdit
from stdit.errors import StditError
from stdit.vae.autoencoder import PRESETS, CausalVAE, VaeConfig
from stdit.weights.families.wan_vae import FAMILY

SMALL = VaeConfig(
    base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,), z_dim=3, patch_size=2,
    decoder_base_dim=6, latents_mean=(0.5, 1, 2), latents_std=(1, 2, 3),
)  # fmt: skip

RESIDUAL = VaeConfig(base_dim=4, decoder_base_dim=6, num_res_blocks=1, z_dim=3, patch_size=2, residual=True)


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_wan21_equals_diffusers_key_for_key():
    """diffusers' defaults are the released Wan 2.1 VAE; built without memory, every name and shape agrees."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        ours, theirs = CausalVAE(PRESETS["wan2.1"]), diffusers.AutoencoderKLWan()
    table = FAMILY.keymap(ours.config, "diffusers").table(shapes_of(ours))
    assert not table.differences(shapes_of(theirs))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 126_892_531
    assert FAMILY.config_from(dict(theirs.config), shapes_of(theirs)) == PRESETS["wan2.1"]
    assert FAMILY.config_from({}, shapes_of(theirs)) == PRESETS["wan2.1"]


def test_wan21_has_the_names_of_the_release():
    """A few of Wan2.1_VAE.pth's tensors, where its numbering is easy to get wrong."""
    with torch.device("meta"):
        shapes = shapes_of(CausalVAE(PRESETS["wan2.1"]))
    assert len(shapes) == 194
    for name, shape in {
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
        "encoder.downsamples.0.residual.0.gamma": (96, 1, 1, 1),
        "encoder.downsamples.2.resample.1.weight": (96, 96, 3, 3),
        "encoder.downsamples.5.time_conv.weight": (192, 192, 3, 1, 1),
        "encoder.downsamples.8.time_conv.bias": (384,),
        "encoder.downsamples.10.residual.6.weight": (384, 384, 3, 3, 3),
        "encoder.middle.1.norm.gamma": (384, 1, 1),
        "encoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
        "encoder.head.2.bias": (32,),
        "conv1.weight": (32, 32, 1, 1, 1),
        "conv2.weight": (16, 16, 1, 1, 1),
        "decoder.conv1.weight": (384, 16, 3, 3, 3),
        "decoder.upsamples.3.time_conv.weight": (768, 384, 3, 1, 1),
        "decoder.upsamples.4.shortcut.weight": (384, 192, 1, 1, 1),
        "decoder.upsamples.7.resample.1.weight": (192, 384, 3, 3),
        "decoder.upsamples.11.resample.1.bias": (96,),
        "decoder.upsamples.14.residual.2.weight": (96, 96, 3, 3, 3),
        "decoder.head.2.weight": (3, 96, 3, 3, 3),
    }.items():
        assert shapes[name] == shape, name


def test_wan22_equals_diffusers_key_for_key():
    """The config of the released Wan 2.2 TI2V 5B's VAE; its other values are diffusers' defaults."""
    diffusers = pytest.importorskip("diffusers")
    config = PRESETS["wan2.2"]
    values = dict(
        base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, patch_size=2, in_channels=12, out_channels=12,
        scale_factor_temporal=4, scale_factor_spatial=16,
        latents_mean=list(config.latents_mean), latents_std=list(config.latents_std),
    )  # fmt: skip
    with torch.device("meta"):
        ours, theirs = CausalVAE(config), diffusers.AutoencoderKLWan(**values)
    table = FAMILY.keymap(config, "diffusers").table(shapes_of(ours))
    assert not table.differences(shapes_of(theirs))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 704_688_668
    released = dict(theirs.config) | {"clip_output": False}  # a key that the release has and diffusers passes over
    for found in (dict(theirs.config), released, {}):
        assert FAMILY.config_from(found, shapes_of(theirs)) == config


def test_wan22_has_the_names_of_the_release():
    """A few of Wan2.2_VAE.pth's tensors (wan/modules/vae2_2.py), where its numbering is easy to get wrong."""
    with torch.device("meta"):
        shapes = shapes_of(CausalVAE(PRESETS["wan2.2"]))
    assert len(shapes) == 196
    for name, shape in {
        "encoder.conv1.weight": (160, 12, 3, 3, 3),
        "encoder.downsamples.0.downsamples.1.residual.6.weight": (160, 160, 3, 3, 3),
        "encoder.downsamples.0.downsamples.2.resample.1.weight": (160, 160, 3, 3),
        "encoder.downsamples.1.downsamples.2.time_conv.weight": (320, 320, 3, 1, 1),
        "encoder.downsamples.2.downsamples.0.shortcut.weight": (640, 320, 1, 1, 1),
        "encoder.downsamples.3.downsamples.1.residual.3.gamma": (640, 1, 1, 1),
        "encoder.head.2.weight": (96, 640, 3, 3, 3),
        "decoder.conv1.weight": (1024, 48, 3, 3, 3),
        "decoder.upsamples.0.upsamples.3.time_conv.weight": (2048, 1024, 3, 1, 1),
        "decoder.upsamples.2.upsamples.3.resample.1.weight": (512, 512, 3, 3),
        "decoder.upsamples.3.upsamples.0.shortcut.weight": (256, 512, 1, 1, 1),
        "decoder.head.2.weight": (12, 256, 3, 3, 3),
    }.items():
        assert shapes[name] == shape, name


@pytest.mark.parametrize("config", [SMALL, RESIDUAL, *PRESETS.values()], ids=["small", "residual", *PRESETS])
def test_configs_return_from_every_dialect(config):
    with torch.device("meta"):
        ours = shapes_of(CausalVAE(config))
    for dialect, written in [
        ("diffusers", FAMILY.written(config, "diffusers")),
        ("original", FAMILY.written(config, "original")),
    ]:
        theirs = FAMILY.keymap(config, dialect).table(ours).foreign_shapes
        assert FAMILY.dialect_of(theirs) == dialect
        assert FAMILY.config_from(json.loads(json.dumps(written)), theirs) == config
        bare = FAMILY.config_from({}, theirs)
        assert dataclasses.replace(bare, latents_mean=None, latents_std=None) == dataclasses.replace(
            config, latents_mean=None, latents_std=None
        )
    assert FAMILY.config_from(json.loads(json.dumps(dataclasses.asdict(config))), {}) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(_class_name="AutoencoderKLCogVideoX"), "CogVideoX"),
        (dict(is_residual=True, dim_mult=[1, 3, 4, 4]), "residual level"),
        (dict(attn_scales=[1.0]), "attn_scales"),
        (dict(in_channels=4), "in_channels"),
        (dict(base_dims=4), "base_dim"),
        (dict(z_dim=8), "z_dim is 8"),
        (dict(base_dim="96"), "config.json"),
    ],
)
def test_config_errors(change, words):
    found = {**FAMILY.written(PRESETS["wan2.1"], "diffusers"), **change}
    with pytest.raises(StditError, match=words):
        FAMILY.config_from(found, {})


@pytest.mark.parametrize("config", [SMALL, RESIDUAL], ids=["2.1", "2.2"])
@torch.no_grad()
def test_saved_and_loaded_bit_for_bit(config, tmp_path):
    torch.manual_seed(0)
    vae = CausalVAE(config)
    for layout in ("diffusers", "original"):
        stdit.save_vae(vae, tmp_path / layout, layout=layout)
        loaded = stdit.load_vae(tmp_path / layout)
        assert loaded.config == config
        assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in vae.state_dict().items())
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "diffusers")
    video = torch.rand(1, 3, 5, 16, 32) * 2 - 1
    torch.testing.assert_close(
        vae.encode_moments(video)[0], theirs.encode(video).latent_dist.mean, atol=1e-5, rtol=1e-5
    )
