"""Several manifests as one data set: the same as one manifest of all their rows."""

from __future__ import annotations

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from stdit.data.config import DataConfig, PlanConfig
from stdit.data.manifest import Caption, Clip, Manifest, clip_id, read_manifest, write_manifest
from stdit.data.manifests import manifest_paths, read_manifests
from stdit.data.plan.buckets import assign
from stdit.data.plan.filters import source_weights
from stdit.data.plan.planner import Plan
from stdit.errors import StditError


def clip(number, path=None, caption=None):
    sha256 = f"{number:064x}"
    captions = (Caption(caption or f"clip {number}"),)
    path = path or f"/videos/{number}.mp4"
    return Clip(clip_id(sha256, 0, 2), path, captions, 20 + number, 10.0, 64, 48, 0.0, 2.0, sha256)


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Manifests a and b in folders of their own, and one of all their rows."""
    monkeypatch.chdir(tmp_path)
    for name, rows in (("a", range(3)), ("b", range(3, 8)), ("all", range(8))):
        write_manifest(Manifest.of([clip(n) for n in rows]), f"{name}/m.parquet")
    return ["a/m.parquet", "b/m.parquet"]


def test_several_are_one(sets):
    found, wanted = read_manifests(sets), read_manifest("all/m.parquet")
    assert list(found) == list(wanted) and found.hash == wanted.hash
    assert found.source == "a/m.parquet b/m.parquet"
    assert read_manifests(sets[0]).hash == read_manifests([sets[0]]).hash == read_manifest(sets[0]).hash
    assert read_manifests(sets[::-1]).hash != found.hash  # the order counts


def test_the_plan_is_that_of_all(sets):
    config = DataConfig(shapes=["64x48x9"], fps=8.0)

    def plan(manifest):
        bucket = assign(manifest, config).bucket
        return Plan(bucket, [10], (1, 0), PlanConfig(largest_clips_per_step=3.0), 0, source=manifest.hash)

    joined, whole, part = (plan(read_manifests(m)) for m in (sets, "all/m.parquet", sets[0]))
    assert joined.hash == whole.hash != part.hash
    assert [joined.step(i) for i in range(joined.num_steps)] == [whole.step(i) for i in range(whole.num_steps)]


def test_patterns_are_sorted_and_a_file_counts_once(sets, tmp_path):
    assert manifest_paths("[ab]/*.parquet") == manifest_paths([*sets, "a/*.parquet"]) == sets
    assert manifest_paths(str(tmp_path / "?" / "m.parquet")) == [str(tmp_path / place) for place in sets]
    write_manifest(Manifest.of([clip(9)]), "odd[1].parquet")
    assert manifest_paths("odd[1].parquet") == ["odd[1].parquet"]  # a file that has such a name
    with pytest.raises(StditError, match=r"c/\*\.parquet: no manifest matches"):
        read_manifests([sets[0], "c/*.parquet"])
    with pytest.raises(StditError, match=r"gone\.parquet: no such manifest"):
        read_manifests([sets[0], "gone.parquet"])


def test_patterns_of_a_url(sets):
    for name in ("m1.parquet", "m2.parquet", "other.txt"):
        fsspec.filesystem("memory").pipe_file(f"/sets/{name}", b"")
    assert manifest_paths("memory://sets/m*.parquet") == ["memory://sets/m1.parquet", "memory://sets/m2.parquet"]
    assert manifest_paths("https://host/m.parquet?download=1") == ["https://host/m.parquet?download=1"]


def test_a_clip_of_two_counts_once_as_the_first_has_it(sets, caplog):
    write_manifest(Manifest.of([clip(2, "/elsewhere/2.mp4", "another caption"), clip(9)]), "c/m.parquet")
    found = read_manifests([*sets, "c/m.parquet"])
    assert [one.captions[0].text for one in found] == [f"clip {n}" for n in (*range(8), 9)]
    assert found[2].path == "/videos/2.mp4"
    assert "1 clips are in several of a/m.parquet b/m.parquet c/m.parquet" in caplog.text


def test_relative_paths_stay_with_their_manifest_and_sources_see_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, number in (("a", 1), ("b", 2)):
        path = str(tmp_path / name / "talks" / f"{number}.mp4")
        write_manifest(Manifest.of([clip(number, path)]), f"{name}/m.parquet")
    assert read_manifest("a/m.parquet").table.column("path").to_pylist() == ["talks/1.mp4"]
    found = read_manifests(["a/m.parquet", str(tmp_path / "b" / "m.parquet")])
    assert [one.path for one in found] == ["./a/talks/1.mp4", f"{tmp_path}/b/talks/2.mp4"]
    weights = source_weights(found, {"a/*": 3.0, "*/b/*": 0.5})
    assert weights.tolist() == [3.0, 0.5]
    write_manifest(found, "both.parquet")  # as any other
    assert [one.path for one in read_manifest("both.parquet")] == ["./a/talks/1.mp4", "./b/talks/2.mp4"]


def test_columns_that_only_some_have_are_empty_in_the_others(sets):
    table = read_manifest(sets[0]).table
    scored = Manifest(table.append_column("motion", pa.array(np.arange(3.0))), "a")
    write_manifest(scored, "scored.parquet")
    found = read_manifests(["scored.parquet", sets[1]])
    assert found.table.column("motion").to_pylist() == [0.0, 1.0, 2.0, *[None] * 5]
    with pytest.raises(StditError, match="row 3 has no motion"):
        assign(found, DataConfig(shapes=["64x48x9"], fps=8.0, filter={"motion": (1.0, None)}))
    other = Manifest(read_manifest(sets[1]).table.append_column("motion", pa.array(["fast"] * 5)), "b")
    write_manifest(other, "other.parquet")
    with pytest.raises(StditError, match="a column of one name has several types"):
        read_manifests(["scored.parquet", "other.parquet"])
