from __future__ import annotations

import json
from pathlib import Path

import pytest
from sample_runs import run

from stdit.cli.common.lazy import as_command
from stdit.cli.sample.command import sample
from stdit.cli.sample.rows import settings_of
from stdit.data.decode.video import probe
from stdit.errors import StditError


def rows(file: Path, *options: str):
    words = ["--model", ".", "--out", str(file.parent / "out"), "--prompts", str(file), *options]
    return settings_of(file, as_command(sample).make_context("sample", words))


def test_a_line_of_prompts_ends_at_a_line_feed_and_odd_ones_are_named(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red\u2028circle\r\na\x0cblue square\n".encode())
    assert [row.prompt for row in rows(file)] == ["a red\u2028circle", "a\x0cblue square"]
    for content, says in [(b"ok\ncaf\xe9\n", "line 2 is not UTF-8"), (b"a\0b\n", "NUL"), (b"a\rb\r", "CR alone")]:
        file.write_bytes(content)
        with pytest.raises(StditError, match=rf"prompts\.txt.*{says}"):
            rows(file)


def test_a_row_counts_instead_of_the_command(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "duration": "2s", "seed": 7}\n\n{"prompt": "b", "aspect": "1:1", "steps": null}\n')
    one, two = rows(file, "--frames", "5", "--size", "48x32", "--steps", "3")
    assert (one.duration, one.frames, one.size, one.seed, one.steps) == ("2s", None, "48x32", 7, 3)
    assert (two.aspect, two.size, two.frames, two.seed, two.steps) == ("1:1", None, 5, 0, 3)
    table = tmp_path / "a.csv"
    table.write_text('prompt,duration,seed,aspect\na,2s,7,\n"b",,,1:1\n')
    for mine, theirs in zip(rows(table, "--frames", "5", "--size", "48x32", "--steps", "3"), (one, two), strict=True):
        assert {**vars(mine), "where": ""} == {**vars(theirs), "where": ""}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "fsp": 8}, "'fsp' is no setting; fps is"),
        ({"prompt": "a", "lora": "x"}, "--lora is for the whole command"),
        ({"prompt": "a", "steps": 0}, "--steps 0: 0 is not from 1 to 1000"),
        ({"prompt": "a", "guidance": float("nan")}, "--guidance nan"),
        ({"prompt": "a", "seed": "x"}, "--seed 'x'"),
        ({"prompt": "a", "frames": True}, "write a text or a number"),
        ({"prompt": "a", "size": "wide"}, "'wide': write WIDTHxHEIGHT"),
        ({"prompt": "a", "frames": 5, "duration": "1s"}, "give one"),
        ({"prompt": "a", "image": "nowhere.png"}, "nowhere.png is not a file"),
        ({"prompt": "a\udcffb"}, "is not UTF-8"),
        ({"prompt": " "}, "no prompt"),
        ({"seed": 1}, "no prompt"),
        ([1], "not an object"),
    ],
)
def test_a_bad_row_is_named_with_file_line_value_and_remedy(tmp_path, row, message):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "good"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(StditError) as error:
        rows(file)
    assert f"{file}, line 2" in str(error.value) and message in str(error.value)


def test_rows_of_other_shapes_are_made_in_one_call(folder, tmp_path, capsys):
    file = tmp_path / "a.csv"
    file.write_text("prompt,size,frames\na red circle,32x32,5\na blue square,48x32,9\na circle,16x16,1\n")
    assert run(folder, tmp_path / "out", "--prompts", file, "--json") == 0
    clips = json.loads(capsys.readouterr().out)["clips"]
    found = [probe(clip["video"]) for clip in clips[:2]]
    assert [(one.width, one.height, one.frames) for one in found] == [(32, 32, 5), (48, 32, 9)]
    assert clips[2]["video"] is None
    file.write_text("prompt,size,frames\na red circle,32x32,5\na blue square,48x32,8\n")
    assert run(folder, tmp_path / "none", "--prompts", file) == 1
    assert f"{file}, line 3: " in capsys.readouterr().err and not list((tmp_path / "none").glob("*.mp4"))


def test_parts_make_all_clips_between_them(folder, tmp_path, monkeypatch, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue square\na circle\n")
    assert run(folder, tmp_path / "whole", "--prompts", file, "--frames", 5) == 0
    assert run(folder, tmp_path / "parts", "--prompts", file, "--frames", 5, "--part", "2/2") == 0
    assert "1 of 3 clips" in capsys.readouterr().err and len([*(tmp_path / "parts").glob("*.mp4")]) == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(folder, tmp_path / "parts", "--prompts", file, "--frames", 5) == 0
    assert "chosen by torchrun's RANK" in capsys.readouterr().err
    names = [{path.name for path in (tmp_path / place).iterdir()} for place in ("whole", "parts")]
    assert names[0] == names[1]
    monkeypatch.setenv("RANK", "1")
    assert run(folder, tmp_path / "none", "--prompt", "a red circle") == 0 and not (tmp_path / "none").exists()
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    for name, value in (("ID", 2), ("MIN", 1), ("MAX", 2), ("COUNT", 2)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert run(folder, tmp_path / "own", "--prompt", "a red circle", "--frames", 5) == 0  # not a part of anything
    assert len([*(tmp_path / "own").glob("*.mp4")]) == 1
    assert run(folder, tmp_path / "array", "--prompts", file, "--frames", 5) == 0
    assert [path.name[:3] for path in (tmp_path / "array").glob("*.mp4")] == ["001"]


def test_rows_with_and_without_a_setting_have_what_they_share_in_common(folder, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    rows = [{"prompt": "a red circle", "levels": "1,0.5", "solver": "euler", "apg": "0"}, {"prompt": "a blue square"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert run(folder, tmp_path / "out", "--prompts", file, "--frames", 5, "--json") == 0
    shared = json.loads(capsys.readouterr().out)["settings"]
    assert shared["frames"] == 5 and not {"levels", "apg", "solver"} & shared.keys()


def test_what_filters_refuse_is_not_made(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "words.txt").write_text("square\n")
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue square\n")
    words = ["--prompts", file, "--frames", 5]
    assert run(folder, tmp_path / "out", *words, "--prompt-filter", tmp_path / "words.txt") == 1
    said = capsys.readouterr().err
    assert f"{file}, line 2: the prompt 'a blue square' is refused: {tmp_path / 'words.txt'} does not" in said
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "second_only.py").write_text(
        "seen = []\n\ndef refuse(frames):\n    seen.append(len(frames))\n    return sum(seen) > 5 and 'enough'\n"
    )
    assert run(folder, tmp_path / "out", *words, "--frame-filter", "second_only:refuse") == 1
    assert "its frames are refused: enough" in capsys.readouterr().err
    (video,) = (tmp_path / "out").glob("*.mp4")
    assert video.name.startswith("000-a-red-circle")
