"""The run's config: strict reading, overrides, round trips, and what a resumed run may change."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from stdit.errors import StditError
from stdit.shipped import CONFIGS
from stdit.training.config import RunConfig, differences, from_dict, load_config, save_config, to_dict
from stdit.vae.config import preset


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_yaml_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "run: {seed: 3}\nmodel: {preset: toy, layers: 2}\noptimizer: {lr: 1e-4}\n")
    config = load_config(path, ["run=runs/x", "model.layers=4", "optimizer.betas=[0.8, 0.9]", "text.trained.dim=64"])
    assert config.run.path == "runs/x" and config.run.seed == 3
    assert config.model.preset == "toy" and config.model.overrides == {"layers": 4}
    assert config.optimizer.lr == 1e-4 and config.optimizer.betas == (0.8, 0.9)
    assert config.text.trained is not None and config.text.trained.dim == 64


def test_few_numbers_may_be_negative(tmp_path: Path) -> None:
    text = (
        "run: {seed: -1}\neval: {seed: -2}\nobjective: {flow: {noise_levels: {mean: -0.5}}}\nvae: {latents_mean: [-1]}"
    )
    config = load_config(write(tmp_path, text))
    assert (config.run.seed, config.eval.seed, config.objective.flow.noise_levels.mean) == (-1, -2, -0.5)
    assert config.vae.overrides == {"latents_mean": (-1.0,)}


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == RunConfig()


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_that_comes_along_is_read_and_consistent(path: Path) -> None:
    config = load_config(path)
    config.data.check()
    if config.objective.kind == "vae" and config.vae.preset:
        stride = preset(config.vae.preset).stride
        for shape in config.data.video_shapes():
            shape.latent(stride)  # raises where it does not divide
            assert shape.frames * shape.height * shape.width <= config.plan.tokens_per_pack


def test_what_is_saved_reads_back(tmp_path: Path) -> None:
    raw = {
        "model": {"preset": "toy", "patch": [1, 2, 2], "dim": 96},
        "vae": {"dim_mult": [1, 2], "temporal_downsample": [True]},
        "objective": {"flow": {"tasks": {"text_to_video": 1, "extend": 0.5}, "noise_levels": {"shift": 3}}},
        "data": {"shapes": ["64x64x9"], "manifest": "m.parquet"},
        "text": {"trained": {"dim": 32}},
    }
    config = from_dict(raw, "here")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert to_dict(load_config(tmp_path / "config.yaml")) == yaml.safe_load((tmp_path / "config.yaml").read_text())


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("optimiser: {lr: 1}", [], ["run.yaml", "optimiser", "'optimizer'"]),
        ("optimizer: {learning_rate: 1}", [], ["optimizer.learning_rate", "lr"]),
        ("model: {layer: 1}", [], ["model.layer", "'layers'"]),
        ("objective: {flow: {noise_levels: {shfit: 1}}}", [], ["objective.flow.noise_levels.shfit", "'shift'"]),
        ("", ["optimizer.lrr=1"], ["optimizer.lrr=1", "optimizer.lrr", "'lr'"]),
        ("schedule: {steps: many}", [], ["schedule.steps", "'many'", "an integer"]),
        ("schedule: {steps: 1.5}", [], ["schedule.steps", "1.5", "an integer"]),
        ("run: {deterministic: 1}", [], ["run.deterministic", "true or false"]),
        ("run: {seed: 99999999999999999999}", [], ["run.seed is 99999999999999999999", "64 bits"]),
        ("run: {precision: fp16}", [], ["run.precision", "'fp16'", "'fp32' or 'bf16'"]),
        ("data: {shapes: 64x64x9}", [], ["data.shapes", "a list"]),
        ("data: [1]", [], ["data", "mapping"]),
        ("optimizer: {betas: [0.9]}", [], ["optimizer.betas", "list of 2"]),
        ("schedule: {steps: 0}", [], ["schedule.steps is 0", "above 0"]),
        ("text: {path: a, trained: {dim: 8}}", [], ["text", "both set"]),
        ("objective: {flow: {tasks: {text_to_vide: 1}}}", [], ["'text_to_video'"]),
        ("a: [", [], ["run.yaml", "not YAML"]),
        ("", ["optimizer.lr"], ["'optimizer.lr'", "KEY=VALUE"]),
        ("optimizer: 3", ["optimizer.lr=1"], ["optimizer"]),
        ("plan: {largest_clips_per_step: .nan}", [], ["plan.largest_clips_per_step", "nan", "finite"]),
        ("run: {path: 1e5}", [], ["run.path is 100000.0", "a text", "in quotes"]),
        ("optimizer: {options: &a [*a]}", [], ["optimizer.options"]),
        ("model: {overrides: {dim: 96}}", [], ["model.overrides is not a setting"]),
        ("model: {lora: {rank: 4, alpha: 1, x: 1}, init: a}", [], ["model.lora.x is not a setting"]),
        ("run: {seed: 0x" + "f" * 5000 + "}", [], ["run.seed is 0xfff", "64 bits"]),
        ("data: {fps: inf}", [], ["data.fps is 'inf'", "a number"]),
        ("data: {keep_gb: -1}", [], ["run.yaml: data.keep_gb is -1;", "at least 0"]),
        ("data: {sources: {a*: -0.5}}", [], ["data.sources.a* is -0.5"]),
        ("data: {filter: {motion: [-1, null]}}", [], ["data.filter.motion[0] is -1"]),
        ("optimizer: {betas: [-0.9, 0.95]}", [], ["optimizer.betas[0] is -0.9"]),
        ("optimizer: {weight_decay: -1}", [], ["optimizer.weight_decay is -1"]),
        ("objective: {token_power: -1}", [], ["objective.token_power is -1"]),
        ("plan: {tokens_per_pack: -4}", [], ["plan.tokens_per_pack is -4", "at least 0"]),
        ("eval: {guidance: -3}", [], ["eval.guidance is -3"]),
        ("text: {padding: -1}", [], ["text.padding is -1"]),
        ("vae: {latents_std: [-1]}", [], ["vae.latents_std[0] is -1"]),
        ("model: {rope_fps: -1}", [], ["model.rope_fps is -1"]),
        ("text: {trained: {heads: 0}}", [], ["text.trained.heads is 0", "above 0"]),
        ("text: {trained: {dim: 30, heads: 4}}", [], ["text.trained", "dim 30"]),
        ("parallel: {sequence_parallel: 0}", [], ["parallel.sequence_parallel is 0", "above 0"]),
        ("data: {rule: {areas: [64x64], aspects: ['1:1']}}", [], ["run.yaml: data.rule lacks durations."]),
        ("data: {rule: {}}", [], ["data.rule lacks areas and aspects and durations."]),
        ('data: {manifest: "a\\0b"}', [], ["data.manifest", "without NUL"]),
        ("", ['run="a\\ud800"'], ["run.path", "lone surrogates"]),
        ("a: 2020-13-45", [], ["run.yaml", "not YAML", "month"]),
        ("", ["schedule.steps=" + "9" * 5000], ["the value is not YAML"]),
        ("", ["optimizer.options=" + "[" * 5000], ["the value is not YAML"]),
        ("optimizer: {options: {a: 2020-01-01}}", [], ["optimizer.options.a has a date"]),
        ("optimizer: {options: {lr: 1e-3}}", [], ["optimizer: options.lr has no effect", "optimizer.lr"]),
        ("optimizer: {options: {weight_decay: 0.5}}", [], ["options.weight_decay", "optimizer.weight_decay"]),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(StditError) as error:
        load_config(write(tmp_path, text), overrides)
    for word in words:
        assert word in str(error.value)


def test_a_number_that_yaml_takes_for_a_text_is_one_in_options(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "optimizer: {options: {eps: 1e-8, betas: [0.9, 1e-3]}}"))
    assert config.optimizer.options == {"eps": 1e-8, "betas": [0.9, 1e-3]}
    config = load_config(write(tmp_path, ""), ["optimizer.options.eps=1E-6", "optimizer.options.name=adam1e5"])
    assert config.optimizer.options == {"eps": 1e-6, "name": "adam1e5"}


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes("run: {path: Läufe}".encode("latin-1"))
    with pytest.raises(StditError, match=r"run\.yaml, line 1 is not UTF-8"):
        load_config(tmp_path / "run.yaml")


def test_what_is_no_file_or_too_large_is_not_read(tmp_path: Path) -> None:
    """A device gives bytes without an end, and a pipe none for ever."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "large.yaml").touch()
    os.truncate(tmp_path / "large.yaml", 2**40)
    for path in (tmp_path / "pipe.yaml", tmp_path / "large.yaml", tmp_path, Path("/dev/zero")):
        with pytest.raises(StditError, match="is not a file of at most 16,777,216 bytes"):
            load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StditError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_what_a_resumed_run_may_change() -> None:
    then = to_dict(from_dict({"optimizer": {"lr": 1e-3}}, "a"))
    harmless = {
        "optimizer": {"lr": 1e-3},
        "log": {"every": 3},
        "eval": {"every": 5, "prompts": ["a"]},
        "checkpoint": {"every": 9},
        "parallel": {"deepspeed": "x.json"},
        "schedule": {"steps": 5},
        "data": {"workers": 7},
        "run": {"path": "elsewhere"},
    }
    assert differences(then, from_dict(harmless, "b")) == []
    changed = from_dict({"optimizer": {"lr": 2e-3}, "run": {"seed": 1}, "model": {"layers": 3}}, "c")
    assert differences(then, changed) == ["model.layers: (unset) → 3", "optimizer.lr: 0.001 → 0.002", "run.seed: 0 → 1"]


