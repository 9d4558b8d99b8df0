from __future__ import annotations

import json
from dataclasses import replace

import pyarrow as pa
import pytest

from stdit.cli.data.plan import advice, measured_rate
from stdit.cli.main import app, run_command
from stdit.data.manifest import Caption, Clip, Manifest, clip_id, read_manifest, write_manifest
from stdit.data.plan.buckets import assign
from stdit.data.remote.local_cache import LocalCache
from stdit.data.remote.storage import STORAGE
from stdit.errors import StditError
from stdit.models.transformer import TransformerConfig, cost_coefficients
from stdit.shapes import VideoShape
from stdit.shipped import CONFIGS
from stdit.training.config import load_config
from stdit.training.setup.footprint import build_on_meta
from stdit.training.setup.resolve import resolve

CONFIG = """
data: {shapes: [64x64x9, 96x64x9, 64x64, 64x64x33], fps: 8}
plan: {largest_clips_per_step: 3}
"""


def clip(number: int, frames: int, width: int, height: int) -> Clip:
    sha = f"{number:064x}"
    end = 0.0 if frames == 1 else frames / 8
    caption = (Caption("a clip"),)
    return Clip(clip_id(sha, 0, end), f"{number}.mp4", caption, frames, 8.0, width, height, 0.0, end, sha)


@pytest.fixture
def files(tmp_path):
    kinds = [(12, 64, 64)] * 20 + [(9, 192, 128)] * 11 + [(1, 80, 80)] * 30 + [(5, 64, 64)] * 2 + [(12, 32, 32)]
    clips = [clip(number, *kind) for number, kind in enumerate(kinds)]
    write_manifest(Manifest.of(clips, tmp_path), tmp_path / "clips.parquet")
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def plan(files, *arguments) -> int:
    args = ["data", "plan", str(files / "clips.parquet"), "--config", str(files / "config.yaml"), *arguments]
    return run_command(app, args, prog="stdit")


def test_captions_that_are_cut_are_told(files, capsys):
    long = " ".join(["word"] * 9)
    clips = [clip(1, 12, 64, 64), replace(clip(2, 12, 64, 64), captions=(Caption(long), Caption("short")))]
    write_manifest(Manifest.of(clips, files), files / "clips.parquet")
    text = ("text.trained={dim: 64}", "text.padding=6")
    assert plan(files, *text) == 0
    told = "1 of 3 captions have more than 6 tokens and are cut. The longest has 10 tokens, and 6 are used: 'word word"
    assert told in capsys.readouterr().out
    assert plan(files, *text, "--json") == 0
    found = json.loads(capsys.readouterr().out)["long_captions"]
    assert (found["count"], found["longest"]["dropped"]) == (1, "word word word word")
    assert plan(files) == 0 and "tokens and are cut" not in capsys.readouterr().out


