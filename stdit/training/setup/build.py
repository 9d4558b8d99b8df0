"""From a run's config to its parts: clips, plan, models, objective. What can be wrong is said here, early."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import accumulate
from typing import Any, Literal

import torch

from stdit.data.load.cache import Cache, CacheMissing, latent_settings, text_settings
from stdit.data.load.clip_files import check_files
from stdit.data.load.loader import Loader, embedding
from stdit.data.manifest import Manifest, read_manifest
from stdit.data.plan.buckets import Assignment, assign
from stdit.data.plan.planner import Plan
from stdit.data.plan.sources import source_weights
from stdit.errors import StditError, error_context
from stdit.heartbeat import HEARTBEAT
from stdit.memory import require_memory
from stdit.models.attention import choose_backend
from stdit.models.transformer import STDiT, TransformerConfig, count_parameters, inflate
from stdit.prepare.encode import check_texts, text_identity, vae_identity
from stdit.sampling.pipeline import Pipeline
from stdit.shapes import VideoShape
from stdit.text.encoders import TextEncoder
from stdit.text.loading import load_text_encoder
from stdit.text.small import build_word_tokenizer, small_umt5
from stdit.training.engine.engine import PRECISIONS
from stdit.training.engine.make import check_engine
from stdit.training.engine.parallel import World
from stdit.training.engine.zero import zero_stage
from stdit.training.objectives.conditions import Conditions
from stdit.training.objectives.flow import FlowObjective
from stdit.training.objectives.protocol import Objective
from stdit.training.objectives.two_experts import ExpertsObjective
from stdit.training.objectives.vae import VaeObjective
from stdit.training.setup.initial_weights import (
    check_export,
    check_vae,
    select_trainable,
)
from stdit.training.setup.long_captions import LONGER, long_captions
from stdit.training.setup.lora import add_lora
from stdit.training.setup.resolve import ResolvedConfig
from stdit.vae.autoencoder import CausalVAE
from stdit.vae.autoencoder import preset as vae_preset
from stdit.weights.families import treatment_of
from stdit.weights.image_vae import inflate_image_vae
from stdit.weights.io import load, load_vae


@dataclass
class RunComponents:
    """What a run works on."""

    manifest: Manifest
    assignment: Assignment
    objective: Objective
    loader: Loader
    plan: Plan  # of epoch 0
    config: ResolvedConfig  # with what follows from model.init
    frozen: dict[str, str] = field(default_factory=dict)  # `check_frozen`'s, once it is checked

    def plan_of(self, epoch: int) -> Plan:
        """The plan of an epoch; the last few are kept."""
        return self.plan if epoch == 0 else self._plan(epoch)

    @cached_property
    def plan_hash(self) -> str:
        """Of what decides the steps of all epochs."""
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
        """Those that have clips, the largest first."""
        used = [shape for shape, count in zip(self.assignment.shapes, self.assignment.counts) if count]
        return sorted(used, key=lambda shape: (-shape.frames * shape.height * shape.width, shape))

    @property
    def sampled_shapes(self) -> list[VideoShape]:
        """What samples have: the videos' shapes, or where there are none the images'; the first is the default."""
        return [shape for shape in self.shapes if not shape.is_image] or self.shapes


def build(config: ResolvedConfig, world: World) -> RunComponents:
    """Reads the data, builds the models with their starting weights (the same on all ranks)."""
    if not config.data.manifest:
        raise StditError("data.manifest is not set: the file that `stdit data scan FOLDER --out MANIFEST` wrote.")
    check_engine(config.optimizer, config.parallel, world.device)
    HEARTBEAT.doing(f"reading {config.data.manifest}")
    manifest = read_manifest(config.data.manifest)
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
    use_texts(objective, manifest, assignment, text_cache, world)
    vae = objective.vae.config
    loader = Loader(
        manifest, assignment, config.data, config.run.seed, cache, text_cache, pin=world.device.type == "cuda",
        latent_size=lambda shape: (vae.z_dim, *shape.latent(vae.stride).sizes),
    )  # fmt: skip
    parts = RunComponents(manifest, assignment, objective, loader, plan, config)
    check_evaluation(parts)
    return parts


def use_texts(
    objective: Objective, manifest: Manifest, assignment: Assignment, cache: Cache | None, world: World
) -> None:
    """Takes dropped captions from the cache as well, so that only a sample needs the text encoder's weights; without a
    cache, reads them now. Raises StditError where the cache lacks captions."""
    flows = [objective.high, objective.low] if isinstance(objective, ExpertsObjective) else [objective]
    if cache is not None:
        world.from_main(lambda: check_texts(manifest, assignment, cache))
    for flow in flows:
        if isinstance(flow, FlowObjective) and cache is not None:
            flow.empty_text = embedding(cache, "")
        elif isinstance(flow, FlowObjective):
            flow.text_encoder.ready()


def check_evaluation(parts: RunComponents) -> None:
    """Raises for what evaluation would stumble over at the end of a training."""
    settings, objective = parts.config.eval, parts.objective
    if settings.manifest is not None:
        held_out = assign(read_manifest(settings.manifest), parts.config.data.fixed())
        if not held_out.counts.any():
            raise StditError(f"eval.manifest={settings.manifest}: no clip in it fits any of data.shapes.")
    if isinstance(objective, ExpertsObjective):
        objective = objective.high  # the other one's weights are of the same shapes
    if settings.prompts and isinstance(objective, FlowObjective):
        shape = parts.sampled_shapes[0]
        size = VideoShape.parse(settings.size) if settings.size else shape
        asked = VideoShape(shape.frames if settings.frames is None else settings.frames, size.height, size.width)
        with error_context(f"eval.size={settings.size}, eval.frames={settings.frames}"):
            objective.tokens(asked)
        with error_context("eval.prompts"):  # whether such weights can be sampled
            pipeline = Pipeline(objective.module.transformer, objective.vae, objective.text_encoder, {})
            pipeline.known_frames.encode(None, asked)


def make_plan(
    manifest: Manifest, assignment: Assignment, objective: Objective, config: ResolvedConfig, epoch: int
) -> Plan:
    """The plan of an epoch, of the curriculum's stage that it is in."""
    tokens = []
    for shape in assignment.shapes:
        with error_context(f"data.shapes: {shape}"):
            tokens.append(objective.tokens(shape))
    stage = config.data.stage_of(epoch)
    with error_context(f"data.stages: stage {stage + 1}") if config.data.stages else nullcontext():
        return Plan(
            assignment.stages[stage].bucket,
            tokens,
            objective.cost,
            config.plan,
            config.run.seed,
            epoch,
            names=assignment.shapes,
            weights=source_weights(manifest, config.data.sources),
            source=manifest.hash,
        )


