"""The record of a run's steps: metrics.jsonl and TensorBoard (on rank 0), and progress on the terminal."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import stdit
from stdit.data.remote.storage import STORAGE
from stdit.machine import spin_settings
from stdit.training.batches import StepClips
from stdit.training.config import RunConfig
from stdit.training.engine.parallel import World
from stdit.training.objectives.protocol import StepResult, Update
from stdit.training.outputs.metrics import MetricsLog
from stdit.training.outputs.progress import Progress
from stdit.training.setup.build import RunComponents


class StepSums(NamedTuple):
    """Sums over all ranks, of the steps since the last line of metrics."""

    losses: float
    tokens: float
    flops: float
    failures: float  # that the ranks have not shared yet
    storage_retries: float  # since the start
    critic_loss: float | None = None  # of the last step


class StepLog:
    """Times run from `begin_step` to `end_step`: saving and sampling, which lie between steps, are left out.

    peak: FLOP/s of one rank's matrix products, which MFU is relative to.
    """

    def __init__(self, config: RunConfig, world: World, step: int, peak: float) -> None:
        self.config, self.world, self.peak = config, world, peak
        self.metrics: MetricsLog | None = None
        if world.is_main:
            self.metrics = MetricsLog(Path(config.run.path), step, config.log.tensorboard)
        self.first_step = step
        self.progress = Progress(step, config.schedule.steps, config.log.progress and world.is_main)
        self._reset()
        self._begun = time.perf_counter()

    def _reset(self) -> None:
        self.seconds = self.waiting = 0.0
        self.tokens = self.flops = self.steps = 0

    def write_start(self, components: RunComponents, say: Callable[[str], None]) -> None:
        plan, ranks, name = components.plan, self.world.size, _device_name(self.world.device)
        self.write(
            "start", self.first_step, objective=self.config.objective.kind, ranks=ranks,
            steps=self.config.schedule.steps, peak_flops=self.peak, device=name, torch=torch.__version__,
            stdit=stdit.__version__, parameters=components.parameters, clips=plan.num_items,
            steps_per_epoch=plan.num_steps,
        )  # fmt: skip
        say(
            f"{self.config.run.path}: {components.parameters:,} parameters, {plan.num_items:,} clips, "
            f"{plan.num_steps:,} steps per epoch, {ranks} rank(s) on {name}, matrix products "
            f"{self.peak / 1e9:,.0f} GFLOP/s per rank"
            + (f"; goes on after step {self.first_step}" if self.first_step else "")
        )

    def begin_step(self, step: int) -> None:
        self.progress.begin(step)
        self._begun = time.perf_counter()

    def clips_are_read(self) -> None:
        self.waiting += time.perf_counter() - self._begun

    def end_step(self, result: StepResult) -> None:
        self.seconds += time.perf_counter() - self._begun
        self.tokens += result.tokens
        self.flops += result.flops
        self.steps += 1

    def show_step(self, step: int) -> None:
        self.progress.advance(step)

    def sum_over_ranks(self, losses: Sequence[Tensor], failures: int, critic_loss: Tensor | None) -> StepSums:
        """losses, failures, critic_loss: this rank's share. All ranks call it together."""
        mine = [sum(float(loss) for loss in losses), self.tokens, self.flops, failures, STORAGE.retries]
        mine += [] if critic_loss is None else [float(critic_loss)]
        return StepSums(*self.world.sum_(torch.tensor(mine, dtype=torch.float64)).tolist())

    def write_step(self, step: int, clips: StepClips, update: Update, loss: float, sums: StepSums, failed: int) -> None:
        """A line about the steps since the last one. loss: their mean. failed: clips so far that could not be read."""
        per_second, mfu = sums.tokens / self.seconds, None
        if sums.flops:
            mfu = round(sums.flops / self.seconds / (self.peak * self.world.size), 6)
        critic = {} if sums.critic_loss is None else {"critic_loss": sums.critic_loss}
        self.progress.show(loss=loss, tokens_per_second=per_second, mfu=mfu)
        self.write(
            "train", step, epoch=clips.epoch, loss=loss, grad_norm=update.norm, lr=update.lr, clips=clips.num_clips,
            failed=failed, storage_retries=int(sums.storage_retries), tokens=int(sums.tokens) // self.steps,
            step_seconds=round(self.seconds / self.steps, 6), wait_seconds=round(self.waiting / self.steps, 6),
            tokens_per_second=round(per_second, 3), mfu=mfu, **critic,
        )  # fmt: skip
        self._reset()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """A line of metrics.jsonl (see metrics_schema.json); nothing on other ranks than 0."""
        if self.metrics is not None:
            self.metrics.write(kind, step, **values)

    def close(self) -> None:
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    settings = spin_settings()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads" + (f" ({settings})" if settings else "")
