"""Wan 2.2 A14B's two experts: one model to the caller, two folders on the disk, in both layouts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import stdit
from stdit.errors import StditError
from stdit.models.packing import pack_clips, pack_texts
from stdit.models.transformer import Experts, STDiT, TransformerConfig

CONFIG = TransformerConfig(24, 2, 2, 40, 4, 4, text_dim=16, frequency_dim=32)
FOLDERS = {"diffusers": ("transformer", "transformer_2"), "original": ("high_noise_model", "low_noise_model")}


def expert(seed: int, config: TransformerConfig = CONFIG) -> STDiT:
    torch.manual_seed(seed)
    model = STDiT(config)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def experts() -> Experts:
    return Experts(expert(0), expert(1), 0.875)


def given(levels, seed=3):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(levels), 4, 2, 4, 6, generator=generator)
    return latents, torch.tensor(levels), torch.randn(len(levels), 3, 16, generator=generator)


@pytest.mark.parametrize("layout", FOLDERS)
def test_both_go_to_the_disk_and_back(experts, layout, tmp_path):
    stdit.save_transformer(experts, tmp_path, layout)
    assert sorted(place.name for place in tmp_path.iterdir()) == sorted(FOLDERS[layout])
    if layout == "diffusers":
        (tmp_path / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.6}))
    again = stdit.load_transformer(tmp_path)
    assert isinstance(again, Experts) and again.boundary == (0.6 if layout == "diffusers" else 0.875)
    for name, tensor in experts.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for name, wanted in (("high", experts.high), ("low", experts.low)):
        alone = stdit.load_transformer(tmp_path, expert=name)
        assert isinstance(alone, STDiT)
        assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), wanted.state_dict().values()))


def test_each_clip_is_predicted_by_the_expert_for_its_level(experts):
    latents, t, text = given([0.9, 0.875, 0.87, 0.1])
    found = experts.predict(latents, t, text)
    high, low = experts.high.predict(latents, t, text), experts.low.predict(latents, t, text)
    torch.testing.assert_close(found, torch.cat([high[:2], low[2:]]), rtol=1e-4, atol=1e-5)
    assert (high[2:] - low[2:]).abs().mean() > 0.01  # the two differ
    frames = torch.tensor([[0.0, 0.9], [0.0, 0.5]])  # a known frame does not make a clip one of low noise
    found = experts.predict(latents[:2], frames, text[:2])
    wanted = [experts.high.predict(latents[:1], frames[:1], text[:1]),
              experts.low.predict(latents[1:2], frames[1:], text[1:2])]  # fmt: skip
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-5)


def test_a_condition_of_all_clips_is_not_cut_like_one_of_each(experts):
    """A size (2,) beside two clips has as many numbers as there are clips."""
    config = replace(CONFIG, level_condition="size", dim=24)
    both = Experts(expert(0, config), expert(1, config), 0.875)
    latents, t, text = given([0.9, 0.3])
    for size in (torch.tensor([48, 32]), [48, 32], torch.tensor([[48, 32], [64, 16]])):
        each = torch.as_tensor(size).expand(2, 2)
        found = both.predict(latents, t, text, size=size)
        wanted = [
            one.predict(latents[n : n + 1], t[n : n + 1], text[n : n + 1], size=each[n : n + 1])
            for n, one in enumerate((both.high, both.low))
        ]
        torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-5)


def test_both_get_gradients_of_their_own_clips(experts):
    latents, t, text = given([0.95, 0.2])
    experts.zero_grad()
    experts.predict(latents, t, text)[0].square().sum().backward()
    assert experts.high.head.head.weight.grad.abs().sum() > 0
    assert not experts.low.head.head.weight.grad.any()


def test_a_pack_is_of_one_side(experts):
    latents, t, text = given([0.9, 0.3])
    pack, texts = pack_clips([*latents], [*t], CONFIG.patch), pack_texts([*text], 0)
    with pytest.raises(StditError, match=r"0\.3 to 0\.9, on both sides of the experts' boundary 0\.875"):
        experts(pack, texts)
    pack, texts = pack_clips([*latents[1:]], [*t[1:]], CONFIG.patch), pack_texts([*text[1:]], 0)
    assert torch.equal(experts(pack, texts), experts.low(pack, texts))


def test_what_does_not_fit_is_named(experts, tmp_path):
    with pytest.raises(StditError, match="one config"):
        Experts(expert(0), STDiT(TransformerConfig(24, 2, 1, 40, 4, 4, text_dim=16, frequency_dim=32)), 0.5)
    with pytest.raises(StditError, match=r"boundary is 875; it must be a noise level"):
        Experts(experts.high, experts.low, 875)
    stdit.save_transformer(experts.high, tmp_path / "one")
    with pytest.raises(StditError, match="holds one transformer"):
        stdit.load_transformer(tmp_path / "one", expert="low")
    with pytest.raises(StditError, match="expert 'middle' does not exist"):
        stdit.load_transformer(tmp_path / "one", expert="middle")
    stdit.save_transformer(experts, tmp_path / "two")
    (tmp_path / "two" / "model_index.json").write_text(json.dumps({"boundary_ratio": None}))
    with pytest.raises(StditError, match="boundary_ratio is None"):
        stdit.load_transformer(tmp_path / "two")
