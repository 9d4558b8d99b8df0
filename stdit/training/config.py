"""A run's config: its sections, `RunConfig` that composes them, and the strict reader of YAML and `key=value`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from stdit.data.config import DataConfig, PlanConfig
from stdit.errors import StditError
from stdit.files import publish_text
from stdit.shapes import VideoShape
from stdit.shipped import CONFIGS, find_shipped
from stdit.strict import build
from stdit.text_files import read_text, read_yaml
from stdit.training.engine.checkpoint import CheckpointConfig
from stdit.training.engine.engine import ParallelConfig
from stdit.training.engine.optimizer import OptimizerConfig
from stdit.training.engine.schedule import ScheduleConfig
from stdit.training.objectives.config import ObjectiveConfig

LARGEST = 2**24  # bytes of a config

# On resume only these may differ. Nothing in them changes what is computed, but for schedule.steps, which moves a decay
# (`ScheduleConfig`), and parallel, whose rounding differs.
MAY_DIFFER = (
    "log.", "eval.", "checkpoint.", "parallel.", "run.path", "schedule.steps", "data.workers", "data.prefetch",
    "optimizer.max_skipped_steps",
    "data.timeout", "data.verify", "data.keep_gb",
)  # fmt: skip

# These, too, where the checkpoint names what is there by content (`frozen.check_frozen`): a folder may be moved.
MAY_MOVE = ("model.init", "vae.path", "text.path", "objective.vae.lpips.path")

# A field with the metadata "rest_of": "module:Class" holds those settings of its section that belong to that class.


@dataclass
class RunSettings:
    """path: the run folder. deterministic: bit for bit on a GPU too, slower."""

    path: str = ""
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    deterministic: bool = False


@dataclass
class LoraConfig:
    """alpha / rank scales what an adapter adds. targets: patterns (* and ?) of the linear layers, by our names; unset:
    all of attention and MLP. layout: of the exported file (stdit/weights/lora/write.py). merged: export the whole
    model folder too, with the adapter in its weights.
    Of Cosmos, whose common layout diffusers does not read, there is a second file in diffusers' own.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: ["*blocks.*_attn.*", "*blocks.*.ffn.*"])
    layout: Literal["common", "original", "kohya", "diffusers", "peft"] = "common"
    merged: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 65_536 or self.alpha <= 0 or not self.targets:
            raise StditError(
                f"rank {self.rank} must be from 1 to 65,536, alpha {self.alpha:g} positive, and targets "
                f"{self.targets} name some layers."
            )


@dataclass
class ModelSettings:
    """preset: a size of `stdit.models.transformer` (toy), whose settings may be changed one by one (`model.layers=4`).
    Channels and text width follow from the VAE and the text encoder.

    init: a model folder, or a transformer's folder or file, to start from instead of fresh weights. What a model folder
    holds is the run's unless the config says otherwise: VAE, text encoder, text padding, shift.
    expert: which of two experts (Wan 2.2 A14B) to train, at its own noise levels, or both. inflate: put attention over
    time into an image model (PixArt). freeze: "pretrained" trains what inflate adds alone. trainable: patterns of the
    names of the parameters to train, such as "blocks.*.self_attn.*"; the others keep the values of init.
    lora: train adapters beside the weights, which all keep the values of init.
    checkpoint_blocks: recompute the blocks in backward to save memory. attention_backend: auto, or one by name.
    """

    preset: str | None = None
    init: str | None = None
    expert: Literal["high", "low", "both"] | None = None
    inflate: bool = False
    freeze: Literal["pretrained"] | None = None
    trainable: list[str] = field(default_factory=list)
    lora: LoraConfig | None = None
    checkpoint_blocks: bool = False
    attention_backend: str = "auto"
    overrides: dict[str, Any] = field(
        default_factory=dict, metadata={"rest_of": "stdit.models.transformer:TransformerConfig"}
    )

    def __post_init__(self) -> None:
        if self.init and self.preset:
            raise StditError(
                f"preset {self.preset} and init {self.init} are both set: fresh weights, or those of init."
            )
        for name in ("expert", "inflate", "freeze", "trainable", "lora"):
            if getattr(self, name) and not self.init:
                raise StditError(f"{name} {getattr(self, name)} is about the weights of init, which is not set.")
        if self.freeze and (not self.inflate or self.trainable):
            raise StditError(f"freeze {self.freeze} goes with inflate, and not with trainable: it says what trains.")
        if self.lora and (self.freeze or self.trainable):
            raise StditError("lora says what trains, and goes with neither freeze nor trainable.")


