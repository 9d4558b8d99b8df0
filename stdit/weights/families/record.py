"""The record of a family of open weights. Every file of this folder that is named in `__init__.py` holds one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.text.places import Treatment
from stdit.weights.families.configs import ConfigJson, Settings, Tensors, check_keys, count
from stdit.weights.keymap import KeyMap, Shape

if TYPE_CHECKING:
    from stdit.vae.families.diffusers_vae import VaeTraits

Config = Any  # TransformerConfig, VaeConfig or OpenSoraConfig
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class PipelineKind:
    """What one of diffusers' pipeline classes, or Open-Sora 1.2's code, does around its transformer.

    fps: of the released weights.
    shape: the released weights' WIDTHxHEIGHTxFRAMES; None: images of the size that they were trained at.
    by_channels: of releases whose latents have this other number of channels: their fps and shape.
    text: how the pipeline brings a prompt to its text encoder.
    caller: how the pipeline calls its scheduler, a key of `stdit.diffusion.solvers.base.CALLERS`.
    negative_follows: the negative prompt is brought to each prompt's length, with the encoder's output at padding.
    known_noise: at noise level t the network sees known tokens with noise of this factor times t².
    guides_beyond: guidance s is cond + s · (cond − uncond), not uncond + s · (cond − uncond).
    experts: model_index.json says whether there are two experts, and the noise level between them.
    gathered: users put the folder together from downloads that have no scheduler/.
    refused: why stdit does not run this class; "" if it does.
    """

    fps: float
    shape: str | None = None
    by_channels: Mapping[int, PipelineKind] = field(default_factory=dict)
    text: Treatment = field(default_factory=Treatment)
    caller: str = "plain"
    negative_follows: bool = False
    known_noise: float = 0.0
    guides_beyond: bool = False
    experts: bool = False
    gathered: bool = False
    refused: str = ""


@dataclass(frozen=True)
class Release:
    """A released model.

    name: the release's.
    settings: fields of TransformerConfig that tell it from the family's other releases; the first that fits counts.
    vae, text: the autoencoder and text encoder whose latents and embeddings it takes.
    """

    name: str
    settings: Mapping[str, Any]
    vae: str
    text: str


@dataclass(frozen=True)
class Family:
    """All that is particular to one family of open weights.

    Its identity:
    name: its file's name, and `TransformerConfig.family` of its models.
    title: its name in messages.
    library: the library that model_index.json names for its class.
    settings: fields of TransformerConfig that all its models share.

    Its files. The same tensors have other names in the release's own files (dialect "original") and in diffusers'
    (dialect "diffusers").
    configs: the config.json of each dialect; a dialect that is not named has the first. Under other names, further
        classes that are read; "own" is stdit's, which no other program has.
    form(config, dialect): the name of the one that is written.
    marks: by dialect, patterns of tensor names, each of which some tensor of a model has.
    lacks: a pattern of names that no model has, though other families have it beside the same marks.
    fits: whether tensors without a config.json are this family's, if another family has the same names.
    blocks: a pattern of the start of a block's tensors' names; its group is the block's number.
    keymap: the key map between our names and a dialect's.
    prepare(found, shapes, place): the content of a config.json before it is read; {} if there is none.
    bare(tensors, kept): the settings of tensors without a config.json, `kept` beside them by stdit. None: the defaults.
    finish(values, shapes, place): completes the settings, of whatever origin.
    comfyui: whether ComfyUI has such models.
    built_in: the settings that the program which reads a layout fixes in its code, with the values that it can run;
        check_layout refuses any other value.
    not_written: settings that may differ when read back, because they change no output.
    metadata: what the original's program looks for in a file's own metadata.
    config_class: of its models' configs.

    What goes with it:
    scheduler: the scheduler config that a model was released with.
    pipelines: by the class in model_index.json.
    releases: its released models.
    autoencoders: autoencoders that diffusers runs for it, by class.

    How it differs in use:
    variants: changes of settings that make small models which together have every tensor of the family.
    guided_by_null_text: "no text" is the learned `null_text`, not the text encoder's output for "".
    diffusers_reads_common_lora: whether diffusers reads a LoRA file in the layout "common".
    """

    name: str
    title: str
    configs: Mapping[str, ConfigJson]
    marks: Mapping[str, tuple[str, ...]]
    keymap: Callable[[Config, str], KeyMap]
    blocks: str = ""
    library: str = "diffusers"
    settings: Mapping[str, Any] = field(default_factory=dict)
    form: Callable[[Config, str], str] = lambda config, dialect: dialect
    lacks: str = ""
    fits: Callable[[Shapes], bool] = lambda shapes: True
    prepare: Callable[[Settings, Shapes, object], Settings] = lambda found, shapes, place: found
    bare: Callable[[Tensors, Settings], Settings] | None = None
    finish: Callable[[Settings, Shapes, object], Settings] = lambda values, shapes, place: values
    comfyui: bool = False
    built_in: Callable[[Config, str], dict[str, tuple[Any, ...]]] = lambda config, layout: {}
    not_written: tuple[str, ...] = ()
    metadata: Callable[[Config], dict[str, str]] = lambda config: {}
    config_class: type[Any] = TransformerConfig
    scheduler: Callable[[Config], dict[str, Any]] = lambda config: {}
    pipelines: Mapping[str, PipelineKind] = field(default_factory=dict)
    releases: tuple[Release, ...] = ()
    autoencoders: Mapping[str, VaeTraits] = field(default_factory=dict)
    variants: tuple[Mapping[str, Any], ...] = ({},)
    guided_by_null_text: bool = False
    diffusers_reads_common_lora: bool = True

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that its config.json may name."""
        return tuple(form.class_name for form in self.configs.values())

    def dialect_of(self, shapes: Shapes) -> str:
        """The dialect of tensors by their names; "" if they are another family's."""

        def held(pattern: str) -> bool:
            return any(re.fullmatch(pattern, name) for name in shapes)

        found = [dialect for dialect, patterns in self.marks.items() if all(map(held, patterns))]
        return found[0] if found and not (self.lacks and held(self.lacks)) else ""

    def config_from(
        self, found: Settings, shapes: Shapes, place: object = "config.json", heads: int | None = None
    ) -> Config:
        """Our config of a config.json in any dialect; of the tensors' shapes alone if `found` is {}.

        heads: their number, if the user gave it. Raises StditError that names `place`.
        """
        found = self.prepare(found, shapes, place)
        kind = found.get("_class_name")
        if kind not in (None, *self.classes):
            raise StditError(f"{place}: {kind!r} is not a model that stdit loads; it loads {', '.join(self.classes)}.")
        form = self._form_of(found)
        if self.bare is None or (found and not form.bare):
            values = form.read(found, place)
        else:
            kept = check_keys(found, (), form.own, place)
            tensors = Tensors(shapes, self._keymap_of(shapes), self.blocks, self.title, place, kept.get("heads", heads))
            values = self.bare(tensors, kept) | kept
        return self._checked({**self.settings, **self.finish(values, shapes, place)}, shapes, place)

    def written(self, config: Config, dialect: str) -> Settings:
        """The config.json of a config in a dialect."""
        form = self.configs.get(self.form(config, dialect)) or next(iter(self.configs.values()))
        return form.write(config)

    def samples(self, layers: int = 1) -> list[TransformerConfig]:
        """Small models of a family of transformers that together have every tensor of its models."""
        sizes = {"dim": 12, "heads": 1, "ffn_dim": 4, "text_dim": 4, "frequency_dim": 12, "in_channels": 1}
        sizes |= {"layers": layers, "out_channels": 1, "position_base": 1}
        return [TransformerConfig(**{**sizes, **self.settings, **variant}) for variant in self.variants]

    def _form_of(self, found: Settings) -> ConfigJson:
        """That of the class which a config.json names; else the one that has most of its keys."""
        kind, forms = found.get("_class_name"), self.configs.values()
        named = [form for form in forms if form.class_name == kind]
        return named[0] if named else max(forms, key=lambda form: len(found.keys() & {*form.names}))

    def _keymap_of(self, shapes: Shapes) -> KeyMap:
        """The key map that has the names of these tensors."""
        samples = self.samples() if self.config_class is TransformerConfig else [self.config_class()]
        keymaps = [self.keymap(sample, self.dialect_of(shapes)) for sample in samples]
        fitting = [keymap for keymap in keymaps if keymap.foreign("blocks.0.ffn.0.weight") in shapes]
        return (*fitting, *keymaps)[0]

    def _checked(self, values: Settings, shapes: Shapes, place: object) -> Config:
        """The config of `values`. Its number of blocks must be the tensors'."""
        try:
            config = self.config_class(**values)
        except (StditError, TypeError, ValueError) as error:
            raise StditError(f"{place}: {error}") from None
        if not self.blocks or not shapes or (found := count(shapes, self.blocks)) == config.layers:
            return config
        if isinstance(place, Path) and place.name != "config.json":  # weights without a config.json
            raise StditError(
                f"{place}: the tensors are of {found} blocks; without their config.json, {config.layers} are expected. "
                "Put the config.json of the weights beside them."
            )
        raise StditError(
            f"{place}: the config says {config.layers} blocks, the tensors are of {found}. "
            "Does this config.json belong to these weights?"
        )
