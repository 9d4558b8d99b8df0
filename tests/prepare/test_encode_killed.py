"""`stdit data encode` killed at any moment and continued, by any number of ranks: the same files, byte for byte."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

import numpy as np
import pytest
import torch
from children import LIMIT, Child, finish_together
from doubles import FakeText, FakeVae

import stdit
from stdit import files as files_module
from stdit.cli.main import app, run_command
from stdit.data.config import DataConfig
from stdit.data.decode.write import write_video
from stdit.data.load.cache import Cache, latent_settings
from stdit.data.manifest import Caption, Clip, Manifest, clip_id
from stdit.data.parts import WHOLE, Part
from stdit.data.plan.buckets import assign
from stdit.prepare import encode as encode_module
from stdit.prepare.encode import merge_caches

CONFIG = DataConfig(shapes=["16x16x5", "32x16x5"], fps=8.0, max_crop=0.7, crops=2, workers=0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for number in range(9):
        width = 24 if number % 3 else 48
        frames = np.random.default_rng(number).integers(0, 256, (9, 16, width, 3), dtype=np.uint8)
        path = str(folder / f"{number}.mp4")
        write_video(path, frames, 8)
        sha256 = f"{number:064x}"
        rows.append(
            Clip(clip_id(sha256, 0, 1), path, (Caption(f"clip {number}"),), 9, 8.0, width, 16, 0.0, 1.125, sha256)
        )
    return Manifest.of(rows, folder)


def encode(clips, out, part=WHOLE):
    return encode_module.encode_manifest(
        clips, assign(clips, CONFIG), CONFIG, FakeVae(), FakeText(), out,
        vae_id="vae", text_id={"text_encoder": "text"}, batch=2, clips_per_shard=2, part=part,
    )  # fmt: skip


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def finished(folder):
    return {path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}


def die_at(moment):
    """Kills this process at the n-th of the moments that matter: an encoding, or a file on its way to its place."""
    left = [moment]

    def counted(function):
        def call(*arguments, **options):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    FakeVae.encode = counted(FakeVae.encode)
    files_module.sync = counted(files_module.sync)  # the file is written, under its other name
    files_module.os.replace = counted(os.replace)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_ten_times_it_ends_in_the_same_bytes(clips, tmp_path, seed):
    """Continued in changing numbers of parts, killed between any two moments."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    encode(clips, whole)
    drawn = random.Random(seed)
    for _ in range(10):
        of = drawn.choice([1, 2])
        number, moment = drawn.randint(1, of), drawn.randint(1, 7)
        child = os.fork()
        if not child:
            try:
                die_at(moment)
                encode(clips, killed, Part(number, of))
            finally:
                os._exit(0)  # this part has nothing left to do
        os.waitpid(child, 0)
    left = contents(killed)
    assert left.keys() != contents(whole).keys()  # killed in the middle
    encode(clips, killed, Part(1, 2))
    merge_caches(killed, encode(clips, killed, Part(2, 2)).caches)
    assert contents(killed) == contents(whole)
    keys = Cache.open(killed, latent_settings(CONFIG, "vae")).index.column("key").to_pylist()
    assert len(keys) == len(set(keys)) == 9 * CONFIG.crops


SHAPES = [f"{width}x{height}x5" for width in (16, 24, 32, 40) for height in (16, 24, 32)]


@pytest.fixture
def command(tmp_path):
    """A function that starts `stdit data encode` of 60 clips in 12 shapes with a small causal VAE."""
    from stdit.vae.autoencoder import CausalVAE, VaeConfig

    videos = tmp_path / "videos"
    videos.mkdir()
    lines = ["file,caption"]
    for number in range(60):
        width, height, _ = map(int, SHAPES[number % len(SHAPES)].split("x"))
        frames = np.random.default_rng(number).integers(0, 256, (6, height, width, 3), dtype=np.uint8)
        write_video(videos / f"{number}.mp4", frames, 8)
        lines.append(f"{number}.mp4,clip {number}")
    (videos / "captions.csv").write_text("\n".join(lines))
    assert run_command(app, ["data", "scan", str(videos), "--out", str(videos / "m.parquet")], "stdit") == 0
    torch.manual_seed(0)
    vae = CausalVAE(VaeConfig(base_dim=8, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,), z_dim=2))
    stdit.save_vae(vae, tmp_path / "vae")
    data = {"shapes": SHAPES, "fps": 8, "max_crop": 0.1}
    (tmp_path / "c.yaml").write_text(json.dumps({"data": data, "vae": {"path": str(tmp_path / "vae")}}))

    def start(out, rank=0, ranks=1):
        arguments = [str(videos / "m.parquet"), "--config", str(tmp_path / "c.yaml"), "--out", str(out), "--batch", "1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(ranks)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        code = (
            "import sys; from stdit.cli.main import app, run_command; sys.exit(run_command(app, sys.argv[1:], 'stdit'))"
        )
        return Child([sys.executable, "-c", code, "data", "encode", *arguments], environment)

    return start


@pytest.mark.slow
def test_the_command_killed_ten_times_and_on_two_ranks(command, tmp_path):
    command(tmp_path / "whole").finish()
    wanted = contents(tmp_path / "whole")
    assert len(wanted) == 2 * len(SHAPES) + 2
    ranks = [command(tmp_path / "two", rank, 2) for rank in (0, 1)]
    finish_together(ranks)
    assert run_command(app, ["data", "merge", str(tmp_path / "two")], "stdit") == 0
    assert contents(tmp_path / "two") == wanted
    out, drawn, killed = tmp_path / "killed", random.Random(0), 0
    out.mkdir()
    while killed < 10:
        before = finished(out)
        process, deadline = command(out), time.monotonic() + LIMIT
        # a random moment after it has begun to write: most of the time before is Python's imports
        while process.popen.poll() is None and finished(out) <= before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(drawn.uniform(0, 0.1))
        process.kill()
        if process.status() != -signal.SIGKILL:
            break
        killed += 1
    print(f"killed {killed} times, with {len(contents(out))} of {len(wanted)} files")
    assert killed == 10
    command(out).finish()
    assert contents(out) == wanted