def test_json_says_what_training_will_do(files, capsys):
    assert plan(files, "--json", "--world-size", "2", "--picture", str(files / "plan.png")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clips"] == 64 and found["planned"] == 61
    assert found["dropped"] == {"short": 2, "small": 1}
    assert {b["shape"]: b["clips"] for b in found["buckets"]} == {
        "64x64x9": 20,
        "96x64x9": 11,
        "64x64x1": 30,
        "64x64x33": 0,
    }
    config = resolve(load_config(files / "config.yaml"))
    shapes = assign(read_manifest(files / "clips.parquet"), config.data).shapes
    for bucket, shape in zip(found["buckets"], shapes):
        n = shape.grid((4, 8, 8), (1, 2, 2)).tokens
        linear, quadratic = build_on_meta(config).cost
        assert bucket["tokens"] == n and bucket["work"] == linear * n + quadratic * n * n
    total = sum(b["clips"] * b["work"] for b in found["buckets"])
    assert sum(b["share_of_work"] for b in found["buckets"]) == pytest.approx(1)
    assert found["steps_per_epoch"] * found["work_per_step"] == pytest.approx(total)
    assert found["measured_steps"] == found["steps_per_epoch"] and found["groups"] == 2
    assert 0.8 < found["balance_least"] <= found["balance"] <= found["balance_best"] <= 1
    assert found["fullest_pack"] <= found["tokens_per_pack"]
    assert (files / "plan.png").stat().st_size > 10_000


def test_the_plan_is_the_same_for_any_world_size(files, capsys):
    hashes = set()
    for size in ("1", "2", "8"):
        assert plan(files, "--json", "--world-size", size) == 0
        found = json.loads(capsys.readouterr().out)
        hashes.add((found["hash"], found["steps_per_epoch"]))
    assert len(hashes) == 1
    assert plan(files, "--json", "run.seed=1") == 0
    assert json.loads(capsys.readouterr().out)["hash"] not in {h for h, _ in hashes}


def test_ranks_that_share_packs_are_dealt_clips_as_one(files, capsys):
    found = []
    for settings in (["--world-size", "2"], ["--world-size", "4", "parallel.sequence_parallel=2"]):
        assert plan(files, "--json", "data.cache=latents", *settings) == 0
        found.append(json.loads(capsys.readouterr().out))
    apart, shared = found
    assert (apart["world_size"], shared["world_size"], shared["groups"]) == (2, 4, 2)
    same = ("groups", "hash", "balance", "balance_best", "fullest_pack", "tokens_per_pack", "micro_steps_per_step")
    assert [shared[name] for name in same] == [apart[name] for name in same]
    activations = [one["memory_per_rank"]["activations"] for one in found]
    assert activations[0] / 2 <= activations[1] < 0.6 * activations[0]
    assert plan(files, "--world-size", "4", "parallel.sequence_parallel=2") == 0
    assert "4 ranks, 2 to a pack" in capsys.readouterr().out


def test_tables_name_buckets_drops_and_empty_ones(files, capsys):
    assert plan(files, "--world-size", "2") == 0
    text = capsys.readouterr().out
    for part in (
        "Left out: 3 of 64 clips",
        "shorter than every shape",
        "64x64x9",
        "balance",
        "no clip goes to 64x64x33, in any epoch: remove shapes you do not need from data.shapes",
        "memory per rank",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.shapes=[512x512x9]"], "no step"),
        (["data.shapes=[65x64x9]"], "Nearest"),
        (["plan.tokens_per_pack=20"], "tokens_per_pack to"),
        (["data.shaps=[64x64]"], "Did you mean 'shapes'"),
        (["parallel.sequence_parallel=2", "--world-size", "3"], "sequence_parallel=2 does not divide 3 ranks"),
        (["vae.path=/no/such/vae"], "/no/such/vae"),
        (["model.preset=tyo"], "Did you mean 'toy'"),
        (["text.path=/no/such/text"], "/no/such/text"),
        (["model.norm=rms"], "run/model will hold it: layout 'diffusers' cannot hold norm=rms"),
        (["data.sources={'*': 0.001}", "--epoch", "1"], "--epoch 1 has no clip"),
        (["data.shapes=[00x64]"], "'00x64' is not a shape"),
        (["data.shapes=[64x64x9,16x16x65]", "data.stages=[{epochs: 1}, {area: 16x16}]"], "stage 2: the plan has no"),
        (["--picture", "."], "is a folder. Name the file in it"),
    ],
)
def test_what_is_wrong_is_said(files, arguments, message, capsys):
    assert plan(files, *arguments) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "error: " in error and message in error


def test_a_dropped_everything_shows_why(files, capsys):
    assert plan(files, "--json", "data.shapes=[512x512x9]") == 1
    assert "data.upscale" in capsys.readouterr().err


