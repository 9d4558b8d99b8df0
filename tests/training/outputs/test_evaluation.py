"""What is evaluated and exported does not depend on how many ranks share the work and the weights."""

from __future__ import annotations

import copy
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from thread_world import ThreadWorld, on_ranks
from tiny_runs import ALONE, make_quick
from torch import nn

from stdit.errors import Interrupted
from stdit.evaluation.report import read_metrics
from stdit.training.config import load_config
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.engine.engine import ShardPiece, TorchEngine
from stdit.training.engine.optimizer import OptimizerConfig
from stdit.training.engine.parallel import World
from stdit.training.outputs import evaluation, export
from stdit.training.run import run
from stdit.training.setup.build import RunComponents, build
from stdit.training.setup.resolve import resolve
from stdit.vae.autoencoder import measure_latents

PROMPTS = ["a small red circle moves left", "two", "three"]


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def in_folder(parts: RunComponents, folder: Path) -> RunComponents:
    other = copy.copy(parts)
    other.config = replace(parts.config, run=replace(parts.config.run, path=str(folder)))
    return other


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_transformers_evaluation_is_the_same_for_any_number_of_ranks(tiny: Path, tmp_path: Path) -> None:
    """Bit for bit: losses, what samples of the toy captions show, and the files of the prompts' clips."""
    settings = ["eval.clips=5", f"eval.manifest={tiny / 'manifest.parquet'}", "eval.steps=2", "data.workers=0"]
    settings += [f"eval.prompts=[{', '.join(PROMPTS)}]", "eval.toy={captions: 19, shapes: [32x32x5]}"]
    parts = build(resolve(load_config(tiny / "flow.yaml", settings)), ALONE)
    module = randomised(parts.objective.fresh())

    def evaluated(world: World) -> dict[str, Any]:
        place = in_folder(parts, tmp_path / str(world.size))
        return evaluation.evaluate(place, copy.deepcopy(module), world, 7)

    expected = evaluated(ALONE)
    assert len(expected["samples"]) == 3 and len(expected["loss_by_shape"]) >= 2
    assert expected["loss_by_shape"].keys() <= {"32x32x5", "48x32x5", "32x32x1", "48x32x1"}
    for ranks in (2, 3):
        assert on_ranks(ranks, evaluated) == [expected] * ranks
        assert files(tmp_path / str(ranks)) == files(tmp_path / "1")


def test_a_vaes_evaluation_and_measured_latents_are_too(tiny: Path, tmp_path: Path) -> None:
    settings = ["eval.clips=5", f"eval.manifest={tiny / 'manifest.parquet'}", "data.workers=0"]
    parts = build(resolve(load_config(tiny / "vae.yaml", settings)), ALONE)
    module = randomised(parts.objective.fresh())

    def evaluated(world: World) -> tuple[dict[str, Any], Any, Any]:
        mine = copy.deepcopy(module)
        found = evaluation.evaluate(parts, mine, world, 7)
        config = export.measured(mine.vae, parts, world).config
        return found, config.latents_mean, config.latents_std

    expected = evaluated(ALONE)
    assert on_ranks(3, evaluated) == [expected] * 3
    clips = export.share_clips(parts, None, 256, ALONE, lambda clip: clip.example.video[None])
    mean, deviation = measure_latents(module.vae, clips)
    np.testing.assert_allclose(expected[1], mean, rtol=1e-9)
    np.testing.assert_allclose(expected[2], deviation, rtol=1e-9)


def pieces_of(engine: TorchEngine, rank: int, ranks: int) -> list[list[ShardPiece]]:
    """What a rank holds if every parameter is cut into equal parts, the last one smaller."""
    found = []
    for (piece,) in engine.pieces:
        part = -(-piece.numel // ranks)
        numel = min(part, piece.numel - rank * part)
        cut = ShardPiece(piece.name, piece.shape, rank * part, rank * part, numel)
        found.append([cut] if numel > 0 else [])
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_put_together_on_every_rank_one_at_a_time(tiny: Path, precision: str) -> None:
    parts = build(resolve(load_config(tiny / "flow.yaml", ["data.workers=0", f"run.precision={precision}"])), ALONE)
    engine = TorchEngine(randomised(parts.objective.module), OptimizerConfig(), precision, ALONE)
    whole = {name: p.detach().clone() for name, p in zip(engine.shapes, engine.flat_masters)}
    most = max(weight.nbytes for weight in whole.values())

    def joined(world: ThreadWorld) -> nn.Module:
        flats = [torch.full_like(flat, torch.nan) for flat in engine.flat_masters]  # of others' pieces nothing is known
        mine = SimpleNamespace(ema=None, flat_masters=flats, shapes=engine.shapes, replicated=False)
        mine.pieces = pieces_of(engine, world.rank, world.size)
        for flat, other, cuts in zip(flats, engine.flat_masters, mine.pieces):
            for cut in cuts:
                part = slice(cut.start, cut.start + cut.numel)
                flat.view(-1)[part] = other.detach().view(-1)[part]
        weights = export.averaged_weights(mine, world)  # type: ignore[arg-type]

        def one_by_one() -> Any:
            for name, weight in weights:
                assert weight.nbytes <= most and torch.equal(weight, whole[name])
                yield name, weight

        module = export.trained_module(parts, one_by_one(), world, wanted=world.rank != 1)
        assert (module is None) == (world.rank == 1)
        return module

    for module in filter(None, on_ranks(3, joined)):
        assert not isinstance(module, Exception), module
        for name, parameter in module.named_parameters():
            assert parameter.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
            assert torch.equal(parameter, whole[name].to(parameter.dtype)), name


def test_a_signal_ends_an_evaluation_which_the_same_command_makes_up_for(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_quick(monkeypatch)
    settings = [f"run={tmp_path / 'run'}", "eval.prompts=[a, b, c]", "eval.every=2", "eval.steps=1", "data.workers=0"]
    config = load_config(tiny / "flow.yaml", [*settings, "schedule.steps=3"])
    write, written = evaluation.write_video, []

    def signalled(path: Path, *arguments: Any) -> None:
        written.append(path.name)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        write(path, *arguments)

    monkeypatch.setattr(evaluation, "write_video", signalled)
    with pytest.raises(Interrupted, match="saved after step 2") as stopped:
        run(config, ALONE)
    saved = Checkpoint.latest(tmp_path / "run")
    assert stopped.value.status == 75 and len(written) == 2 and saved is not None and saved.step == 2
    assert read_metrics(tmp_path / "run", "eval") == []
    run(config, ALONE)
    assert [line["step"] for line in read_metrics(tmp_path / "run", "eval")] == [2, 3] and len(written) == 2 + 3 + 3
