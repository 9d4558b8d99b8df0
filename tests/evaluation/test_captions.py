"""The measures of captions on models whose answers are known: one that knows every clip, one that ignores the text."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from stdit.data.config import DataConfig
from stdit.data.decode.write import write_video
from stdit.data.manifest import Caption, Clip, Manifest, write_manifest
from stdit.diffusion.solvers import unipc_config
from stdit.errors import StditError
from stdit.evaluation.captions import (
    CaptionedClip,
    caption_losses,
    clip_distances,
    evaluate_captions,
    group_captions,
    measures,
)
from stdit.models.config import TransformerConfig
from stdit.models.transformer import STDiT
from stdit.sampling.pipeline import FolderSettings, Pipeline

WORDS = ("eat", "help", "milk", "no")
PEOPLE = ("a grey T-shirt", "an orange sweater")
GROUP = "A person in (.+) signs"


class Blocks(nn.Module):
    """A VAE of stride 4×8×8 that keeps one pixel a block, and shows it all over the block."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.config = SimpleNamespace(stride=(4, 8, 8), z_dim=3)

    def encode(self, video):
        return video[:, :, ::4, ::8, ::8] * self.scale

    def decode(self, z):
        video = z.repeat_interleave(8, 3).repeat_interleave(8, 4).repeat_interleave(4, 2)  # (B, 3, 4T', H, W)
        return video[:, :, 3:].clamp(-1, 1)

    def decode_stream(self, z):
        yield self.decode(z[None])[0]


class Words(nn.Module):
    """A text encoder: a caption's place in a list; the empty one's is −1."""

    dim, max_length = 1, 16

    def __init__(self, captions):
        super().__init__()
        self.captions = ["", *captions]

    def encode(self, texts, at_least=0):
        return [torch.tensor([[self.captions.index(text) - 1.0]]) for text in texts]


class Oracle(nn.Module):
    """The exact velocity towards the clip that `clip_of` names for the caption, for patches of one latent cell."""

    gain = 1.0  # other gains make the loss depend on the noise

    def __init__(self, clip_of):
        super().__init__()
        self.clip_of = clip_of  # caption index, n -> tokens (n, 3)
        channels = {"in_channels": 3, "out_channels": 3, "text_dim": 1}
        self.config = TransformerConfig(2, 1, 1, 1, **channels, text_padding=0, patch=(1, 1, 1))
        self.patch_embedding = nn.Linear(1, 1)

    def forward(self, pack, text):
        captions = [int(one[0]) for one in text.tokens.split(text.segments.lengths)]
        x0 = torch.cat([self.clip_of(c, n) for c, n in zip(captions, pack.segments.lengths)])
        return self.gain * (pack.tokens - x0) / pack.levels[pack.level_of].float()[:, None].clamp(min=1e-4)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    """Eight clips: a background of the person's colour, a square in a place of the word's; two durations."""
    folder = tmp_path_factory.mktemp("clips")
    clips = []
    for number, (person, word) in enumerate((p, w) for p in PEOPLE for w in WORDS):
        frames = np.full((9 if number % 2 else 5, 32, 32, 3), 60 + 100 * PEOPLE.index(person), np.uint8)
        top, left = divmod(WORDS.index(word), 2)
        frames[:, 16 * top : 16 * top + 16, 16 * left : 16 * left + 16] = (230, 20, 20)
        path = folder / f"{number}.mp4"
        write_video(path, frames, 8)
        caption = Caption(f"A person in {person} signs the word {word}.")
        clips.append(
            Clip(f"{number:064x}", str(path), (caption,), len(frames), 8.0, 32, 32, 0.0, len(frames) / 8, "0" * 64)
        )
    lost = Clip("f" * 64, str(folder / "lost.mp4"), (Caption("gone"),), 9, 8.0, 32, 32, 0.0, 9 / 8, "0" * 64)
    mute = Clip("e" * 64, clips[0].path, (), 5, 8.0, 32, 32, 0.0, 5 / 8, "0" * 64)
    write_manifest(Manifest.of([*clips, lost, mute], folder), folder / "manifest.parquet")
    return DataConfig(str(folder / "manifest.parquet"), ["32x32x5", "32x32x9"], fps=8, mirror=True)


def known_tokens(data: DataConfig) -> tuple[list[str], list[torch.Tensor]]:
    """The captions, and the latents of each one's clip as tokens."""
    from stdit.data.decode.video import read_frames
    from stdit.data.manifest import read_manifest

    manifest = read_manifest(data.manifest)
    captions, tokens = [], []
    for row in range(8):
        clip = manifest[row]
        video = torch.from_numpy(read_frames(clip.path, clip.frames, (32, 32), 8)).float() / 127.5 - 1
        captions.append(clip.captions[0].text)
        tokens.append(video[::4, ::8, ::8].reshape(-1, 3))
    return captions, tokens


