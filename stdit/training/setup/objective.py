"""Makes the objective of a run: its models with their starting weights, on the rank's device."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import pyarrow.compute as pc
import torch

from stdit.data.manifest import Manifest
from stdit.data.plan.buckets import Assignment
from stdit.errors import StditError, error_context, nearest_name
from stdit.machine import require_memory
from stdit.models.attention import choose_backend
from stdit.models.operators import Recompute
from stdit.models.sequence import SequenceGroup, check_shareable
from stdit.models.transformer import TEMPORAL_BLOCKS, STDiT, TransformerConfig, count_parameters, inflate
from stdit.text.encoders import TextEncoder
from stdit.text.lengths import LongTexts, TextLimit
from stdit.text.loading import load_text_encoder
from stdit.text.small import build_word_tokenizer, small_umt5
from stdit.training.config import ModelSettings, RunConfig
from stdit.training.engine.engine import PRECISIONS
from stdit.training.engine.parallel import World
from stdit.training.engine.start import Numbers
from stdit.training.engine.zero import zero_stage
from stdit.training.objectives.conditions import Conditions
from stdit.training.objectives.flow import FlowObjective
from stdit.training.objectives.protocol import Objective
from stdit.training.objectives.two_experts import ExpertsObjective
from stdit.training.objectives.vae import VaeObjective
from stdit.training.setup.lora import add_lora
from stdit.training.setup.resolve import ResolvedConfig
from stdit.vae.autoencoder import CausalVAE
from stdit.vae.autoencoder import preset as vae_preset
from stdit.weights.families import on_meta, treatment_of
from stdit.weights.image_vae import inflate_image_vae
from stdit.weights.io import check_layout, load, load_vae, part_reader
from stdit.weights.sources import Source

LONGER = " text.padding says how many are used, the weights how many they know."


def make_objective(config: ResolvedConfig, manifest: Manifest, world: World) -> Objective:
    """The objective on this rank's device."""
    if config.objective.kind == "vae":
        return make_vae_objective(config, world)
    if not config.vae.path:
        raise StditError("vae.path is not set: the folder of the VAE that makes the latents.")
    if config.model.lora is not None and config.text.path is None:
        raise StditError(
            "model.lora trains adapters alone: set text.path, the encoder that the weights were made with."
        )
    if config.model.expert == "both":
        return make_experts(config, manifest, world)
    return make_flow(config, manifest, world)


def make_vae_objective(config: ResolvedConfig, world: World) -> VaeObjective:
    if world.size > 1 and zero_stage(config.parallel.deepspeed) > 2:
        raise StditError(
            "a VAE trains under ZeRO 0 to 2: images and videos run different layers, whose weights stage 3 gathers "
            "one by one on all ranks together. Use parallel.deepspeed=zero2."
        )
    if config.parallel.sequence_parallel > 1:
        raise StditError(
            f"parallel.sequence_parallel={config.parallel.sequence_parallel} is for transformers: a VAE's clips are no "
            f"tokens that ranks could share. Leave it out."
        )
    lpips, dtype = None, PRECISIONS[config.run.precision]
    if (settings := config.objective.vae.lpips) is not None:
        from stdit.vae.training.lpips import Lpips

        with error_context("objective.vae.lpips"):
            lpips = Lpips(settings.path, settings.trust_pickle).to(world.device)
    remake = partial(make_vae, config)
    return VaeObjective(config.objective, remake, lpips, seed=config.run.seed, device=world.device, dtype=dtype)


def make_experts(config: ResolvedConfig, manifest: Manifest, world: World) -> ExpertsObjective:
    """The objectives of both experts of `model.init`, which share a VAE and a text encoder."""
    initial = config.initial
    assert initial is not None and initial.boundary is not None
    folder = initial.folder
    if not (folder / "model_index.json").is_file() or {config.vae.path, config.text.path} != {str(folder)}:
        raise StditError(
            f"model.expert=both trains a diffusers folder with its own VAE and text encoder; model.init={folder}, "
            f"vae.path={config.vae.path}, text.path={config.text.path}. Train one expert at a time."
        )
    high = make_flow(replace(config, model=replace(config.model, expert="high")), manifest, world)
    low = make_flow(replace(config, model=replace(config.model, expert="low")), manifest, world, beside=high)
    return ExpertsObjective(high, low, initial.boundary)


