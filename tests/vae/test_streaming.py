"""Chunks, slices and tiles against the whole clip at once; what they hold in memory; what is wrong with an input."""

from __future__ import annotations

import gc
import itertools
import json
import re
import weakref
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from stdit.errors import StditError
from stdit.vae import autoencoder, cpu, tiles
from stdit.vae.autoencoder import CausalVAE, VaeConfig
from stdit.vae.config import PRESETS
from stdit.vae.streaming import CausalCache
from stdit.vae.tiles import Slices, blend_weights, coarse_bytes, slices, spans, working_bytes

STATISTICS = dict(latents_mean=(0.5, -1, 0), latents_std=(1, 2, 0.5))
WAN21 = VaeConfig(base_dim=4, num_res_blocks=1, z_dim=3, **STATISTICS)
WAN22 = VaeConfig(
    base_dim=4, decoder_base_dim=8, num_res_blocks=1, z_dim=3, patch_size=2, residual=True, **STATISTICS
)  # fmt: skip
TINY = VaeConfig(base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,), z_dim=3, **STATISTICS)


def random_vae(config: VaeConfig, dtype: torch.dtype = torch.float32) -> CausalVAE:
    torch.manual_seed(0)
    vae = CausalVAE(config).requires_grad_(False)
    for p in vae.parameters():
        p.add_(torch.randn_like(p) * 0.05)
    return vae.to(dtype)


def clip(config: VaeConfig, frames: int, rows: int = 1, columns: int = 2, dtype=torch.float32) -> torch.Tensor:
    shape = (3, frames, rows * config.stride[1], columns * config.stride[2])
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype) * 2 - 1


def chunk_length(monkeypatch, latents: int) -> None:
    monkeypatch.setattr(autoencoder, "slices", lambda config, side, shape, *_: Slices(1, latents, *shape[2:]))


@pytest.mark.parametrize(
    ("dtype", "tolerance", "pairs_from"),
    [(torch.float64, 1e-12, 64), (torch.float32, 1e-6, 64), (torch.float32, 1e-6, 1)],
    ids=["fp64", "fp32", "fp32 in pairs"],
)
@pytest.mark.parametrize("config", [WAN21, WAN22, replace(WAN21, groups=2)], ids=["2.1", "2.2", "groups"])
@torch.no_grad()
def test_streamed_equals_whole(config, dtype, tolerance, pairs_from, monkeypatch):
    """The whole: the first frame, then all others in one chunk. Every chunk length from one latent frame up."""
    monkeypatch.setattr(cpu, "WINOGRAD_CHANNELS", pairs_from)
    vae, video = random_vae(config, dtype), clip(config, 13, dtype=dtype)
    cache = CausalCache()
    parts = [vae.encode_moments(part[None], cache)[0] for part in video.split([1, 12], dim=1)]
    latents = vae.normalise(torch.cat(parts, 2))[0]
    cache = CausalCache()
    raw = vae.denormalise(latents[None])
    decoded = torch.cat([vae.decode_raw(part, cache) for part in raw.split([1, 3], dim=2)], 2)[0]
    for length in range(1, 4):
        chunk_length(monkeypatch, length)
        chunks = list(vae.encode_stream(iter(video.unbind(1))))
        assert [c.shape[1] for c in chunks] == [1] + [length] * (3 // length) + [3 % length] * (3 % length > 0)
        assert relative(torch.cat(chunks, 1), latents) <= tolerance
        assert relative(torch.cat(list(vae.decode_stream(chunks, clamp=False)), 1), decoded) <= tolerance
    parts = list(vae.decode_stream(latents, clamp=False))  # a whole tensor is cut, too, with the last length
    assert relative(torch.cat(parts, 1), decoded) <= tolerance
    assert relative(vae.encode(video[None])[0], latents) <= tolerance
    assert relative(vae.decode(latents[None], clamp=False)[0], decoded) <= tolerance


@torch.no_grad()
def test_a_stream_drawn_from_the_posterior_does_not_hang_on_its_chunks(monkeypatch):
    vae, video = random_vae(WAN21, torch.float64), clip(WAN21, 13, dtype=torch.float64)
    mean, logvar = (one[0] for one in vae.encode_moments(video[None]))
    posterior = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.randn(mean[:, 0].shape, generator=posterior) for _ in range(mean.shape[1])], 1)
    wanted = vae.normalise((mean + (0.5 * logvar).exp() * noise)[None])[0]
    for length in range(1, 4):
        chunk_length(monkeypatch, length)
        chunks = vae.encode_stream(video.unbind(1), posterior=torch.Generator().manual_seed(5))
        assert relative(torch.cat(list(chunks), 1), wanted) <= 1e-12


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).double().norm() / wanted.double().norm())


