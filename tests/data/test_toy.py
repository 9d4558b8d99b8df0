"""The toy grammar and its files: what is held out, where the shapes are, what survives an interruption."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter

import numpy as np
import pytest

from stdit.data import toy
from stdit.data.decode.video import probe, read_frames
from stdit.data.toy import (
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    SHAPES,
    SIZES,
    Jitter,
    ToySettings,
    ToySpec,
    all_specs,
    held_out_prompts,
    make_toy,
    render,
    still_specs,
    toy_file,
)
from stdit.errors import StditError

FEW = ToySettings(clips=5, held_out=2, scales=(1.0,), seconds=(1.25,), fps=(16,), image_share=0.3)


def test_only_triples_are_held_out_every_pair_stays_frequent():
    everything = set(itertools.product(COLOURS, SHAPES, DIRECTIONS))
    assert everything > HELD_OUT and len(HELD_OUT) == 12
    trained = everything - HELD_OUT
    for first, second in itertools.combinations(range(3), 2):
        pairs = Counter((triple[first], triple[second]) for triple in everything)
        kept = Counter((triple[first], triple[second]) for triple in trained)
        assert all(kept[pair] >= pairs[pair] / 2 for pair in pairs)
    for position in range(3):  # each value is left out equally often
        assert len(set(Counter(triple[position] for triple in HELD_OUT).values())) == 1


def test_training_files_never_show_a_held_out_combination():
    settings = ToySettings()
    trained = [toy_file(settings, "train", i).spec for i in range(1500)]
    assert not any(spec.held_out for spec in trained)
    assert {spec for spec in trained if spec.direction != "none"} == set(all_specs(held_out=False))  # all are dealt
    assert 0.07 < sum(spec.direction == "none" for spec in trained) / 1500 < 0.13
    assert all(toy_file(settings, "held_out", i).spec.held_out for i in range(200))


def test_held_out_prompts_are_distinct_and_never_trained():
    prompts = held_out_prompts(64)
    assert len(set(prompts)) == 64 and not set(prompts) & {s.caption for s in all_specs(held_out=False)}
    assert prompts == held_out_prompts(64) != held_out_prompts(64, seed=1)
    with pytest.raises(StditError, match="1 to 72"):
        held_out_prompts(73)


def test_captions_parse_back_to_their_specs():
    for spec in (*all_specs(True), *all_specs(False), *still_specs()):
        assert ToySpec.parse(spec.caption) == spec


@pytest.mark.parametrize(
    "caption, said",
    [
        ("a large red circle moving left", "not a caption"),
        ("a large rde circle moving left on a black background", "no colour 'rde'. Did you mean 'red'"),
        ("a large red circle moving sideways on a black background", "no direction 'sideways'"),
    ],
)
def test_what_is_not_a_caption_is_named(caption, said):
    with pytest.raises(StditError, match=said):
        ToySpec.parse(caption)


@pytest.mark.parametrize("shape, share", [("circle", np.pi / 4), ("square", 1.0), ("triangle", 0.5)])
@pytest.mark.parametrize("size", SIZES)
def test_shapes_have_the_area_of_their_formula(shape, share, size):
    red, blue = (
        render(ToySpec(colour, shape, size, "none", "black"), 200, 120, 1)[0, ..., 0].astype(float)
        for colour in ("red", "blue")
    )
    coverage = (red - blue) / (COLOURS["red"][0] - COLOURS["blue"][0])
    width = SIZES[size] * np.sqrt(200 * 120)
    assert coverage.sum() == pytest.approx(share * width**2, rel=0.02)  # soft corners


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("frames", [5, 9, 17])
def test_a_shape_crosses_the_frame_once_at_any_duration(direction, frames):
    clip = render(ToySpec("red", "square", "small", direction, "black"), 96, 64, frames).astype(float)
    x_step, y_step = DIRECTIONS[direction]
    bright = clip[..., 0] > 120
    x = [np.mean(np.nonzero(frame)[1] + 0.5) / 96 for frame in bright]
    y = [np.mean(np.nonzero(frame)[0] + 0.5) / 64 for frame in bright]
    along, across, step = (x, y, x_step) if x_step else (y, x, y_step)
    assert np.allclose(across, 0.5, atol=0.01)
    assert np.all(np.diff(along) * step > 0)
    assert abs(along[-1] - along[0]) > 0.55  # of the frame: several tokens of 16 pixels
    cut = bright[:, [0, -1]].any((1, 2)) | bright[:, :, [0, -1]].any((1, 2))  # by the frame, and with it the mean
    assert cut[[0, -1]].all() and cut.sum() < frames / 2
    whole = np.array(along)[~cut]
    assert np.allclose(np.diff(whole), 0.7 * step / (frames - 1), atol=0.02)


def test_make_toy_writes_what_it_says(tmp_path):
    counts = make_toy(tmp_path / "toy", FEW)
    assert counts == {"train": 5, "held_out": 2, "rendered": 7}
    assert json.loads((tmp_path / "toy/toy.json").read_text())["complete"]
    for part, count in (("train", 5), ("held_out", 2)):
        with (tmp_path / "toy" / part / "captions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == count == len(list((tmp_path / "toy" / part).glob("clip-*")))
        for index, row in enumerate(rows):
            wanted = toy_file(FEW, part, index)
            found = probe(str(tmp_path / "toy" / part / row["path"]))
            assert row["caption"] == wanted.spec.caption
            assert (found.width, found.height, found.frames) == (wanted.width, wanted.height, wanted.frames)
            if wanted.frames > 1:
                assert found.codec == "h264" and found.fps == pytest.approx(16)
                frames = read_frames(str(tmp_path / "toy" / part / row["path"]), 9, fps=8)
                truth = render(wanted.spec, wanted.width, wanted.height, wanted.frames, wanted.jitter)[0:17:2]
                assert np.abs(frames.astype(int) - truth).mean() < 4
    assert {toy_file(FEW, "train", i).frames for i in range(5)} == {1, 20}  # both kinds were checked


def test_an_interrupted_folder_is_completed_and_a_complete_one_left_alone(tmp_path, monkeypatch):
    make_toy(tmp_path / "whole", FEW)
    write, written = toy._write, []

    def dies(path, file):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        write(path, file)

    monkeypatch.setattr(toy, "_write", dies)
    monkeypatch.setattr(toy.os, "cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        make_toy(tmp_path / "broken", FEW)
    monkeypatch.setattr(toy, "_write", write)
    assert not json.loads((tmp_path / "broken/toy.json").read_text())["complete"]
    assert make_toy(tmp_path / "broken", FEW)["rendered"] == 4
    assert make_toy(tmp_path / "broken", FEW)["rendered"] == 0
    assert _contents(tmp_path / "broken") == _contents(tmp_path / "whole")


def test_a_folder_grows_but_is_never_taken_for_another(tmp_path):
    few = ToySettings(**{**FEW.__dict__, "clips": 2})
    make_toy(tmp_path / "toy", few)
    assert make_toy(tmp_path / "toy", FEW)["rendered"] == 3
    make_toy(tmp_path / "whole", FEW)
    assert _contents(tmp_path / "toy") == _contents(tmp_path / "whole")
    with pytest.raises(StditError, match="clips is 5 there, 2 here"):
        make_toy(tmp_path / "toy", few)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(StditError, match="not a toy set"):
        make_toy(tmp_path / "mine", FEW)


def _contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_jitter_is_small_and_keyed():
    first, second = Jitter.keyed(1), Jitter.keyed(2)
    assert first == Jitter.keyed(1) != second
    for jitter in (Jitter.keyed(i) for i in range(100)):
        assert abs(jitter.across) <= 0.1 and max(abs(jitter.start), abs(jitter.end)) <= 0.04
