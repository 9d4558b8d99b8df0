"""Parts: which one a process is, what it has to do, and that none is forgotten when they are merged."""

from __future__ import annotations

import json
import re

import pytest

from stdit.data.parts import WHOLE, Part, PartRecord, choose_part, clear_parts, finish, finished_parts, unfinish
from stdit.errors import StditError

TORCHRUN = {"RANK": "2", "WORLD_SIZE": "8"}


def slurm(task, first, last, count, **more):
    names = {"ID": task, "MIN": first, "MAX": last, "COUNT": count} | more
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


@pytest.mark.parametrize(
    ("given", "environ", "number", "of", "by"),
    [
        (None, {}, 1, 1, ""),
        (None, {"RANK": "0", "WORLD_SIZE": "1"}, 1, 1, ""),
        ("2/5", {}, 2, 5, "--part"),
        (" 2/5 ", TORCHRUN, 2, 5, "--part"),
        ("1/1", slurm(3, 3, 3, 1), 1, 1, "--part"),
        (None, TORCHRUN, 3, 8, "RANK"),
        (None, slurm(0, 0, 3, 4), 1, 4, "SLURM_ARRAY_TASK_ID"),
        (None, slurm(4, 1, 4, 4), 4, 4, "SLURM_ARRAY_TASK_ID"),
        (None, slurm(7, 1, 7, 4, STEP=2), 4, 4, "SLURM_ARRAY_TASK_ID"),
        (None, slurm(3, 1, 4, 4) | {"SLURM_PROCID": "0", "SLURM_NTASKS": "64"}, 3, 4, "SLURM_ARRAY_TASK_ID"),
        (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "64"}, 1, 1, ""),  # of a script that srun did not start
    ],
)
def test_the_option_counts_then_the_launcher(given, environ, number, of, by):
    part = choose_part(given, environ)
    assert (part.number, part.of) == (number, of) and by in part.chosen_by and bool(by) == bool(part.chosen_by)


@pytest.mark.parametrize("given", ["0/3", "4/3", "1", "1/0", "a/b", "1/3/5", "-1/3", "1/1000000", "", "²/3"])
def test_a_part_that_cannot_be_is_refused(given):
    with pytest.raises(StditError, match=r"--part .*it must be I/N"):
        choose_part(given, {})


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        (slurm(3, 3, 3, 1), "has one task, 3. .*--part .SLURM_ARRAY_TASK_ID/N"),
        (slurm(5, 2, 5, 2), "2 tasks between 2 and 5"),
        (TORCHRUN | slurm(1, 1, 4, 4), "rank 2 of torchrun within task 1"),
    ],
)
def test_where_the_launcher_leaves_it_open_the_part_must_be_named(environ, says):
    """A Slurm array of the tasks that failed has another number of tasks: guessing would do the wrong part."""
    with pytest.raises(StditError, match=says):
        choose_part(None, environ)


def test_each_name_and_place_is_one_parts():
    names = [f"folder/{n}.mp4" for n in range(3000)] + ["\udcff.mp4"]
    for of in (1, 2, 7):
        parts = [Part(number, of) for number in range(1, of + 1)]
        assert all(sum(part.has_name(name) for part in parts) == 1 for name in names)
        assert all(sum(part.has_place(place) for part in parts) == 1 for place in range(50))
        shares = [sum(map(part.has_name, names)) for part in parts]
        assert min(shares) > 0.8 * len(names) / of  # six standard deviations
    assert [n for n in range(9) if Part(2, 3).has_place(n)] == [1, 4, 7]
    assert WHOLE.is_whole and Part(1, 1).is_whole and not Part(1, 2).is_whole


def record(number, of=3, kind="scan", **settings):
    command = ["stdit", "data", "scan", "my videos", "--out", "m.parquet"]
    return PartRecord(Part(number, of), kind, command, {"folder": "my videos", **settings}, ("folder",), {"n": number})


@pytest.mark.parametrize("cache", [False, True], ids=["a manifest", "a cache"])
def test_a_missing_part_is_named_with_its_command(tmp_path, cache):
    out = str(tmp_path / ("cache" if cache else "m.parquet"))
    with pytest.raises(StditError, match="no part has finished"):
        finished_parts(out)
    for number in (1, 3):
        finish(out, record(number))
    with pytest.raises(StditError) as error:
        finished_parts(out)
    wanted = f"{out}: part 2/3 has not finished. Run:\n  stdit data scan 'my videos' --out m.parquet --part 2/3"
    assert str(error.value) == wanted
    finish(out, record(2))
    found = finished_parts(out)
    assert [(one.part.number, one.part.of, one.found) for one in found] == [(n, 3, {"n": n}) for n in (1, 2, 3)]
    unfinish(out, Part(1, 3), "scan")  # it runs again
    with pytest.raises(StditError, match=r"part 1/3 has not finished"):
        finished_parts(out)
    finish(out, record(1))
    clear_parts(out, finished_parts(out))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_parts_beside_other_outputs_are_theirs(tmp_path):
    finish(str(tmp_path / "a.parquet"), record(1, of=1))
    finish(str(tmp_path / "a.b.parquet"), record(1, of=2))
    finish(str(tmp_path / "a.b.parquet"), record(2, of=2))
    assert len(finished_parts(str(tmp_path / "a.parquet"))) == 1
    assert len(finished_parts(str(tmp_path / "a.b.parquet"))) == 2


def test_parts_that_do_not_belong_together_are_not_merged(tmp_path):
    out = str(tmp_path / "m.parquet")
    finish(out, record(1, of=2, scenes=False))
    finish(out, record(2, of=2, scenes=True))
    with pytest.raises(StditError, match=r"part 2/2 was made with scenes True, part 1/2 with False.*\n.*--part 2/2"):
        finished_parts(out)
    finish(out, record(1, of=3))
    with pytest.raises(StditError, match=r"parts of different runs. Remove .*m\.part-1-of-2\.scan\.json"):
        finished_parts(out)


def test_a_damaged_record_is_named(tmp_path):
    out = str(tmp_path / "m.parquet")
    (tmp_path / "m.part-1-of-1.scan.json").write_text('{"settings"')
    with pytest.raises(StditError, match=r"part-1-of-1\.scan\.json is damaged.*run part 1/1 again"):
        finished_parts(out)


def test_paths_are_found_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    finish(str(tmp_path / "m.parquet"), record(1, of=1))
    assert finished_parts("../m.parquet")[0].settings["folder"] == "my videos"
    monkeypatch.chdir(tmp_path)
    assert finished_parts("m.parquet")[0].settings["folder"] == str(tmp_path / "here" / "my videos")
    content = json.loads((tmp_path / "m.part-1-of-1.scan.json").read_text())
    assert content["format"] == 1 and re.fullmatch(".*/here", content["folder"])