def make_flow(
    config: ResolvedConfig, manifest: Manifest, world: World, beside: FlowObjective | None = None
) -> FlowObjective:
    """beside: the other expert's, whose VAE, text encoder and group of ranks are shared."""
    dtype = PRECISIONS[config.run.precision]
    vae = beside.vae if beside else make_vae(config).to(world.device).eval()
    text_encoder = beside.text_encoder if beside else make_text_encoder(config, manifest)
    if config.text.path and not beside:
        text_encoder.requires_grad_(False).to(world.device, dtype)
    remake = partial(make_transformer, config, vae.config.z_dim, text_encoder.dim)
    transformer = remake(outlined=config.parallel.deepspeed is not None)
    transformer.attention_backend = config.model.attention_backend
    with error_context("model.attention_backend"):
        choose_backend(config.model.attention_backend, world.device.type, dtype, transformer.config.head_dim)
    shared = config.parallel.sequence_parallel
    if shared > 1:
        check_shareable(transformer.config)
    conditions = make_conditions(config, transformer.config, vae, world.device)
    weights = config.objective.flow.tasks or {}
    tasks = [name for name, weight in weights.items() if weight > 0 and name != "text_to_video"]
    conditions.check(tasks)
    patch = transformer.config.patch
    if tasks and patch[0] > 1:
        raise StditError(
            f"objective.flow.tasks: {' and '.join(tasks)} cannot be learned with model.patch={patch}: "
            f"{patch[0]} latent frames share a token, and the known ones may end within it."
        )
    initial, padding = config.initial, config.text.padding or 0
    return FlowObjective(
        config.objective, transformer, vae, text_encoder, train_text=config.text.path is None, text_padding=padding,
        conditions=conditions, remake=remake if initial else None, numbers=starting_numbers(config, transformer),
        scheduler=initial.scheduler if initial else None, device=world.device, dtype=dtype,
        group=beside.group if beside else SequenceGroup.join(shared),
    )  # fmt: skip


def check_vae(path: str) -> None:
    """Raises StditError if nothing is at `vae.path`: a new user may have to train a VAE first."""
    if not Path(path).expanduser().exists():
        raise StditError(
            f"vae.path: {path}: no such file or folder. Train a VAE first (stdit train pretrain_vae), or name the "
            f"folder of one, such as Wan2.1-T2V-1.3B-Diffusers."
        )


def make_vae(config: ResolvedConfig) -> CausalVAE:
    """The VAE of `vae.path`, or a fresh one to train; always in fp32, since it is exported with these weights."""
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
            return CausalVAE(wanted, config.run.seed)
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
    """The frozen encoder of `text.path`, its weights not read yet, or a fresh one for the words of the captions."""
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
    texts = (caption["text"] for captions in manifest.table.column("captions") for caption in captions.as_py())
    tokenizer = build_word_tokenizer(texts)
    encoder = small_umt5(len(tokenizer), trained.dim, trained.layers, trained.heads, seed=config.run.seed)
    return TextEncoder(encoder.train(), tokenizer, max_length=config.text.padding or 512)


def long_captions(config: ResolvedConfig, manifest: Manifest, assignment: Assignment) -> LongTexts | None:
    """Counts the distinct captions of the clips that train which are longer than the positions of the text encoder.
    None if the run has no text encoder."""
    text, padding = config.text, config.text.padding or None
    if config.objective.kind == "vae" or (text.path is None and text.trained is None):
        return None
    captions = pc.list_flatten(manifest.table.column("captions").take(assignment.rows()))
    texts = pc.unique(pc.struct_field(captions, "text")).to_pylist()
    if text.path:
        return TextLimit.of_folder(text.path, treatment_of(text.path), padding).among(texts)
    return TextLimit.of_words(padding or 512).among(texts)


