"""The reader of toy clips is itself checked: on ground truth, on degraded ground truth, on what shows nothing."""

from __future__ import annotations

import numpy as np
import pytest

from stdit.data.decode.video import read_frames
from stdit.data.toy import Jitter, ToySettings, ToySpec, all_specs, render, still_specs, toy_file
from stdit.data.toy import _write as write_file
from stdit.errors import StditError
from stdit.evaluation.harness import shuffle
from stdit.evaluation.metrics import psnr
from stdit.evaluation.toy import NONE, read_clip, score_readings

SHAPES = [(64, 64, 9), (80, 48, 9), (48, 80, 17), (96, 48, 9), (112, 64, 5), (128, 128, 13)]
SPECS = [*all_specs(held_out=True), *all_specs(held_out=False)[::15]]  # 96


def clean(index: int, spec: ToySpec) -> np.ndarray:
    return render(spec, *SHAPES[index % len(SHAPES)], Jitter.keyed(index))


def blur(clip: np.ndarray, sigma: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(clip.astype(float), (0.3, sigma, sigma, 0), mode="nearest").round().astype(np.uint8)


def noise(clip: np.ndarray, db: float) -> np.ndarray:
    drawn = np.random.default_rng(0).normal(0, 255 / 10 ** (db / 20), clip.shape)
    return np.clip(clip + drawn, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def truth():
    return [clean(index, spec) for index, spec in enumerate(SPECS)]


@pytest.mark.parametrize("damage", ["none", "blur", "noise"])
def test_at_least_98_percent_of_every_attribute_is_read(truth, damage):
    clips = truth
    if damage != "none":
        pytest.importorskip("scipy")
        clips = [blur(clip, 3.0) if damage == "blur" else noise(clip, 28) for clip in truth]
        assert np.mean([psnr(clip, one) for clip, one in zip(clips, truth)]) < 30.5
    result = score_readings([spec.caption for spec in SPECS], [*map(read_clip, clips)])
    assert {name: accuracy.share for name, accuracy in result.items() if accuracy.share < 0.98} == {}


def test_shuffled_captions_are_at_chance(truth):
    captions = [spec.caption for spec in SPECS]
    shuffled = shuffle(captions, 0)
    assert sorted(shuffled) == sorted(captions) and all(a != b for a, b in zip(captions, shuffled))
    readings = [read_clip(clip) for clip in truth]
    for name, accuracy in score_readings(shuffled, readings).items():
        assert accuracy.p > 0.001 and accuracy.low <= accuracy.chance + 0.05, name


def test_real_files_are_read_as_training_reads_them(tmp_path):
    """H.264 and back, scaled, cut in time: 9 of the frames from anywhere in the clip still show its direction."""
    settings = ToySettings(seconds=(1.25,), image_share=0)
    prompts, clips = [], []
    for index in range(12):
        file = toy_file(settings, "train", index)
        write_file(tmp_path / file.name, file)
        scale = 64 / np.sqrt(file.width * file.height)
        size = (round(file.width * scale / 16) * 16, round(file.height * scale / 16) * 16)
        prompts.append(file.spec.caption)
        clips.append(read_frames(str(tmp_path / file.name), 9, size, 8.0, start=0.2 * (index % 2)))
    assert all(accuracy.share == 1 for accuracy in score_readings(prompts, [*map(read_clip, clips)]).values())


def test_still_images_have_no_direction():
    specs = still_specs()[::7]
    clips = [render(spec, 64, 64, 1, Jitter.keyed(i)) for i, spec in enumerate(specs)]
    result = score_readings([spec.caption for spec in specs], [*map(read_clip, clips)])
    assert "direction" not in result and all(accuracy.share == 1 for accuracy in result.values())
    assert {read_clip(clip).direction for clip in clips} == {NONE}
    frozen = np.repeat(clips[0], 9, axis=0)
    assert read_clip(frozen).direction == NONE


@pytest.mark.parametrize("kind", ["grey", "black", "noise", "red"])
def test_what_shows_no_shape_is_read_as_none(kind):
    rng = np.random.default_rng(0)
    clip = {
        "grey": np.full((9, 64, 64, 3), 128),
        "black": np.zeros((9, 64, 64, 3)),
        "noise": rng.integers(0, 256, (9, 64, 64, 3)),
        "red": np.full((9, 64, 64, 3), (225, 45, 45)),
    }[kind].astype(np.uint8)
    reading = read_clip(clip)
    assert (reading.shape, reading.size) == (NONE, NONE)


def test_reading_knows_its_mistakes():
    spec = ToySpec("red", "square", "large", "left", "dusk")
    backwards = render(spec, 64, 64, 9)[::-1].copy()
    wrong = [name for name, right in read_clip(backwards).right(spec).items() if not right]
    assert wrong == ["direction"]
    with pytest.raises(StditError, match=r"uint8 \(T, H, W, 3\)"):
        read_clip(backwards / 255)
    with pytest.raises(StditError, match="one clip for each prompt"):
        score_readings([spec.caption], [])
