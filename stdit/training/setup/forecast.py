"""Forecasts a run without its weights: a rank's memory under each setting, what fits into a card, the time it takes.

`--dry-run` prints it, and a run that is out of memory asks it what to change.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stdit.data.config import DataConfig
from stdit.data.manifest import Manifest
from stdit.data.manifests import manifest_paths, named, read_manifests
from stdit.data.plan.buckets import Assignment, TokensOf, assign, explain_exclusions
from stdit.data.plan.picture import Measures, measure_plan
from stdit.data.plan.planner import Plan
from stdit.data.remote.paths import is_remote
from stdit.errors import StditError, nearest_name
from stdit.heartbeat import HEARTBEAT
from stdit.models.operators import Recompute, RecomputeKind
from stdit.models.sequence import check_shareable
from stdit.models.transformer import transformer_flops
from stdit.shapes import VideoShape
from stdit.shipped import DEEPSPEED
from stdit.text.small import build_word_tokenizer, small_umt5
from stdit.training.engine.make import check_engine
from stdit.training.engine.optimizer import shardable
from stdit.training.engine.zero import zero_memory
from stdit.training.objectives.flow import FlowObjective
from stdit.training.objectives.protocol import Objective
from stdit.training.setup.activations import MetaStep
from stdit.training.setup.build import make_plan
from stdit.training.setup.footprint import CAPTION_TOKENS, Footprint, ModelSizes, build_on_meta
from stdit.training.setup.resolve import ResolvedConfig

FORMAT = 1  # of the JSON
CARDS = Path(__file__).with_name("gpus.json")
# Of a card's memory, this share is left free. A GB is counted as 10⁹ bytes; cards have 7 % more than that, which the
# libraries on the device and the gaps between tensors take.
MARGIN = 0.05
MFU = 0.4  # assumed share of a card's peak: a rough figure for training in bf16
KINDS: tuple[RecomputeKind | int, ...] = ("none", 2, "attention", "all")  # of recomputation that are compared
SHARED = (1, 2, 4, 8)  # ranks that share a pack, which are compared
STEPS_DEALT = 32  # steps of the plan that are dealt to ranks, for their balance


@dataclass(frozen=True)
class Card:
    """A GPU of gpus.json, whose figures are the vendor's."""

    name: str
    memory_gb: float
    bf16_tflops: float  # of dense matrix products
    source: str

    @classmethod
    def named(cls, name: str) -> Card:
        known = json.loads(CARDS.read_text())
        if name.lower() not in known:
            raise StditError(f"--gpu {name}: not a known card.{nearest_name(name, known)} Known: {', '.join(known)}.")
        return cls(**known[name.lower()])

    @property
    def usable(self) -> float:
        """Bytes that a run may take."""
        return self.memory_gb * 1e9 * (1 - MARGIN)


@dataclass(frozen=True)
class Way:
    """One way to run, and what it costs."""

    deepspeed: str | None
    recompute: RecomputeKind | int
    sequence_parallel: int
    memory: Footprint  # of a rank
    step_flops: float | None = None  # of all ranks, with what is recomputed; None for a VAE
    step_seconds: float | None = None
    fits: bool | None = None

    @property
    def settings(self) -> str:
        """As a user sets it."""
        group = f" parallel.sequence_parallel={self.sequence_parallel}" if self.sequence_parallel > 1 else ""
        name = "null" if self.deepspeed is None else self.deepspeed
        return f"parallel.deepspeed={name} parallel.recompute={self.recompute}{group}"


