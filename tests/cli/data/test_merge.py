"""Scan, caption and encode in parts, merged: the bytes of one part, whatever was killed in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tarfile
import time

import numpy as np
import pytest
import tiny_captioners
import torch
from children import LIMIT, Child

import stdit
from stdit.cli.main import app, run_command
from stdit.data.decode.write import write_video

REAL = (
    "asl/yes.mkv", "mixed/discard_first_keyframe.mp4", "mixed/corrupted.mp4", "mixed/result.webm",
    "mixed/sample_audio_only.mp4",
)  # fmt: skip


def run(*words):
    return run_command(app, [str(word) for word in words], "stdit")


def start(*words):
    code = "import sys; from stdit.cli.main import app, run_command; sys.exit(run_command(app, sys.argv[1:], 'stdit'))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return Child([sys.executable, "-c", code, *map(str, words)], environment)


def start_and_kill(folder, is_time, *words):
    """Starts a command that writes to a folder, and kills it once `is_time`; again from nothing if it was faster."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        child, deadline = start(*words), time.monotonic() + LIMIT
        while child.popen.poll() is None and not is_time():
            assert time.monotonic() < deadline, child.output
            time.sleep(0.002)
        child.kill()
        if child.status() == -signal.SIGKILL:
            return
        assert child.status() == 0, child.output
    raise AssertionError("it ended ten times before it could be killed")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(videos, tmp_path):
    """Real files, good and bad ones, one of them twice, one without a caption, two of them in a tar; and toy clips."""
    folder = tmp_path / "clips"
    lines = ["file,caption", "gone.mp4,nobody", ",nothing"]
    for name in REAL:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(videos / name, folder / name)
        lines += [f"{name},real {name}"] if "discard" not in name else []
    shutil.copyfile(videos / "asl/yes.mkv", folder / "copy.mkv")
    lines.append("copy.mkv,said once more")
    for number in range(6):
        frames = np.random.default_rng(number).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
        write_video(folder / f"{number}.mp4", frames, 8)
        lines.append(f"{number}.mp4,clip {number}")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for number in (4, 5):
            tar.add(folder / f"{number}.mp4", f"in/{number}.mp4")
            (folder / f"{number}.mp4").unlink()
    lines[-2:] = ["shard.tar/in/4.mp4,clip 4", "shard.tar/in/5.mp4,clip 5"]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_scan_in_parts_is_the_scan_in_one(folder, tmp_path, capsys):
    outs = {name: tmp_path / name / "m.parquet" for name in ("one", "three", "killed")}
    options = ["--scores", "--workers", 2, "--timeout", 600]
    assert run("data", "scan", folder, "--out", outs["one"], *options) == 0
    wanted = contents(tmp_path / "one")
    assert set(wanted) == {"m.parquet", "m.skipped.jsonl", "m.probed.jsonl"}
    skipped = [json.loads(line)["reason"] for line in wanted["m.skipped.jsonl"].splitlines()]
    assert sorted({*skipped}) == ["bad_row", "duplicate", "empty", "missing", "no_caption", "no_video"]

    def part(name, number):
        return ["data", "scan", folder, "--out", outs[name], *options, "--part", f"{number}/3"]

    for number in (3, 1, 2):
        capsys.readouterr()
        assert run("data", "merge", outs["three"]) == 1
        said = capsys.readouterr().err
        assert ("no part has finished" if number == 3 else f"--part {number}/3") in said
        assert run(*part("three", number)) == 0
        said = capsys.readouterr()
        assert f"part {number}/3, chosen by --part" in said.err and f"stdit data merge {outs['three']}" in said.out
        assert not outs["three"].exists()

    log = tmp_path / "killed" / "m.part-2-of-3.probed.jsonl"
    some_are_known = lambda: log.is_file() and log.read_bytes().count(b"\n") > 1  # noqa: E731
    start_and_kill(tmp_path / "killed", some_are_known, *part("killed", 2))
    for number in (1, 2, 3):
        assert run(*part("killed", number)) == 0
    for name in ("three", "killed"):
        assert run("data", "merge", outs[name], "--json", "--workers", 2) == 0
        assert contents(tmp_path / name) == wanted
    capsys.readouterr()
    assert run("data", "scan", folder, "--out", outs["three"], *options, "--json") == 0  # knows all
    answer = json.loads(capsys.readouterr().out)
    assert answer["reused"] == len(wanted["m.probed.jsonl"].splitlines()) - 1  # the tar has a line of its own
    assert contents(tmp_path / "three") == wanted
    total = 0
    for number in (1, 2, 3):  # and so do new parts, but for the file that is missing
        assert run(*part("three", number), "--json") == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["part"] == number
        total += answer["files"] - answer["reused"]
    assert total == 1


def test_a_scan_of_other_settings_is_not_merged(folder, tmp_path, capsys):
    out = tmp_path / "m.parquet"
    for number, more in ((1, []), (2, ["--quick"])):
        assert run("data", "scan", folder, "--out", out, "--part", f"{number}/2", *more) == 0
    assert run("data", "merge", out) == 1
    assert "part 2/2 was made with verify False, part 1/2 with True" in capsys.readouterr().err
    assert run("data", "scan", folder, "--out", out, "--part", "3/2") == 1
    assert "--part 3/2: it must be I/N" in capsys.readouterr().err


