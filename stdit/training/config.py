"""A run's config: its sections, `RunConfig` that composes them, and the reader of YAML and `key=value`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from stdit.data.config import DataConfig, PlanConfig
from stdit.errors import StditError
from stdit.files import publish_text
from stdit.models.config import TransformerConfig
from stdit.settings import SettingsOf, read
from stdit.shapes import VideoShape
from stdit.shipped import CONFIGS, find_shipped
from stdit.text_files import read_text, read_yaml, yaml_text
from stdit.training.engine.checkpoint import CheckpointConfig
from stdit.training.engine.make import ParallelConfig
from stdit.training.engine.optimizer import OptimizerConfig, ScheduleConfig
from stdit.training.objectives.config import ObjectiveConfig
from stdit.vae.config import VaeConfig

LARGEST = 2**24  # bytes of a config

# On resume only these may differ. None of them changes what is computed, except schedule.steps, which moves a decay
# (`ScheduleConfig`), and parallel, which rounds differently.
MAY_DIFFER = (
    "log.", "eval.", "checkpoint.", "parallel.", "run.path", "schedule.steps", "data.workers", "data.prefetch",
    "optimizer.max_skipped_steps",
    "data.timeout", "data.verify", "data.keep_gb",
)  # fmt: skip

# These too, where the checkpoint names the content (`frozen.check_frozen`): a folder may be moved.
MAY_MOVE = ("model.init", "vae.path", "text.path", "objective.vae.lpips.path")


@dataclass
class RunSettings:
    """The run as a whole.

    path: the run folder; `run=PATH` for short.
    seed: seeds every random draw; any 64-bit integer.
    precision: of weights and activations. Masters and moments are fp32 either way.
    deterministic: makes a GPU compute the same bits every time, more slowly.
    """

    path: str = ""
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    deterministic: bool = False


@dataclass
class LoraConfig:
    """Adapters (LoRA) that train beside frozen weights.

    rank: columns of each low-rank matrix.
    alpha: scales an adapter's output by alpha / rank.
    targets: patterns (* and ?) of the linear layers, by stdit's names; the default is all of attention and MLP.
    layout: of the exported file, see stdit/weights/lora/write.py. With "common", Cosmos gets a second file in
        diffusers' own layout, because diffusers does not read the common one.
    merged: also exports the whole model folder, with the adapter merged into its weights.
    """

    rank: Annotated[int, Field(ge=1, le=65_536)] = 16
    alpha: PositiveFloat = 16.0
    targets: Annotated[list[str], Field(min_length=1)] = field(
        default_factory=lambda: ["*blocks.*_attn.*", "*blocks.*.ffn.*"]
    )
    layout: Literal["common", "original", "kohya", "diffusers", "peft"] = "common"
    merged: bool = False


@dataclass
class ModelSettings:
    """The transformer: a preset with changes, or the weights of `init`. Channels and text width follow from the VAE and
    the text encoder.

    preset: the size of a fresh model: toy (the default), small, base, large, 1.3B, 5B or 14B. Single settings of it can
        be changed: `model.layers=4`.
    init: a model folder, or a transformer's folder or file, to start from. A model folder also gives the VAE, the text
        encoder, the text padding and the shift, unless the config sets them.
    expert: which of two experts (Wan 2.2 A14B) to train, each at its own noise levels.
    inflate: adds attention over time to an image model (PixArt).
    freeze: "pretrained" trains only what `inflate` adds.
    trainable: patterns of the names of the parameters to train, such as "blocks.*.self_attn.*"; empty: all.
    lora: trains adapters beside the weights, which all stay as they are in `init`.
    attention_backend: auto, or a backend by name.
    overrides: settings of the preset.
    """

    preset: str | None = None
    init: str | None = None
    expert: Literal["high", "low", "both"] | None = None
    inflate: bool = False
    freeze: Literal["pretrained"] | None = None
    trainable: list[str] = field(default_factory=list)
    lora: LoraConfig | None = None
    attention_backend: str = "auto"
    overrides: Annotated[dict[str, Any], SettingsOf(TransformerConfig)] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.init and self.preset:
            raise StditError(f"preset {self.preset} and init {self.init} are both set: choose fresh weights or init.")
        for name in ("expert", "inflate", "freeze", "trainable", "lora"):
            if getattr(self, name) and not self.init:
                raise StditError(f"{name} {getattr(self, name)} needs the weights of init, which is not set.")
        if self.freeze and (not self.inflate or self.trainable):
            raise StditError(f"freeze {self.freeze} needs inflate, and excludes trainable: it says what trains.")
        if self.lora and (self.freeze or self.trainable):
            raise StditError("lora says what trains: it excludes freeze and trainable.")


@dataclass
class VaeSettings:
    """The VAE: a folder of trained weights, or a preset with changes to train from scratch.

    path: a VAE folder. Its own training starts from there; a transformer's training uses it frozen.
    preset: the size of a fresh VAE: toy (the default), wan2.1, …. Single settings of it can be changed: `vae.z_dim=8`.
    inflate: path is an image VAE (Stable Diffusion's), to be trained on as a causal video VAE;
        `vae.temporal_downsample` may say where its frames halve.
    overrides: settings of the preset.
    """

    path: str | None = None
    preset: str | None = None
    inflate: bool = False
    overrides: Annotated[dict[str, Any], SettingsOf(VaeConfig)] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path and self.preset:
            raise StditError(f"path {self.path} and preset {self.preset} are both set: choose that VAE or a fresh one.")
        if self.inflate and not self.path:
            raise StditError("inflate needs the image VAE of path, which is not set.")


@dataclass
class TrainedText:
    """A small UMT5 encoder that trains along; its vocabulary comes from the captions.

    dim: width, a multiple of heads.
    layers: transformer layers.
    heads: attention heads.
    """

    dim: Annotated[int, Field(ge=1, le=16_384)] = 128
    layers: Annotated[int, Field(ge=1, le=256)] = 2
    heads: PositiveInt = 4

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise StditError(f"dim {self.dim} must be a multiple of heads {self.heads}.")


@dataclass
class TextSettings:
    """The text encoder: frozen, from `path`, or `trained` along.

    path: a folder with text_encoder/ and tokenizer/, used frozen.
    trained: a small encoder to train along instead.
    padding: positions that a text is padded or cut to, 0 for no padding; unset: as the weights of `model.init` expect,
        512 for fresh weights.
    """

    path: str | None = None
    trained: TrainedText | None = None
    padding: Annotated[int, Field(ge=0, le=1_000_000)] | None = None

    def __post_init__(self) -> None:
        if self.path and self.trained:
            raise StditError("path and trained are both set: choose a frozen encoder or one that trains along.")


@dataclass
class ToyEval:
    """Held-out captions of the toy set that a transformer samples, to be read from the pixels.

    captions: how many of the 72.
    shapes: WIDTHxHEIGHTxFRAMES, all captions at each; empty: the largest shape of the training.
    """

    captions: Annotated[int, Field(ge=1, le=72)] = 64
    shapes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for shape in self.shapes:
            VideoShape.parse(shape)


@dataclass
class EvalSettings:
    """Validation while training, with the weights that would be exported then. A transformer samples `prompts`, and has
    its loss measured on the clips of `manifest`; a VAE reconstructs clips.

    every: steps between validations; 0: none.
    prompts: one clip is sampled for each.
    size: WIDTHxHEIGHT of the samples; unset: that of the largest shape.
    frames: of the samples; unset: those of the largest shape.
    steps: solver steps per sample.
    guidance: scale of classifier-free guidance.
    seed: of the noise of samples and of the loss; any 64-bit integer.
    manifest: held-out clips, for a transformer's loss and a VAE's PSNR. Unset: no such loss, and the VAE reconstructs
        clips of the training.
    clips: how many of them at most, spread over the manifest.
    toy: also samples held-out captions of the toy set, and counts what the clips show right; unset: none.
    """

    every: NonNegativeInt = 0
    prompts: list[str] = field(default_factory=list)
    size: str | None = None
    frames: NonNegativeInt | None = None
    steps: PositiveInt = 20
    guidance: NonNegativeFloat = 4.0
    seed: int = 0
    manifest: str | None = None
    clips: PositiveInt = 32
    toy: ToyEval | None = None

    @property
    def asks_a_transformer(self) -> bool:
        """Whether there is anything to measure or to sample with a transformer."""
        return bool(self.prompts or self.manifest or self.toy)

    def __post_init__(self) -> None:
        if self.size is not None and not VideoShape.parse(self.size).is_image:
            raise StditError(f"size {self.size!r} is WIDTHxHEIGHT alone; eval.frames sets the number of frames.")


@dataclass
class LogSettings:
    """What is written while training.

    every: steps between lines of metrics.jsonl.
    tensorboard: also writes TensorBoard files.
    wandb: a project of Weights & Biases that metrics go to as well; `pip install stdit[wandb]`.
    progress: shows a progress bar.
    """

    every: PositiveInt = 10
    tensorboard: bool = True
    wandb: str | None = None
    progress: bool = True


@dataclass
class RunConfig:
    """Everything that decides a run."""

    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    vae: VaeSettings = field(default_factory=VaeSettings)
    text: TextSettings = field(default_factory=TextSettings)
    data: DataConfig = field(default_factory=DataConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalSettings = field(default_factory=EvalSettings)
    log: LogSettings = field(default_factory=LogSettings)


WITH_OVERRIDES = {"model": ModelSettings, "vae": VaeSettings}  # sections that also take another class's settings


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain lists and mappings, which `from_dict` reads back."""
    return {section.name: _plain(getattr(config, section.name)) for section in dataclasses.fields(RunConfig)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        own = {entry.name: _plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
        return own | own.pop("overrides", {})
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def save_config(config: RunConfig, path: Path) -> None:
    publish_text(path, yaml_text(to_dict(config)))


def differences(then: dict[str, Any], now: RunConfig, named: bool = False) -> list[str]:
    """Lines such as "optimizer.lr: 0.001 → 0.002" for what a resumed run must not change.

    then: `to_dict` of the config that the run began with. An older stdit may have written it: settings that it lacks
        had their defaults.
    named: whether the checkpoint names the content of paths, so that the paths themselves may differ.
    """
    old, new = _flatten(_completed(then, now)), _flatten(to_dict(now))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [
        f"{key}: {old.get(key, '(unset)')} → {new.get(key, '(unset)')}"
        for key in changed
        if not key.startswith(MAY_DIFFER) and not (named and key in MAY_MOVE and old.get(key) and new.get(key))
    ]


def _completed(then: Any, now: Any) -> Any:
    """`then` with the settings that it lacks, at their defaults. now: the same part of the present config."""
    if isinstance(then, list) and isinstance(now, list):
        return [*map(_completed, then, now), *then[len(now) :]]
    if not isinstance(then, dict) or not dataclasses.is_dataclass(now):
        return then
    result: dict[str, Any] = {}
    for entry in dataclasses.fields(now):
        if entry.name in then:
            result[entry.name] = _completed(then[entry.name], getattr(now, entry.name))
        elif entry.name != "overrides" and entry.default_factory is not dataclasses.MISSING:
            result[entry.name] = _plain(entry.default_factory())
        elif entry.default is not dataclasses.MISSING:
            result[entry.name] = _plain(entry.default)
    return result | {key: value for key, value in then.items() if key not in result}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, with `a.b=c` set on top, whose values are YAML; `run=PATH` sets run.path."""
    path = find_shipped(path, CONFIGS, ".yaml")
    try:
        if path.exists() and not (path.is_file() and path.stat().st_size <= LARGEST):
            raise StditError(f"config {path} is not a file of at most {LARGEST:,} bytes, as a YAML file is.")
        text = read_text(path)
    except OSError as error:
        raise StditError(f"config {path} cannot be read: {error.strerror}.") from error
    raw = read_yaml(text, f"{path} is")
    raw = {} if raw is None else raw
    config = from_dict(raw, str(path))
    if not overrides:
        return config
    for override in overrides:
        _set(raw, override)
    return from_dict(raw, f"{' '.join(overrides)} on top of {path}")


def from_dict(raw: Any, where: str) -> RunConfig:
    """where: the source, for errors."""
    if isinstance(raw, dict):
        raw = raw | {name: _gathered(kind, raw.get(name, {})) for name, kind in WITH_OVERRIDES.items()}
    return read(RunConfig, raw, where)


def _gathered(kind: type, section: Any) -> Any:
    """A section's settings, with those that are none of `kind`'s own in `overrides`."""
    if not isinstance(section, dict):
        return section
    own = {entry.name for entry in dataclasses.fields(kind)} - {"overrides"}
    given = {name: value for name, value in section.items() if name in own}
    return given | {"overrides": {name: value for name, value in section.items() if name not in own}}


def _set(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise StditError(f"{override!r} is not KEY=VALUE, such as optimizer.lr=0.001.")
    value = read_yaml(text, f"{override!r}: the value is")
    parts = ["run", "path"] if key == "run" else key.split(".")
    for part in parts[:-1]:
        if raw.get(part) is None:
            raw[part] = {}
        raw = raw[part]
        if not isinstance(raw, dict):
            raise StditError(f"{override!r}: {part} is {raw!r} and has no settings in it.")
    raw[parts[-1]] = value
