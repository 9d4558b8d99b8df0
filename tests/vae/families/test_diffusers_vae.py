"""Other families' autoencoders: encode and decode as diffusers' pipelines of the families call them."""

from __future__ import annotations

import json
import sys

import diffusers as d
import pytest
import torch

import stdit
from stdit.errors import StditError
from stdit.shapes import Stride, VideoShape, frames_for
from stdit.vae.families.diffusers_vae import DiffusersVAE, VaeTraits
from stdit.weights.io import vae_on_meta

FOUR = (8, 8, 8, 8)
ONES = (1, 1, 1, 1, 1)
LTX = {
    "latent_channels": 6, "block_out_channels": FOUR, "decoder_block_out_channels": FOUR, "layers_per_block": ONES,
    "decoder_layers_per_block": ONES, "scaling_factor": 0.8,
}  # fmt: skip
# name: (class, config, stride, what its pipeline makes of raw latents, as diffusers' pipeline files have it)
VAES = {
    "CogVideoX": (
        "AutoencoderKLCogVideoX",
        {"block_out_channels": FOUR, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2},
        (4, 8, 8),
        lambda vae, raw: vae.config.scaling_factor * raw,
    ),
    "HunyuanVideo": (
        "AutoencoderKLHunyuanVideo",
        {"block_out_channels": FOUR, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4},
        (4, 8, 8),
        lambda vae, raw: raw * vae.config.scaling_factor,
    ),
    "Mochi": (
        "AutoencoderKLMochi",
        {
            "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4, "latent_channels": 4,
            "layers_per_block": ONES, "latents_mean": (0.1, 0.2, -0.3, 0.4), "latents_std": (1.1, 0.9, 0.8, 1.2),
            "scaling_factor": 0.9,
        },
        (6, 8, 8),
        lambda vae, raw: (raw - column(vae.config.latents_mean)) * vae.config.scaling_factor
        / column(vae.config.latents_std),
    ),
    "LTX-Video 0.9.1": (
        "AutoencoderKLLTXVideo",
        {**LTX, "timestep_conditioning": True},
        (8, 32, 32),
        lambda vae, raw: (raw - column(vae.latents_mean)) * vae.config.scaling_factor / column(vae.latents_std),
    ),
    "Stable Diffusion 3": (
        "AutoencoderKL",
        {
            "block_out_channels": (4, 4), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "shift_factor": 0.06,
        },
        (1, 2, 2),
        lambda vae, raw: (raw - vae.config.shift_factor) * vae.config.scaling_factor,
    ),
}  # fmt: skip


def column(values) -> torch.Tensor:
    return torch.as_tensor(values).view(1, -1, 1, 1, 1)


