"""Training: plan → clips → objective → engine, and everything around a step that keeps a run alive and watched."""

from __future__ import annotations

import math
import os
import platform
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import stdit
from stdit.data.remote.storage import STORAGE
from stdit.errors import Interrupted, StditError
from stdit.heartbeat import HEARTBEAT
from stdit.threads import spin_settings
from stdit.training import non_finite
from stdit.training.batches import StepClips, StepLoader
from stdit.training.config import MAY_DIFFER, RunConfig, differences, to_dict
from stdit.training.engine import checkpoint
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.engine.ema import Ema
from stdit.training.engine.engine import PRECISIONS, Engine, make_engine
from stdit.training.engine.parallel import World
from stdit.training.objectives.protocol import StepKey
from stdit.training.outputs import export
from stdit.training.outputs.metrics import MetricsLog, measure_peak, read_metrics
from stdit.training.outputs.progress import Progress
from stdit.training.setup.build import RunComponents, build
from stdit.training.setup.frozen import check_frozen
from stdit.training.setup.networks import check_networks, with_networks


class StepResult(NamedTuple):
    """A step's gradients are there. loss, tokens, flops: this rank's share, they add up."""

    loss: Tensor
    tokens: int
    flops: int
    stop: int  # the signal that asks any rank to save and stop, or 0
    critic: Tensor | None = None  # its loss, as loss is


