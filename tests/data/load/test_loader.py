"""Examples are a function of (seed, epoch, clip, occurrence), however they are read."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from stdit.data.config import DataConfig, Stage
from stdit.data.decode import source
from stdit.data.decode.checks import VideoError
from stdit.data.decode.video import read_frames
from stdit.data.decode.write import write_video
from stdit.data.load.cache import Cache, latent_key, latent_settings, text_key, text_settings
from stdit.data.load.loader import Loader, check_files, choose_caption
from stdit.data.manifest import Caption, Clip, Manifest, clip_id
from stdit.data.plan.buckets import assign
from stdit.data.remote.failures import StorageError
from stdit.data.remote.storage import Storage
from stdit.errors import StditError
from stdit.pixels import to_video
from stdit.prepare.encode import encode_manifest


class Item(NamedTuple):
    row: int
    occurrence: int
    bucket: int


CONFIG = DataConfig(shapes=["16x16x5", "32x16x5", "16x16"], fps=8.0, max_crop=0.7)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four clips of growing brightness, one of them gone; the third has two captions."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for number, (width, height) in enumerate([(16, 16), (48, 16), (24, 20), (16, 16)]):
        sha256 = f"{number:064x}"
        across = np.arange(width, dtype=np.uint8)[None, None, :, None] * 2
        values = np.arange(16, dtype=np.uint8)[:, None, None, None] * 8 + 10 * number
        frames = np.broadcast_to(values + across, (16, height, width, 3))
        write_video(folder / f"{number}.mp4", frames, 8)
        captions = (Caption(f"clip {number}"), Caption("another", 3.0)) if number == 2 else (Caption(f"clip {number}"),)
        path = str(folder / f"{number}.mp4")
        rows.append(Clip(clip_id(sha256, 0, 2), path, captions, 16, 8.0, width, height, 0.0, 2.0, sha256))
    (folder / "3.mp4").unlink()
    return Manifest.of(rows, folder)


def items(manifest, repeats=1):
    bucket = assign(manifest, CONFIG).bucket
    return [Item(row, n, int(bucket[row])) for n in range(repeats) for row in range(len(manifest))]


def same(a, b):
    fields = ("clip_id", "row", "occurrence", "epoch", "shape", "weight", "caption", "failure")
    return all(getattr(a, f) == getattr(b, f) for f in fields) and torch.equal(a.frames, b.frames)


def test_any_number_of_workers_gives_the_same(clips):
    assignment = assign(clips, CONFIG)
    wanted = items(clips, repeats=3)
    batches = [wanted[:5], [], wanted[5:6], wanted[6:]]
    results = []
    for workers in (0, 2, 5):
        loader = Loader(clips, assignment, CONFIG, seed=7, workers=workers)
        results.append(list(loader.iterate((1, batch) for batch in batches)))
    assert [len(batch) for batch in results[0]] == [5, 0, 1, 6]
    for other in results[1:]:
        for left, right in zip(results[0], other):
            assert len(left) == len(right) and all(map(same, left, right))
    alone = Loader(clips, assignment, CONFIG, seed=7).fetch([wanted[9]], epoch=1)[0]  # out of order, on its own
    assert same(alone, results[0][3][3])


def test_kept_clips_are_decoded_once_and_are_the_same(clips):
    config = replace(CONFIG, start="first", crop="centre", mirror=True)
    reads: Counter[str] = Counter()

    def reader(path, *arguments):
        reads[path] += 1
        return read_frames(path, *arguments)

    assignment, wanted = assign(clips, config), items(clips)
    plain = Loader(clips, assignment, config, seed=7, workers=0)
    keeping = Loader(clips, assignment, replace(config, keep_gb=1.0), seed=7, workers=0, reader=reader)
    for epoch in range(3):
        assert all(map(same, keeping.fetch(wanted, epoch), plain.fetch(wanted, epoch)))
    gone = clips[3].path
    assert reads == {clip.path: 3 if clip.path == gone else 1 for clip in (clips[row] for row in range(4))}
    reads.clear()
    full = Loader(clips, assignment, replace(config, keep_gb=1e-9), seed=7, workers=0, reader=reader)  # room for 1 byte
    for epoch in range(2):
        full.fetch(wanted[:1], epoch)
    assert reads == {clips[0].path: 2}
    with pytest.raises(StditError, match="keep_gb"):
        assign(clips, replace(CONFIG, keep_gb=1.0))


def test_of_a_clip_that_another_stage_cuts_otherwise_the_new_cut_is_kept(clips):
    config = replace(CONFIG, shapes=["16x16x5", "16x16x9"], start="first", crop="centre")
    config = replace(config, stages=[Stage(epochs=1, frames=5), Stage()], keep_gb=3 * 16 * 16 * 3 * 9 / 1e9)
    reads: Counter[str] = Counter()

    def reader(path, *arguments):
        reads[path] += 1
        return read_frames(path, *arguments)

    assignment = assign(clips, config)
    keeping = Loader(clips, assignment, config, seed=7, workers=0, reader=reader)
    plain = Loader(clips, assignment, replace(config, keep_gb=0.0), seed=7, workers=0)
    for epoch, stage in enumerate([*assignment.stages, assignment]):
        wanted = [Item(row, 0, int(stage.bucket[row])) for row in range(3)]
        assert all(map(same, keeping.fetch(wanted, epoch), plain.fetch(wanted, epoch)))
    assert set(reads.values()) == {2}  # once a stage: what the first kept has made room


def test_start_crop_and_caption_vary_and_stay_inside(clips):
    loader = Loader(clips, assign(clips, CONFIG), CONFIG, seed=7)
    wanted = [Item(2, n, 0) for n in range(30)]
    examples = loader.fetch(wanted, epoch=0)
    again = Loader(clips, assign(clips, CONFIG), CONFIG, seed=8).fetch(wanted, epoch=0)
    later = loader.fetch(wanted, epoch=1)
    firsts = [int(e.frames[0].float().mean().item()) for e in examples]
    assert len(set(firsts)) > 5
    assert sum(map(same, examples, again)) < 5 and sum(map(same, examples, later)) < 5
    counts = Counter(e.caption for e in examples)
    assert set(counts) == {"clip 2", "another"} and counts["another"] > counts["clip 2"]
    assert all(e.weight == 1 and e.failure is None and e.frames.shape == (5, 16, 16, 3) for e in examples)
    steps = torch.stack([e.frames.float().mean((1, 2, 3)).diff() for e in examples])
    assert (steps - 8).abs().max() < 2  # consecutive source frames, whatever the start


def test_first_and_centre_are_the_plain_read(clips):
    config = DataConfig(shapes=CONFIG.shapes, fps=8.0, max_crop=0.7, start="first", crop="centre")
    example = Loader(clips, assign(clips, config), config, seed=0).fetch([Item(1, 0, 1)], epoch=4)[0]
    assert np.array_equal(example.frames.numpy(), read_frames(clips[1].path, 5, (32, 16), 8.0))
    assert example.video.shape == (3, 5, 16, 32)
    assert torch.allclose((example.video[0] + 1) * 127.5, example.frames[..., 0].float(), atol=1e-4)
    assert to_video(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1)).flatten().tolist() == [-1, 1]
    mirrored = DataConfig(**{**config.__dict__, "mirror": True})
    loader = Loader(clips, assign(clips, mirrored), mirrored, seed=0)
    flips = [torch.equal(e.frames, example.frames.flip(2)) for e in loader.fetch([Item(1, n, 1) for n in range(20)], 0)]
    assert 4 < sum(flips) < 16


def test_a_missing_clip_keeps_its_place_with_weight_0(clips):
    loader = Loader(clips, assign(clips, CONFIG), CONFIG, seed=0, workers=2)
    examples = next(loader.iterate([(0, items(clips))]))
    assert [e.weight for e in examples] == [1, 1, 1, 0]
    assert "3.mp4: no such file" in examples[3].failure and examples[3].reason == "missing"
    assert examples[3].frames.shape == (5, 16, 16, 3) and not examples[3].frames.any()


def test_a_strange_clip_keeps_its_place_with_weight_0(clips, monkeypatch):
    """Whatever its decoding or conversion brings up; the clips beside it are read."""
    to_rgb, failing = source.to_rgb, [IndexError("odd")]

    def strange(*arguments):
        if failing:
            raise failing.pop()
        return to_rgb(*arguments)

    monkeypatch.setattr(source, "to_rgb", strange)
    examples = Loader(clips, assign(clips, CONFIG), CONFIG, seed=0, workers=0).fetch(items(clips)[:3], epoch=0)
    assert [e.weight for e in examples] == [0, 1, 1]
    assert "0.mp4: cannot be decoded (IndexError" in examples[0].failure and examples[0].reason == "undecodable"
    assert not examples[0].frames.any()


def test_a_disk_that_fails_is_asked_again_and_then_stops_the_run(clips):
    """As a network mount does; a clip that is bad itself still costs only its place."""
    failures = []

    def reader(path, count, size, *_):
        if failures:
            raise failures.pop()
        return np.full((count, size[1], size[0], 3), 7, np.uint8)

    def gone():
        return VideoError("a.mp4", "unreachable", "the storage failed (Stale file handle).")

    storage = Storage(tries=3, pause=0.001)
    loader = Loader(clips, assign(clips, CONFIG), CONFIG, seed=0, workers=0, reader=reader, storage=storage)
    failures += [gone(), gone()]
    (example,) = loader.fetch(items(clips)[:1], epoch=0)
    assert example.weight == 1 and int(example.frames.min()) == 7 and storage.retries == 2
    failures += [gone(), gone(), gone()]
    with pytest.raises(StorageError, match=r"3 tries failed.*Stale file handle") as error:
        loader.fetch(items(clips)[:1], epoch=0)
    assert error.value.reason == "unreachable"
    failures.append(VideoError("a.mp4", "damaged", "is bad."))
    assert [e.weight for e in loader.fetch(items(clips)[:2], epoch=0)] == [0, 1]


class Away(Storage):
    """A storage that gives no file, for this reason."""

    def __init__(self, reason):
        super().__init__()
        self.reason = reason

    def local(self, path):
        raise StorageError(path, self.reason, "said so.")


def test_what_storage_does_not_give_costs_the_clip_or_stops_the_run(clips):
    remote = Manifest.of([Clip(**{**clips[0].__dict__, "path": "s3://bucket/0.mp4"})])
    for reason in ("missing", "too_large"):
        loader = Loader(remote, assign(remote, CONFIG), CONFIG, seed=0, storage=Away(reason), workers=0)
        example = loader.fetch([Item(0, 0, 0)], 0)[0]
        assert (example.weight, example.reason, example.failure) == (0, reason, "s3://bucket/0.mp4: said so.")
    for reason in ("denied", "unreachable", "wrong"):
        loader = Loader(remote, assign(remote, CONFIG), CONFIG, seed=0, storage=Away(reason), workers=0)
        with pytest.raises(StditError, match=r"bucket/0\.mp4: said so"):
            loader.fetch([Item(0, 0, 0)], 0)


def test_cached_cuts_are_drawn_by_key_and_are_those_of_the_files(clips, tmp_path):
    """As many cuts as asked for, each what its own start and crop give, drawn evenly and alike by any loader."""
    config = replace(CONFIG, crops=3, mirror=True)
    manifest = Manifest.of([clips[row] for row in range(3)])
    assignment = assign(manifest, config)

    class Vae:
        def encode(self, video):
            return video

    for crops in (2, 3):  # one more: the others are there
        more = replace(config, crops=crops)
        done = encode_manifest(manifest, assignment, more, Vae(), None, tmp_path, vae_id="vae", clips_per_shard=2)
    assert (done.clips, done.reused) == (3, 6)
    cache = Cache.open(tmp_path, latent_settings(config, "vae"))
    assert len(cache) == 9
    plain = Loader(manifest, assignment, replace(config, crops=1), seed=0, workers=0)
    cuts = {}
    for row in range(3):
        for cut in range(3):
            key = latent_key(manifest[row].id, assignment.shapes[assignment.bucket[row]], cut)
            cuts[row, cut] = cache.tensor(cache.position(key))
            wanted = plain.fetch([Item(row, cut, int(assignment.bucket[row]))], epoch=0)[0].video
            assert torch.equal(cuts[row, cut], wanted)
    assert not torch.equal(cuts[0, 0], cuts[0, 1])
    wanted = [Item(row, n, int(assignment.bucket[row])) for row in range(3) for n in range(100)]
    first = Loader(manifest, assignment, config, seed=7, cache=cache).fetch(wanted, epoch=1)
    again = Loader(manifest, assignment, config, seed=7, cache=cache).fetch(wanted[::-1], epoch=1)[::-1]
    later = Loader(manifest, assignment, config, seed=7, cache=cache).fetch(wanted, epoch=2)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(first, again))
    assert not all(torch.equal(a.latents, b.latents) for a, b in zip(first, later))
    drawn = Counter(next(c for c in range(3) if torch.equal(e.latents, cuts[e.row, c])) for e in first)
    assert all(70 < drawn[cut] < 130 for cut in range(3))
    with pytest.raises(StditError, match=r"lacks the latents of 3 of 3 clips.*--crops 4"):
        Loader(manifest, assignment, replace(config, crops=4), seed=7, cache=cache)
    with pytest.raises(StditError, match=r"data\.crops is 2"):
        assign(manifest, replace(CONFIG, crops=2, start="first", crop="centre"))


def test_a_bug_in_a_worker_is_not_hidden(clips):
    def reader(*args):
        raise RuntimeError("a bug")

    loader = Loader(clips, assign(clips, CONFIG), CONFIG, seed=0, workers=2, reader=reader)
    with pytest.raises(RuntimeError, match="a bug"):
        list(loader.iterate([(0, items(clips))] * 20))


def test_reading_ahead_is_bounded(clips):
    config = DataConfig(**{**CONFIG.__dict__, "prefetch": 2})
    taken = []

    def batches():
        for number in range(20):
            taken.append(number)
            yield 0, [Item(0, number, 0)]

    iterator = Loader(clips, assign(clips, config), config, seed=0, workers=2).iterate(batches())
    next(iterator)
    assert len(taken) <= 3
    iterator.close()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_a_gpu_takes_is_pinned(clips, device, monkeypatch):
    pinned = []
    if device == "cpu":
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    assignment, wanted = assign(clips, CONFIG), items(clips)
    loader = Loader(clips, assignment, CONFIG, seed=7, workers=2, pin=True)
    for got, plain in zip(loader.fetch(wanted, 0), Loader(clips, assignment, CONFIG, seed=7).fetch(wanted, 0)):
        assert same(got, plain)
        assert got.frames.is_pinned() if device == "cuda" else any(got.frames is one for one in pinned)


def test_captions_are_drawn_by_weight(clips):
    clip = clips[2]
    drawn = Counter(choose_caption(clip, u) for u in np.linspace(0, 1, 4000, endpoint=False))
    assert drawn["another"] == pytest.approx(3000, abs=2)
    assert choose_caption(Clip(**{**clip.__dict__, "captions": ()}), 0.5) == ""


def test_the_cache_gives_the_shape_of_the_stage(clips, tmp_path):
    config = DataConfig(**{**CONFIG.__dict__, "start": "first", "crop": "centre"})
    config.shapes, config.stages = ["16x16x5", "16x16x9"], [Stage(epochs=1, frames=5), Stage()]
    assignment = assign(clips, config)
    early, late = assignment.stages
    cache = Cache.create(tmp_path, latent_settings(config, "vae"))
    keys = {
        f"{clips[row].id}/{stage.shapes[stage.bucket[row]]}" for stage in (early, late) for row in range(len(clips))
    }
    assert len(keys) == 8
    latents = {key: torch.randn(4, 2 if key.endswith("x5") else 3, 4, 4) for key in keys}
    first, *others = sorted(keys)
    cache.write_shard("one", {key: latents[key] for key in others}, {})
    with pytest.raises(StditError, match="lacks the latents of 1 of 4 clips"):
        Loader(clips, assignment, config, 0, cache=Cache.open(tmp_path, cache.settings))
    cache.write_shard("two", {first: latents[first]}, {})
    loader = Loader(clips, assignment, config, 0, cache=Cache.open(tmp_path, cache.settings))
    for stage in (early, late):
        for example in loader.fetch([Item(row, 0, int(stage.bucket[row])) for row in range(len(clips))], epoch=0):
            assert torch.equal(example.latents, latents[f"{example.clip_id}/{example.shape}"])


def test_a_shape_whose_only_clip_failed_to_encode_does_not_end_the_run(clips, tmp_path):
    config = replace(CONFIG, start="first", crop="centre")
    assignment = assign(clips, config)
    assert assignment.counts.tolist() == [3, 1, 0]
    cache = Cache.create(tmp_path, latent_settings(config, "vae"))
    keys = [latent_key(clips[row].id, assignment.shapes[bucket]) for row, _, bucket in items(clips)]
    cache.write_shard("one", {key: torch.ones(4, 2, 4, 4) for key in keys if "32x16" not in key}, {})
    cache.write_shard("two", {}, {key: "gone" for key in keys if "32x16" in key})
    read = Cache.open(tmp_path, cache.settings)
    size = (4, 2, 4, 8)
    (example,) = Loader(clips, assignment, config, 0, cache=read, latent_size=lambda _: size).fetch([Item(1, 0, 1)], 0)
    assert (example.weight, example.reason, example.failure) == (0, "not_encoded", "gone")
    assert example.latents.shape == size and not example.latents.any()


def test_from_the_cache(clips, tmp_path):
    config = DataConfig(**{**CONFIG.__dict__, "start": "first", "crop": "centre"})
    assignment = assign(clips, config)
    settings = latent_settings(config, "vae")
    cache = Cache.create(tmp_path, settings)
    latents = {f"{clips[row].id}/{assignment.shapes[b]}": torch.randn(4, 2, 4, 4) for row, _, b in items(clips)[:3]}
    cache.write_shard("one", latents, {})
    with pytest.raises(StditError, match="lacks the latents of 1 of 4 clips"):
        Loader(clips, assignment, config, 0, cache=Cache.open(tmp_path, settings))
    cache.write_shard("two", {}, {f"{clips[3].id}/{assignment.shapes[0]}": "gone"})
    text = Cache.create(tmp_path, text_settings(config, {"text_encoder": "text"}))
    text.write_shard("t", {text_key(c): torch.ones(n + 1, 3) for n, c in enumerate(["clip 0", "clip 1", "clip 2"])}, {})
    text.reload()
    loader = Loader(clips, assignment, config, 0, cache=Cache.open(tmp_path, settings), text_cache=text)
    first = loader.fetch(items(clips)[:2], epoch=0)
    assert all(torch.equal(e.latents, latents[f"{e.clip_id}/{e.shape}"]) and e.frames is None for e in first)
    assert [e.text.shape for e in first] == [(1, 3), (2, 3)]
    with pytest.raises(StditError, match="no embedding of the caption 'clip 3'"):
        loader.fetch(items(clips)[3:], epoch=0)
    read = Cache.open(tmp_path, settings)
    failing = Loader(clips, assignment, config, 0, cache=read, latent_size=lambda shape: (4, 2, shape.height // 4, 4))
    (failed,) = failing.fetch(items(clips)[3:], 0)
    assert failed.weight == 0 and failed.failure == "gone"
    assert failed.latents.shape == (4, 2, 4, 4) and not failed.latents.any()
    with pytest.raises(StditError, match=r"set data\.start=first"):
        Loader(clips, assignment, CONFIG, 0, cache=Cache.open(tmp_path, settings))


def test_a_manifest_that_was_moved_is_named_before_its_clips_fail(tmp_path):
    def manifest(*paths):
        rows = [
            Clip(str(n), str(path), (Caption("a"),), 6, 8.0, 16, 16, 0.0, 0.75, f"{n:064x}")
            for n, path in enumerate(paths)
        ]
        return Manifest.of(rows, tmp_path)

    (tmp_path / "there.mp4").write_bytes(b"")
    check_files(manifest(*[f"gone{n}.mp4" for n in range(20)], "s3://bucket/a.mp4"))
    check_files(manifest("gone.mp4", "there.mp4"))
    check_files(manifest("there.tar#512+3/a.mp4", "there.mp4"))
    with pytest.raises(StditError, match=r"gone0\.mp4.*relative to its own folder"):
        check_files(manifest(*[f"gone{n}.mp4" for n in range(20)]))
