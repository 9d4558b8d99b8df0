"""The cache: settings never mix, shards appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stdit.data.config import DataConfig
from stdit.data.load.cache import Cache, CacheMissing, latent_key, latent_settings, text_key
from stdit.data.remote.failures import StorageError
from stdit.data.remote.storage import Storage
from stdit.errors import StditError
from stdit.shapes import VideoShape

CONFIG = DataConfig(fps=8.0)
SETTINGS = latent_settings(CONFIG, "vae-one")


def keys(*names):
    return [text_key(name) for name in names]


def test_what_was_written_is_read(tmp_path):
    cache = Cache.create(tmp_path, SETTINGS)
    tensors = {key: torch.randn(2, 3, 4, 5) for key in keys("a", "b", "c")}
    cache.write_shard("one", tensors, {})
    cache.write_shard("two", {text_key("d"): torch.ones(2, dtype=torch.bfloat16)}, {text_key("e"): "cannot be read"})
    read = Cache.open(tmp_path, SETTINGS)
    assert len(read) == 5
    positions = read.find(keys("c", "nowhere", "e", "a"))
    assert (positions >= 0).tolist() == [True, False, True, True]
    assert [read.position(key) for key in keys("c", "nowhere", "e", "a")] == positions.tolist()
    for name in "abc":
        assert torch.equal(read.tensor(read.position(text_key(name))), tensors[text_key(name)])
    d = read.tensor(read.position(text_key("d")))
    assert d.dtype == torch.float32 and d.tolist() == [1, 1]
    assert read.failure(positions[2]) == "cannot be read" and read.failure(positions[0]) is None


def test_keys_that_share_a_prefix_are_told_apart(tmp_path):
    cache = Cache.create(tmp_path, SETTINGS)
    clip = hashlib.sha256(b"clip").hexdigest()
    shapes = [VideoShape(5, 8, 8), VideoShape(1, 8, 8)]
    cache.write_shard("one", {latent_key(clip, shape): torch.tensor(float(shape.frames)) for shape in shapes}, {})
    cache.reload()
    assert [cache.tensor(cache.position(latent_key(clip, shape))).item() for shape in shapes] == [5.0, 1.0]
    assert cache.position(latent_key(clip, VideoShape(9, 8, 8))) == -1


def test_a_clip_may_have_any_id(tmp_path):
    cache = Cache.create(tmp_path, SETTINGS)
    keys = [latent_key(clip, VideoShape(5, 8, 8)) for clip in ("clip-1", "é", "0" * 64)]
    cache.write_shard("one", {key: torch.tensor(float(number)) for number, key in enumerate(keys)}, {})
    read = Cache.open(tmp_path, SETTINGS)
    assert [read.tensor(position).item() for position in read.find(keys)] == [0.0, 1.0, 2.0]


def test_another_vae_is_an_error_that_names_both(tmp_path):
    Cache.create(tmp_path, SETTINGS)
    with pytest.raises(StditError, match="vae vae-one there, vae-two wanted"):
        Cache.open(tmp_path, latent_settings(CONFIG, "vae-two"))
    with pytest.raises(StditError, match=r"fps 8\.0 there, 16\.0 wanted"):
        Cache.open(tmp_path, latent_settings(DataConfig(fps=16.0), "vae-one"))
    with pytest.raises(StditError, match="holds no latents"):
        Cache.open(tmp_path / "elsewhere", SETTINGS)
    Cache.create(tmp_path, latent_settings(CONFIG, "vae-two"))  # side by side they do no harm
    assert Cache.open(tmp_path, SETTINGS).settings["vae"] == "vae-one"


@pytest.mark.parametrize("content", [b"", b'{"vae": "v', b"\xff", b"[1]", b"null", b"{}"])
def test_a_folder_with_damaged_settings_is_named_and_does_no_harm(tmp_path, content):
    damaged = Path(Cache.create(tmp_path, SETTINGS).folder)
    (damaged / "settings.json").write_bytes(content)
    wanted = latent_settings(CONFIG, "vae-two")
    says = "vae None there" if content == b"{}" else "its settings.json is damaged"
    with pytest.raises(StditError, match=rf"cache {tmp_path} holds other latents:\s+{damaged.name}: .*{says}"):
        Cache.open(tmp_path, wanted)
    Cache.create(tmp_path, wanted)
    assert Cache.open(tmp_path, wanted).settings["vae"] == "vae-two"


def test_a_shard_without_its_index_is_not_there(tmp_path):
    cache = Cache.create(tmp_path, SETTINGS)
    cache.write_shard("one", {text_key("a"): torch.zeros(1)}, {})
    Path(cache.folder, "one.parquet").unlink()
    cache.reload()
    assert len(cache) == 0 and not cache.has_shard("one")


@pytest.mark.parametrize("other", [False, True], ids=["cut off", "of other columns"])
def test_a_damaged_index_part_says_what_to_do(tmp_path, other):
    cache = Cache.create(tmp_path, SETTINGS)
    cache.write_shard("one", {text_key("a"): torch.zeros(100)}, {})
    path = Path(cache.folder, "one.parquet")
    path.write_bytes(path.read_bytes()[:60])
    if other:
        pq.write_table(pa.table({"name": ["a"]}), path)
    with pytest.raises(StditError, match=r"one\.parquet cannot be read as Parquet.*Remove it"):
        Cache.open(tmp_path, SETTINGS)


def test_a_damaged_shard_says_what_to_do(tmp_path):
    cache = Cache.create(tmp_path, SETTINGS)
    cache.write_shard("one", {text_key("a"): torch.zeros(100)}, {})
    path = Path(cache.folder, "one.safetensors")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(StditError, match=r"one\.safetensors cannot be read.*Remove one\.parquet"):
        Cache.open(tmp_path, SETTINGS).tensor(0)


def test_a_disk_that_does_not_answer_is_not_a_missing_cache(tmp_path, monkeypatch):
    Cache.create(tmp_path, SETTINGS)

    def stale(folder):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with pytest.raises(CacheMissing):
        Cache.open(tmp_path / "elsewhere", SETTINGS)
    monkeypatch.setattr(os, "listdir", stale)
    with pytest.raises(StorageError, match=r"3 tries failed, .*Stale file handle.*Check the disk") as caught:
        Cache.open(tmp_path, SETTINGS, Storage(tries=3, pause=0))
    assert caught.value.reason == "unreachable" and not isinstance(caught.value, CacheMissing)