def test_a_run_begun_before_a_setting_existed_had_its_default() -> None:
    settings = {
        "model": {"init": "folder", "lora": {"rank": 4}},
        "data": {"stages": [{"epochs": 2, "frames": 1}, {}]},
        "objective": {"flow": {"tasks": {"text_to_video": 1.0}}},
    }
    now = from_dict(settings, "a")
    then = json.loads(json.dumps(to_dict(now)))  # as a checkpoint has it
    assert differences(then, now) == []
    del then["plan"], then["objective"]["flow"]["noise_levels"], then["data"]["mirror"]
    del then["data"]["stages"][0]["area"], then["model"]["lora"]["alpha"]
    assert differences(then, now) == []
    now = from_dict(
        {**settings, "data": {"stages": [{"epochs": 2, "frames": 1, "area": "64x64"}, {}], "mirror": True}}, "b"
    )
    stages = [[{"epochs": 2, "area": area, "frames": 1}, {"epochs": None, "area": None, "frames": None}]
              for area in (None, "64x64")]  # fmt: skip
    assert differences(then, now) == ["data.mirror: False → True", f"data.stages: {stages[0]} → {stages[1]}"]
    then["data"]["gone"] = 3  # a setting that is no more
    assert "data.gone: 3 → (unset)" in differences(then, now)


def test_a_curriculum_is_saved_and_read_back(tmp_path: Path) -> None:
    config = from_dict(
        {
            "data": {
                "stages": [{"epochs": 2, "frames": 1}, {}],
                "rule": {"areas": ["64x64"], "aspects": ["1:1"], "durations": [0]},
            }
        },
        "a",
    )
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
