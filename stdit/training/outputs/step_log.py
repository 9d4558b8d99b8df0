"""The record of a run's steps: metrics.jsonl and boards (on rank 0), and progress on the terminal."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import stdit
from stdit.data.remote.storage import STORAGE
from stdit.files import publish_text, writing
from stdit.heartbeat import HEARTBEAT, SILENCE, rich_bars
from stdit.machine import spin_settings
from stdit.training.batches import StepClips
from stdit.training.config import RunConfig, to_dict
from stdit.training.engine.parallel import World
from stdit.training.engine.traffic import TRAFFIC, Traffic
from stdit.training.objectives.protocol import StepResult, Update
from stdit.training.outputs.boards import Board, TensorBoard, WeightsAndBiases
from stdit.training.setup.build import RunComponents

SCHEMA = Path(__file__).with_name("metrics_schema.json")
EVERY = SILENCE - 2  # seconds between lines where there is no terminal: the heartbeat speaks only in long steps


class MetricsLog:
    """Appends lines to metrics.jsonl of a run folder, and their numbers to boards.

    step: where the run goes on. Lines of later steps, which a killed process wrote, are dropped.
    """

    def __init__(self, folder: Path, step: int, boards: Sequence[Board] = ()) -> None:
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            publish_text(path, "".join(line + "\n" for line in kept))
        self._path, self._file = path, path.open("ab", buffering=0)  # unbuffered, so that close cannot fail
        self._boards = boards

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends a line. Numbers that are not finite become null."""
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **_finite(values)}
        with writing(self._path):
            content = json.dumps(line).encode() + b"\n"
            while content:  # a nearly full disk takes a part before it raises
                content = content[self._file.write(content) :]
        for board in self._boards:
            board.write(dict(_numbers(kind, values)), step)

    def close(self) -> None:
        self._file.close()
        for board in self._boards:
            board.close()


def _finite(value: Any) -> Any:
    """The value with null for numbers that are not finite, also within mappings."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """(name, number) of the finite numbers in a value; those within mappings are named OUTER/INNER."""
    if isinstance(value, dict):
        for inner, part in value.items():
            yield from _numbers(f"{name}/{inner}", part)
    elif isinstance(value, int | float) and math.isfinite(value):
        yield name, value


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def boards_of(config: RunConfig, step: int) -> list[Board]:
    """Those that the config asks for. step: where the run goes on."""
    folder, found = Path(config.run.path), list[Board]()
    if config.log.tensorboard:
        found.append(TensorBoard(folder, step))
    if config.log.wandb is not None:
        found.append(WeightsAndBiases(folder, config.log.wandb, to_dict(config)))
    return found


class Progress:
    """Steps done, loss, tokens/s, MFU and time left: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, step: int, steps: int, shown: bool) -> None:
        self.first, self.steps, self.shown = step, steps, shown
        self.begun = self.spoke = time.monotonic()
        self.text = ""
        self.bar: Any = None
        self._held = ExitStack()
        if not shown:
            self._held.enter_context(HEARTBEAT.muted())
        elif sys.stderr.isatty():
            self.bar = self._held.enter_context(rich_bars(counts=True, transient=False))
            self.task = self.bar.add_task("", total=steps, completed=step)

    def show(self, loss: float, tokens_per_second: float, mfu: float | None) -> None:
        self.text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if mfu is not None:
            self.text += f"  MFU {100 * mfu:.1f} %"

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=self.text)
        elif self.shown and self.text and (time.monotonic() - self.spoke > EVERY or step == self.steps):
            self.spoke = time.monotonic()
            left = (self.steps - step) * (self.spoke - self.begun) / max(1, step - self.first)
            print(f"step {step}/{self.steps}  {self.text}  {left / 60:.1f} min left", flush=True)
            HEARTBEAT.spoke()

    def close(self) -> None:
        self._held.close()


class StepSums(NamedTuple):
    """Of all ranks together, of the steps since the last line of metrics."""

    losses: float
    tokens: float
    flops: float
    failures: float  # that the ranks have not shared yet
    storage_retries: float  # since the start
    waiting: float  # the longest of any rank, in seconds
    memory: float  # the most of any rank, in bytes
    loss_by_level: dict[str, float]  # nan for parts of the noise levels that no clip had
    critic_loss: float | None  # of the last step