@dataclass(frozen=True)
class RunShape:
    """What a run goes through: its plan, or one of clips of the largest shape where there is no manifest."""

    plan: Plan
    shapes: Sequence[VideoShape]
    from_manifest: bool
    unused: list[str]  # shapes without clips, and why clips are left out

    @classmethod
    def of(cls, config: ResolvedConfig, objective: Objective, manifest: Manifest | None) -> RunShape:
        if manifest is not None:
            assignment = assign(manifest, config.data)
            unused = unused_shapes_and_clips(manifest, assignment, config.data, objective.tokens)
            return cls(make_plan(manifest, assignment, objective, config, 0), assignment.shapes, True, unused)
        shapes = config.data.video_shapes()
        tokens = [objective.tokens(shape) for shape in shapes]
        linear, quadratic = objective.cost
        largest = max(range(len(shapes)), key=lambda b: tokens[b])
        each = linear * tokens[largest] + quadratic * tokens[largest] ** 2
        clips = round((config.plan.work_per_step or 0) / each) or round(config.plan.largest_clips_per_step)
        bucket = np.full(max(1, clips), largest)
        return cls(Plan(bucket, tokens, objective.cost, config.plan, config.run.seed, names=shapes), shapes, False, [])

    @property
    def largest(self) -> VideoShape:
        """The shape of the clips with the most tokens."""
        return self.shapes[max(range(len(self.shapes)), key=lambda b: (self.plan.counts[b] > 0, self.plan.tokens[b]))]


@dataclass(frozen=True)
class StepFlops:
    """Forward FLOPs of a step on all ranks, on average: of everything, and of self-attention alone."""

    forward: float
    attention: float

    @classmethod
    def of(cls, run: RunShape, objective: FlowObjective, padding: int) -> StepFlops:
        """Counts CAPTION_TOKENS per caption, if as many fit, and no encoding."""
        model, flow = objective.model_config, objective.config.flow
        text = min(CAPTION_TOKENS, padding or CAPTION_TOKENS)
        share, routed = flow.routing.share if flow.routing else 0.0, len(objective.routed_blocks)
        forward = attention = 0.0
        for count, tokens in zip(run.plan.counts.tolist(), run.plan.tokens):
            kept = tokens - round(share * tokens)
            forward += count * transformer_flops(model, [tokens], [text], [kept], routed)
            attention += count * objective.cost[1] * tokens**2
        return cls(forward / run.plan.num_steps, attention / run.plan.num_steps)

    def with_backward(self, recompute: Recompute) -> float:
        """Forward, backward and what is recomputed, whose last few operations torch leaves out."""
        again = self.forward - (self.attention if recompute.keeps_attention else 0)
        return 3 * self.forward + (again / recompute.every if recompute.every else 0)


@dataclass(frozen=True)
class Forecast:
    """What a run will need. Times are in seconds, memory in bytes."""

    config: ResolvedConfig
    ranks: int
    card: Card | None
    mfu: float  # the assumed share of the card's peak
    run: RunShape
    sizes: ModelSizes
    dealt: Measures  # how the first steps are dealt to ranks
    configured: Way
    ways: list[Way]

    @property
    def best(self) -> Way | None:
        """The fastest way that fits; of equally fast ones the one with the least communication."""
        fitting = [way for way in self.ways if way.fits]
        offloads = {way.deepspeed: zero_memory(way.deepspeed).state_on_host for way in fitting}  # which is slow
        slowness = [(offloads[way.deepspeed], way.step_flops or 0, way.sequence_parallel) for way in fitting]
        return fitting[min(range(len(fitting)), key=slowness.__getitem__)] if fitting else None

    @property
    def advice(self) -> str:
        """What to set if the run does not fit."""
        if self.best is not None:
            return f"Fits: {self.best.settings}."
        least = min(self.ways, key=lambda way: way.memory.total).memory
        clip, pack = max(self.run.plan.tokens), max(self.dealt.fullest)
        if pack > clip:
            return f"Set plan.tokens_per_pack={clip:,}, one clip of {self.run.largest}, in place of {pack:,}."
        if 2 * least.activations > least.total:
            return f"One clip of {self.run.largest} is too large: choose smaller shapes, or more ranks to share it."
        return "Take more ranks under zero3, or a smaller model."


