"""Builds what a run works on, from its config: clips, plan, objective, caches. Mistakes in the config show here."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import torch

from stdit.data.load.cache import Cache, CacheMissing, latent_settings, text_settings
from stdit.data.load.loader import Loader, check_files, embedding
from stdit.data.manifest import Manifest, read_manifest
from stdit.data.manifests import named, read_manifests
from stdit.data.plan.buckets import Assignment, assign
from stdit.data.plan.filters import source_weights
from stdit.data.plan.planner import Plan
from stdit.errors import StditError, error_context
from stdit.heartbeat import HEARTBEAT
from stdit.prepare.encode import check_texts, text_identity, vae_identity
from stdit.sampling.pipeline import Pipeline
from stdit.shapes import VideoShape
from stdit.training.engine.make import check_engine
from stdit.training.engine.parallel import World
from stdit.training.objectives.protocol import Objective
from stdit.training.objectives.two_experts import TransformerObjective
from stdit.training.setup.objective import LONGER, long_captions, make_objective
from stdit.training.setup.resolve import ResolvedConfig

MANY_SHARDS = 1000  # in a cache, beyond which it is worth merging their indices before all ranks read them


@dataclass
class RunComponents:
    """The parts of a run, built from its config."""

    manifest: Manifest
    assignment: Assignment
    objective: Objective
    loader: Loader
    plan: Plan  # of epoch 0
    config: ResolvedConfig
    frozen: dict[str, str] = field(default_factory=dict)  # SHA-256 of the frozen weights by part; set by `check_frozen`

    def plan_of(self, epoch: int) -> Plan:
        """The plan of an epoch; the last few are kept."""
        return self.plan if epoch == 0 else self._plan(epoch)

    @cached_property
    def plan_hash(self) -> str:
        """The hash of the steps of all epochs: of one plan per stage."""
        firsts = accumulate([stage.epochs or 0 for stage in self.config.data.stages[:-1]], initial=0)
        hashes = [f"{epoch} {self.plan_of(epoch).hash}" for epoch in firsts]
        return self.plan.hash if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def __post_init__(self) -> None:
        trained = (p for p in self.objective.module.parameters() if p.requires_grad)
        self.parameters = sum(p.numel() for p in trained)  # now: under ZeRO-3 they will look empty
        self._plan = lru_cache(maxsize=2)(
            lambda epoch: make_plan(self.manifest, self.assignment, self.objective, self.config, epoch)
        )

    @property
    def shapes(self) -> list[VideoShape]:
        """The shapes that have clips, the largest first."""
        used = [shape for shape, count in zip(self.assignment.shapes, self.assignment.counts) if count]
        return sorted(used, key=lambda shape: (-shape.frames * shape.height * shape.width, shape))

    @property
    def sampled_shapes(self) -> list[VideoShape]:
        """The shapes of samples: those of videos, or of images if there are no videos. The first is the default."""
        return [shape for shape in self.shapes if not shape.is_image] or self.shapes


def build(config: ResolvedConfig, world: World) -> RunComponents:
    """Reads the data, builds the models with their starting weights (the same on all ranks)."""
    if not config.data.manifest:
        raise StditError("data.manifest is not set: the file that `stdit data scan FOLDER --out MANIFEST` wrote.")
    config.parallel.groups(world.size)
    check_engine(config.optimizer, config.parallel, world.device)
    HEARTBEAT.doing(f"reading {named(config.data.manifest)}")
    manifest = read_manifests(config.data.manifest)
    if config.data.cache is None:
        check_files(manifest)
    assignment = assign(manifest, config.data)
    torch.manual_seed(config.run.seed)
    HEARTBEAT.doing("building the models")
    objective = make_objective(config, manifest, world)
    if world.is_main:
        HEARTBEAT.doing("counting long captions")
        if (found := long_captions(config, manifest, assignment)) and found.count:
            print(f"{found}{LONGER}", flush=True)
    HEARTBEAT.doing("planning the steps")
    plan = make_plan(manifest, assignment, objective, config, 0)
    HEARTBEAT.doing("opening the caches")
    cache, text_cache = open_caches(config, world)
    if text_cache is not None:
        world.from_main(lambda: check_texts(manifest, assignment, text_cache))
    for flow in objective.flows if isinstance(objective, TransformerObjective) else []:
        if text_cache is None:
            flow.text_encoder.ready()
        else:  # only sampling will need the weights of the text encoder
            flow.empty_text = embedding(text_cache, "")
    vae = objective.vae.config
    loader = Loader(
        manifest, assignment, config.data, config.run.seed, cache, text_cache, pin=world.device.type == "cuda",
        latent_size=lambda shape: (vae.z_dim, *shape.latent(vae.stride).sizes),
    )  # fmt: skip
    parts = RunComponents(manifest, assignment, objective, loader, plan, config)
    check_evaluation(parts)
    return parts


def check_evaluation(parts: RunComponents) -> None:
    """Raises StditError now for what would fail in the evaluation at the end of a training."""
    settings, objective = parts.config.eval, parts.objective
    if settings.manifest is not None:
        held_out = assign(read_manifest(settings.manifest), parts.config.data.fixed())
        if not held_out.counts.any():
            raise StditError(f"eval.manifest={settings.manifest}: no clip in it fits any of data.shapes.")
    if settings.toy is not None and not isinstance(objective, TransformerObjective):
        raise StditError("eval.toy samples captions: a VAE knows none. Leave it out, or set objective.kind=flow.")
    if (settings.prompts or settings.toy) and isinstance(objective, TransformerObjective):
        flow, shape = objective.flows[0], parts.sampled_shapes[0]  # another one's weights are of the same shapes
        for text in settings.toy.shapes if settings.toy else []:
            with error_context("eval.toy.shapes"):
                flow.tokens(VideoShape.parse(text))
        size = VideoShape.parse(settings.size) if settings.size else shape
        asked = VideoShape(shape.frames if settings.frames is None else settings.frames, size.height, size.width)
        with error_context(f"eval.size={settings.size}, eval.frames={settings.frames}"):
            flow.tokens(asked)
        with error_context("eval.prompts"):  # whether such weights can be sampled
            pipeline = Pipeline(flow.module.transformer, flow.vae, flow.text_encoder, {})
            pipeline.known_frames.encode(None, asked)


def make_plan(
    manifest: Manifest, assignment: Assignment, objective: Objective, config: ResolvedConfig, epoch: int
) -> Plan:
    """The plan of an epoch, in the stage of the curriculum that it belongs to."""
    tokens = []
    for shape in assignment.shapes:
        with error_context(f"data.shapes: {shape}"):
            tokens.append(objective.tokens(shape))
    stage = config.data.stage_of(epoch)
    with error_context(f"data.stages: stage {stage + 1}") if config.data.stages else nullcontext():
        return Plan(
            assignment.stages[stage].bucket, tokens, objective.cost, config.plan, config.run.seed, epoch,
            names=assignment.shapes, weights=source_weights(manifest, config.data.sources), source=manifest.hash,
        )  # fmt: skip


def open_caches(config: ResolvedConfig, world: World) -> tuple[Cache | None, Cache | None]:
    """The caches of latents and of text embeddings. The second is None if texts are encoded while training.

    Raises StditError if the cache is of another text encoder, StorageError if it cannot be reached.
    """
    if config.data.cache is None or config.objective.kind == "vae":
        return None, None
    vae, text = config.vae.path, config.text
    assert vae is not None
    latent_id = world.from_main(lambda: vae_identity(vae))
    latents = _open(config.data.cache, latent_settings(config.data, latent_id), world)
    if (path := text.path) is None:
        return latents, None
    text_id = world.from_main(lambda: text_identity(path, text.padding))
    try:
        return latents, _open(config.data.cache, text_settings(config.data, text_id), world)
    except CacheMissing as error:
        if error.others:
            raise
        if world.is_main:
            print(f"captions are encoded while training, by {path}: {error}", flush=True)
        return latents, None


def _open(place: str, settings: dict[str, Any], world: World) -> Cache:
    """A cache that all ranks see. Raises the error of any rank on all of them: the others would wait forever."""
    found: Cache | CacheMissing
    with world.together():
        if world.is_main:
            _merge_index(place, settings)
    with world.together():
        try:
            found = Cache.open(place, settings)
        except CacheMissing as missing:
            found = missing
    see = world.gather(isinstance(found, Cache))
    if any(see) and not all(see):
        raise StditError(f"rank {see.index(False)} does not see the {settings['kind']} in {place} that others see.")
    if isinstance(found, CacheMissing):
        raise found
    return found


def _merge_index(place: str, settings: dict[str, Any]) -> None:
    """Merges the index of a cache of many shards, if parts of an encoding have left that undone and we may write."""
    with suppress(CacheMissing):
        cache = Cache.open(place, settings)
        if cache.unmerged > MANY_SHARDS:
            with suppress(OSError, StditError):
                cache.write_index()