def make_transformer(config: ResolvedConfig, channels: int, text_dim: int, outlined: bool = False) -> STDiT:
    """The preset with its changes, fitted to the VAE and the text encoder; or the model of `model.init`.

    outlined: on the meta device, where `starting_numbers` gives its weights in parts; adapters are on the CPU. Not an
        inflated model.
    """
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
            require_memory(4 * count, "cpu", f"a transformer of {count:,} parameters", "Choose a smaller model.")
            with torch.device("meta"):
                model = STDiT(wanted)
            if not outlined:
                model.to_empty(device="cpu").initialise(config.run.seed)
        return prepared(model, config)
    with error_context("model.init"):
        source = config.initial.sources[settings.expert]
        frozen = settings.lora is not None  # then no master is kept of them
        dtype = PRECISIONS[config.run.precision] if frozen else torch.float32
        model = outline(source) if outlined and not settings.inflate else load(source, dtype=dtype)
        for name, value in (settings.overrides | {"text_dim": text_dim, "latent_channels": channels}).items():
            if (found := getattr(model.config, name)) != value:
                whose = {"text_dim": "the text encoder's", "latent_channels": "the VAE's"}.get(name, "model's")
                raise StditError(f"{source.files.path}: its {name} is {found}, {whose} {value}.")
        model = inflate(model) if settings.inflate else model
    return prepared(model, config)


def outline(source: Source) -> STDiT:
    """The source's model on the meta device; only its buffers are read."""
    model, numbers = on_meta(source.config), part_reader(source)
    for name, buffer in [*model.named_buffers()]:
        setattr(model, name, numbers(name, 0, buffer.numel()).view(buffer.shape))
    assert isinstance(model, STDiT)
    return model


def starting_numbers(config: ResolvedConfig, transformer: STDiT) -> Numbers | None:
    """Draws or reads parts of a transformer that is on the meta device; None if it is not."""
    if not transformer.head.head.weight.is_meta:
        return None
    if config.initial is None:
        return transformer.starting_weights(config.run.seed).draw
    return part_reader(config.initial.sources[config.model.expert])


def prepared(model: STDiT, config: RunConfig) -> STDiT:
    """The model with its adapters, and only what trains unfrozen. Raises StditError if it could not be exported."""
    settings = config.model
    select_trainable(model, settings)
    if settings.lora is not None:
        add_lora(model, settings.lora, config.run.seed)
    check_export(settings, model.config)
    model.recompute = Recompute.of(config.parallel.recompute)
    return model


def check_export(settings: ModelSettings, model: TransformerConfig) -> None:
    """Raises StditError for a setting that the exported model folder cannot hold."""
    if settings.lora is None or settings.lora.merged:
        with error_context("model, as run/model will hold it"), torch.device("cpu"):  # models may be made on meta
            check_layout(model, "diffusers")


def select_trainable(model: STDiT, settings: ModelSettings) -> None:
    """Freezes all parameters but those that `model.trainable` or `model.freeze` chooses."""
    patterns = [TEMPORAL_BLOCKS] if settings.freeze else settings.trainable
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise StditError(
                f"model.trainable: {pattern!r} is no parameter's name.{nearest_name(pattern, parameters)} Patterns are "
                f"such as 'blocks.*.self_attn.*'."
            )
    for name, parameter in parameters.items():
        parameter.requires_grad_(not patterns or any(fnmatchcase(name, pattern) for pattern in patterns))


def make_conditions(
    config: ResolvedConfig, model: TransformerConfig, vae: CausalVAE, device: torch.device
) -> Conditions:
    """The conditions that the weights take beside the text. Loads their image encoder if they have one."""
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