@dataclass
class VaeSettings:
    """path: a VAE folder; for a VAE's own training it starts there. Else preset (toy) and its settings: a fresh one.

    inflate: path is an image VAE (Stable Diffusion's), whose training goes on as a causal video VAE;
    `vae.temporal_downsample` may say where its frames halve.
    """

    path: str | None = None
    preset: str | None = None
    inflate: bool = False
    overrides: dict[str, Any] = field(default_factory=dict, metadata={"rest_of": "stdit.vae.autoencoder:VaeConfig"})

    def __post_init__(self) -> None:
        if self.path and self.preset:
            raise StditError(f"path {self.path} and preset {self.preset} are both set: that VAE, or a fresh one.")
        if self.inflate and not self.path:
            raise StditError("inflate is about the image VAE of path, which is not set.")


@dataclass
class TrainedText:
    """A small UMT5 encoder, trained along; its words come from the captions."""

    dim: int = 128
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        if min(self.dim, self.layers, self.heads) < 1 or self.dim % self.heads:
            raise StditError(
                f"dim {self.dim}, layers {self.layers} and heads {self.heads} must be at least 1, and heads divide dim."
            )
        if self.dim > 16_384 or self.layers > 256:
            raise StditError(f"dim {self.dim} must be at most 16,384 and layers {self.layers} at most 256.")


@dataclass
class TextSettings:
    """path: a folder with text_encoder/ and tokenizer/, frozen; or `trained`.

    padding: positions of a text, 0: none; unset: as the weights of model.init are for, 512 for fresh ones.
    """

    path: str | None = None
    trained: TrainedText | None = None
    padding: int | None = None

    def __post_init__(self) -> None:
        if self.path and self.trained:
            raise StditError("path and trained are both set: either a frozen encoder or one trained along.")
        if self.padding is not None and self.padding > 1_000_000:
            raise StditError(f"padding {self.padding} is more positions than any text has: at most 1,000,000.")


@dataclass
class EvalSettings:
    """every: steps between validations, 0 for none. A transformer samples `prompts` (size WIDTHxHEIGHT and frames:
    unset, the largest shape's); a VAE reconstructs up to `clips` clips of `manifest` (held out; unset: training clips).
    """

    every: int = 0
    prompts: list[str] = field(default_factory=list)
    size: str | None = None
    frames: int | None = None
    steps: int = 20
    guidance: float = 4.0
    seed: int = 0
    manifest: str | None = None
    clips: int = 32

    def __post_init__(self) -> None:
        if self.every < 0 or self.steps < 1 or self.clips < 1:
            raise StditError(
                f"every {self.every} must be at least 0, steps {self.steps} and clips {self.clips} at least 1."
            )
        if self.size is not None and not VideoShape.parse(self.size).is_image:
            raise StditError(f"size {self.size!r} is WIDTHxHEIGHT alone; eval.frames sets the number of frames.")


@dataclass
class LogSettings:
    """every: steps between lines of metrics.jsonl."""

    every: int = 10
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise StditError(f"every {self.every} must be at least 1.")


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


def to_dict(config: Any) -> dict[str, Any]:
    """What `from_dict` reads back, in plain lists and mappings."""
    result: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if "rest_of" in entry.metadata:
            result |= {key: _plain(one) for key, one in value.items()}
        else:
            result[entry.name] = _plain(value)
    return result


def save_config(config: RunConfig, path: Path) -> None:
    publish_text(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


def differences(then: dict[str, Any], now: RunConfig, named: bool = False) -> list[str]:
    """Lines "optimizer.lr: 0.001 → 0.002" for what a resumed run must not change.

    then: `to_dict` of the config that the run began with, perhaps in an older stdit: settings that it lacks had their
    defaults. named: whether the checkpoint names by content what is at paths, which may then be others.
    """
    old, new = _flatten(_completed(then, now)), _flatten(to_dict(now))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [
        f"{key}: {old.get(key, '(unset)')} → {new.get(key, '(unset)')}"
        for key in changed
        if not key.startswith(MAY_DIFFER) and not (named and key in MAY_MOVE and old.get(key) and new.get(key))
    ]


def _completed(then: Any, now: Any) -> Any:
    """`then` with the settings it lacks, at their defaults; now: the present config of the same part, or a value."""
    if isinstance(then, list) and isinstance(now, list):
        return [*map(_completed, then, now), *then[len(now) :]]
    if not isinstance(then, dict) or not dataclasses.is_dataclass(now):
        return then
    result: dict[str, Any] = {}
    for entry in dataclasses.fields(now):
        if entry.name in then:
            result[entry.name] = _completed(then[entry.name], getattr(now, entry.name))
        elif "rest_of" not in entry.metadata and entry.default_factory is not dataclasses.MISSING:
            result[entry.name] = _plain(entry.default_factory())
        elif entry.default is not dataclasses.MISSING:
            result[entry.name] = _plain(entry.default)
    return result | {key: value for key, value in then.items() if key not in result}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a YAML file with `a.b=c` set on top, values read as YAML; `run=PATH` sets run.path."""
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
    """`where` names the source in errors."""
    return build(RunConfig, raw, where)


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