def test_an_encoding_in_parts_is_the_encoding_in_one(folder, tmp_path, monkeypatch, capsys):
    """By --part, by the tasks of a Slurm array, and by the ranks of torchrun."""
    from stdit.vae.autoencoder import CausalVAE, VaeConfig

    torch.manual_seed(0)
    vae = CausalVAE(VaeConfig(base_dim=4, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,), z_dim=2))
    stdit.save_vae(vae, tmp_path / "vae")
    assert run("data", "scan", folder, "--out", tmp_path / "m.parquet") == 0
    shapes = ["16x16x5", "32x32x5", "64x48x9"]
    config = {"data": {"shapes": shapes, "fps": 8, "max_crop": 0.9}, "vae": {"path": str(tmp_path / "vae")}}
    (tmp_path / "c.yaml").write_text(json.dumps(config))

    def command(out, *options):
        words = [tmp_path / "m.parquet", "--config", tmp_path / "c.yaml", "--out", tmp_path / out, "--batch", 2]
        return ["data", "encode", *words, *options]

    def encode(out, *options):
        capsys.readouterr()
        assert run(*command(out, *options)) == 0
        return capsys.readouterr()

    encode("one")
    wanted = contents(tmp_path / "one")
    assert sum(name.endswith("index.arrow") for name in wanted) == 1
    assert "part 2/3 of" in encode("parts", "--part", "2/3").out
    assert run("data", "merge", tmp_path / "parts") == 1
    said = capsys.readouterr().err
    assert "2 of 3 parts have not finished" in said and f"--out {tmp_path / 'parts'} --batch 2 --part 3/3" in said
    encode("parts", "--part", "3/3")
    encode("parts", "--part", "1/3")
    a_shard_is_there = lambda: any((tmp_path / "killed").rglob("[!.]*.safetensors"))  # noqa: E731
    start_and_kill(tmp_path / "killed", a_shard_is_there, *command("killed", "--part", "1/3"))
    for number in (3, 1, 2):
        encode("killed", "--part", f"{number}/3")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert f"part {rank + 1}/2, chosen by torchrun's RANK" in encode("ranks").err
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    for task in (5, 4):
        for name, value in (("ID", task), ("MIN", 4), ("MAX", 5), ("COUNT", 2)):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        assert f"part {task - 3}/2, chosen by Slurm's SLURM_ARRAY_TASK_ID" in encode("array").err
    for name in ("parts", "killed", "ranks", "array"):
        assert run("data", "merge", tmp_path / name, "--json") == 0
        answer = json.loads(capsys.readouterr().out)
        assert contents(tmp_path / name) == wanted
        assert [one["failed"] for one in answer["caches"].values()] == [0] and not answer["failures"]


def test_captions_in_parts_are_the_captions_in_one(tmp_path, capsys):
    for number in range(5):
        frames = np.random.default_rng(number).integers(0, 256, (6, 32, 32 + 16 * number, 3), dtype=np.uint8)
        write_video(tmp_path / f"{number}.mp4", frames, 8)
    assert run("data", "scan", tmp_path, "--out", tmp_path / "m.parquet", "--allow-uncaptioned") == 0
    (tmp_path / "4.mp4").unlink()
    tiny_captioners.save("qwen2_vl", tmp_path / "model")

    def command(out, *more):
        words = [tmp_path / "m.parquet", "--model", tmp_path / "model", "--out", tmp_path / out / "m.parquet"]
        words += ["--frames", 2, "--max-new-tokens", 4, "--device", "cpu"]
        return ["data", "caption", *words, *more]

    def caption(out, *more):
        assert run(*command(out, *more)) == 0

    caption("one")
    for number in (2, 3, 1):
        caption("three", "--part", f"{number}/3")
        assert not (tmp_path / "three" / "m.parquet").exists()
    log = tmp_path / "killed" / "m.part-1-of-3.captions.jsonl"
    one_is_known = lambda: log.is_file() and b"\n" in log.read_bytes()  # noqa: E731
    start_and_kill(tmp_path / "killed", one_is_known, *command("killed", "--part", "1/3"))
    for number in (1, 2, 3):
        caption("killed", "--part", f"{number}/3")
    wanted = (tmp_path / "one" / "m.parquet").read_bytes()
    for name in ("three", "killed"):
        capsys.readouterr()
        assert run("data", "merge", tmp_path / name / "m.parquet") == 0
        assert "4 of 5 clips have a new caption, of 3 parts" in capsys.readouterr().out
        assert (tmp_path / name / "m.parquet").read_bytes() == wanted
        assert {path.name for path in (tmp_path / name).iterdir()} == {"m.parquet", "m.captions.jsonl"}
        caption(name)  # all is known
        assert (tmp_path / name / "m.parquet").read_bytes() == wanted
