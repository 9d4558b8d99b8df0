"""Stable Diffusion's image VAE, inflated, against diffusers' AutoencoderKL with the same random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensor_files import load_file
from torch import Tensor
from torch.testing import assert_close

from stdit.errors import StditError
from stdit.training.config import from_dict
from stdit.training.engine.parallel import World
from stdit.training.setup.footprint import build_on_meta
from stdit.training.setup.objective import make_objective, make_vae
from stdit.training.setup.resolve import resolve
from stdit.vae.autoencoder import CausalVAE
from stdit.weights.image_vae import inflate_image_vae
from stdit.weights.io import load_vae, save_vae

diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference: pip install 'stdit[dev]'")
CLOSE = dict(rtol=1e-5, atol=1e-5)


def image_vae(**settings: object):
    torch.manual_seed(0)
    levels = dict(down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3)
    sizes = dict(block_out_channels=[8, 16, 16], layers_per_block=2, norm_num_groups=4, latent_channels=3)
    vae = diffusers.AutoencoderKL(**(levels | sizes | settings)).requires_grad_(False).eval()
    for p in vae.parameters():
        p.add_(torch.randn_like(p) * 0.05)
    return vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder of Stable Diffusion's, as far as its VAE is concerned."""
    folder = tmp_path_factory.mktemp("sd")
    image_vae().save_pretrained(folder / "vae")
    return folder


def frames(count: int, side: int = 8) -> Tensor:
    """(1, 3, T, H, W), no square."""
    return torch.rand((1, 3, count, side, side + 4), generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_an_image_is_what_the_image_vae_makes_of_it(folder):
    theirs, ours = image_vae(), inflate_image_vae(folder)
    image = frames(1)
    wanted = theirs.encode(image[:, :, 0]).latent_dist
    mean, logvar = ours.encode_moments(image)
    assert_close(mean[:, :, 0], wanted.mean, **CLOSE)
    assert_close(logvar[:, :, 0], wanted.logvar, **CLOSE)
    assert_close(ours.decode_raw(mean)[:, :, 0], theirs.decode(wanted.mean).sample, **CLOSE)
    # normalised as by diffusers' pipelines, here run behind stdit's own methods
    other = load_vae(folder)
    latents = other.encode(image)
    assert_close(ours.encode(image), latents, **CLOSE)
    assert_close(ours.decode(latents), other.decode(latents), **CLOSE)


@torch.no_grad()
def test_a_clip_is_its_frames(folder):
    """Latent frame i is that of frame 4i, and each is shown as four frames; without strides in time, one by one."""
    theirs = image_vae()
    for temporal, stride in ((None, 4), ((False, False), 1)):
        ours = inflate_image_vae(folder, temporal)
        assert ours.config.stride[0] == stride
        video = frames(1 + 2 * stride)
        mean, _ = ours.encode_moments(video)
        alone = torch.stack(
            [theirs.encode(video[:, :, i]).latent_dist.mean for i in range(0, 1 + 2 * stride, stride)], 2
        )
        assert_close(mean, alone, **CLOSE)
        shown = torch.stack([theirs.decode(mean[:, :, -(-i // stride)]).sample for i in range(video.shape[2])], 2)
        assert_close(ours.decode_raw(mean), shown, **CLOSE)
        streamed = torch.cat(list(ours.decode_stream(ours.normalise(mean)[0], clamp=False)), 1)
        assert_close(streamed, shown[0], **CLOSE)


def test_it_is_saved_and_loaded_and_trains(folder, tmp_path):
    vae = inflate_image_vae(folder)
    save_vae(vae, tmp_path)
    again = load_vae(tmp_path)
    assert isinstance(again, CausalVAE) and again.config == vae.config
    state = again.state_dict()
    assert state.keys() == vae.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in vae.state_dict().items())
    with pytest.raises(StditError, match="layout 'diffusers'"):
        save_vae(vae, tmp_path / "original", layout="original")
    mean, logvar = vae.encode_moments(frames(5))
    (vae.decode_raw(mean).square().mean() + logvar.mean()).backward()
    still = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().max()]
    assert not [name for name in still if "bias" not in name]  # taps of the past move, too
    past = vae.encoder.conv1.weight.grad
    assert past is not None and past[:, :, 0].abs().max() > 0


def test_training_starts_there(folder):
    config = {"vae": {"path": str(folder), "inflate": True, "temporal_downsample": [True, False]}}
    vae = make_vae(resolve(from_dict(config | {"objective": {"kind": "vae"}}, "test")))
    assert vae.config.stride == (2, 4, 4) and vae.config.groups == 4
    assert build_on_meta(resolve(from_dict(config | {"objective": {"kind": "vae"}}, "test"))).vae.config == vae.config
    plain = resolve(from_dict({"vae": {"path": str(folder)}, "objective": {"kind": "vae"}}, "test"))
    for made in (lambda: build_on_meta(plain), lambda: make_objective(plain, None, World(0, 1, torch.device("cpu")))):
        with pytest.raises(StditError, match=r"AutoencoderKL cannot be trained here.*vae\.inflate=true"):
            made()
    with pytest.raises(StditError, match=r"objective\.kind=vae"):
        make_vae(resolve(from_dict(config, "test")))
    with pytest.raises(StditError, match="path, which is not set"):
        from_dict({"vae": {"inflate": True}}, "test")


@torch.no_grad()
def test_other_files(folder, tmp_path):
    """As diffusers wrote attention before 0.18, as Stable Diffusion's files are to this day; and without the
    convolutions around the latents, as Stable Diffusion 3 has it."""
    wanted = inflate_image_vae(folder).state_dict()
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensor for name, tensor in state.items()}
    save_file(state, tmp_path / path.name)
    (tmp_path / "config.json").write_text((folder / "vae" / "config.json").read_text())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in inflate_image_vae(tmp_path).state_dict().items())

    bare = image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)
    bare.save_pretrained(tmp_path / "bare")
    ours, image = inflate_image_vae(tmp_path / "bare"), frames(1)
    latents = (bare.encode(image[:, :, 0]).latent_dist.mean - 0.06) * 1.5
    assert_close(ours.encode(image)[:, :, 0], latents, **CLOSE)
    wanted = bare.decode(latents / 1.5 + 0.06).sample
    assert_close(ours.decode(latents[:, :, None], clamp=False)[:, :, 0], wanted, **CLOSE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "AutoencoderKLWan.* is not an image VAE"),
        ({"act_fn": "relu"}, "act_fn is 'relu'.*'silu' only"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types is"),
        ({"block_out_channels": [8, 12, 16]}, "multiples of the first"),
        ({"block_out_channels": [8, 16, 32]}, "Does .*config.json belong to these weights"),
        ({"norm_num_groups": 3}, "groups=3"),
        ({"latent_channel": 4}, "Did you mean 'latent_channels'"),
        ({"block_out_channels": [1 << 15] * 3}, "Does .*config.json belong to these weights"),  # nor is memory taken
        ({"block_out_channels": [1 << 18] * 3}, "base_dim is 262144; it must be at most 65,536"),
    ],
)
def test_what_does_not_fit_is_said(folder, tmp_path, change, words):
    found = json.loads((folder / "vae" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(found | change))
    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / name).symlink_to(folder / "vae" / name)
    with pytest.raises(StditError, match=words):
        inflate_image_vae(tmp_path)
