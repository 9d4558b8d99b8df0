"""The harness on pipelines whose right answers are known: one that obeys, one that always draws the same."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stdit.data.decode.video import read_frames
from stdit.data.toy import Jitter, ToySettings, ToySpec, make_toy, render
from stdit.errors import StditError
from stdit.evaluation.harness import default_shapes, evaluate_toy, reconstruct, shape_kind
from stdit.shapes import VideoShape, check_size


class IdentityVae(torch.nn.Module):
    """A VAE that loses `error` grey levels everywhere: its PSNR is known."""

    def __init__(self, error: float = 0.0) -> None:
        super().__init__()
        self.error = torch.nn.Parameter(torch.tensor(error / 127.5))
        self.config = SimpleNamespace(stride=(4, 8, 8))

    def encode(self, video):
        return video * 0.5  # some other space than pixels

    def decode(self, latents):
        return latents * 2 + self.error


class OraclePipeline:
    """Renders what the prompt says, or always what `stubborn` says."""

    multiple = (16, 16)

    def __init__(self, shapes, stubborn: str | None = None, error: float = 0.0) -> None:
        self.settings = SimpleNamespace(shapes=shapes, fps=8.0)
        self.vae, self.stubborn, self.calls = IdentityVae(error), stubborn, []

    def shape(self, size, frames):
        check_size(*size, self.multiple)

    def __call__(self, prompts, size, frames, steps, guidance, seed, progress, indices):
        assert indices is None  # all prompts at once
        self.calls.append((size, frames, steps, guidance, seed))
        progress(steps, steps)
        return [
            render(ToySpec.parse(self.stubborn or prompt), *size, frames, Jitter.keyed(i))
            for i, prompt in enumerate(prompts)
        ]


SHAPES = ("64x64x9", "80x48x9", "64x64")


def test_an_obedient_model_is_right_everywhere_and_a_stubborn_one_at_chance(tmp_path):
    good = OraclePipeline(SHAPES, error=8.0)
    result = evaluate_toy(good, tmp_path / "good", prompts=6, steps=3, guidance=2.0, seed=5)
    kinds = {one["shape"]: one["kind"] for one in result["sets"]}
    assert kinds == {
        "64x64x9": "trained",
        "80x48x9": "trained",
        "96x48x9": "untrained aspect ratio",
        "64x64x13": "untrained duration",
    }
    assert good.calls[0] == ((64, 64), 9, 3, 2.0, 5) and len(good.calls) == 4
    for one in result["sets"]:
        for source in ("samples", "vae", "rendered"):
            assert all(cell["share"] == 1 for cell in one[source].values())
        # 8 levels off everywhere but where the range ends: 10·log10(255²/8²)
        assert one["vae_psnr"] == pytest.approx(20 * np.log10(255 / 8), abs=0.15)
        assert one["shuffled"]["all"]["share"] < 0.2
        assert (tmp_path / "good" / one["sheet"]).stat().st_size > 1000
    assert result["summary"]["trained"]["samples"]["colour"]["total"] == 12
    assert json.loads((tmp_path / "good/evaluation.json").read_text()) == result
    clip = result["sets"][2]["clips"][3]
    assert read_frames(str(tmp_path / "good" / clip["file"]), 9).shape == (9, 48, 96, 3)
    assert all(clip["right"].values()) and clip["reading"]["colour"] in clip["prompt"]

    stubborn = OraclePipeline(SHAPES, stubborn="a large red circle moving left on a black background")
    result = evaluate_toy(stubborn, tmp_path / "bad", prompts=24, shapes=["64x64x5"])
    assert [one["kind"] for one in result["sets"]] == ["untrained duration"]
    for name, cell in result["sets"][0]["samples"].items():
        assert cell["share"] < 0.7 and cell["p"] > 0.01, name


def test_the_vae_is_measured_on_held_out_files(tmp_path):
    make_toy(tmp_path / "toy", ToySettings(clips=1, held_out=4, seconds=(1.25,)))
    pipeline = OraclePipeline(SHAPES, error=8.0)
    result = evaluate_toy(pipeline, tmp_path, prompts=1, shapes=["64x64x9"], held_out=tmp_path / "toy")
    assert result["vae"]["clips"] == 4 and set(result["vae"]["shapes"]) <= {"64x64x9", "80x48x9"}
    assert result["vae"]["psnr"] == pytest.approx(20 * np.log10(255 / 8), abs=0.2)
    with pytest.raises(StditError, match=r"no captions\.csv"):
        evaluate_toy(pipeline, tmp_path, prompts=1, shapes=["64x64x9"], held_out=tmp_path)


def test_a_shape_that_does_not_fit_is_refused_before_sampling(tmp_path):
    pipeline = OraclePipeline(SHAPES)
    with pytest.raises(StditError, match="multiple of 16"):
        evaluate_toy(pipeline, tmp_path, shapes=["64x64x9", "60x64x9"])
    assert pipeline.calls == []


@pytest.mark.parametrize(
    "trained, extra",
    [
        (["64x64x9"], ["96x48x9", "64x64x13"]),
        (["64x64x9", "64x64x17", "96x48x9", "64x64"], ["48x96x9", "64x64x13"]),
        (["48x80x5", "80x48x5", "64x64x17"], ["96x48x5", "48x80x13"]),
    ],
)
def test_default_shapes_add_what_was_never_trained(trained, extra):
    shapes = [VideoShape.parse(shape) for shape in trained]
    chosen = default_shapes(shapes, (16, 16), 4)
    videos = [shape for shape in shapes if not shape.is_image]
    assert [str(shape) for shape in chosen] == [*map(str, videos), *extra]
    assert [shape_kind(shape, shapes) for shape in chosen[-2:]] == ["untrained aspect ratio", "untrained duration"]
    with pytest.raises(StditError, match="images alone"):
        default_shapes([VideoShape(1, 64, 64)], (16, 16), 4)


def test_reconstruct_keeps_frames_and_their_order():
    clips = [np.random.default_rng(i).integers(0, 256, (5, 16, 32, 3), dtype=np.uint8) for i in range(11)]
    rebuilt = reconstruct(IdentityVae(), clips, batch=4)
    assert all(np.array_equal(one, other) for one, other in zip(clips, rebuilt)) and len(rebuilt) == 11