def make_objective(
    config: ResolvedConfig, manifest: Manifest, world: World, beside: FlowObjective | None = None
) -> Objective:
    """beside: an objective whose VAE and text encoder to use, of the other expert."""
    dtype = PRECISIONS[config.run.precision]
    if config.objective.kind == "vae":
        if world.size > 1 and zero_stage(config.parallel.deepspeed) > 2:
            raise StditError(
                "a VAE trains under ZeRO 0 to 2: images and videos run different layers, whose weights stage 3 gathers "
                "one by one on all ranks together. Use parallel.deepspeed=zero2."
            )
        lpips = None
        if (settings := config.objective.vae.lpips) is not None:
            from stdit.vae.training.lpips import Lpips

            with error_context("objective.vae.lpips"):
                lpips = Lpips(settings.path, settings.trust_pickle).to(world.device)
        return VaeObjective(config.objective, partial(make_vae, config), lpips, device=world.device, dtype=dtype)
    if not config.vae.path:
        raise StditError("vae.path is not set: the folder of the VAE that makes the latents.")
    if config.model.lora is not None and config.text.path is None:
        raise StditError(
            "model.lora trains adapters alone: set text.path, the encoder that the weights were made with."
        )
    if config.model.expert == "both":
        return make_experts(config, manifest, world)
    vae = beside.vae if beside else make_vae(config).to(world.device).eval()
    text_encoder = beside.text_encoder if beside else make_text_encoder(config, manifest)
    if config.text.path and not beside:
        text_encoder.requires_grad_(False).to(world.device, dtype)
    remake = partial(make_transformer, config, vae.config.z_dim, text_encoder.dim)
    transformer = remake()
    transformer.attention_backend = config.model.attention_backend
    with error_context("model.attention_backend"):
        choose_backend(config.model.attention_backend, world.device.type, dtype, transformer.config.head_dim)
    conditions = make_conditions(config, transformer.config, vae, world.device)
    tasks = [
        name for name, weight in (config.objective.flow.tasks or {}).items() if weight > 0 and name != "text_to_video"
    ]
    conditions.check(tasks)
    patch = transformer.config.patch
    if tasks and patch[0] > 1:
        raise StditError(
            f"objective.flow.tasks: {' and '.join(tasks)} cannot be learned with model.patch={patch}: "
            f"{patch[0]} latent frames share a token, and the known ones may end within it."
        )
    return FlowObjective(
        config.objective,
        transformer,
        vae,
        text_encoder,
        train_text=config.text.path is None,
        text_padding=config.text.padding or 0,
        conditions=conditions,
        remake=remake if config.initial else None,
        scheduler=config.initial.scheduler if config.initial else None,
        device=world.device,
        dtype=dtype,
    )