def test_costs_are_the_configs(files):
    config = resolve(load_config(files / "config.yaml", ["model.preset=1.3B", "model.layers=3", "vae.preset=wan2.1"]))
    found = build_on_meta(config)
    expected = TransformerConfig.preset("1.3B", layers=3)
    assert found.cost == cost_coefficients(expected) and found.tokens(VideoShape(9, 64, 96)) == 3 * 4 * 6
    config = resolve(load_config(files / "config.yaml", ["objective.kind=vae", "vae.temporal_downsample=[false,true]"]))
    found = build_on_meta(config)
    shape = config.data.video_shapes()[0]
    assert found.cost == (1, 0) and found.tokens(shape) == 64 * 64 * 9 and found.tokens(VideoShape(3, 64, 64))
    with pytest.raises(StditError, match="nearest are 1 and 5"):
        found_of = build_on_meta(resolve(load_config(files / "config.yaml", ["objective.kind=vae"])))
        found_of.tokens(VideoShape(3, 64, 64))


def test_costs_are_those_of_the_training(files, tmp_path):
    import torch

    from stdit.training.engine.parallel import World
    from stdit.training.setup.objective import make_objective
    from stdit.vae.autoencoder import CausalVAE, VaeConfig
    from stdit.weights.io import save_vae

    small = dict(base_dim=4, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,), z_dim=4)
    save_vae(CausalVAE(VaeConfig(**small)), tmp_path / "vae")
    overrides = [f"vae.path={tmp_path / 'vae'}", "model.dim=24", "model.heads=2", "model.layers=1", "model.ffn_dim=32"]
    config = resolve(load_config(files / "config.yaml", [*overrides, "text.trained={dim: 16, layers: 1, heads: 2}"]))
    world = World(0, 1, torch.device("cpu"))
    for kind in ("flow", "vae"):
        config.objective.kind = kind
        objective = make_objective(config, read_manifest(files / "clips.parquet"), world)
        found = build_on_meta(config)
        assert found.cost == objective.cost
        for shape in config.data.video_shapes():
            assert found.tokens(shape) == objective.tokens(shape)


@pytest.mark.parametrize("name", ["Stable Diffusion's", "LTX-Video's", "Cosmos's"])
def test_another_familys_vae_has_its_plan_and_memory(name, tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers", reason="pip install 'stdit[vaes]'")
    four, five = (8,) * 4, (1,) * 5
    made, tokens = {
        "Stable Diffusion's": (lambda: diffusers.AutoencoderKL(block_out_channels=(32,)), 9 * 32 * 32),
        "LTX-Video's": (
            lambda: diffusers.AutoencoderKLLTXVideo(
                block_out_channels=four, decoder_block_out_channels=four, layers_per_block=five,
                decoder_layers_per_block=five, latent_channels=6,
            ),
            2 * 1 * 1,
        ),
        "Cosmos's": (
            lambda: diffusers.AutoencoderKLCosmos(
                encoder_block_out_channels=four, decode_block_out_channels=four, num_layers=1
            ),
            2 * 4 * 4,
        ),
    }[name]  # fmt: skip
    vae = made()
    vae.save_pretrained(tmp_path / "vae")
    write_manifest(Manifest.of([clip(0, 10, 64, 64)], tmp_path), tmp_path / "clips.parquet")
    (tmp_path / "config.yaml").write_text("data: {shapes: [64x64x9], fps: 8}")
    assert plan(tmp_path, "--json", f"vae.path={tmp_path / 'vae'}") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["buckets"][0]["tokens"] == tokens
    memory = found["memory_per_rank"]
    assert memory["vae"] == 4 * sum(p.numel() for p in vae.parameters())
    assert memory["activations"] > 4 * 9 * 64 * 64 * 3  # the clip itself in fp32, at least


def test_a_manifest_may_be_at_a_url(files, tmp_path, monkeypatch, capsys):
    import fsspec

    monkeypatch.setattr(STORAGE, "local_cache", LocalCache(tmp_path / "copies", 1 << 30))
    fsspec.filesystem("memory").pipe("/m/clips.parquet", (files / "clips.parquet").read_bytes())
    command = ["data", "plan", "memory://m/clips.parquet", "--config", str(files / "config.yaml"), "--json"]
    assert run_command(app, command, prog="stdit") == 0
    assert json.loads(capsys.readouterr().out)["planned"] == 61


def test_any_path_can_be_told(tmp_path, capsys):
    """What looks like rich's markup too."""
    one = clip(0, 12, 64, 64)
    write_manifest(Manifest.of([replace(one, path="[/b][x].mp4")], tmp_path), tmp_path / "clips.parquet")
    (tmp_path / "config.yaml").write_text(CONFIG)
    assert plan(tmp_path, "data.sources={'[/b][x]*': 2}") == 0
    assert "[/b][x]*" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["toy/vae.yaml", "vae/asl.yaml"])
