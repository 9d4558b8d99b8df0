"""Reads and writes model folders in diffusers' pipeline layout.

A folder written here opens in the pipeline class that model_index.json names, with the same result for the same noise,
and the other way round. `stdit.json` holds what diffusers has no place for. An adapter alone, as training writes it, is
a model folder too (see base_weights.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from typing_extensions import Self

from stdit import settings
from stdit.diffusion.solvers import read_scheduler, write_scheduler
from stdit.errors import StditError, nearest_name
from stdit.files import publish_text
from stdit.models.transformer import Experts, STDiT
from stdit.sampling.base_weights import BaseWeights
from stdit.shapes import VideoShape
from stdit.text.encoders import TextEncoder
from stdit.text.images import ImageEncoder, load_image_encoder
from stdit.text.loading import load_text_encoder
from stdit.vae.families.diffusers_vae import DiffusersVAE
from stdit.vae.families.open_sora import AnyVAE
from stdit.weights.families import class_of, family_of, pipelines, treatment_of
from stdit.weights.families.configs import DIFFUSERS_VERSION
from stdit.weights.families.record import PipelineKind
from stdit.weights.io import NumbersOf, load_transformer, load_vae, own, save_transformer, save_vae
from stdit.weights.lora.adapters import merge
from stdit.weights.lora.read import read_adapter
from stdit.weights.sources import expert_adapter_places
from stdit.weights.tensor_files import read_json

FORMAT = 1  # of stdit.json


@dataclass(frozen=True)
class FolderSettings:
    """The defaults of sampling, which a model folder holds in stdit.json.

    fps: frames per second of the training.
    shapes: WIDTHxHEIGHTxFRAMES of the training; the first is the default.
    text_padding: positions that texts are padded to; None: as the transformer's config says.
    shift_tokens: a clip of so many tokens is sampled with the scheduler's static shift, a clip of n tokens with
        √(n / shift_tokens) times that, as in training; None: every clip with the static shift, as in diffusers.
    """

    fps: Annotated[float, Field(gt=0, le=1000)] = 16.0
    shapes: Annotated[tuple[str, ...], Field(min_length=1)] = ("832x480x81",)
    text_padding: NonNegativeInt | None = None
    shift_tokens: PositiveInt | None = None

    def __post_init__(self) -> None:
        for shape in self.shapes:
            VideoShape.parse(shape)

    @classmethod
    def read(cls, folder: str | Path, absent: FolderSettings | None = None) -> FolderSettings:
        """From a model folder. If it has no stdit.json: `absent`, by default Wan's."""
        path = Path(folder) / "stdit.json"
        if not path.is_file():
            return absent or cls()
        found = read_json(path)
        if found.pop("format", None) != FORMAT:
            raise StditError(f"{path}: its format is not {FORMAT}, the one this version of stdit reads.")
        return settings.read(cls, found, str(path))

    def write(self, folder: str | Path) -> None:
        publish_text(Path(folder) / "stdit.json", json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")

    @property
    def shape(self) -> VideoShape:
        """The default shape."""
        return VideoShape.parse(self.shapes[0])


@dataclass(eq=False, repr=False)
class ModelFolder:
    """A model folder in memory: a transformer, a VAE, a text encoder and a scheduler's config.

    settings: the folder's stdit.json.
    image_encoder: for weights that see its tokens (Wan 2.1 I2V).
    index: the folder's model_index.json. Its `_class_name` is the diffusers pipeline to sample as; by default the one
        that the scheduler's config is for.
    """

    transformer: STDiT | Experts
    vae: AnyVAE
    text_encoder: TextEncoder
    scheduler: Mapping[str, Any]
    settings: FolderSettings = field(default_factory=FolderSettings)
    image_encoder: ImageEncoder | None = None
    index: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text_padding(self) -> int:
        """The number of positions that texts are zero-padded to; 0 for no padding."""
        padding = self.settings.text_padding
        return self.transformer.config.text_padding if padding is None else padding

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Self:
        """Reads a model folder; an adapter's with the parts that it was trained over, and the adapter merged.

        dtype: of the transformer and the encoders; None keeps the stored ones.
        """
        folder = Path(folder)
        base = BaseWeights.read(folder)
        path = Path(base.transformer) / "model_index.json"
        if not (path.is_file() or base.pipeline):
            raise StditError(f"{folder} is not a model folder: it has no model_index.json.")
        index = read_json(path) if path.is_file() else {"_class_name": base.pipeline}
        name = str(index.get("_class_name"))
        known = pipelines()
        kind = known.get(name)
        if kind is None:
            runs = [name for name, kind in known.items() if not kind.refused]
            hint = nearest_name(name, runs)
            raise StditError(f"{path}: {name} is not supported.{hint} Supported: {', '.join(runs)}.")
        if kind.refused:
            raise StditError(f"{path}: {name} is not supported: {kind.refused}.")
        base.check(folder)
        transformer = load_transformer(base.transformer, dtype=dtype, device=device).eval()
        vae = load_vae(base.vae, device=device).eval()
        words = base.text_encoder
        text_encoder = load_text_encoder(words, treatment_of(words), dtype=dtype, device=device)
        sees_image = (path.parent / "image_encoder").is_dir()
        image_encoder = load_image_encoder(path.parent, dtype, device) if sees_image else None
        settings = FolderSettings.read(folder, _released(kind, transformer, vae))
        if kind.gathered and not (folder / "scheduler").is_dir():
            scheduler = family_of(transformer.config).scheduler(transformer.config)
        else:
            scheduler = read_scheduler(folder / "scheduler", name, kind.caller)
        made = cls(transformer, vae, text_encoder, scheduler, settings, image_encoder, index)
        if base.pipeline:
            made.add_loras([(folder, 1.0)])
        return made

    def save(self, folder: str | Path, numbers: NumbersOf = own) -> None:
        """Writes a model folder, which diffusers' pipeline of its class and `load` open. numbers: of the transformer;
        see `save_transformer`."""
        folder = Path(folder)
        experts = isinstance(self.transformer, Experts)
        save_transformer(self.transformer, folder if experts else folder / "transformer", numbers=numbers)
        save_vae(self.vae, folder / "vae")
        self.text_encoder.save(folder / "text_encoder", folder / "tokenizer")
        write_scheduler(self.scheduler, folder / "scheduler")
        replace(self.settings, text_padding=self.text_padding).write(folder)
        transformer = class_of(self.transformer.config)
        vae = ["diffusers", self.vae.config.name] if isinstance(self.vae, DiffusersVAE) else class_of(self.vae.config)
        index = {name: value for name, value in self.index.items() if name != "_name_or_path"}
        if (kind := pipelines().get(index["_class_name"])) is not None and kind.experts:
            index = {"expand_timesteps": False} | index
            index["boundary_ratio"] = self.transformer.boundary if isinstance(self.transformer, Experts) else None
            index["transformer_2"] = transformer if experts else [None, None]
        index |= {
            "_diffusers_version": DIFFUSERS_VERSION,
            "scheduler": ["diffusers", self.scheduler["_class_name"]],
            "text_encoder": ["transformers", type(self.text_encoder.encoder).__name__],
            "tokenizer": ["transformers", self.text_encoder.tokenizer_class],
            "transformer": transformer,
            "vae": vae,
        }
        if self.image_encoder is not None:
            self.image_encoder.save(folder / "image_encoder", folder / "image_processor")
            index["image_encoder"] = ["transformers", type(self.image_encoder.encoder).__name__]
            index["image_processor"] = ["transformers", type(self.image_encoder.processor).__name__]
        publish_text(folder / "model_index.json", json.dumps(dict(sorted(index.items())), indent=2) + "\n")

    def add_loras(
        self,
        loras: Sequence[tuple[str | Path, float]],
        loras_2: Sequence[tuple[str | Path, float]] = (),
        partly: bool = False,
    ) -> None:
        """Merges LoRA files, each with its weight, into the transformer: all of them or, on an error, none.

        Merging is in fp32, rounded once to the transformer's dtype. To undo it, load the folder again.

        loras: for the transformer. Of two experts (Wan 2.2 A14B), for the one for high noise, as diffusers'
            load_lora_weights does; a model folder with an adapter for each expert goes into both.
        loras_2: for the low-noise expert.
        partly: leave out, with a warning, tensors for layers that the transformer lacks. Otherwise they are an error.
        """
        model = self.transformer
        high, low = (model.high, model.low) if isinstance(model, Experts) else (model, None)
        wanted: list[tuple[STDiT, str | Path, float]] = []
        for path, weight in loras:
            places = {name: place for name, place in expert_adapter_places(Path(path)).items() if place.is_dir()}
            if places and low is None:
                raise StditError(
                    f"{path}: holds adapters of two experts (Wan 2.2 A14B); these weights are one transformer."
                )
            for name, place in places.items() or [("high", path)]:
                wanted.append((low if low and name == "low" else high, place, weight))
        for path, weight in loras_2:
            if low is None:
                raise StditError(f"{path}: is for the second of two experts; these weights are one transformer.")
            wanted.append((low, path, weight))
        read = [(expert, read_adapter(path, expert.config, partly), weight) for expert, path, weight in wanted]
        for expert in dict.fromkeys(expert for expert, _, _ in read):
            merge(expert, [(adapter, weight) for other, adapter, weight in read if other is expert])


def _released(kind: PipelineKind, transformer: STDiT | Experts, vae: AnyVAE) -> FolderSettings:
    """The defaults of a folder that stdit did not write."""
    kind = kind.by_channels.get(vae.config.z_dim, kind)
    if kind.shape is not None:
        return FolderSettings(kind.fps, (kind.shape,))
    side = transformer.config.position_base * transformer.config.patch[1] * vae.config.stride[1]
    return FolderSettings(kind.fps, (f"{side}x{side}x1",))
