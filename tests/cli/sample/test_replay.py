"""A clip again, from the settings beside it."""

from __future__ import annotations

import json
import shutil

import av
import numpy as np
import pytest
from PIL import Image
from sample_runs import PROMPTS, run

from stdit.cli.main import run_command
from stdit.cli.sample.command import sample
from stdit.data.decode.video import probe, read_frames


def replay(*words: object) -> int:
    return run_command(sample, ["--replay", *map(str, words)], prog="sample.py")


@pytest.fixture
def clip(folder, tmp_path):
    """The sidecar of a clip with all kinds of settings."""
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    Image.new("RGB", (48, 32), "red").save(tmp_path / "first.png")
    words = ["--prompt", PROMPTS[0], "--image", tmp_path / "first.png", "--frames", 13, "--seed", 7, "--index", 3]
    words += ["--guidance-interval", "0.1:0.99", "--apg", "0:15:-0.5", "--zero-star", 0, "--skip-layers", "0,0:1"]
    words = [*words[:-2], "--levels", "1,0.8,0.3", "--solver", "euler", "--negative", "a blue circle"]
    assert run(model, tmp_path / "one", *words) == 0
    (sidecar,) = (tmp_path / "one").glob("*.json")
    return sidecar


def test_a_replay_makes_the_same_frames_elsewhere(clip, tmp_path, capsys):
    assert replay(clip) == 0 and "(was there already)" in capsys.readouterr().out
    assert replay(clip, "--out", tmp_path / "two") == 0
    assert (tmp_path / "two" / f"{clip.stem}.mp4").read_bytes() != b""
    one, two = (read_frames(str(folder / f"{clip.stem}.mp4"), 13) for folder in (clip.parent, tmp_path / "two"))
    assert (one == two).all()
    model = json.loads(clip.read_text())["model"]
    shutil.move(model, tmp_path / "moved")
    assert replay(clip, "--out", tmp_path / "three", "--model", tmp_path / "moved") == 0
    assert (tmp_path / "three" / f"{clip.stem}.mp4").is_file()


def test_other_options_count_instead(clip, tmp_path):
    assert replay(clip, "--out", tmp_path / "two", "--size", "32x32", "--duration", "0.6s", "--seed", 8) == 0
    (made,) = (tmp_path / "two").glob("*.json")
    before, after = json.loads(clip.read_text()), json.loads(made.read_text())
    assert {name for name, value in before.items() if after.get(name) != value} == {
        "size", "frames", "seed", "known_hash", "command", "files",
    }  # fmt: skip
    assert (after["size"], after["frames"], after["seed"]) == ("32x32", 5, 8)


def test_files_that_have_changed_are_named(clip, tmp_path, capsys):
    Image.new("RGB", (48, 32), "blue").save(tmp_path / "first.png")
    assert replay(clip, "--out", tmp_path / "two") == 1
    said = capsys.readouterr().err
    assert str(tmp_path / "first.png") in said and "known_hash" in said and str(clip) in said
    assert replay(clip, "--out", tmp_path / "two", "--image", tmp_path / "first.png") == 0


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"command": 3}', '{"command": "rm -rf x"}', '{"command": "stdit sample \'"}']
)
def test_what_is_no_sidecar_is_named(content, tmp_path, capsys):
    (tmp_path / "a.json").write_text(content)
    assert replay(tmp_path / "a.json") == 1
    assert f"{tmp_path / 'a.json'}: it has no command of stdit sample" in capsys.readouterr().err
    assert replay(tmp_path / "b.json") == 1 and "No such file" in capsys.readouterr().err


def test_a_video_changed_keeps_its_shape_and_is_recorded(folder, tmp_path, capsys):
    from stdit.data.decode.write import write_video

    video = np.random.default_rng(0).integers(0, 256, (11, 40, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "old.mp4", video, 8)
    words = ["--prompt", PROMPTS[0], "--init", tmp_path / "old.mp4", "--strength", 0.5, "--resolution", 32]
    assert run(folder, tmp_path / "one", *words) == 0
    assert "40x32, 9 frames at 8 fps" in capsys.readouterr().out  # of 11
    (sidecar,) = (tmp_path / "one").glob("*.json")
    settings = json.loads(sidecar.read_text())
    assert settings["init"] == str(tmp_path / "old.mp4") and settings["strength"] == 0.5 and settings["known_hash"]
    assert replay(sidecar, "--out", tmp_path / "two") == 0
    assert (tmp_path / "two" / sidecar.name).is_file()
    write_video(tmp_path / "old.mp4", 255 - video, 8)
    assert replay(sidecar, "--out", tmp_path / "three") == 1 and "old.mp4" in capsys.readouterr().err


def comment_of(video):
    if video.suffix == ".gif":
        return Image.open(video).info["comment"].decode()
    with av.open(str(video)) as container:
        return next(value for name, value in container.metadata.items() if name.lower() == "comment")


@pytest.mark.parametrize("format", ["mp4", "webm", "gif", "png"])
def test_formats_and_their_comment(format, folder, tmp_path, capsys):
    words = ["--prompt", PROMPTS[1], "--frames", 5, "--fps", 8, "--json"]
    assert run(folder, tmp_path / "plain", *words) == 0
    assert run(folder, tmp_path / "out", *words, "--format", format) == 0
    (sidecar,) = (tmp_path / "out").glob("*.json")
    assert sidecar.name in {path.name for path in (tmp_path / "plain").glob("*.json")}  # the same clip
    settings = json.loads(sidecar.read_text())
    assert settings["format"] == format
    (video,) = (path for path in (tmp_path / "out").iterdir() if path.suffix == f".{format}" * (format != "png"))
    plain = read_frames(str(tmp_path / "plain" / f"{sidecar.stem}.mp4"), 5).astype(int)
    if format == "png":
        pictures = [Image.open(path) for path in sorted(video.iterdir())]
        frames, about = np.stack([np.asarray(one) for one in pictures]).astype(int), pictures[0].text["Comment"]
        assert [path.name for path in sorted(video.iterdir())] == [f"{number:05d}.png" for number in range(5)]
    else:
        found = probe(str(video))
        assert (found.frames, round(found.fps, 1), found.width) == (5, 8.0 if format != "gif" else 8.3, 48)
        frames = read_frames(str(video), 5).astype(int)
        about = comment_of(video)
    assert np.abs(frames - plain).mean() < 12
    told = json.loads(about)
    assert told["made_by"] == "stdit" and told["model_hash"] == settings["model_hash"] and told["prompt"] == PROMPTS[1]
    capsys.readouterr()
    assert run(folder, tmp_path / "out", *words, "--format", format) == 0
    assert json.loads(capsys.readouterr().out)["clips"][0]["made"] is False
    first = min(video.iterdir()) if format == "png" else video
    first.write_bytes(first.read_bytes()[:-1])
    assert run(folder, tmp_path / "out", *words, "--format", format) == 0  # made again
    assert json.loads(capsys.readouterr().out)["clips"][0]["made"] is True
