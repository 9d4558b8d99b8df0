"""A step that is not finite updates nothing on any rank and names its clips; the run goes on without it."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Child, finish_together
from safetensors.torch import save_file
from tensor_files import load_file
from tiny_runs import ALONE, check_lines, losses, make_quick, same_weights

from stdit.cli.main import app, run_command
from stdit.data.load.loader import Loader
from stdit.data.manifest import read_manifest
from stdit.errors import StditError
from stdit.evaluation.report import read_metrics
from stdit.shipped import DEEPSPEED
from stdit.training import trainer as trainer_module
from stdit.training.config import load_config
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.engine.engine import TorchEngine
from stdit.training.engine.optimizer import OptimizerConfig
from stdit.training.objectives.protocol import Update
from stdit.training.objectives.vae import VaeObjective
from stdit.training.run import run

ROOT = Path(__file__).parents[2]
FIXED = ("data.start=first", "data.crop=centre")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    make_quick(monkeypatch)
    yield
    torch.set_num_threads(before)


def train(tiny: Path, folder: Path, *overrides: str, config: str = "flow") -> None:
    run(load_config(tiny / f"{config}.yaml", [f"run={folder}", *overrides]), ALONE)


def poison(monkeypatch: pytest.MonkeyPatch, rows: set[int], epochs: set[int]) -> None:
    """Latents of these clips come as if from a cache that holds nan."""
    example = Loader._example

    def poisoned(self: Loader, item: Any, epoch: int) -> Any:
        found = example(self, item, epoch)
        if item.row not in rows or epoch not in epochs:
            return found
        assert self.latent_size is not None
        latents = torch.full(self.latent_size(found.shape), 0.5)
        latents[0, 0, 0, 0] = math.nan
        return replace(found, frames=None, latents=latents)

    monkeypatch.setattr(Loader, "_example", poisoned)


def test_one_clip_costs_its_step_and_nothing_else(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a run without the poison whose update is left out at that step: equal weights, moments and average."""
    with monkeypatch.context() as patch:
        poison(patch, {2}, {0})
        train(tiny, tmp_path / "poisoned")
    (line,) = read_metrics(tmp_path / "poisoned", "skipped")
    clip = read_manifest(tiny / "manifest.parquet")[2]
    assert [found["id"] for found in line["clips"]] == [clip.id] and line["in_a_row"] == 1
    assert line["clips"][0]["path"] == clip.path and 0 < line["clips"][0]["noise_level"] < 1
    told = capsys.readouterr().out
    assert f"step {line['step']} updates nothing: the gradient's norm is nan. 1 of its" in told
    assert clip.path in told and "latents in the cache are not finite" in told
    check_lines(tmp_path / "poisoned")

    update = trainer_module.Trainer.update

    def leave_out(self: trainer_module.Trainer) -> Update:
        if self.step + 1 != line["step"]:
            return update(self)
        self.engine.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return Update(math.nan, 0.0)

    monkeypatch.setattr(trainer_module.Trainer, "update", leave_out)
    monkeypatch.setattr(trainer_module.Trainer, "_skip", lambda *_: None)
    train(tiny, tmp_path / "left-out")
    assert same_weights(tmp_path / "poisoned", tmp_path / "left-out")
    found, expected = losses(tmp_path / "poisoned"), losses(tmp_path / "left-out")
    assert found == expected and found[line["step"]] is None and sum(one is None for one in found.values()) == 1


def test_too_many_in_a_row_stop_the_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    settings = ("optimizer.max_skipped_steps=2", "checkpoint.every=1", "checkpoint.keep=0")
    with monkeypatch.context() as patch:
        poison(patch, set(range(20)), {1, 2})
        with pytest.raises(StditError, match=r"(?s)clips are not finite.*\n3 steps in a row.*without these clips"):
            train(tiny, folder, *settings, "schedule.steps=20")
    lines = read_metrics(folder, "skipped")
    assert [line["in_a_row"] for line in lines] == [1, 2, 3]
    first, last = lines[0]["step"], Checkpoint.latest(folder)
    assert last is not None and last.step == first + 1 and last.state["skipped"] == 2  # what a resumed run goes on from
    before = Checkpoint(folder / "checkpoints" / f"step-{first:08d}").weights()
    assert all(torch.equal(weight, before[name]) for name, weight in last.weights().items())