def make_experts(config: ResolvedConfig, manifest: Manifest, world: World) -> ExpertsObjective:
    """Both experts of `model.init`, each with an objective of its own over one VAE and one text encoder."""
    initial = config.initial
    assert initial is not None and initial.boundary is not None
    folder = initial.folder
    if not (folder / "model_index.json").is_file() or {config.vae.path, config.text.path} != {str(folder)}:
        raise StditError(
            f"model.expert=both trains a diffusers folder with its own VAE and text encoder; model.init={folder}, "
            f"vae.path={config.vae.path}, text.path={config.text.path}. Train one expert at a time."
        )
    made: list[FlowObjective] = []
    experts: tuple[Literal["high", "low"], ...] = ("high", "low")
    for name in experts:
        one = replace(config, model=replace(config.model, expert=name))
        objective = make_objective(one, manifest, world, beside=made[0] if made else None)
        assert isinstance(objective, FlowObjective)
        made.append(objective)
    return ExpertsObjective(made[0], made[1], initial.boundary)


def make_vae(config: ResolvedConfig) -> CausalVAE:
    """The VAE of `vae.path`, or a fresh one to train. In fp32 under any precision: it is exported as it is here."""
    if config.vae.path is None:
        if config.objective.vae.train != "all":
            raise StditError(
                f"objective.vae.train={config.objective.vae.train} keeps the rest of a VAE: set vae.path to it."
            )
        with error_context("vae"):
            wanted = vae_preset(config.vae.preset or "toy", **config.vae.overrides)
            with torch.device("meta"):
                numbers = sum(parameter.numel() for parameter in CausalVAE(wanted).parameters())
            require_memory(4 * numbers, "cpu", f"a VAE of {numbers:,} parameters", "Choose a smaller one.")
            return CausalVAE(wanted)
    if config.vae.inflate and config.objective.kind != "vae":
        raise StditError("vae.inflate starts a VAE's own training (objective.kind=vae); a DiT takes a trained one.")
    check_vae(config.vae.path)
    with error_context("vae.path"):
        if config.vae.inflate:
            vae = inflate_image_vae(config.vae.path, config.vae.overrides.get("temporal_downsample"))
        else:
            vae = load_vae(config.vae.path, dtype=torch.float32)
    for name, value in config.vae.overrides.items():
        if (found := getattr(vae.config, name, None)) != value:
            raise StditError(f"vae.{name} is {value}, but {config.vae.path} has {found}. Leave it out.")
    return vae


def make_text_encoder(config: ResolvedConfig, manifest: Manifest) -> TextEncoder:
    """The frozen encoder of `text.path`, its weights not read yet, or a fresh one whose words are the manifest's."""
    if config.text.path:
        with error_context("text.path"):
            treatment = treatment_of(config.text.path)
            return load_text_encoder(config.text.path, treatment, max_length=config.text.padding or None, deferred=True)
    if config.text.trained is None:
        init = f"; {config.model.init} has no text_encoder/" if config.model.init else ""
        raise StditError(
            f"text.path or text.trained must be set: a folder with text_encoder/, or one to train along{init}."
        )
    trained = config.text.trained
    tokenizer = build_word_tokenizer(caption["text"] for caption in _captions(manifest))
    encoder = small_umt5(len(tokenizer), trained.dim, trained.layers, trained.heads, seed=config.run.seed)
    return TextEncoder(encoder.train(), tokenizer, max_length=config.text.padding or 512)