def forecast(config: ResolvedConfig, ranks: int, card: Card | None = None, mfu: float = MFU) -> Forecast:
    """Raises StditError for settings that no run can have."""
    parallel = config.parallel
    parallel.groups(ranks)
    check_engine(config.optimizer, parallel, torch.device("cpu"))
    objective = _outlined(config)
    HEARTBEAT.doing("reading the manifest")
    manifest = _manifest(config)
    HEARTBEAT.doing("planning the steps")
    run = RunShape.of(config, objective, manifest)
    sizes = ModelSizes.of(config, objective, _trained_text(config, manifest))
    HEARTBEAT.doing("dealing steps to ranks")
    dealt = {
        shared: measure_plan(run.plan, ranks // shared, run.plan.token_bound(), STEPS_DEALT)
        for shared in _shared(config, objective, ranks)
    }
    HEARTBEAT.doing("computing the memory")
    mine = parallel.sequence_parallel
    step = MetaStep(config, objective, run.largest, max(dealt[mine].fullest))
    flops = StepFlops.of(run, objective, config.text.padding or 0) if isinstance(objective, FlowObjective) else None
    rate = None  # of all ranks
    if card is not None and config.run.precision == "bf16":
        rate = ranks * card.bf16_tflops * 1e12 * mfu

    def way(deepspeed: str | None, kind: RecomputeKind | int, shared: int) -> Way:
        peak = step.peak(Recompute.of(kind), shared, max(dealt[shared].fullest))
        memory = sizes.footprint(zero_memory(deepspeed), ranks, peak)
        needed = None if flops is None else flops.with_backward(Recompute.of(kind))
        seconds = None if needed is None or rate is None else needed / rate / dealt[shared].total_balance
        fits = None if card is None else memory.total <= card.usable
        return Way(deepspeed, kind, shared, memory, needed, seconds, fits)

    kinds, deepspeeds = _kinds(config), _deepspeeds(config, ranks)
    ways = [way(name, kind, shared) for shared in dealt for kind in kinds for name in deepspeeds]
    configured = way(parallel.deepspeed, parallel.recompute, mine)
    return Forecast(config, ranks, card, mfu, run, sizes, dealt[mine], configured, ways)


def ways_of_a_pack(config: ResolvedConfig, shape: VideoShape, tokens: int, ranks: int) -> list[Way]:
    """What a pack of so many tokens needs: first as configured, then all ways. shape: of its largest clip."""
    objective, parallel = build_on_meta(config), config.parallel
    sizes, step = ModelSizes.of(config, objective), MetaStep(config, objective, shape, tokens)

    def way(deepspeed: str | None, kind: RecomputeKind | int) -> Way:
        peak = step.peak(Recompute.of(kind), parallel.sequence_parallel)
        memory = sizes.footprint(zero_memory(deepspeed), ranks, peak)
        return Way(deepspeed, kind, parallel.sequence_parallel, memory)

    ways = [way(deepspeed, kind) for kind in _kinds(config) for deepspeed in _deepspeeds(config, ranks)]
    return [way(parallel.deepspeed, parallel.recompute), *ways]


def _shared(config: ResolvedConfig, objective: Objective, ranks: int) -> list[int]:
    """The values of `parallel.sequence_parallel` to compare."""
    mine = config.parallel.sequence_parallel
    if not isinstance(objective, FlowObjective):
        return [mine]
    with suppress(StditError):
        check_shareable(objective.model_config)
        return sorted({mine, *(size for size in SHARED if ranks % size == 0 and size <= objective.model_config.heads)})
    return [mine]


def _kinds(config: ResolvedConfig) -> list[RecomputeKind | int]:
    """The kinds of recomputation to compare; a VAE's training has none."""
    if config.objective.kind == "vae":
        return ["none"]
    return [*KINDS, *({config.parallel.recompute} - {*KINDS})]


def _deepspeeds(config: ResolvedConfig, ranks: int) -> list[str | None]:
    """The values of `parallel.deepspeed` to compare."""
    found: list[str | None] = [None] if ranks == 1 else []
    if shardable(config.optimizer):
        found += [file.stem for file in sorted(DEEPSPEED.glob("*.json"))]
    if config.objective.kind == "vae":
        found = [name for name in found if zero_memory(name).stage < 3]
    mine = config.parallel.deepspeed
    return found if mine in found or mine is None else [*found, mine]


def _outlined(config: ResolvedConfig) -> Objective:
    try:
        return build_on_meta(config)
    except StditError as error:
        if config.vae.path is None or Path(config.vae.path).expanduser().exists():
            raise
        raise StditError(f"{error} For the sizes alone: vae.path=null vae.preset=wan2.1.") from None


def _manifest(config: ResolvedConfig) -> Manifest | None:
    """None if there is none yet."""
    try:
        paths = manifest_paths(config.data.manifest)
    except StditError:  # a pattern that nothing matches
        return None
    if not all(path and (is_remote(path) or Path(path).expanduser().exists()) for path in paths):
        return None
    return read_manifests(config.data.manifest)


def _trained_text(config: ResolvedConfig, manifest: Manifest | None) -> int:
    """Parameters of a text encoder that trains along; its words are those of the captions."""
    trained = config.text.trained
    if trained is None or config.objective.kind == "vae":
        return 0
    captions = [] if manifest is None else manifest.table.column("captions")
    words = len(build_word_tokenizer(caption["text"] for each in captions for caption in each.as_py()))
    encoder = small_umt5(words, trained.dim, trained.layers, trained.heads)
    return sum(p.numel() for p in encoder.parameters())


def unused_shapes_and_clips(
    manifest: Manifest, assignment: Assignment, data: DataConfig, tokens: TokensOf
) -> list[str]:
    """Shapes without clips, and why clips are left out: the signs of a wrong data.shapes or data.fps."""
    lines = []
    if empty := [str(shape) for shape, count in zip(assignment.shapes, assignment.counts) if not count]:
        lines.append(f"no clip goes to {', '.join(empty)}")
    for group in explain_exclusions(manifest, assignment, data, tokens):
        details = f" ({group.details})" if group.details else ""
        lines.append(f"{group.clips:,} clips left out: {group.text}{details}")
    return lines


def summary(found: Forecast) -> dict[str, Any]:
    """A forecast as `--json` prints it."""
    config, plan, dealt = found.config, found.run.plan, found.dealt
    steps, count = config.schedule.steps, len(dealt.steps)
    return {
        "format": FORMAT,
        "objective": config.objective.kind,
        "precision": config.run.precision,
        "parameters": {"trained": found.sizes.trained, "frozen": found.sizes.frozen, "vae": found.sizes.vae,
                       "text_encoder": found.sizes.text_encoder},
        "world_size": found.ranks,
        "manifest": named(config.data.manifest) if found.run.from_manifest else None,
        "clips": plan.num_items if found.run.from_manifest else None,
        "buckets": [
            {"shape": str(shape), "clips": int(clips), "tokens": tokens}
            for shape, clips, tokens in zip(found.run.shapes, plan.counts, plan.tokens)
        ],
        "unused": found.run.unused,
        "steps": steps,
        "steps_per_epoch": plan.num_steps if found.run.from_manifest else None,
        "clips_per_step": sum(dealt.clips) / count,
        "tokens_per_step": sum(dealt.tokens) / count,
        "micro_steps_per_step": sum(dealt.micro_steps) / count,
        "tokens_per_pack": plan.token_bound(),
        "fullest_pack": max(dealt.fullest),
        "balance": dealt.total_balance,
        "gpu": None if found.card is None else dataclasses.asdict(found.card) | {"usable": found.card.usable},
        "mfu": found.mfu,
        "configured": _as_json(found.configured, steps),
        "ways": [_as_json(way, steps) for way in found.ways],
        "best": None if found.best is None else _as_json(found.best, steps),
    }  # fmt: skip


def _as_json(way: Way, steps: int) -> dict[str, Any]:
    memory = dataclasses.asdict(way.memory) | {"total": way.memory.total}
    seconds = None if way.step_seconds is None else way.step_seconds * steps
    return dataclasses.asdict(way) | {"settings": way.settings, "memory": memory, "seconds": seconds}
