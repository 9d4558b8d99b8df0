"""The training loop: plan → clips → objective → engine, and what keeps a run alive and watched.

Read `Trainer.train`, then `accumulate` (forward and backward of a step) and `update` (the optimizer's step).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from stdit import keyed
from stdit.evaluation.report import read_metrics
from stdit.heartbeat import HEARTBEAT
from stdit.training import bad_clips, out_of_memory, resume
from stdit.training.batches import StepClips, StepLoader
from stdit.training.config import RunConfig, to_dict
from stdit.training.engine.agreement import agree
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.engine.engine import PRECISIONS, Engine
from stdit.training.engine.make import make_engine
from stdit.training.engine.parallel import SharingStopped, World
from stdit.training.engine.saver import Saver
from stdit.training.engine.start import frozen_alone
from stdit.training.objectives.protocol import StepKey, StepResult, Update
from stdit.training.outputs import evaluation, export
from stdit.training.outputs.step_log import StepLog, measure_peak
from stdit.training.setup.build import RunComponents, build
from stdit.training.setup.frozen import check_frozen
from stdit.training.setup.resolve import ResolvedConfig
from stdit.training.stop_signal import StopSignal


class Trainer:
    """One run, from its first or its last saved step to its end. All ranks call every method together."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.folder = Path(config.run.path)
        self.say: Callable[[str], None] = say if world.is_main else (lambda _: None)
        self.resumed = agree(self.folder, world, self.say)
        if self.resumed is not None:
            resume.check_config(self.resumed, config)
        self.step = self.resumed.step if self.resumed else 0  # optimizer steps done
        self.saved = self.step
        self.skipped = 0  # steps in a row that were not finite and updated nothing
        self.losses: list[Tensor] = []  # this rank's share of each step's loss since the last line of metrics
        self.by_level = torch.zeros(2, 0)  # this rank's errors by noise level and their weights, of the same steps
        self.shared = config.parallel.sequence_parallel  # ranks that share a pack; the first counts its clips
        self.counts = world.rank % self.shared == 0
        self.failures = bad_clips.FailedClips(world)
        self.stop = StopSignal(world)
        self.saver = Saver(self.folder, config.checkpoint, world)

    # ------------------------------------------------------------------------------------------------------ preparing

    def prepare(self, config: ResolvedConfig) -> None:
        """Builds everything, and loads the last checkpoint if there is one."""
        if config.run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        resume.check_randomness(self.resumed)
        self.components: RunComponents = build(config, self.world)
        self.objective, resumed = self.components.objective, self.resumed
        self.components.frozen = check_frozen(config, resumed, self.world, self.say)
        self.networks = resume.check_networks(config, self.objective, resumed, self.say)
        resume.check_data(self.components, resumed, self.world)
        if resumed is not None:
            steps_before = resumed.state["config"]["schedule"]["steps"]
            if jump := config.schedule.jump(steps_before, resumed.step, config.optimizer.lr):
                self.say(jump)
            HEARTBEAT.doing(f"loading {resumed.path}")
            critic = self.objective.critic
            resumed.load_weights(self.objective.module, *([critic.module] if critic else []), world=self.world)
        self.by_level = torch.zeros(2, len(self.objective.level_names), dtype=torch.float64, device=self.world.device)
        HEARTBEAT.doing("preparing the optimizer")
        self._make_engines()
        if resumed is not None:
            self._load_state(resumed)
        for engine in self.engines:
            engine.module.train()

    def _make_engines(self) -> None:
        config, critic, numbers = self.config, self.objective.critic, self.objective.numbers
        if self.resumed is not None and numbers is not None:
            numbers = frozen_alone(self.objective.module, numbers)
        engine_of = partial(make_engine, parallel=config.parallel, precision=config.run.precision, world=self.world)
        self.engine: Engine = engine_of(self.objective.module, config.optimizer, numbers=numbers)
        self.critic: Engine | None = engine_of(critic.module, critic.optimizer) if critic else None
        self.engines = [self.engine, *([self.critic] if self.critic else [])]

    def _load_state(self, resumed: Checkpoint) -> None:
        resumed.load_state(self.engines)
        if self.objective.numbers is not None:  # else all weights are there already
            self.engine.copy_masters()
        self.failures.by_id = dict(resumed.state["failures"])
        self.skipped = resumed.state.get("skipped", 0)
        for engine, limit in zip(self.engines, resumed.state.get("limits", [])):
            engine.limit.load(limit)
        shares = [loss if self.world.is_main else 0.0 for loss in resumed.state["window"]]
        self.losses = [torch.tensor(share, dtype=torch.float64) for share in shares]
        if self.world.is_main and "by_level" in resumed.state:
            self.by_level.copy_(torch.tensor(resumed.state["by_level"]).view_as(self.by_level))

    # ------------------------------------------------------------------------------------------------------- training

    def train(self) -> None:
        """Trains to the last step and exports the model. Raises `Interrupted` after a signal, once it has saved."""
        config, world = self.config, self.world
        HEARTBEAT.doing("measuring this machine's rate")
        peak = measure_peak(world.device, PRECISIONS[config.run.precision])
        self.log = StepLog(config, world, self.step, peak, self.objective.level_names)
        self.log.write_start(self.components, self.say)
        group, groups = world.rank // self.shared, config.parallel.groups(world.size)
        loader = StepLoader(self.components.plan_of, self.components.loader, group, groups, self.step)
        with closing(self.log), closing(loader), self.stop.listening(), self.saver.finishing():
            if self._evaluation_is_due() and not self._is_evaluated():  # the process was killed between the two
                self._evaluate()
            while self.step < config.schedule.steps:
                self.log.begin_step(self.step + 1)
                clips = next(loader.steps)
                self.log.clips_are_read()
                with out_of_memory.explained(self.components.config, world, self.step + 1, clips):
                    result = self.accumulate(clips)
                    update = self.update()
                if update.is_finite:
                    self.losses.append(result.loss)
                    self.by_level += result.by_level
                else:
                    self._skip(clips, update)
                self.log.end_step(result)
                is_last = self.step == config.schedule.steps
                if is_last or self.step % config.log.every == 0:
                    self._write_metrics(clips, update, result.critic_loss)
                self.log.progress.advance(self.step)
                if result.stop or is_last or self.step % config.checkpoint.every == 0:
                    self.save()
                if result.stop:
                    self.saver.finish()
                    raise self.stop.interrupted(result.stop, self.step, self.folder)
                if self._evaluation_is_due():
                    self._evaluate()
            if self.saved != self.step:
                self.save()
            self._finish()

    def accumulate(self, clips: StepClips) -> StepResult:
        """Forward and backward of all micro-steps: leaves the gradient of the step's exact loss in the engine."""
        objective, critic, device = self.objective, self._critic_in_this_step(), self.world.device
        key = self._key(clips, self.step)
        weight, failed, saved, *stop = self._sum_weights(clips, key)
        if saved == self.world.size:
            self.saver.go_on()
        if failed and self.shared > 1:  # maybe not on all ranks of a group
            clips = bad_clips.agreed(clips, self.world)
            weight = self._sum_weights(clips, key)[0]
        if self.counts:
            self.failures.note(clips)
        if weight == 0:
            self.saver.finish()
            raise bad_clips.no_clip_could_be_read(clips, self.step + 1)
        loss, critic_loss = torch.zeros(2, dtype=torch.float64, device=device)
        flops, by_level = 0, torch.zeros(2, len(objective.level_names), device=device)
        for micro in clips.micro_steps:
            batch = objective.prepare(micro.examples, micro.items, key)
            flops += batch.flops
            is_last = micro is clips.micro_steps[-1]
            loss += self.engine.backward(batch, 1 / weight, is_last).double()
            if critic is not None:
                critic_loss += critic.backward(batch, 1 / weight, is_last).double()
            if batch.by_level is not None:
                by_level += batch.by_level
            del batch  # before the next one is made
        return StepResult(
            loss=loss / weight,
            critic_loss=None if critic is None else critic_loss / weight,
            tokens=self.counts * sum(item.tokens for micro in clips.micro_steps for item in micro.items),
            flops=flops,
            stop=self.stop.of_flags(*stop),
            by_level=by_level,
        )

    def _sum_weights(self, clips: StepClips, key: StepKey) -> list[float]:
        """Σ_c w_c, how many clips failed, on how many ranks the saver is ready, and who asked to stop: over all ranks,
        each pack counted once."""
        mine = sum(self.objective.weight(micro.examples, key) for micro in clips.micro_steps) if self.counts else 0.0
        failed = sum(example.failure is not None for example in clips.examples)
        flags = [self.saver.is_ready, *self.stop.flags]
        return self.world.sum_(torch.tensor([mine, failed, *flags], dtype=torch.float64)).tolist()

    def update(self) -> Update:
        """Steps the optimizer and the average. If the gradient's norm is not finite, which all ranks see alike,
        weights and average stay as they are."""
        factor = self.config.schedule.factor(self.step)
        lr = self.config.optimizer.lr * factor
        limit = self.engine.limit.value if self.config.optimizer.adaptive_clip else 0.0
        norm = self.engine.step(lr)
        if (critic := self._critic_in_this_step()) is not None:
            assert self.objective.critic is not None
            critic_norm = critic.step(self.objective.critic.optimizer.lr * factor)
            norm += 0.0 * critic_norm  # not finite if the critic's is not
        update = Update(norm, lr, limit)
        self.step += 1
        self.skipped = 0 if update.is_finite else self.skipped + 1
        if update.is_finite and self.engine.ema is not None:
            self.engine.ema.update(self.step)
        return update

    def _key(self, clips: StepClips, done: int) -> StepKey:
        return StepKey(self.config.run.seed, clips.epoch, clips.index, clips.num_clips, done)

    def _critic_in_this_step(self) -> Engine | None:
        critic = self.objective.critic
        return self.critic if critic is not None and self.step >= critic.start else None

    # ------------------------------------------------------------------------------------------------ around the steps

    def _skip(self, clips: StepClips, update: Update) -> None:
        """Names the clips of a step that was not finite. Raises StditError if too many steps in a row were."""
        HEARTBEAT.doing(f"step {self.step} is not finite: running its clips alone")
        objective, manifest = self.objective, self.components.manifest
        key = self._key(clips, self.step - 1)
        faults = bad_clips.find_not_finite(clips, key, objective, self.engine, manifest, self.world)
        self.log.write(
            "skipped", self.step, epoch=clips.epoch, grad_norm=update.norm, in_a_row=self.skipped, clips=faults
        )  # fmt: skip
        message = f"the gradient's norm is {update.norm}. {bad_clips.describe(faults, clips.num_clips)}"
        if self.skipped > self.config.optimizer.max_skipped_steps:
            message += f"\n{self.skipped} steps in a row: stopped"
            blame_clips = bad_clips.are_to_blame(faults, clips.num_clips)
            self.saver.finish()
            raise bad_clips.diverged(self.folder, self.step, message, blame_clips)
        self.say(f"step {self.step} updates nothing: {message}")

    def _write_metrics(self, clips: StepClips, update: Update, critic_loss: Tensor | None) -> None:
        """Writes a line about the steps since the last one. Raises StditError if their loss is not finite."""
        sums = self.log.sum_over_ranks(self.losses, self.by_level, self.failures.unshared, critic_loss)
        loss = sums.losses / len(self.losses) if self.losses else math.nan
        if sums.failures:
            self.failures.share()
        if self.losses and not math.isfinite(loss):
            self.saver.finish()
            raise bad_clips.diverged(self.folder, self.step, f"the loss is {loss}")
        self.losses = []
        self.by_level.zero_()
        self.log.write_step(self.step, clips, update, loss, sums, failed=len(self.failures.by_id))

    def save(self) -> None:
        """Begins to write a checkpoint of this step; `saver` tells when it is there."""
        HEARTBEAT.doing(f"saving step {self.step}")
        self.failures.share()
        losses = self.world.sum_(torch.stack([loss.cpu() for loss in self.losses])) if self.losses else torch.zeros(0)
        by_level = self.world.sum_(self.by_level.cpu())
        # From here on the sums are rank 0's, as after a resume.
        self.losses = list(losses if self.world.is_main else torch.zeros_like(losses))
        self.by_level.copy_(by_level if self.world.is_main else torch.zeros_like(by_level))
        state = {
            "randomness": keyed.VERSION,
            "plan": self.components.plan_hash,
            "window": losses.tolist(),
            "by_level": by_level.tolist(),
            "failures": self.failures.by_id,
            "skipped": self.skipped,
            "limits": [engine.limit.state for engine in self.engines],
            "frozen": self.components.frozen,
            "networks": self.networks,
            "config": to_dict(self.config),
        }
        self.saver.start(self.step, self.engines, state)
        self.saved = self.step

    def _evaluation_is_due(self) -> bool:
        """Not after the last step, whose evaluation is part of `_finish`."""
        settings = self.config.eval
        if not settings.every or (self.config.objective.kind == "flow" and not settings.asks_a_transformer):
            return False
        return self.step % settings.every == 0 and 0 < self.step < self.config.schedule.steps

    def _is_evaluated(self) -> bool:
        return self.world.from_main(lambda: any(x["step"] == self.step for x in read_metrics(self.folder, "eval")))

    def _evaluate(self) -> nn.Module:
        """Returns the module that was evaluated: what trains, with averaged weights."""
        self.saver.finish()  # no step publishes the checkpoint meanwhile, and this may take long
        HEARTBEAT.doing(f"evaluating step {self.step}")
        weights = export.averaged_weights(self.engine, self.world)
        module = export.trained_module(self.components, weights, self.world)
        assert module is not None
        world = replace(self.world, asked_to_stop=lambda: self.stop.received is not None)
        try:
            values = evaluation.evaluate(self.components, module, world, self.step)
        except SharingStopped:  # the same command evaluates again
            number = self.stop.of_flags(*self.world.sum_(torch.tensor(self.stop.flags, dtype=torch.float64)).tolist())
            if self.saved != self.step:
                self.save()
            self.saver.finish()
            raise self.stop.interrupted(number, self.step, self.folder) from None
        self.log.write("eval", self.step, **values)
        if told := evaluation.described(values):
            self.say(f"step {self.step}: {told}")
        return module

    def _finish(self) -> None:
        """Evaluates the last step, then exports the model folder, which marks the run as finished."""
        self.saver.finish()
        asked = self.config.objective.kind == "vae" or self.config.eval.asks_a_transformer
        module = self._evaluate() if asked else None
        HEARTBEAT.doing(f"exporting step {self.step}")
        export.export(self.components, self.engine, self.world, self.step, module)
        self.log.write("end", self.step, model="model")
        self.say(f"finished after {self.step} steps: {self.folder / 'model'}")


def say(text: str) -> None:
    print(text, flush=True)
    HEARTBEAT.spoke()
