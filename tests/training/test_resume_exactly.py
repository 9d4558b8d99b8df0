"""Killed and started again, a training ends with the same bits as one that was never killed: real processes.

Compared are each step's loss, gradient norm and clips on every rank, and the last checkpoint's shards, which hold
weights, optimizer and average.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from children import Child, finish_together
from rank_children import start_ranks
from tiny_models import save_tiny_model

from stdit.shipped import DEEPSPEED
from stdit.training.engine.checkpoint import published

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")
WORKER = Path(__file__).with_name("resume_worker.py")
LIMIT = 1500.0
STEPS, EVERY = 6, 2  # of a training, and between checkpoints


class Setting(NamedTuple):
    workers: int
    ranks: int
    stage: int
    kind: str
    shared: int

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


def possible(one: Setting) -> bool:
    """Two ranks are needed to share a pack, and VAEs train under ZeRO 0 to 2, each rank on its own clips."""
    return one.shared <= one.ranks and (one.kind != "vae" or (one.shared == 1 and one.stage < 3))


def pairwise() -> list[Setting]:
    """Settings in which every possible pair of values comes together."""
    everything = [Setting(*one) for one in product((0, 2), (1, 2), (1, 2, 3), ("flow", "lora", "vae"), (1, 2))]
    everything = [one for one in everything if possible(one)]

    def pairs(one: Setting) -> set[Any]:
        return set(combinations(enumerate(one), 2))

    left, chosen = set().union(*map(pairs, everything)), list[Setting]()
    while left:
        best = max(everything, key=lambda one: len(pairs(one) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


SETTINGS = pairwise()


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """flow.yaml, lora.yaml and vae.yaml, and the JSONs of ZeRO's stages."""
    out = tmp_path_factory.mktemp("resumed")
    save_tiny_model(out)
    flow = yaml.safe_load((tiny / "flow.yaml").read_text())
    flow |= {"schedule": {"steps": STEPS}, "checkpoint": {"every": EVERY}}
    flow["plan"]["tokens_per_pack"] = 150
    vae = yaml.safe_load((tiny / "vae.yaml").read_text())
    vae |= {"schedule": {"steps": STEPS}, "checkpoint": {"every": EVERY}}
    vae["plan"] = {"largest_clips_per_step": 4, "tokens_per_pack": 48 * 32 * 5}
    vae["objective"]["vae"] = {"discriminator": {"dim": 8, "layers": 3, "lr": 2e-3}}
    lora = flow | {"model": {"init": str(out / "init"), "lora": {"rank": 3}}, "text": {"path": str(out / "text")}}
    for name, config in (("flow", flow), ("vae", vae), ("lora", lora)):
        (out / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return out


def run_of(folder: Path, place: Path, one: Setting) -> str:
    stage = f"parallel.deepspeed={DEEPSPEED / f'zero{one.stage}.json'}"
    settings = [f"run={place}", stage, f"data.workers={one.workers}", f"parallel.sequence_parallel={one.shared}"]
    return f"{one.kind}:{'+'.join(settings)}"


def start(folder: Path, ranks: int, runs: Sequence[str]) -> list[Child]:
    return start_ranks([sys.executable, str(WORKER), str(folder), *runs], ranks)


def kill(folder: Path, ranks: int, run: str, victim: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts a training whose rank `victim` dies of SIGKILL in a step."""
    monkeypatch.setenv("STDIT_KILL", f"{victim}:{step}")
    children = start(folder, ranks, [run])
    monkeypatch.delenv("STDIT_KILL")
    assert children[victim].status(LIMIT) == -signal.SIGKILL, children[victim].output
    for child in children:
        child.kill()


def steps_of(place: Path) -> list[dict[int, dict[str, Any]]]:
    """What each rank saw of each step, the last time that it did it."""
    files = sorted(place.glob("steps-*.jsonl"))
    return [{line["step"]: line for line in map(json.loads, file.read_text().splitlines())} for file in files]


def check_same(whole: Path, killed: Path, steps: int) -> None:
    expected, found = steps_of(whole), steps_of(killed)
    assert found == expected and all(sorted(rank) == list(range(1, steps + 1)) for rank in found)
    ends = [published(place)[-1] for place in (whole, killed)]
    assert [end.name for end in ends] == [f"step-{steps:08d}"] * 2
    shards = [{path.name: path.read_bytes() for path in end.glob("*.safetensors")} for end in ends]
    assert shards[0] == shards[1] and len(shards[0]) == len(expected)


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """The folder, with a finished run whole-NAME, and one NAME that was killed and started again, of every setting."""
    with pytest.MonkeyPatch.context() as patch:
        for number, one in enumerate(SETTINGS):
            run = run_of(folder, folder / one.name, one)
            kill(folder, one.ranks, run, number % one.ranks, 1 + number % STEPS, patch)
    for ranks in (1, 2):
        # ZeRO 3 last: from then on DeepSpeed's own `linear` is in the process, whose gradients round in another way.
        settings = sorted((one for one in SETTINGS if one.ranks == ranks), key=lambda one: one.stage)
        names = [(prefix, one) for one in settings for prefix in ("", "whole-")]
        finish_together(
            start(folder, ranks, [run_of(folder, folder / f"{prefix}{one.name}", one) for prefix, one in names]), LIMIT
        )
    return folder


def test_every_pair_of_values_is_tried() -> None:
    values = [{setting[n] for setting in SETTINGS} for n in range(5)]
    assert values == [{0, 2}, {1, 2}, {1, 2, 3}, {"flow", "lora", "vae"}, {1, 2}] and len(SETTINGS) < 15


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda one: one.name)
def test_the_same_bits_whatever_is_trained_and_however(finished: Path, setting: Setting) -> None:
    check_same(finished / f"whole-{setting.name}", finished / setting.name, STEPS)


def test_killed_at_each_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1 to 20 of a run on one rank, with a checkpoint every third step."""

    def run(name: str) -> str:
        settings = ["parallel.deepspeed=null", "schedule.steps=20", "checkpoint.every=3"]
        return f"flow:{'+'.join([f'run={folder / name}', *settings])}"

    steps = range(1, 21)
    for step in steps:
        kill(folder, 1, run(f"at-{step}"), 0, step, monkeypatch)
    finish_together(start(folder, 1, [run("never"), *(run(f"at-{step}") for step in steps)]), LIMIT)
    for step in steps:
        check_same(folder / "never", folder / f"at-{step}", 20)


def test_other_ranks_and_stages_go_on_with_the_same_clips(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks under ZeRO 1, then one under ZeRO 3, then four under ZeRO 2, each killed but the last."""

    def run(name: str, stage: int) -> str:
        settings = [f"parallel.deepspeed={DEEPSPEED / f'zero{stage}.json'}", "schedule.steps=12", "checkpoint.every=4"]
        return f"flow:{'+'.join([f'run={folder / name}', *settings])}"

    kill(folder, 2, run("moved", 1), 1, 6, monkeypatch)
    kill(folder, 1, run("moved", 3), 0, 10, monkeypatch)
    finish_together(start(folder, 4, [run("moved", 2)]), LIMIT)
    finish_together(start(folder, 1, [run("still", 1)]), LIMIT)
    (expected,) = steps_of(folder / "still")
    first, *others = steps_of(folder / "moved")
    assert sorted(first) == list(range(1, 13)) == sorted(expected)
    assert os.path.lexists(folder / "moved" / "steps-3.jsonl")
    for step, wanted in expected.items():
        ranks = [first, *others][: 4 if step > 8 else 1 if step > 4 else 2]
        assert sorted(clip for rank in ranks for clip in rank[step]["clips"]) == sorted(wanted["clips"]), step
        loss = sum(float.fromhex(rank[step]["loss"]) for rank in ranks)
        assert loss == pytest.approx(float.fromhex(wanted["loss"]), rel=1e-5)
