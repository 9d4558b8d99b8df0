"""The index of a cache: the same answers merged and not, by the documented hash; what changes later is seen."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from stdit.data.config import DataConfig
from stdit.data.load import index as index_module
from stdit.data.load.cache import Cache, latent_key, latent_settings
from stdit.data.load.index import ClipIds, hash_keys
from stdit.errors import StditError
from stdit.shapes import VideoShape

SETTINGS = latent_settings(DataConfig(fps=8.0), "vae")
SHAPES = [VideoShape(5, 8, 8), VideoShape(1, 16, 8)]
ODD = ["clip-1", "é" * 40, "a/b", "0" * 63, "0" * 65, "G" * 64, "A" * 64]  # ids of other programs


def sha(number):
    return hashlib.sha256(b"%d" % number).hexdigest()


def by_hand(key):
    """The documented hash, in plain Python."""

    def first(text):
        return int(hashlib.sha256(text.encode()).hexdigest()[:32], 16)

    name, slash, rest = key.partition("/")
    if len(name) == 64 and set(name) <= set("0123456789abcdef"):
        return int(name[:32], 16) ^ (first(rest) if slash else 0)
    return first(key)


def numbers(hashes):
    return [int(high) << 64 | int(low) for high, low in zip(*hashes)]


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_hashes_are_the_documented_ones(monkeypatch, block):
    monkeypatch.setattr(index_module, "_BLOCK", block)
    ids = [sha(n) for n in range(20)] + ODD
    keys = [*ids, "", *(latent_key(name, shape, cut) for name in ids for shape in SHAPES for cut in (None, 0, 12))]
    for column in (keys, pa.array(keys), pa.chunked_array([keys[:3], keys[3:]], pa.large_string())):
        assert numbers(hash_keys(column)) == list(map(by_hand, keys))
    rows = np.arange(len(ids))[::-1]
    found = ClipIds(pa.chunked_array([ids])).keys(rows, "16x8x1/3")
    assert numbers(found) == [by_hand(f"{ids[row]}/16x8x1/3") for row in rows]
    assert [len(part) for part in hash_keys([])] == [0, 0]


def fill(cache, first, shards, keys_each=5):
    """Writes shards of numbered tensors; every seventh is a failure. Returns what each key has."""
    wanted = {}
    for shard in range(first, first + shards):
        tensors, failures = {}, {}
        for number in range(shard * keys_each, (shard + 1) * keys_each):
            key = latent_key(ODD[number] if number < len(ODD) else sha(number), SHAPES[number % 2])
            if number % 7:
                tensors[key], wanted[key] = torch.tensor(float(number)), float(number)
            else:
                failures[key] = wanted[key] = f"failure {number}"
        cache.write_shard(f"s{shard}", tensors, failures)
    return wanted


def read(cache, keys):
    keys = list(keys)
    positions = cache.find(keys)
    assert positions.tolist() == [cache.position(key) for key in keys]
    assert [cache.key(position) for position in positions] == keys
    return {key: cache.failure(at) or cache.tensor(at).item() for key, at in zip(keys, positions)}


def test_merged_or_not_the_answers_are_the_same(tmp_path):
    cache = Cache.create(tmp_path, SETTINGS)
    wanted = fill(cache, 0, 6)
    apart = Cache.open(tmp_path, SETTINGS)
    assert read(apart, wanted) == wanted and apart.unmerged == 6
    apart.write_index()
    index = Path(cache.folder, "index.arrow")
    content = index.read_bytes()
    for part in Path(cache.folder).glob("*.parquet"):
        part.write_bytes(b"is not read any more")
    merged = Cache.open(tmp_path, SETTINGS)
    assert read(merged, wanted) == wanted and merged.unmerged == 0 and len(merged) == len(wanted)
    assert (merged.find([sha(n) for n in range(99, 199)]) == -1).all() and merged.position("nothing") == -1
    merged.write_index()
    assert index.read_bytes() == content


def test_shards_that_came_later_are_seen_and_then_merged(tmp_path):
    wanted = fill(Cache.create(tmp_path, SETTINGS), 0, 3)
    Cache.open(tmp_path, SETTINGS).write_index()
    wanted |= fill(Cache.create(tmp_path, SETTINGS), 3, 2)
    grown = Cache.open(tmp_path, SETTINGS)
    assert read(grown, wanted) == wanted and grown.unmerged == 2
    grown.write_index()
    assert read(Cache.open(tmp_path, SETTINGS), wanted) == wanted and Cache.open(tmp_path, SETTINGS).unmerged == 0
    at_once = Cache.create(tmp_path / "other", SETTINGS)
    fill(at_once, 0, 5)
    at_once.reload()
    at_once.write_index()
    grown, at_once = (Path(cache.folder, "index.arrow").read_bytes() for cache in (grown, at_once))
    assert grown == at_once  # however it came about


def test_a_shard_that_is_written_again_or_removed_is_not_read_from_the_old_index(tmp_path):
    wanted = fill(Cache.create(tmp_path, SETTINGS), 0, 3)
    Cache.open(tmp_path, SETTINGS).write_index()
    cache, first = Cache.open(tmp_path, SETTINGS), list(wanted)[:5]
    assert any(isinstance(wanted[key], str) for key in first)  # it had failed
    cache.write_shard("s0", {key: torch.tensor(-1.0) for key in first}, {})
    again = Cache.open(tmp_path, SETTINGS)
    assert read(again, first) == dict.fromkeys(first, -1.0)
    again.write_index()
    Path(cache.folder, "s1.parquet").unlink()
    assert len(Cache.open(tmp_path, SETTINGS)) == 10


def test_a_tensor_goes_before_a_failure_of_the_same_clip(tmp_path):
    key = latent_key(sha(0), SHAPES[0])
    cache = Cache.create(tmp_path, SETTINGS)
    cache.write_shard("a", {}, {key: "first it failed"})
    cache.write_shard("b", {key: torch.tensor(2.0)}, {})
    cache.write_shard("c", {}, {key: "and later"})
    for _ in range(2):
        cache = Cache.open(tmp_path, SETTINGS)
        assert read(cache, [key]) == {key: 2.0} and len(cache) == 3
        cache.write_index()


def test_keys_that_share_64_bits_are_told_apart(tmp_path):
    """Of ids that agree in the first half of their hash each is found, and one that is not there is not."""
    ids = [f"{'ab' * 8}{number:048x}" for number in (5 << 128, 3 << 128, 4 << 128)]
    cache = Cache.create(tmp_path, SETTINGS)
    cache.write_shard("a", {name: torch.tensor(float(n)) for n, name in enumerate(ids[:2])}, {})
    cache.reload()
    assert {key: cache.tensor(at).item() for key, at in zip(ids, cache.find(ids[:2]))} == {ids[0]: 0.0, ids[1]: 1.0}
    assert cache.find(ids).tolist()[2] == cache.position(ids[2]) == -1


def test_a_damaged_or_foreign_index(tmp_path):
    wanted = fill(Cache.create(tmp_path, SETTINGS), 0, 2)
    cache = Cache.open(tmp_path, SETTINGS)
    cache.write_index()
    path = Path(cache.folder, "index.arrow")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StditError, match=r"index\.arrow cannot be read.*Remove it"):
        Cache.open(tmp_path, SETTINGS)
    table = cache.index.replace_schema_metadata({"stdit_cache_index": "99"})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    newer = Cache.open(tmp_path, SETTINGS)  # of another version: made anew
    assert read(newer, wanted) == wanted and newer.unmerged == 2