def make_transformer(config: ResolvedConfig, channels: int, text_dim: int) -> STDiT:
    """The preset with its changes, fitted to the VAE and the text encoder; or the weights of `model.init`."""
    settings = config.model
    if config.initial is None:
        follow = {"in_channels": channels, "out_channels": channels, "text_dim": text_dim}
        follow["text_padding"] = config.text.padding or 0
        for name, value in follow.items():
            if settings.overrides.get(name, value) != value:
                raise StditError(
                    f"model.{name} is {settings.overrides[name]}, but the VAE and the text encoder make it {value}. "
                    f"Leave it out."
                )
        with error_context("model"):
            wanted = TransformerConfig.preset(settings.preset or "toy", **(settings.overrides | follow))
            count = count_parameters(wanted)
            require_memory(4 * count, "cpu", f"a transformer of {count:,} parameters",
                           "Choose a smaller model.")  # fmt: skip
            model = STDiT(wanted)
    else:
        with error_context("model.init"):
            source = config.initial.sources[settings.expert]
            frozen = settings.lora is not None  # then no master is kept of them
            dtype = PRECISIONS[config.run.precision] if frozen else torch.float32
            model = load(source, dtype=dtype)
            for name, value in (settings.overrides | {"text_dim": text_dim, "latent_channels": channels}).items():
                if getattr(model.config, name) != value:
                    whose = {"text_dim": "the text encoder's", "latent_channels": "the VAE's"}.get(name, "model's")
                    raise StditError(
                        f"{source.files.path}: its {name} is {getattr(model.config, name)}, {whose} {value}."
                    )
            model = inflate(model) if settings.inflate else model
        select_trainable(model, settings)
        if settings.lora is not None:
            add_lora(model, settings.lora, config.run.seed)
    check_export(settings, model.config)
    model.checkpoint_blocks = config.model.checkpoint_blocks
    return model


def make_conditions(
    config: ResolvedConfig, model: TransformerConfig, vae: CausalVAE, device: torch.device
) -> Conditions:
    """What the weights take of a clip beside its text; loads their image encoder if they have one."""
    encoder = None
    init = config.initial.folder if config.initial else None
    if "image_text" in model.conditions and init and (init / "image_encoder").is_dir():
        from stdit.text.images import load_image_encoder

        with error_context("model.init"):
            encoder = load_image_encoder(init).to(device)
            if encoder.dim != model.image_text_dim:
                raise StditError(f"image_encoder/ gives tokens of {encoder.dim}, not of {model.image_text_dim}.")
    conditions = Conditions(model, vae, config.data.fps, encoder)
    if conditions.gives_latents and config.data.cache is not None:
        raise StditError(
            f"data.cache={config.data.cache}: {config.model.init} takes a clip's first frames as latents of their own, "
            f"which a cache of whole clips does not hold. Set data.cache=null."
        )
    return conditions


def open_caches(config: ResolvedConfig, world: World) -> tuple[Cache | None, Cache | None]:
    """The latents' and, where a frozen encoder's texts are cached, the texts'; says so where they are not.

    Raises StditError where the cache holds other texts, and StorageError where it cannot be reached.
    """
    if config.data.cache is None or config.objective.kind == "vae":
        return None, None
    vae, text = config.vae.path, config.text
    assert vae is not None
    latent_id = world.from_main(lambda: vae_identity(vae))
    latents = _open(config.data.cache, latent_settings(config.data, latent_id), world)
    if text.path is None:
        return latents, None
    path = text.path
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
    """A cache that all ranks see, or the error of one of them: with some of them it would be waited for ever."""
    found: Cache | None = None
    missing: CacheMissing | None = None
    error: Exception | None = None
    try:
        found = Cache.open(place, settings)
    except CacheMissing as caught:
        missing = caught
    except Exception as caught:
        error = caught
    world.all_succeeded(error)
    see = world.gather(found is not None)
    if any(see) and not all(see):
        raise StditError(f"rank {see.index(False)} does not see the {settings['kind']} in {place} that others see.")
    if missing is not None:
        raise missing
    assert found is not None
    return found


def _captions(manifest: Manifest) -> Iterable[dict[str, Any]]:
    for captions in manifest.table.column("captions"):
        yield from captions.as_py()