def pipeline(captions, clip_of) -> Pipeline:
    settings = FolderSettings(fps=8, shapes=("32x32x5", "32x32x9"), text_padding=0)
    return Pipeline(Oracle(clip_of), Blocks(), Words(captions), unipc_config(), settings)  # type: ignore[arg-type]


def fit(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """A clip's tokens at another duration: cut, or its last latent frame (16 tokens) repeated."""
    return torch.cat([tokens, *[tokens[-16:]] * 8])[:count]


def test_a_model_that_knows_every_clip_is_right_everywhere(data, tmp_path):
    captions, tokens = known_tokens(data)
    model = pipeline(captions, lambda c, n: fit(tokens[c], n))
    seen = []
    result = evaluate_captions(
        model,
        data,
        tmp_path,
        GROUP,
        levels=2,
        draws=2,
        steps=3,
        guidance=1.0,
        progress=lambda *about: seen.append(about),
    )
    for name, total in (("below_mean", 8), ("lowest", 8), ("same_group", 2 * 4 * 3), ("nearest", 8)):
        assert (result["measures"][name]["right"], result["measures"][name]["total"]) == (total, total), name
    assert result["measures"]["lowest"]["chance"] == result["measures"]["nearest"]["chance"] == 1 / 8
    assert [clip["shape"] for clip in result["clips"]] == ["32x32x5", "32x32x9"] * 4
    assert [one["group"] for one in result["captions"]] == [PEOPLE[0]] * 4 + [PEOPLE[1]] * 4
    # The loss under another caption is the distance of the two clips over t², here at t = 1/4 and 3/4.
    apart = (fit(tokens[1], 32) - fit(tokens[0], 32)).square().mean().item()
    wanted = apart * (16 + 16 / 9) / 2
    assert result["clips"][0]["losses"][1] == pytest.approx(wanted, rel=1e-4)
    assert result["clips"][0]["losses"][0] < 1e-6 * wanted
    assert [one["t"] for one in result["levels"]] == [0.25, 0.75]
    assert "lost.mp4" in result["failures"][0] and len(result["failures"]) == 1
    assert json.loads((tmp_path / "evaluation-captions.json").read_text()) == result
    assert (tmp_path / result["sheet"]).stat().st_size > 1000
    assert {what for what, _, _ in seen} == {"reading clips", "losses", "samples 32x32x5", "samples 32x32x9"}


def test_a_model_that_ignores_the_text_is_never_better_and_draws_one_clip(data, tmp_path):
    captions, tokens = known_tokens(data)
    result = evaluate_captions(
        pipeline(captions, lambda c, n: fit(tokens[5], n)), data, tmp_path, GROUP, levels=2, draws=1, steps=2
    )
    shares = {name: cell["right"] for name, cell in result["measures"].items()}
    assert shares == {"below_mean": 0, "lowest": 0, "same_group": 0, "nearest": 1}


def test_a_model_that_takes_any_clip_for_a_caption_is_at_chance():
    """Losses that depend on the caption but not on whether it is the right one."""
    rng = np.random.default_rng(0)
    own, groups = list(range(40)), [str(i // 8) for i in range(40)]
    found = measures(rng.random((40, 40)), own, groups, rng.random((40, 40)))
    for name in ("below_mean", "same_group"):
        assert found[name]["low"] < 0.5 < found[name]["high"], name
    for name in ("lowest", "nearest"):
        assert found[name]["low"] < 1 / 40 < found[name]["high"], name


def test_measures_count_what_they_say():
    losses = np.array([[1.0, 2.0, 0.5], [3.0, 1.0, 0.9], [1.0, 1.0, 1.0], [2.0, 1.0, 4.0]])  # four clips, 3 captions
    distances = np.array([[np.inf, 2.0, 3.0, 1.0], [1.0, 0.5, 3.0, 1.0], [0.3, 2.0, 0.2, np.inf]])
    found = measures(losses, [0, 1, 2, 0], ["a", "a", None], distances)
    counts = {name: (cell["right"], cell["total"]) for name, cell in found.items()}
    # below the mean of the others: 1 < 1.25, 1 < 1.95; not 1 < 1, 2 < 2.5 is. Pairs in "a": 1 < 2, 1 < 3, not 2 < 1.
    assert counts == {"below_mean": (3, 4), "lowest": (0, 4), "same_group": (2, 3), "nearest": (3, 3)}
    assert found["nearest"]["chance"] == pytest.approx((1 / 3 + 1 / 4 + 1 / 3) / 3)
    assert measures(losses, [0, 1, 2, 0], [None] * 3, distances)["same_group"] is None


def test_all_captions_see_the_same_noise_however_they_are_packed(data):
    captions, tokens = known_tokens(data)
    model = pipeline(captions, lambda c, n: fit(tokens[0], n) + 0.1 * c)
    model.transformer.gain = 0.5
    clip = CaptionedClip("id", "", captions[0], np.zeros((5, 32, 32, 3), np.uint8), torch.rand(3, 2, 4, 4))
    whole = caption_losses(model, [clip], captions, [0.3, 0.9], 2, 7, 10**6)
    pieces = caption_losses(model, [clip], captions, [0.3, 0.9], 2, 7, 100)  # three clips of 32 tokens a pack
    assert whole.shape == (1, 8, 2) and np.allclose(whole, pieces, rtol=1e-6)
    assert not np.allclose(whole, caption_losses(model, [clip], captions, [0.3, 0.9], 2, 8, 10**6))
    model.transformer.clip_of = lambda c, n: fit(tokens[0], n)
    ignorant = caption_losses(model, [clip], captions, [0.5], 3, 7, 100)
    assert np.ptp(ignorant) <= 1e-12 * ignorant.max()


@pytest.mark.parametrize(
    "settings", [{"level_condition": "size"}, {"in_channels": 4, "image_channels": 1}, {"rope_fps": 8.0}]
)
def test_weights_that_take_more_than_text_are_given_it(settings):
    """Sizes (PixArt), the mask of known frames (Cosmos-Predict2), the frames a second."""
    names = {"dim": 24, "heads": 2, "layers": 1, "ffn_dim": 32, "in_channels": 3, "out_channels": 3, "text_dim": 1}
    torch.manual_seed(0)
    model = STDiT(TransformerConfig(**names | settings, text_padding=0, patch=(1, 1, 1)))
    torch.nn.init.normal_(model.head.head.weight)
    captions = ["one", "two"]
    folder = FolderSettings(fps=8, shapes=("32x32x5",), text_padding=0)
    pipe = Pipeline(model, Blocks(), Words(captions), unipc_config(), folder)  # type: ignore[arg-type]
    clip = CaptionedClip("a", "a.mp4", "one", np.zeros((5, 32, 32, 3), np.uint8), torch.zeros(3, 2, 4, 4))
    losses = caption_losses(pipe, [clip], captions, [0.3, 0.7], 1, 0, 1000)
    assert losses.shape == (1, 2, 2) and np.isfinite(losses).all()


def test_weights_that_begin_with_a_picture_are_refused_by_name():
    names = {"dim": 24, "heads": 2, "layers": 1, "ffn_dim": 32, "in_channels": 10, "out_channels": 3, "text_dim": 1}
    model = STDiT(TransformerConfig(**names, image_channels=7, text_padding=0, patch=(1, 1, 1)))
    pipe = Pipeline(model, Blocks(), Words(["one"]), unipc_config())  # type: ignore[arg-type]
    with pytest.raises(StditError, match="these weights take a first image"):
        caption_losses(pipe, [], ["one"], [0.5], 1, 0, 1000)


def test_distances_are_over_common_frames_and_equal_sizes():
    black, white = np.zeros((5, 8, 16, 3), np.uint8), np.full((9, 8, 16, 3), 255, np.uint8)
    mixed = np.concatenate([black, white[:4]])
    found = clip_distances([black, white], [black, white, mixed, np.zeros((5, 16, 8, 3), np.uint8)])
    assert np.allclose(found[:, :3], [[0, 1, 0], [1, 0, 5 / 9]]) and np.isinf(found[:, 3]).all()


def test_groups_are_what_the_pattern_captures():
    texts = ["A person in a hat signs no.", "A person in a hat signs yes.", "A dog."]
    assert group_captions(texts, GROUP) == ["a hat", "a hat", None]
    assert group_captions(texts, None) == [None] * 3
    for pattern, message in (("(", "not a regular expression"), ("hat", "0 .groups."), ("(cat)", "matches none")):
        with pytest.raises(StditError, match=message):
            group_captions(texts, pattern)


def test_what_cannot_be_compared_is_refused(data, tmp_path):
    captions, tokens = known_tokens(data)
    model = pipeline(captions, lambda c, n: fit(tokens[c], n))
    with pytest.raises(StditError, match="at least 2"):
        evaluate_captions(model, data, tmp_path, limit=1)
    with pytest.raises(StditError, match=r"data\.fps is 4.*trained at 8"):
        evaluate_captions(model, DataConfig(data.manifest, data.shapes, fps=4), tmp_path)
    with pytest.raises(StditError, match="no clip has a caption and fits"):
        evaluate_captions(model, DataConfig(data.manifest, ["64x64x5"], fps=8), tmp_path)
    broken = pipeline(captions, lambda c, n: torch.full((n, 3), torch.nan))
    with pytest.raises(StditError, match="not finite"):
        evaluate_captions(broken, data, tmp_path)
    assert not Path(tmp_path / "evaluation-captions.json").exists()