@torch.no_grad()
def test_slices_of_a_batch_and_clamping():
    vae = random_vae(TINY, torch.float64)
    video = torch.stack([clip(TINY, 5, dtype=torch.float64) * scale for scale in (1, 0.1, -0.5)])
    one = working_bytes(TINY, "encoder", 1, 1, 1, 2, 8)
    assert slices(TINY, "encoder", (3, 3, 1, 2), 8, one) == Slices(1, 1, 1, 2)
    alone = torch.cat([vae.encode(v[None]) for v in video])
    assert_close(vae.encode(video, memory=one), alone, rtol=0, atol=1e-12)
    vae.decoder.head[2].weight.mul_(20)
    decoded = vae.decode(alone, memory=working_bytes(TINY, "decoder", 1, 1, 1, 2, 8), clamp=False)
    assert_close(decoded, torch.cat([vae.decode(z[None], clamp=False) for z in alone]), rtol=0, atol=1e-12)
    assert decoded.abs().max() > 1
    assert_close(vae.decode(alone), decoded.clamp(-1, 1), rtol=0, atol=1e-12)
    assert_close(torch.cat(list(vae.decode_stream(alone[0])), 1), vae.decode(alone)[0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_sampling_does_not_depend_on_the_chunks():
    vae, video = random_vae(TINY, torch.float64), clip(TINY, 9, dtype=torch.float64)[None]
    draws = [
        vae.encode(video, sample=True, generator=torch.Generator().manual_seed(3), memory=memory)
        for memory in (1 << 30, working_bytes(TINY, "encoder", 1, 1, 1, 2, 8))
    ]
    assert_close(*draws, rtol=0, atol=1e-12)


def peak(work, tmp_path) -> int:
    """Bytes that torch's allocator held at the most, above what it held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = sorted((e["ts"], e["args"]) for e in events if e["name"] == "[memory]")
    before = events[0][1]["Total Allocated"] - events[0][1]["Bytes"]
    return max(args["Total Allocated"] for _, args in events) - before


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@torch.no_grad()
def test_memory_does_not_grow_with_the_clip(side, tmp_path):
    """A source that makes frames as they are asked for, a consumer that keeps none; chunks of 8 latent frames."""
    vae, frame, latent = random_vae(TINY), clip(TINY, 1)[:, 0], torch.zeros(3, 2, 1, 2)

    def work(frames: int) -> None:
        if side == "encoder":
            results = vae.encode_stream(frame.clone() for _ in range(frames))
        else:
            results = vae.decode_stream(latent.clone() for _ in range(frames // 4))
        for _ in results:
            pass

    work(5)  # what is allocated once
    assert peak(lambda: work(201), tmp_path) <= 1.1 * peak(lambda: work(65), tmp_path)


@pytest.mark.parametrize("latents", [1, 3])
@pytest.mark.parametrize("config", [WAN21, WAN22], ids=["2.1", "2.2"])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
@torch.no_grad()
def test_working_bytes_are_about_what_a_chunk_takes(side, config, latents, tmp_path):
    config = replace(config, base_dim=16, decoder_base_dim=16)  # narrower ones, oneDNN pads to 16
    vae, cache = random_vae(config), CausalCache()
    run, size = vae.decode_raw, (4, 4)
    if side == "encoder":
        run, size = vae.encode_moments, (4 * config.stride[1], 4 * config.stride[2])
    run(torch.zeros(1, 3, 1, *size), cache)
    kept = sum(tensor.nbytes for tensor in cache.values())  # of one frame; the next chunk's are of two
    chunk = torch.zeros(1, 3, latents if side == "decoder" else 4 * latents, *size)
    ratio = (kept + peak(lambda: run(chunk, cache), tmp_path)) / working_bytes(config, side, 1, latents, 4, 4, 4)
    assert 0.5 < ratio < 1.35


def test_a_consumer_that_stops_half_way_leaks_nothing():
    vae, made = random_vae(TINY), []

    def source():
        for _ in range(1001):
            frame = torch.zeros(3, *TINY.stride[1:])
            made.append(weakref.ref(frame))
            yield frame

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    before = tensors()
    frames = source()
    stream = vae.encode_stream(frames)
    next(stream), next(stream)
    assert len(made) < 200
    decoded = vae.decode_stream(torch.zeros(3, 100, 1, 1))
    next(decoded), next(decoded)
    stream.close(), decoded.close()
    del stream, decoded
    assert all(ref() is None for ref in made[:-1])
    frames.close()
    assert tensors() == before
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "no frames .* Give at least one"),
        ([torch.zeros(3, 4, 4)] * 6, "nearest are 5 and 7"),
        ([torch.zeros(3, 4, 5)], "Nearest: 4x4 or 6x4"),
        ([torch.zeros(3, 4, 4, dtype=torch.uint8)], r"frame 0 is torch.uint8.* / 127.5 - 1"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), torch.full((3, 4, 4), float("nan"))], "frame 2 has NaN"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 4, 6)], r"frame 1 has shape \(3, 4, 6\)"),
        ([torch.zeros(4, 4, 3)], r"frames are \(3, H, W\)"),
        ([torch.full((3, 4, 4), 200.0)], "200"),
    ],
)
def test_encoding_says_what_is_wrong_with_the_frames(frames, words):
    with pytest.raises(StditError, match=words):
        list(random_vae(TINY).encode_stream(iter(frames)))


def test_decoding_says_what_is_wrong_with_the_latents():
    vae = random_vae(TINY)
    with pytest.raises(StditError, match="the iterator was empty"):
        list(vae.decode_stream(iter([])))
    with pytest.raises(StditError, match=r"\(3, n, H', W'\)"):
        list(vae.decode_stream(torch.zeros(1, 3, 1, 2, 2)))
    with pytest.raises(StditError, match=r"\(3, n, H', W'\)"):
        list(vae.decode_stream(torch.zeros(3, 0, 2, 2)))
    first = torch.zeros(3, 2, 2, 4)
    for other, words in (
        (torch.zeros(3, 1, 2, 5), "chunk 1: latents of 5x2, torch.float32, those before of 4x2, torch.float32"),
        (torch.zeros(3, 1, 3, 4), "chunk 1: latents of 4x3"),
        (first.double(), "chunk 1: latents of 4x2, torch.float64, those before of 4x2, torch.float32"),
        (first.int(), "chunk 1: .* torch.int32: a stream of latents is floats"),
        (first[0], "chunk 1: latents of shape .2, 2, 4."),
    ):
        stream = vae.decode_stream(iter([first, other]))
        frames = next(stream).shape[1] + next(stream).shape[1]  # what came before the mistake
        assert frames == 3
        with pytest.raises(StditError, match=words):
            next(stream)


def test_tiles_cover_and_their_weights_sum_to_one():
    for size, tile in [(17, 16), (33, 16), (40, 24), (90, 33), (9, 16)]:
        found = spans(size, tile)
        assert found[0][0] == 0 and found[-1][1] == size
        assert all(b - a == min(tile, size) for a, b in found)
        assert all(a[1] - b[0] >= tiles.OVERLAP for a, b in itertools.pairwise(found))
        total = torch.zeros(size * 4, dtype=torch.float64)
        for (a, b), weight in zip(found, blend_weights(found, 4)):
            total[a * 4 : b * 4] += weight
        assert_close(total, torch.ones_like(total))


PLAIN = VaeConfig(base_dim=2, dim_mult=(1,), num_res_blocks=1, temporal_downsample=(), z_dim=1)


@torch.no_grad()
def test_tiles_are_the_whole_where_their_margin_covers_the_convolutions(monkeypatch):
    """The attention among all positions of a frame is not cut; a tile's convolutions reach 3 (encoder) and 5 far."""
    vae = random_vae(PLAIN, torch.float64)
    video = clip(PLAIN, 2, 26, 21, torch.float64)[None]
    whole = vae.encode(video)
    decoded = vae.decode(whole, clamp=False)
    monkeypatch.setattr(autoencoder, "slices", lambda *_: Slices(1, 1, 16, 18))
    for overlap, margin, least, most in ((8, 2, 1e-9, 0.1), (12, 5, 0, 1e-12)):
        monkeypatch.setattr(tiles, "OVERLAP", overlap)
        monkeypatch.setattr(tiles, "MARGIN", margin)
        assert least <= relative(vae.encode(video), whole) <= most
        assert least <= relative(vae.decode(whole, clamp=False), decoded) <= most
        streamed = torch.cat(list(vae.encode_stream(video[0].unbind(1))), 1)
        assert_close(streamed, vae.encode(video)[0], rtol=0, atol=1e-12)
        streamed = torch.cat(list(vae.decode_stream(whole[0], clamp=False)), 1)
        assert_close(streamed, vae.decode(whole, clamp=False)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_tiles_are_as_small_as_the_memory_wants(side):
    config, shape = PRESETS["wan2.1"], (1, 2, 40, 34)

    def takes(rows: int, columns: int) -> int:
        return coarse_bytes(config, side, 1, *shape[1:], 4) + working_bytes(config, side, 1, 1, rows, columns, 4)

    assert slices(config, side, shape, 4, takes(16, 24)) == Slices(1, 1, 16, 21)
    least = takes(16, 16)
    assert slices(config, side, shape, 4, least) == Slices(1, 1, 16, 16)
    for frames, budget in ((2, least - 1), (0, least)):  # a stream keeps the past of all tiles: it takes more
        with pytest.raises(StditError, match="Give at least as many"):
            slices(config, side, (1, frames, *shape[2:]), 4, budget)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("frames", [0, 9])
def test_the_least_memory_that_an_error_names_is_the_least(side, frames):
    """Of a stream, too, which keeps the past of all tiles, what they share twice."""
    config, shape = PRESETS["toy"], (1, frames, 60, 80)
    with pytest.raises(StditError, match=r"takes (\d+) bytes for 80x60 latents") as said:
        slices(config, side, shape, 4, 1)
    least = int(re.search(r"takes (\d+)", str(said.value))[1])
    assert slices(config, side, shape, 4, least)
    with pytest.raises(StditError):
        slices(config, side, shape, 4, least - 1)


@torch.no_grad()
def test_latents_given_whole_are_decoded_where_a_stream_of_them_would_not_fit():
    config = replace(TINY, base_dim=8)
    vae, latents = random_vae(config), torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    memory = coarse_bytes(config, "decoder", 1, *latents.shape[1:], 4)
    memory += working_bytes(config, "decoder", 1, 1, 16, 16, 4)
    with pytest.raises(StditError, match="Give at least as many"):
        list(vae.decode_stream(iter([latents]), memory=memory))
    (found,) = vae.decode_stream(latents, memory=memory)
    assert torch.equal(found, vae.decode(latents[None], memory=memory)[0])


@torch.no_grad()
def test_a_memory_that_is_too_small_is_said():
    with pytest.raises(StditError, match="Give at least as many"):
        random_vae(TINY).encode(clip(TINY, 5)[None], memory=1000)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@torch.no_grad()
def test_tiles_keep_to_the_memory(side, tmp_path):
    config, shape = replace(TINY, base_dim=16, z_dim=16, latents_mean=None, latents_std=None), (1, 3, 24, 24)
    vae = random_vae(config)  # of fewer channels, oneDNN's convolutions take other ways
    given = clip(config, 5, 24, 24)[None] if side == "encoder" else torch.zeros(1, 16, 3, 24, 24)
    run = vae.encode if side == "encoder" else vae.decode
    memory = coarse_bytes(config, side, 1, *shape[1:], 4) + working_bytes(config, side, 1, 1, 16, 16, 4)
    assert slices(config, side, shape, 4, memory) == Slices(1, 1, 16, 16)
    out = run(given, memory=memory).nbytes  # is not counted
    assert 0.4 * memory < peak(lambda: run(given, memory=memory), tmp_path) - out < 1.35 * memory
