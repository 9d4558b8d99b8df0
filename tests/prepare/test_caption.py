"""Captioning a manifest: the right frames, every clip once, killed or not the same manifest."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pyarrow as pa
import pytest

from stdit.data.decode.video import read_frames
from stdit.data.decode.write import write_video
from stdit.data.manifest import Caption, Clip, Manifest, clip_id, read_manifest
from stdit.errors import StditError
from stdit.prepare import caption as caption_module
from stdit.prepare.caption import caption_manifest
from stdit.text.captioner import Refused


class FakeCaptioner:
    """Says how many frames it sees and their mean; keeps what it was shown. refuses: fails on clips so wide."""

    def __init__(self, most=4, refuses=(), silent=()):
        self.most, self.refuses, self.silent, self.shown = most, refuses, silent, []

    def frames(self, wanted):
        return min(wanted, self.most)

    def caption(self, clips, fps):
        self.shown.append([(clip, rate) for clip, rate in zip(clips, fps)])
        if any(clip.shape[2] in self.refuses for clip in clips):
            raise Refused("the model fails on it.")
        return ["" if c.shape[2] in self.silent else f"{len(c)} frames, mean {c.mean():.2f}" for c in clips]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Seven videos of 9 frames, the fourth broken, and two images; one has a caption already."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for number in range(9):
        image, width = number in (2, 6), 16 + 16 * (number % 4)
        frames = np.random.default_rng(number).integers(0, 256, (1 if image else 9, 16, width, 3), dtype=np.uint8)
        path = folder / f"{number}.{'png' if image else 'mp4'}"
        if image:
            from PIL import Image

            Image.fromarray(frames[0]).save(path)
        else:
            write_video(path, frames, 8)
        sha256, end = f"{number:064x}", 0.0 if image else 1.125
        captions = (Caption("by hand", 2.0),) if number == 1 else ()
        fps = 1.0 if image else 8.0
        rows.append(Clip(clip_id(sha256, 0, end), str(path), captions, len(frames), fps, width, 16, 0.0, end, sha256))
    (folder / "3.mp4").write_bytes(b"broken")
    manifest = Manifest.of(rows, folder)
    return Manifest(manifest.table.append_column("score", pa.array(np.arange(9.0))), folder, "clips.parquet")


def caption(clips, out, captioner=None, **options):
    return caption_manifest(clips, captioner or FakeCaptioner(), out, **{"maker": "fake", "frames": 3, **options})


def test_frames_are_the_middles_of_equal_parts(clips, tmp_path):
    for wanted, places, rate in (
        (3, [1, 4, 7], 8 / 3),
        (1, [4], 8 / 9),
        (9, list(range(9)), 8.0),
        (99, list(range(9)), 8.0),
    ):
        captioner = FakeCaptioner(most=99)
        caption(clips, tmp_path / f"{wanted}.parquet", captioner, frames=wanted)
        shown = [one for batch in captioner.shown for one in batch]
        assert len(shown) == 8 and [len(one) for one, _ in shown[:2]] == [1, 1]  # images come first
        videos = [clip for clip in clips if not clip.image and not clip.path.endswith("3.mp4")]
        for (frames, fps), clip in zip(shown[2:], videos):
            assert (frames == read_frames(clip.path, 9)[places]).all() and fps == pytest.approx(rate)


def test_large_frames_are_scaled_down(tmp_path):
    path = tmp_path / "large.png"
    from PIL import Image

    Image.new("RGB", (2560, 90), "red").save(path)
    captioner = FakeCaptioner()
    caption(Manifest.of([Clip("a", str(path), (), 1, 1.0, 2560, 90, 0.0, 0.0, "a")]), tmp_path / "o.parquet", captioner)
    assert captioner.shown[0][0][0].shape == (1, 45, 1280, 3)


def test_captions_beside_or_in_place_of_those_there(clips, tmp_path):
    done = caption(clips, tmp_path / "beside.parquet", weight=0.5, batch=2)
    assert (done.captioned, done.reused) == (8, 0)
    assert [(os.path.basename(one.file), one.reason) for one in done.failures] == [("3.mp4", "not_media")]
    found = read_manifest(tmp_path / "beside.parquet")
    assert found.hash == done.manifest.hash and found.column("score").tolist() == list(range(9))
    assert [clip.id for clip in found] == [clip.id for clip in clips]
    frames = read_frames(clips[1].path, 9)[[1, 4, 7]]
    mine = Caption(f"3 frames, mean {frames.mean():.2f}", 0.5)
    assert found[1].captions == (Caption("by hand", 2.0), mine) and found[3].captions == ()
    # in place, and from what the call before has made; a text that is there already is not put there twice
    again = caption(found, tmp_path / "beside.parquet", replace=True, weight=0.5)
    assert (again.captioned, again.reused) == (0, 8) and again.manifest[1].captions == (mine,)
    assert caption(again.manifest, tmp_path / "beside.parquet").manifest[1].captions == (mine,)
    # made by another model or prompt they are made again
    other = caption(clips, tmp_path / "beside.parquet", FakeCaptioner(1), maker="other")
    assert other.captioned == 8 and other.manifest[1].captions[1].text.startswith("1 frames")


def test_what_the_model_fails_on_is_named_and_the_rest_of_its_batch_is_not_lost(clips, tmp_path):
    done = caption(clips, tmp_path / "o.parquet", FakeCaptioner(refuses=(48,), silent=(64,)), batch=4)
    reasons = {os.path.basename(one.file): one.reason for one in done.failures}
    assert reasons == {"2.png": "refused", "6.png": "refused", "3.mp4": "not_media", "7.mp4": "no_caption"}
    assert done.captioned == 5 and done.manifest[2].captions == ()
    assert caption(clips, tmp_path / "o.parquet", batch=4).captioned == 3  # tried again


def test_where_no_clip_can_be_captioned(clips, tmp_path):
    captioner = FakeCaptioner(refuses=(16, 32, 48, 64))
    with pytest.raises(StditError, match=r"no clip of clips.parquet .*2.png: the model fails on it"):
        caption(clips, tmp_path / "o.parquet", captioner)
    assert len(captioner.shown) == 3  # no use in going on
    assert not (tmp_path / "o.parquet").exists()
    with pytest.raises(StditError, match="weight is positive"):
        caption(clips, tmp_path / "o.parquet", weight=0.0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", [1, 2, 4, 5, 6, 7])
def test_killed_and_continued_the_manifest_is_the_same(clips, tmp_path, moment):
    """At the n-th of the moments that matter: a caption being made, and one being written down."""
    whole = caption(clips, tmp_path / "whole.parquet", batch=2)
    out = tmp_path / "killed.parquet"
    child = os.fork()
    if not child:
        try:
            left = [moment]

            def counted(function):
                def call(*arguments):
                    left[0] -= 1
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*arguments)

                return call

            FakeCaptioner.caption = counted(FakeCaptioner.caption)
            inner = caption_module.STORAGE.journal

            class Counted:
                def __init__(self, path):
                    self.inner = inner(path)

                def __enter__(self):
                    lines, add = self.inner.__enter__()
                    return lines, counted(add)

                def __exit__(self, *arguments):
                    return self.inner.__exit__(*arguments)

            caption_module.STORAGE.journal = Counted
            caption_module.READER = caption_module.READER.__class__()
            caption(clips, out, batch=2)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and not out.exists()
    written = (tmp_path / "killed.captions.jsonl").read_text().split("\n")
    kept = [json.loads(line) for line in written if line]
    with open(tmp_path / "killed.captions.jsonl", "a") as file:
        file.write('{"id": "cut o')
    captioner = FakeCaptioner()
    done = caption(clips, out, captioner, batch=2)
    assert done.reused == len(kept) == {1: 0, 2: 0, 4: 2, 5: 4, 6: 4, 7: 5}[moment]
    assert sum(map(len, captioner.shown)) == 8 - len(kept)  # none is captioned twice
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert done.manifest.hash == whole.manifest.hash
