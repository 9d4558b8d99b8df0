"""Encoding: every clip once, killed or not the same bytes, and the latents of the plain frames."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import FakeText, FakeVae

from stdit.data.config import DataConfig
from stdit.data.decode.video import read_frames
from stdit.data.decode.write import write_video
from stdit.data.load.cache import Cache, CacheMissing, latent_key, latent_settings, text_settings
from stdit.data.load.loader import embedding
from stdit.data.manifest import Caption, Clip, Manifest, clip_id
from stdit.data.parts import Part
from stdit.data.plan.buckets import assign
from stdit.errors import StditError
from stdit.pixels import to_video
from stdit.prepare.encode import check_texts, encode_manifest, merge_caches, text_identity, vae_identity
from stdit.text.encoders import TextEncoder
from stdit.text.loading import load_text_encoder
from stdit.text.small import build_word_tokenizer, small_umt5
from stdit.weights.families import treatment_of

CONFIG = DataConfig(shapes=["16x16x5", "32x16x5"], fps=8.0, max_crop=0.7, prefetch=2)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for number in range(11):
        width = 16 if number % 3 else 48
        frames = np.random.default_rng(number).integers(0, 256, (6, 16, width, 3), dtype=np.uint8)
        write_video(folder / f"{number}.mp4", frames, 8)
        sha256 = f"{number:064x}"
        captions = (Caption(f"clip {number}"), Caption("shared"))
        path = str(folder / f"{number}.mp4")
        rows.append(Clip(clip_id(sha256, 0, 1), path, captions, 6, 8.0, width, 16, 0.0, 0.75, sha256))
    (folder / "5.mp4").write_bytes(b"broken")
    return Manifest.of(rows, folder)


def encode(clips, out, vae=None, rows=None, **options):
    manifest = clips if rows is None else Manifest.of([clips[i] for i in rows])
    options = {"batch": 2, "clips_per_shard": 3, "vae_id": "vae", "text_id": {"text_encoder": "text"}, **options}
    return encode_manifest(manifest, assign(manifest, CONFIG), CONFIG, vae or FakeVae(), FakeText(), out, **options)


def files(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_latents_are_those_of_the_plain_frames(clips, tmp_path):
    seen = []
    done = encode(clips, tmp_path, on_clips=seen.append)
    assert (done.clips, done.reused, done.texts, sum(seen)) == (10, 0, 13, 11)
    assert [clip for clip, _ in done.failures] == [clips[5].id] and "5.mp4" in done.failures[0][1]
    cache = Cache.open(tmp_path, latent_settings(CONFIG, "vae"))
    assignment = assign(clips, CONFIG)
    for row in (0, 1, 10):
        shape = assignment.shapes[assignment.bucket[row]]
        frames = torch.from_numpy(read_frames(clips[row].path, 5, (shape.width, shape.height), 8.0))
        wanted = FakeVae().encode(to_video(frames)[None])[0]
        assert torch.equal(cache.tensor(cache.position(latent_key(clips[row].id, shape))), wanted)
    text = Cache.open(tmp_path, text_settings(CONFIG, {"text_encoder": "text"}))
    assert len(text) == 13  # eleven clips, the shared caption once, and the empty one
    assert embedding(text, "").shape == (1, 3) and embedding(text, "shared").shape == (7, 3)
    again = encode(clips, tmp_path)
    assert (again.clips, again.reused, again.texts) == (0, 11, 0)


def test_killed_and_continued_gives_the_same_bytes(clips, tmp_path):
    encode(clips, tmp_path / "whole")
    for die_at in (1, 2, 4):
        with pytest.raises(KeyboardInterrupt):
            encode(clips, tmp_path / "killed", FakeVae(die_at))
    encode(clips, tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("of", [2, 3, 20])
def test_any_number_of_parts_gives_the_same_bytes(clips, tmp_path, of):
    """Whatever the order, and also if one was killed and done again."""
    whole = encode(clips, tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        encode(clips, tmp_path / "parts", FakeVae(1), part=Part(2, of))
    done = [encode(clips, tmp_path / "parts", part=Part(number, of)) for number in range(of, 0, -1)]
    before = files(tmp_path / "parts")
    counts = merge_caches(tmp_path / "parts", done[0].caches)
    assert files(tmp_path / "parts") == files(tmp_path / "one") != before
    assert sum(d.clips for d in done) <= 10 and {d.caches for d in done} == {whole.caches}
    assert counts == {whole.caches[0]: (11, 1), whole.caches[1]: (13, 0)}


def test_a_grown_manifest_encodes_only_what_is_new(clips, tmp_path):
    encode(clips, tmp_path, rows=range(7))
    done = encode(clips, tmp_path)
    assert (done.clips, done.reused) == (4, 7)
    index = Cache.open(tmp_path, latent_settings(CONFIG, "vae")).index.column("key").to_pylist()
    assert len(index) == len(set(index)) == 11


def test_failed_clips_are_tried_again_when_asked(clips, tmp_path):
    encode(clips, tmp_path)
    broken = Path(clips[5].path).read_bytes()
    try:
        write_video(clips[5].path, np.zeros((6, 16, 16, 3), np.uint8), 8)
        assert encode(clips, tmp_path).clips == 0
        done = encode(clips, tmp_path, retry_failed=True)
    finally:
        Path(clips[5].path).write_bytes(broken)
    assert done.clips == 3 and not done.failures  # its shard
    cache = Cache.open(tmp_path, latent_settings(CONFIG, "vae"))
    assert len(cache) == 11 and all(cache.failure(i) is None for i in range(11))


@pytest.mark.parametrize("first", [range(7), range(11)], ids=["grown", "the same"])
def test_what_failed_is_tried_again_though_the_manifest_has_grown(clips, tmp_path, first):
    encode(clips, tmp_path, rows=[row for row in first if row != 2])
    encode(clips, tmp_path)  # shards of other clips, into which those that are there do not come
    broken = Path(clips[5].path).read_bytes()
    try:
        write_video(clips[5].path, np.zeros((6, 16, 16, 3), np.uint8), 8)
        done = encode(clips, tmp_path, retry_failed=True)
    finally:
        Path(clips[5].path).write_bytes(broken)
    assert done.clips >= 1 and not done.failures
    cache = Cache.open(tmp_path, latent_settings(CONFIG, "vae"))
    shapes = assign(clips, CONFIG)
    keys = [latent_key(clip.id, shapes.shapes[bucket]) for clip, bucket in zip(clips, shapes.bucket)]
    assert [cache.failure(p) for p in cache.find(keys)] == [None] * 11
    assert torch.equal(cache.tensor(cache.find(keys)[5]), torch.full((3, 2, 4, 4), -1.0))
    assert encode(clips, tmp_path, retry_failed=True).clips == 0


def test_latents_that_are_not_finite_cost_their_clip_by_name(clips, tmp_path):
    class Broken(FakeVae):
        def encode(self, video):
            latents = super().encode(video)
            latents[0] = float("nan") if self.calls == 2 else latents[0]
            return latents

    done = encode(clips, tmp_path, Broken())
    ((bad, failure),) = [one for one in done.failures if one[0] != clips[5].id]  # that one is no video
    assert done.clips == 9 and failure.startswith(next(clip.path for clip in clips if clip.id == bad))
    assert "latents are not finite" in failure
    cache = Cache.open(tmp_path, latent_settings(CONFIG, "vae"))
    kept = [position for position in range(len(cache)) if cache.failure(position) is None]
    assert len(cache) == 11 and len(kept) == 9 and all(torch.isfinite(cache.tensor(at)).all() for at in kept)
    assert [clip for clip, _ in encode(clips, tmp_path, retry_failed=True).failures] == [clips[5].id]


def test_an_embedding_that_is_not_finite_names_its_caption(clips, tmp_path):
    class Large(FakeText):
        def encode(self, texts):
            return [1e5 * one for one in super().encode(texts)]

    config = replace(CONFIG, cache_dtype="float16")  # ends at 65504
    with pytest.raises(StditError, match=r"the caption '.+' is not finite in torch.float16.*data.cache_dtype"):
        encode_manifest(
            clips, assign(clips, config), config, FakeVae(), Large(), tmp_path, vae_id="vae", text_id={"text": "text"}
        )


def test_identities_follow_the_content(tmp_path):
    for name in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    assert vae_identity(tmp_path) == vae_identity(tmp_path / "vae")
    first = (vae_identity(tmp_path), text_identity(tmp_path))
    (tmp_path / "tokenizer" / "config.json").write_text("{}")
    changed = text_identity(tmp_path)
    assert vae_identity(tmp_path) == first[0]
    assert {name for name, value in changed.items() if value != first[1][name]} == {"tokenizer"}
    (tmp_path / "vae" / "model.safetensors").write_bytes(b"other")
    assert vae_identity(tmp_path) != first[0]


def test_pipelines_that_treat_texts_in_other_ways_share_a_folder_and_no_embedding(clips, tmp_path):
    """The same encoder and tokenizer; for each pipeline the cache gives what its own treatment makes of a text."""
    text = "A <b>Red_Circle</b>, moves (left)!"
    rows = Manifest.of([replace(clips[0], captions=(Caption(text),))])
    tokenizer = build_word_tokenizer([text, "a red circle moves left b"])
    encoder = TextEncoder(small_umt5(len(tokenizer), 16, 1, 2), tokenizer)
    found = []
    for name in ("PixArtSigma", "OpenSora", "LTX", "LTXCondition", "Wan"):
        folder = tmp_path / name
        encoder.save(folder / "text_encoder", folder / "tokenizer")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": f"{name}Pipeline"}))
        loaded, identity = load_text_encoder(folder, treatment_of(folder)), text_identity(folder)
        shapes = assign(rows, CONFIG)
        encode_manifest(rows, shapes, CONFIG, FakeVae(), loaded, tmp_path / "cache", vae_id="vae", text_id=identity)
        cache = Cache.open(tmp_path / "cache", text_settings(CONFIG, identity))
        (wanted,) = loaded.encode([text])
        assert torch.equal(embedding(cache, text), wanted)
        found.append(wanted)
    assert len(list((tmp_path / "cache").glob("text-*"))) == len(found) == 5
    sigma, open_sora, ltx, ltx_condition, _ = found
    assert len(sigma) != len(open_sora)  # without the tag and the underline
    assert len(ltx) == len(ltx_condition) and not torch.allclose(ltx, ltx_condition)  # the first sees its padding


def test_another_length_or_precision_is_another_identity(tmp_path):
    tokenizer = build_word_tokenizer(["a"])
    TextEncoder(small_umt5(len(tokenizer), 16, 1, 2), tokenizer).save(tmp_path / "text_encoder", tmp_path / "tokenizer")
    first = text_identity(tmp_path, 32)
    assert text_identity(tmp_path, 512) == text_identity(tmp_path) == text_identity(tmp_path, 0)
    assert {name for name, value in text_identity(tmp_path).items() if value != first[name]} == {"max_length"}
    Cache.create(tmp_path / "cache", text_settings(CONFIG, first))
    with pytest.raises(CacheMissing, match="max_length 32 there, 512 wanted") as caught:
        Cache.open(tmp_path / "cache", text_settings(CONFIG, text_identity(tmp_path)))
    assert caught.value.others
    with pytest.raises(CacheMissing, match="holds no latents") as caught:
        Cache.open(tmp_path / "cache", latent_settings(CONFIG, "vae"))
    assert not caught.value.others
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / part / ".DS_Store").write_text("of no account")
        (tmp_path / part / "README.md").write_text("neither")
    assert text_identity(tmp_path, 32) == first


def test_captions_that_came_after_the_cache_are_told_before_training(clips, tmp_path):
    encode(clips, tmp_path)
    cache = Cache.open(tmp_path, text_settings(CONFIG, {"text_encoder": "text"}))
    check_texts(clips, assign(clips, CONFIG), cache)
    rows = Manifest.of([replace(clips[0], captions=(Caption("of today"), Caption("shared"))), clips[1]])
    with pytest.raises(StditError, match=r"lacks the embeddings of 1 of 4 captions, such as 'of today'.*data encode"):
        check_texts(rows, assign(rows, CONFIG), cache)
