"""An inflated PixArt computes for each frame what diffusers' PixArt computes for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import stdit
from stdit.errors import StditError
from stdit.models.transformer import STDiT, TransformerConfig, inflate

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
from references import FAMILIES, randomise

PIXART = FAMILIES["PixArt"]


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("number", range(len(PIXART.configs)))
def test_every_frame_is_as_in_diffusers_pixart(number: int, frames: int, tmp_path: Path) -> None:
    config = PIXART.configs[number]
    theirs = randomise(PIXART.build(config), number)
    theirs.save_pretrained(tmp_path)
    image = stdit.load_transformer(tmp_path)
    kept = {name: tensor.clone() for name, tensor in image.state_dict().items()}
    video = inflate(image)
    _, height, width = PIXART.grids[number]
    generator = torch.Generator().manual_seed(number)
    latents = torch.randn(2, config["in_channels"], frames, height, width, generator=generator)
    t = torch.rand(2, generator=generator)
    text = torch.randn(2, 6, config["caption_channels"], generator=generator)
    given, mask = PIXART.given(config), torch.ones(2, 6, dtype=torch.bool)
    with torch.no_grad():
        found = video.predict(latents, t, text, **given)
        alone = [image.predict(latents[:, :, i : i + 1], t, text, **given) for i in range(frames)]
        wanted = PIXART.call(theirs, latents, t, text, mask, given)
    # to rounding: for the matrices of four frames torch may take another kernel than for those of one
    assert (found - torch.cat(alone, dim=2)).norm() <= 1e-6 * wanted.norm()
    assert frames > 1 or torch.equal(found, alone[0])
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    state = video.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    assert {name for name in state if name not in kept} == {n for n in state if n.startswith("temporal_blocks.")}


def test_it_saves_and_loads_with_what_its_new_blocks_learned(tmp_path: Path) -> None:
    randomise(PIXART.build(PIXART.configs[0]), 0).save_pretrained(tmp_path / "image")
    video = randomise(inflate(stdit.load_transformer(tmp_path / "image")), 1)
    stdit.save_transformer(video, tmp_path / "video")
    again = stdit.load_transformer(tmp_path / "video")
    assert again.config == video.config and again.config.attention == "spatial_temporal"
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in video.state_dict().items())
    latents, t = torch.randn(1, 5, 3, 6, 4), torch.tensor([0.5])
    text, size = torch.randn(1, 4, 19), (640, 384)
    with torch.no_grad():
        found = again.predict(latents, t, text, size=size)
        turned = again.predict(latents.flip(2), t, text, size=size).flip(2)
    assert not torch.allclose(found, turned, rtol=1e-3), "a frame does not know the others"
    with pytest.raises(StditError, match=r"an inflated PixArt .*: write layout 'diffusers'"):
        stdit.save_transformer(video, tmp_path / "original", "original")


def test_what_is_no_image_model_is_refused() -> None:
    with pytest.raises(StditError, match=r"only a model of images.*attention 'full'"):
        inflate(STDiT(TransformerConfig(dim=24, heads=2, layers=1, ffn_dim=48)))