class StepLog:
    """Times run from `begin_step` to `end_step`: saving and sampling, which lie between steps, are left out.

    peak: FLOP/s of one rank's matrix products, which MFU is relative to.
    """

    def __init__(
        self, config: RunConfig, world: World, step: int, peak: float, level_names: Sequence[str] = ()
    ) -> None:
        self.config, self.world, self.peak, self.first_step = config, world, peak, step
        self.level_names = level_names
        self.metrics: MetricsLog | None = None
        if world.is_main:
            self.metrics = MetricsLog(Path(config.run.path), step, boards_of(config, step))
        self.progress = Progress(step, config.schedule.steps, config.log.progress and world.is_main)
        self._reset()
        self._begun, self._cpu_begun = time.perf_counter(), time.process_time()

    def _reset(self) -> None:
        self.seconds = self.waiting = self.cpu_seconds = 0.0
        self.tokens = self.flops = self.steps = 0
        self.traffic = Traffic()

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
        HEARTBEAT.doing(f"step {step}/{self.config.schedule.steps}")
        TRAFFIC.take()
        self._begun, self._cpu_begun = time.perf_counter(), time.process_time()

    def clips_are_read(self) -> None:
        self.waiting += time.perf_counter() - self._begun

    def end_step(self, result: StepResult) -> None:
        self.seconds += time.perf_counter() - self._begun
        self.cpu_seconds += time.process_time() - self._cpu_begun
        self.tokens += result.tokens
        self.flops += result.flops
        self.steps += 1
        self.traffic += TRAFFIC.take()

    def sum_over_ranks(
        self, losses: Sequence[Tensor], by_level: Tensor, failures: int, critic_loss: Tensor | None
    ) -> StepSums:
        """losses, by_level, failures, critic_loss: this rank's share. All ranks call it together.

        by_level: (2, parts of the noise levels): errors, and their weights.
        """
        counts = [self.tokens, self.flops, failures, STORAGE.retries]
        mine = [sum(float(loss) for loss in losses), 0.0 if critic_loss is None else float(critic_loss), *counts]
        loss, critic, tokens, flops, failed, retries, *levels = self.world.sum_(
            torch.tensor([*mine, *by_level.flatten().tolist()], dtype=torch.float64)
        ).tolist()
        errors, weights = levels[: len(self.level_names)], levels[len(self.level_names) :]
        most = [max(values) for values in zip(*self.world.gather((self.waiting, _peak_memory(self.world.device))))]
        return StepSums(
            losses=loss, tokens=tokens, flops=flops, failures=failed, storage_retries=retries, waiting=most[0],
            memory=most[1], critic_loss=None if critic_loss is None else critic,
            loss_by_level={
                name: error / weight if weight else math.nan
                for name, error, weight in zip(self.level_names, errors, weights)
            },
        )  # fmt: skip

    def write_step(self, step: int, clips: StepClips, update: Update, loss: float, sums: StepSums, failed: int) -> None:
        """A line about the steps since the last one. loss: their mean. failed: clips so far that could not be read."""
        per_second, mfu = sums.tokens / self.seconds, None
        if sums.flops:
            mfu = round(sums.flops / self.seconds / (self.peak * self.world.size), 6)
        told: dict[str, Any] = {} if sums.critic_loss is None else {"critic_loss": sums.critic_loss}
        if sums.loss_by_level:
            told["loss_by_level"] = sums.loss_by_level
        if update.limit:
            told["grad_limit"] = update.limit
        self.progress.show(loss, per_second, mfu)
        self.write(
            "train", step, epoch=clips.epoch, loss=loss, grad_norm=update.norm, lr=update.lr, clips=clips.num_clips,
            failed=failed, storage_retries=int(sums.storage_retries), tokens=int(sums.tokens) // self.steps,
            step_seconds=round(self.seconds / self.steps, 6), wait_seconds=round(sums.waiting / self.steps, 6),
            cpu_seconds=round(self.cpu_seconds / self.steps, 6),
            tokens_per_second=round(per_second, 3), mfu=mfu, balance=round(clips.balance, 4),
            memory_gib=round(sums.memory / 2**30, 3), bytes_sent=round(self.traffic.sent / self.steps),
            collectives=round(self.traffic.calls / self.steps, 1), **told,
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


def _peak_memory(device: torch.device) -> float:
    """The most bytes that this process had at once, since it began: of the GPU's memory as torch counts it, or of the
    machine's; 0 if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    settings = spin_settings()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads" + (f" ({settings})" if settings else "")


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of this process's matrix products, the best within `seconds`. MFU is relative to it."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)

    def once() -> float:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    best, end = once(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, once())
    return 2 * size**3 / best