def test_a_vae_on_crops_has_the_plan_of_its_training(files, name, capsys):
    """Clips are planned by the squares that are trained on (objective.vae.crop), not by whole frames."""
    import torch

    from stdit.training.engine.parallel import World
    from stdit.training.setup.build import make_plan
    from stdit.training.setup.objective import make_objective

    path = CONFIGS / name
    shapes = "data.shapes=[64x64x9, 96x64x9, 64x64]"
    arguments = [str(files / "clips.parquet"), "--config", str(path), shapes]
    assert run_command(app, ["data", "plan", "--json", *arguments], prog="stdit") == 0
    found = json.loads(capsys.readouterr().out)
    config, manifest = resolve(load_config(path, [shapes])), read_manifest(files / "clips.parquet")
    objective = make_objective(config, manifest, World(0, 1, torch.device("cpu")))
    made = make_plan(manifest, assign(manifest, config.data), objective, config, 0)
    assert found["hash"] == made.hash and found["steps_per_epoch"] == made.num_steps
    assert {bucket["tokens"] for bucket in found["buckets"]} == {32 * 32 * 9, 32 * 32}


def test_advice_only_where_something_can_be_better():
    good = dict(empty=[], balance=0.99, groups=8, work_per_step=100, largest_clip_work=10, balance_best=1.0)
    good |= dict(steps_per_epoch=9, steps_with_a_clip_over_a_share=0, measured_steps=7)
    assert advice(good) == []
    assert "tokens_per_pack" in advice(good | dict(balance=0.8))[0]
    assert "largest_clips_per_step to 8" in advice(good | dict(balance=0.3, work_per_step=20, balance_best=0.31))[0]
    told = advice(good | dict(balance_best=0.97, steps_with_a_clip_over_a_share=3))
    assert len(told) == 1 and "3 of 7 steps" in told[0] and "0.970" in told[0]
    assert advice(good | dict(balance=0.3, groups=1)) == []
    few = good | dict(balance=0.3, work_per_step=40, steps_per_epoch=1)  # no setting makes a step of more
    assert "at most 4 ranks" in advice(few)[0] and "largest_clips_per_step" not in advice(few)[0]
    (told,) = advice(good | dict(empty=[f"64x64x{n}" for n in range(1, 49, 4)]))
    assert "64x64x29 and 4 more, in any epoch" in told


def test_a_step_with_a_clip_over_a_groups_share_is_reported(files, capsys):
    assert plan(files, "--json", "--world-size", "8", "plan.largest_clips_per_step=2") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps_with_a_clip_over_a_share"] == found["measured_steps"]
    # a step of the work of two of the largest clips on eight ranks: one of them has at least one whole clip
    assert found["balance"] <= found["balance_best"] <= 2.3 / 8
    assert plan(files, "--world-size", "8", "plan.largest_clips_per_step=2") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"the best possible balance is {found['balance_best']:.3f}" in text