def saved(name: str, folder) -> torch.nn.Module:
    kind, config, _, _ = VAES[name]
    torch.manual_seed(0)
    theirs = getattr(d, kind)(**config).eval()
    if kind == "AutoencoderKLLTXVideo":
        theirs.latents_mean.copy_(torch.linspace(-1, 1, 6)), theirs.latents_std.copy_(torch.linspace(0.5, 2, 6))
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_latents_and_frames_are_those_of_the_familys_pipeline(name, tmp_path):
    theirs = saved(name, tmp_path / "vae")
    ours = stdit.load_vae(tmp_path).eval()
    _, _, stride, normalise = VAES[name]
    assert isinstance(ours, DiffusersVAE) and tuple(ours.config.stride) == stride
    outline = vae_on_meta(tmp_path)
    assert outline.config == ours.config
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert {key: tensor.shape for key, tensor in outline.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in outline.state_dict().values())
    frames = 1 + stride[0]
    video = torch.rand(1, 3, frames, 32, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    if name == "Stable Diffusion 3":
        pictures = video[0].transpose(0, 1)
        raw = theirs.encode(pictures).latent_dist.mode()
        whole, raw = theirs.decode(raw).sample.transpose(0, 1)[None], raw.transpose(0, 1)[None]
    else:
        raw = theirs.encode(video).latent_dist.mode()
        level = (torch.zeros(1),) if "LTX" in name else ()
        whole = theirs.decode(raw, *level).sample
    latents = ours.encode(video)
    shape = VideoShape(frames, 32, 64).latent(ours.config.stride)
    assert latents.shape == (1, ours.config.z_dim, shape.frames, shape.height, shape.width)
    torch.testing.assert_close(latents, normalise(theirs, raw), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(latents, clamp=False), whole, rtol=1e-4, atol=1e-4)
    assert ours.decode(50 * latents).abs().max() <= 1
    streamed = list(ours.decode_stream(latents[0], clamp=False))
    assert len(streamed) == (frames if name == "Stable Diffusion 3" else 1)
    torch.testing.assert_close(torch.cat(streamed, dim=1), whole[0], rtol=1e-4, atol=1e-4)
    first, again = (ours.encode(video, True, torch.Generator().manual_seed(seed)) for seed in (0, 0))
    assert torch.equal(first, again) and not torch.equal(first, latents)
    stdit.save_vae(ours, tmp_path / "back")
    assert all(torch.equal(a, b) for a, b in zip(
        theirs.state_dict().values(), stdit.load_vae(tmp_path / "back").module.state_dict().values()
    ))  # fmt: skip


def test_strides_that_are_not_causal():
    """Allegro: 88 frames are 22 latent ones."""
    stride = Stride((4, 8, 8), first=4)
    assert VideoShape(88, 720, 1280).latent(stride).frames == 22
    assert frames_for(5.8, 15, stride) == 88 and frames_for(0.1, 15, stride) == 4
    with pytest.raises(StditError, match=r"takes 4\+4k frames; nearest are 88 and 92"):
        VideoShape(89, 720, 1280).latent(stride)
    with pytest.raises(StditError, match=r"4\+4k frames; nearest is 4"):
        VideoShape(1, 720, 1280).latent(stride)


def test_what_does_not_fit_is_named(tmp_path, monkeypatch):
    saved("CogVideoX", tmp_path)
    vae = stdit.load_vae(tmp_path)
    with pytest.raises(StditError, match="nearest are 1 and 5"):
        vae.encode(torch.zeros(1, 3, 3, 16, 16))
    vae.memory = None
    with pytest.raises(StditError, match=r"memory 1000: .* keeps to no budget"):
        vae.memory = 1000
    with pytest.raises(StditError, match="uint8"):
        vae.encode(torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(StditError, match=r"decodes \(B, 4"):
        vae.decode(torch.zeros(1, 3, 1, 2, 2))
    with pytest.raises(StditError, match="only be written in layout 'diffusers'"):
        stdit.save_vae(vae, tmp_path / "original", layout="original")
    allegro = d.AutoencoderKLAllegro(
        block_out_channels=(4, 4), down_block_types=("AllegroDownBlock3D",) * 2, norm_num_groups=2,
        up_block_types=("AllegroUpBlock3D",) * 2, layers_per_block=1,
    )  # fmt: skip
    with pytest.raises(StditError, match=r"height must be 320\+200k, not 640; nearest are 520 and 720"):
        DiffusersVAE(allegro, VaeTraits("Allegro", whole=True, tiled=True)).decode(torch.zeros(1, 4, 6, 320, 160))
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StditError, match="cut short"):
        stdit.load_vae(tmp_path)
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    with pytest.raises(StditError, match=r"do not fit its config\.json"):
        stdit.load_vae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"layers_per_block": "two"}))
    for read in (stdit.load_vae, vae_on_meta):
        with pytest.raises(StditError, match="diffusers cannot read AutoencoderKLCogVideoX there"):
            read(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(StditError, match=r"pip install 'stdit\[vaes\]'"):
        stdit.load_vae(tmp_path)