class Trainer:
    """One run from its first or its last saved step to its end."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.folder = Path(config.run.path)
        self.say: Callable[[str], None] = _say if world.is_main else (lambda _: None)
        self.resumed = Checkpoint.latest(self.folder)
        if self.resumed is not None:
            state = self.resumed.state
            changed = differences(with_networks(state, config), config, named="frozen" in state)
            if changed:
                free = ", ".join(key.rstrip(".") for key in MAY_DIFFER)
                raise StditError(
                    f"{self.resumed.path} belongs to another config:\n  " + "\n  ".join(changed) + "\n"
                    f"Put these back, or choose another run=PATH. Only {free} may change."
                )
        self.step = self.resumed.step if self.resumed else 0  # optimizer steps done
        self.failures: dict[str, dict[str, Any]] = {}  # by clip id, of all ranks up to when they last shared them
        self.unshared = 0  # failures that only this rank knows of
        self.window: list[Tensor] = []  # this rank's share of the losses since the last line of metrics
        self.skipped = 0  # steps in a row that were not finite and updated nothing
        self.stop_signal: int | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the last step is done and its weights, not an earlier end's, are exported."""
        return self.step >= self.config.schedule.steps and export.exported_step(self.folder) == self.step

    def prepare(self) -> None:
        """Builds everything, and takes up the state of the last checkpoint."""
        config, world = self.config, self.world
        _set_deterministic(config.run.deterministic)
        self.parts: RunComponents = build(config, world)
        module, critic = self.parts.objective.module, self.parts.objective.critic
        self.parts.frozen = check_frozen(self.parts.config, self.resumed, world, self.say)
        self.networks = check_networks(self.parts.config, self.parts.objective, self.resumed, self.say)
        plans = world.gather(self.parts.plan_hash)
        other = next((rank for rank, plan in enumerate(plans) if plan != plans[0]), None)
        if other is not None:  # they would wait for one another, or learn from clips of different steps
            raise StditError(
                f"rank {other} has other data than rank 0: {config.data.manifest} is not the same there, or was "
                f"written to while it was read. Give all machines the same one and start again."
            )
        if self.resumed is not None:
            if self.resumed.state["plan"] != self.parts.plan_hash:
                raise StditError(
                    f"{self.resumed.path} was made with other data: {config.data.manifest} has changed since, so its "
                    f"steps would be others. Restore the manifest, or choose another run=PATH."
                )
            before = self.resumed.state["config"]["schedule"]["steps"]
            if jump := config.schedule.jump(before, self.step, config.optimizer.lr):
                self.say(jump)
            HEARTBEAT.doing(f"loading {self.resumed.path}")
            self.resumed.load_weights(module, *([critic.module] if critic else []))
        HEARTBEAT.doing("preparing the optimizer")
        self.engine: Engine = make_engine(module, config.optimizer, config.parallel, config.run.precision, world)
        self.critic: Engine | None = None
        if critic is not None:
            self.critic = make_engine(critic.module, critic.optimizer, config.parallel, config.run.precision, world)
            critic.module.train()
        ema = config.optimizer.ema
        self.ema = Ema(self.engine.flat_masters, ema) if ema.decay > 0 else None
        if self.resumed is not None:
            self.resumed.load_state(self.engine, self.ema, self.critic)
            self.failures = dict(self.resumed.state["failures"])
            self.skipped = self.resumed.state.get("skipped", 0)
            loss = self.resumed.state["window"]
            self.window = [torch.tensor(one if world.is_main else 0.0, dtype=torch.float64) for one in loss]
        module.train()

    def train(self) -> None:
        """To the last step; saves and raises `Interrupted` after a signal."""
        config, world = self.config, self.world
        parts = self.parts
        HEARTBEAT.doing("measuring this machine's rate")
        self.peak = measure_peak(world.device, PRECISIONS[config.run.precision])
        log = self._open_log()
        feed = StepLoader(parts.plan_of, parts.loader, world.rank, world.size, self.step)
        progress = Progress(self.step, config.schedule.steps, config.log.progress and world.is_main)
        clock = _Clock()
        restore = self._catch_signals()
        saved = self.step
        try:
            if self._evaluation_is_due() and not self._is_evaluated():  # the process before ended between the two
                self._evaluate(log)
                clock.start()
            while self.step < config.schedule.steps:
                progress.begin(self.step + 1)
                step = next(feed.steps)
                clock.waited()
                done = self.accumulate(step)
                norm, rate = self.update()
                if math.isfinite(norm):
                    self.window.append(done.loss)
                else:
                    self._skip(log, step, norm)
                clock.count(done.tokens, done.flops)
                if self.step % config.log.every == 0 or self.step == config.schedule.steps:
                    self._log(log, progress, clock, step, norm, rate, done.critic)
                progress.advance(self.step)
                if done.stop or self.step % config.checkpoint.every == 0 or self.step == config.schedule.steps:
                    self.save()
                    saved = self.step
                if done.stop:
                    raise self._interrupted(done.stop)
                if self._evaluation_is_due():
                    self._evaluate(log)
                clock.start()
            if saved != self.step:
                self.save()
            self._finish(log)
        finally:
            restore()
            feed.close()
            progress.close()
            if log is not None:
                log.close()

    def accumulate(self, step: StepClips) -> StepResult:
        """Forward and backward of all micro-steps: the gradient of the step's exact loss is then in the engine."""
        world, objective = self.world, self.parts.objective
        key = self._key(step)
        self._note_failures(step)
        mine = sum(objective.weight(examples, key) for examples in step.examples)
        signals = [self.stop_signal == signal.SIGINT, self.stop_signal not in (None, signal.SIGINT)]
        sums = torch.tensor([mine, *signals], dtype=torch.float64)
        weight, interrupted, ended = world.sum_(sums).tolist()
        if weight == 0:
            reasons = [example.failure for examples in step.examples for example in examples if example.failure]
            raise StditError(
                f"step {self.step + 1}: none of its {step.clips} clips could be read: there is nothing to learn from. "
                f"{reasons[0] if reasons else ''} The run can go on from its last checkpoint."
            )
        total, against = torch.zeros(2, dtype=torch.float64, device=world.device)
        critic = self._critic_in_this_step()
        flops = 0
        for number, (examples, items) in enumerate(zip(step.examples, step.items)):
            batch = objective.prepare(examples, items, key)
            flops += batch.flops
            last = number == len(step.items) - 1
            total += self.engine.backward(batch, 1 / weight, last).double()
            if critic is not None:
                against += critic.backward(batch, 1 / weight, last).double()
            del batch  # before the next one is made
        tokens = sum(item.tokens for items in step.items for item in items)
        stop = int(signal.SIGTERM) if ended else int(signal.SIGINT) if interrupted else 0
        return StepResult(total / weight, tokens, flops, stop, None if critic is None else against / weight)

    def _key(self, step: StepClips) -> StepKey:
        return StepKey(self.config.run.seed, step.epoch, step.index, step.clips, self.step)

    def _critic_in_this_step(self) -> Engine | None:
        described = self.parts.objective.critic
        return self.critic if described is not None and self.step >= described.start else None

    def update(self) -> tuple[float, float]:
        """The optimizer's step and the average's. Returns the gradient's norm before clipping, and the rate. Where the
        norm is not finite, which all ranks see alike, the weights and their average stay as they are."""
        factor = self.config.schedule.factor(self.step)
        rate = self.config.optimizer.lr * factor
        norm = self.engine.step(rate)
        if (critic := self._critic_in_this_step()) is not None:
            assert self.parts.objective.critic is not None
            norm += 0.0 * critic.step(self.parts.objective.critic.optimizer.lr * factor)  # not finite if that is not
        self.step += 1
        finite = math.isfinite(norm)
        self.skipped = 0 if finite else self.skipped + 1
        if finite and self.ema is not None:
            self.ema.update(self.step)
        return norm, rate

    def _skip(self, log: MetricsLog | None, step: StepClips, norm: float) -> None:
        """Names the clips of a step that was not finite; raises if too many steps in a row were."""
        HEARTBEAT.doing(f"step {self.step} is not finite: running its clips alone")
        key = replace(self._key(step), done=self.step - 1)
        parts = self.parts
        clips = non_finite.find_clips(step, key, parts.objective, self.engine, parts.manifest, self.world)
        if log is not None:
            log.write("skipped", self.step, epoch=step.epoch, grad_norm=norm, in_a_row=self.skipped, clips=clips)
        told = f"the gradient's norm is {norm}. {non_finite.describe(clips, step.clips)}"
        if self.skipped > self.config.optimizer.max_skipped_steps:
            of_clips = 0 < len(clips) < step.clips or any(clip["fault"] != non_finite.LOSS for clip in clips)
            raise self._diverged(f"{told}\n{self.skipped} steps in a row: stopped", of_clips)
        self.say(f"step {self.step} updates nothing: {told}")

    def _log(
        self,
        log: MetricsLog | None,
        progress: Progress,
        clock: _Clock,
        step: StepClips,
        norm: float,
        rate: float,
        critic: Tensor | None = None,
    ) -> None:
        mine = [sum(float(one) for one in self.window), clock.tokens, clock.flops, self.unshared, STORAGE.retries]
        mine += [] if critic is None else [float(critic)]
        sums = self.world.sum_(torch.tensor(mine, dtype=torch.float64)).tolist()
        loss = sums[0] / len(self.window) if self.window else math.nan
        diverged = self.window and not math.isfinite(loss)
        self.window = []
        if sums[3]:
            self._share_failures()
        if diverged:
            raise self._diverged(f"the loss is {loss}")
        values = clock.rates(int(sums[1]), int(sums[2]), self.peak * self.world.size)
        values |= {} if critic is None else {"critic_loss": sums[5]}
        progress.show(loss=loss, tokens_per_second=values["tokens_per_second"], mfu=values["mfu"])
        if log is not None:
            log.write(
                "train", self.step, epoch=step.epoch, loss=loss, grad_norm=norm, lr=rate, clips=step.clips,
                failed=len(self.failures), storage_retries=int(sums[4]), **values,
            )  # fmt: skip

    def _diverged(self, what: str, of_clips: bool = False) -> StditError:
        """of_clips: only some of the step's clips are at fault, not the training."""
        found = Checkpoint.latest(self.folder)
        kept = f"{found.path} is from before" if found else "nothing was saved"
        remedy = "a lower optimizer.lr, optimizer.clip set, a longer schedule.warmup, or run.precision=fp32"
        return StditError(
            f"step {self.step}: {what}. {kept}; going on from it would end here again, and a run keeps its settings. "
            + f"Start another with run=PATH and {'a manifest without these clips' if of_clips else remedy}"
            + (", or go on with a higher optimizer.max_skipped_steps." if of_clips else ".")
        )

    def _open_log(self) -> MetricsLog | None:
        if not self.world.is_main:
            return None
        log = MetricsLog(self.folder, self.step, self.config.log.tensorboard)
        parts = self.parts
        log.write(
            "start", self.step, objective=self.config.objective.kind, ranks=self.world.size,
            steps=self.config.schedule.steps, peak_flops=self.peak, device=_device_name(self.world.device),
            torch=torch.__version__, stdit=stdit.__version__, parameters=parts.parameters,
            clips=parts.plan.num_items, steps_per_epoch=parts.plan.num_steps,
        )  # fmt: skip
        self.say(
            f"{self.folder}: {parts.parameters:,} parameters, {parts.plan.num_items:,} clips, "
            f"{parts.plan.num_steps:,} steps an epoch, {self.world.size} rank(s) on {_device_name(self.world.device)}, "
            f"matrix products {self.peak / 1e9:,.0f} GFLOP/s per rank"
            + (f"; goes on after step {self.step}" if self.step else "")
        )
        return log

    def _note_failures(self, step: StepClips) -> None:
        for example in (one for examples in step.examples for one in examples):
            if example.failure and example.clip_id not in self.failures:
                self.failures[example.clip_id] = {
                    "row": example.row,
                    "epoch": example.epoch,
                    "reason": example.reason,
                    "failure": example.failure,
                }
                self.unshared += 1
                print(f"clip {example.row} left out of training: {example.failure}", flush=True)

    def _share_failures(self) -> None:
        failures: dict[str, Any] = {}
        for found in self.world.gather(self.failures):
            failures |= found
        self.failures, self.unshared = dict(sorted(failures.items())), 0

    def save(self) -> None:
        HEARTBEAT.doing(f"saving step {self.step}")
        self._share_failures()
        window = self.world.sum_(torch.stack([one.cpu() for one in self.window])) if self.window else torch.zeros(0)
        if self.window:  # the sum is rank 0's from here on, as after a resume
            self.window = [one if self.world.is_main else torch.zeros_like(one) for one in window]
        state = {
            "plan": self.parts.plan_hash,
            "window": window.tolist(),
            "failures": self.failures,
            "skipped": self.skipped,
            "frozen": self.parts.frozen,
            "networks": self.networks,
            "config": to_dict(self.config),
        }
        keep = self.config.checkpoint.keep
        checkpoint.save(self.folder, self.step, self.engine, self.ema, state, keep, self.world, self.critic)

    def _evaluation_is_due(self) -> bool:
        """After the last step it is part of `_finish`."""
        settings = self.config.eval
        if not settings.every or (self.config.objective.kind == "flow" and not settings.prompts):
            return False
        return self.step % settings.every == 0 and 0 < self.step < self.config.schedule.steps

    def _is_evaluated(self) -> bool:
        found = self.world.is_main and any(line["step"] == self.step for line in read_metrics(self.folder, "eval"))
        return bool(self.world.sum_(torch.tensor(float(found))))

    def _evaluate(self, log: MetricsLog | None) -> None:
        HEARTBEAT.doing(f"evaluating step {self.step}")
        weights = export.averaged_weights(self.engine, self.ema, self.world)
        self.world.from_main(partial(self._measure, log, weights))

    def _measure(self, log: MetricsLog | None, weights: dict[str, Tensor] | None) -> None:
        assert weights is not None and log is not None
        if self.config.objective.kind == "vae":
            module: Any = export.with_weights(self.parts.objective.fresh(), weights)
            psnr = export.vae_psnr(module.vae.to(self.world.device), self.parts)
            log.write("eval", self.step, psnr=psnr)
            self.say(f"step {self.step}: PSNR {psnr:.2f} dB")
        else:
            pipeline = export.make_pipeline(self.parts, weights, self.world)
            log.write("eval", self.step, samples=export.sample(pipeline, self.parts, self.step))

    def _finish(self, log: MetricsLog | None) -> None:
        """The last samples or measures, then the model folder: it is what says that the run is finished."""
        HEARTBEAT.doing("measuring and exporting the model")
        weights = export.averaged_weights(self.engine, self.ema, self.world)
        self.world.from_main(partial(self._export, log, weights))

    def _export(self, log: MetricsLog | None, weights: dict[str, Tensor] | None) -> None:
        assert weights is not None and log is not None
        if self.config.objective.kind == "vae":
            measured = export.export_vae(self.parts, weights, self.step, self.world)
            log.write("eval", self.step, **measured)
            self.say(", ".join(f"{name} {value:.2f}" for name, value in measured.items()))
        else:
            if self.config.eval.prompts:
                self._measure(log, weights)
            write = partial(export.write_model, self.parts, weights, self.world)
            export.publish_model(self.folder, self.step, write)
        log.write("end", self.step, model="model")
        self.say(f"finished after {self.step} steps: {self.folder / 'model'}")

    def _catch_signals(self) -> Callable[[], None]:
        """The first signal is noted and acted on after the step; a second Ctrl-C stops at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.stop_signal is not None:
                raise KeyboardInterrupt
            self.stop_signal = number
            if self.world.is_main:  # print is not for handlers: the signal may come within one
                with suppress(OSError):
                    os.write(2, f"{signal.Signals(number).name}: saving after this step …\n".encode())

        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        before = [signal.signal(number, note) for number in wanted]

        def restore() -> None:
            for number, handler in zip(wanted, before):
                signal.signal(number, handler)

        return restore

    def _interrupted(self, number: int) -> Interrupted:
        told = f"saved after step {self.step} in {self.folder / 'checkpoints'}; the same command goes on from there"
        return Interrupted(told if self.world.is_main else "", 130 if number == signal.SIGINT else 75)


class _Clock:
    """Times since the last line of metrics, without what lies between steps (saving, sampling); a rank's own work."""

    def __init__(self) -> None:
        self.reset()
        self.start()

    def reset(self) -> None:
        self.seconds = self.waiting = 0.0
        self.tokens = self.flops = self.steps = 0

    def start(self) -> None:
        self.begun = time.perf_counter()

    def waited(self) -> None:
        self.waiting += time.perf_counter() - self.begun

    def count(self, tokens: int, flops: int) -> None:
        self.seconds += time.perf_counter() - self.begun
        self.tokens += tokens
        self.flops += flops
        self.steps += 1

    def rates(self, tokens: int, flops: int, peak: float) -> dict[str, Any]:
        """tokens, flops, peak: of all ranks together."""
        values = {
            "tokens": tokens // self.steps,
            "step_seconds": round(self.seconds / self.steps, 6),
            "wait_seconds": round(self.waiting / self.steps, 6),
            "tokens_per_second": round(tokens / self.seconds, 3),
            "mfu": round(flops / self.seconds / peak, 6) if flops else None,
        }
        self.reset()
        return values


def _say(text: str) -> None:
    print(text, flush=True)
    HEARTBEAT.spoke()


def _set_deterministic(wanted: bool) -> None:
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    settings = spin_settings()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads" + (f" ({settings})" if settings else "")