def test_a_rule_stages_and_sources_are_shown(files, capsys):
    rule = "data.rule={areas: [64x64], aspects: ['1:1', '3:2'], durations: [0, 1]}"
    stages = "data.stages=[{epochs: 2, frames: 1}, {}]"
    settings = ["data.shapes=[]", rule, stages, "data.sources={'1?.mp4': 2.5}", "data.max_crop=0.5"]
    assert plan(files, "--json", *settings) == 0
    found = json.loads(capsys.readouterr().out)
    assert [bucket["shape"] for bucket in found["buckets"]] == ["64x64x1", "80x48x1", "64x64x9", "80x48x9"]
    first = found["stages"][0]
    assert (first["epoch"], first["epochs"], first["clips"]) == (0, 2, 30)
    assert found["planned"] == 30 and found["dropped"] == {"kind": 34}  # images alone
    assert found["sources"][0] == {"source": "1?.mp4", "weight": 2.5, "clips": 0, "clips_in_epoch": 0}
    assert plan(files, "--json", "--epoch", "2", *settings) == 0
    later = json.loads(capsys.readouterr().out)
    assert later["stages"] == found["stages"]
    assert found["empty"] == later["empty"] == ["80x48x1"]  # the videos' shapes have clips from the third epoch on
    first, others = later["sources"]
    assert first["clips"] == 10 and first["clips_in_epoch"] == 25 and others["source"] == "others"
    assert later["planned"] == later["stages"][1]["clips"] == 25 + others["clips"]
    assert sum(bucket["clips"] for bucket in later["buckets"]) == later["planned"]
    assert plan(files, *settings) == 0
    text = capsys.readouterr().out
    assert "Stages" in text and "Sources" in text and "1?.mp4" in text


def test_a_measured_rate_gives_times(files, tmp_path, capsys):
    assert plan(files, "--json", "--world-size", "2", "--rate", "1e9") == 0
    found = json.loads(capsys.readouterr().out)
    seconds = 3 * found["work_per_step"] / 2 / 1e9 / found["balance"]
    assert found["seconds_per_step"] == pytest.approx(seconds)
    assert found["seconds_per_epoch"] == pytest.approx(seconds * found["steps_per_epoch"])
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"kind": "start", "step": 0, "peak_flops": 1e12, "ranks": 2}]
    for mfu in (0.1, 0.4, 0.5):
        lines.append({"kind": "train", "step": 1, "mfu": mfu, "tokens_per_second": 50.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured_rate(str(run), pixels=False) == 0.4e12 and measured_rate(str(run), pixels=True) == 25.0
    (tmp_path / "moved").mkdir()
    lines.append({"kind": "start", "step": 1, "peak_flops": 5e12, "ranks": 10})  # it went on on other ranks
    (tmp_path / "moved" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    moved = str(tmp_path / "moved")
    assert measured_rate(moved, pixels=False) == 0.4e12 and measured_rate(moved, pixels=True) == 25.0
    assert plan(files, "--rate", str(run)) == 0
    assert "time per epoch" in capsys.readouterr().out
    for wrong in ("-1", str(tmp_path)):
        assert plan(files, "--rate", wrong) == 1
        assert f"--rate {wrong}" in " ".join(capsys.readouterr().err.split())


def test_what_a_filter_leaves_out_is_named(files, capsys):
    path = files / "clips.parquet"
    clips = read_manifest(path)
    motion = [None if image else float(row) for row, image in enumerate(clips.column("frames") == 1)]
    write_manifest(Manifest(clips.table.append_column("motion", pa.array(motion)), files), path)
    assert plan(files, "--json", "data.filter={motion: [10, null]}") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dropped"] == {"motion": 10, "short": 2, "small": 1} and found["planned"] == 51
    assert plan(files, "data.filter.motion=[10, null]") == 0
    assert "its motion is outside data.filter" in capsys.readouterr().out
    assert plan(files, "data.filter.sharpness=[1, null]") == 1
    assert "stdit data scan --scores" in capsys.readouterr().err
    assert plan(files, "data.filter.motion=[10]") == 1
    assert "must be a list of 2 values" in capsys.readouterr().err