def test_where_only_some_clips_are_at_fault_the_remedy_is_to_leave_them_out(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {2}, {0})
    with pytest.raises(StditError, match=r"(?s)1 of its \d+ clips.*a manifest without these clips"):
        train(tiny, tmp_path / "run", "optimizer.max_skipped_steps=0")


def test_the_embedding_of_a_caption(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stdit.text.encoders import TextEncoder
    from stdit.text.small import build_word_tokenizer, small_umt5

    tokenizer = build_word_tokenizer(["a small red circle moves left on black"])
    encoder = TextEncoder(small_umt5(len(tokenizer), 16, 1, 2), tokenizer)
    encoder.save(tmp_path / "text" / "text_encoder", tmp_path / "text" / "tokenizer")
    example = Loader._example

    def poisoned(self: Loader, item: Any, epoch: int) -> Any:
        found = example(self, item, epoch)
        return replace(found, text=torch.full((3, 16), math.nan)) if item.row == 4 and epoch == 0 else found

    monkeypatch.setattr(Loader, "_example", poisoned)
    text = ("text.trained=null", f"text.path={tmp_path / 'text'}", "objective.flow.caption_dropout=0")
    train(tiny, tmp_path / "run", *text, "schedule.steps=6")
    ((clip,),) = (line["clips"] for line in read_metrics(tmp_path / "run", "skipped"))
    assert clip["id"] == read_manifest(tiny / "manifest.parquet")[4].id
    assert clip["fault"] == "its text embedding is not finite"


def test_the_clips_of_a_vae(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, prepare = Loader._example, VaeObjective.prepare

    def marked(self: Loader, item: Any, epoch: int) -> Any:
        found = example(self, item, epoch)
        return replace(found, frames=torch.full_like(found.frames, 255)) if item.row == 5 else found

    def poisoned(self: VaeObjective, *arguments: Any) -> Any:
        batch = prepare(self, *arguments)
        for video, noise, _ in batch.groups:
            noise[(video == 1).flatten(1).all(1)] = math.nan
        return batch

    monkeypatch.setattr(Loader, "_example", marked)
    monkeypatch.setattr(VaeObjective, "prepare", poisoned)
    train(tiny, tmp_path / "run", "schedule.steps=8", config="vae")
    lines = read_metrics(tmp_path / "run", "skipped")
    assert lines and {c["id"] for x in lines for c in x["clips"]} == {read_manifest(tiny / "manifest.parquet")[5].id}
    check_lines(tmp_path / "run")


class Faulty(torch.nn.Module):
    """Its loss is finite where its gradient is not (kind "gradient"), or the other way round ("loss")."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, torch.nn.Parameter(torch.ones(3))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        total = (self.weight * batch).sum()
        if self.kind == "gradient":
            return total + (0 * total).sqrt()  # inf · 0
        return total + torch.full((), math.inf) if self.kind == "loss" else total


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_an_engine_updates_nothing(kind: str, precision: str) -> None:
    module = Faulty("neither")
    engine = TorchEngine(module, OptimizerConfig(lr=0.1), precision, ALONE)
    batch = torch.tensor([1.0, 2.0, 3.0])

    def step() -> float:
        engine.backward(batch, 0.5, last=True)
        return engine.step(0.1)

    assert math.isfinite(step())
    state = [one.clone() for one in engine.optimizer.state[engine.flat_masters[0]].values()]
    before, trained = engine.flat_masters[0].detach().clone(), module.weight.detach().clone()
    module.kind = kind
    assert not math.isfinite(step())
    assert torch.equal(engine.flat_masters[0], before) and torch.equal(module.weight, trained)
    assert all(map(torch.equal, state, engine.optimizer.state[engine.flat_masters[0]].values()))
    module.kind = "neither"
    assert math.isfinite(step()) and not torch.equal(engine.flat_masters[0], before)


WORKER = """
import sys, torch
from stdit.training.config import load_config
from stdit.training import run as run_module, trainer as trainer_module
from stdit.training.engine.parallel import join_world, leave_world
torch.set_num_threads(1)
trainer_module.measure_peak = lambda *args: 1e12
config, *runs = sys.argv[1:]
world = join_world()
for overrides in runs:
    run_module.run(load_config(config, overrides.split(" ")), world)
leave_world()
"""


def test_two_ranks_do_as_one(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under every ZeRO stage, with a cache that holds nan for two clips: the same steps left out, the same clips
    named, by the rank that has them, and the same losses as on one rank. So do two that share every pack."""
    pytest.importorskip("deepspeed")
    config = tiny / "flow.yaml"
    encode = ["data", "encode", str(tiny / "manifest.parquet"), "--config", str(config), "--out", str(tmp_path / "c")]
    assert run_command(app, [*encode, *FIXED]) == 0
    manifest = read_manifest(tiny / "manifest.parquet")
    bad = {manifest[row].id for row in (1, 6)}
    for shard in (tmp_path / "c").rglob("*.safetensors"):
        tensors = load_file(shard)
        for key in tensors:
            if key.split("/")[0] in bad:
                tensors[key][..., 0] = math.nan
        shard.unlink()
        save_file(tensors, shard)
    common = [*FIXED, f"data.cache={tmp_path / 'c'}", "schedule.steps=5", "checkpoint.every=5"]
    common += ["plan.tokens_per_pack=100"]
    run(load_config(config, [f"run={tmp_path / 'one'}", *common]), ALONE)
    expected = read_metrics(tmp_path / "one", "skipped")
    assert expected and {clip["id"] for line in expected for clip in line["clips"]} == bad

    (tmp_path / "zero0.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    stages = {f"zero{n}": DEEPSPEED / f"zero{n}.json" for n in (1, 2, 3)}
    stages["zero0"] = tmp_path / "zero0.json"
    runs = [
        " ".join([f"run={tmp_path / name}", f"parallel.deepspeed={path}", *common]) for name, path in stages.items()
    ]
    stages["shared"] = stages["zero3"]
    shared = [f"run={tmp_path / 'shared'}", f"parallel.deepspeed={stages['shared']}", "parallel.sequence_parallel=2"]
    runs.append(" ".join([*shared, *common]))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["WORLD_SIZE"] = "2"
    command = [sys.executable, "-c", WORKER, str(config), *runs]
    finish_together([Child(command, environment | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in (0, 1)])

    def named(lines: list[dict[str, Any]]) -> list[Any]:
        return [(line["step"], sorted((c["id"], round(c["noise_level"], 12)) for c in line["clips"])) for line in lines]

    for name in stages:
        lines = read_metrics(tmp_path / name, "skipped")
        assert named(lines) == named(expected), name
        assert {clip["fault"] for line in lines for clip in line["clips"]} == {
            "its latents in the cache are not finite; encode it again"
        }
        assert {clip["rank"] for line in lines for clip in line["clips"]} <= {0, 1}
        found, wanted = losses(tmp_path / name), losses(tmp_path / "one")
        assert found.keys() == wanted.keys()
        assert [one is None for one in found.values()] == [one is None for one in wanted.values()]
        for step, loss in wanted.items():
            assert loss is None or found[step] == pytest.approx(loss, rel=1e-5), name
        kept = Checkpoint.latest(tmp_path / name)
        assert kept is not None and all(torch.isfinite(weight).all() for weight in kept.weights().values()), name
