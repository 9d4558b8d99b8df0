"""The record of a family of open weights. Every file of this folder that is named in `__init__.py` holds one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from stdit.text.places import Treatment
from stdit.weights.keymap import KeyMap, Shape

if TYPE_CHECKING:
    from stdit.vae.families.diffusers_vae import VaeTraits

Config = Any  # TransformerConfig, VaeConfig or OpenSoraConfig


class ClipFormat(NamedTuple):
    """fps, and WIDTHxHEIGHTxFRAMES."""

    fps: float
    shape: str


@dataclass(frozen=True)
class PipelineKind:
    """What one of diffusers' pipeline classes, or Open-Sora 1.2's code, does around its transformer.

    fps: of the released weights.
    shape: the released weights' WIDTHxHEIGHTxFRAMES; None: images of the size that they were trained at.
    by_channels: the format of releases whose latents have another number of channels.
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
    by_channels: Mapping[int, ClipFormat] = field(default_factory=dict)
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
    classes: the classes that its config.json may name.
    library: the library that model_index.json names for its class; "stdit" for `own_classes`, which no other has.
    settings: fields of TransformerConfig that all its models share.

    Its files. The same tensors have other names in the release's own files (dialect "original") and in diffusers'
    (dialect "diffusers").
    config_from(found, shapes, place, heads): our config of a config.json in any dialect; of the tensors' shapes alone
        if `found` is {}. heads: their number, if the user gave it. Raises StditError that names `place`.
    config_to_diffusers, config_to_original: a config.json of our config.
    dialect_of: which of the two the tensors' names belong to; "" if they are another family's.
    keymap: the key map between our names and a dialect's.
    built_in: the settings that the program which reads a layout fixes in its code, with the values that it can run;
        check_layout refuses any other value. None if ComfyUI has no such model.
    fits: whether tensors without a config.json are this family's, if another family has the same names.
    not_written: settings that may differ when read back, because they change no output.
    metadata: what the original's program looks for in a file's own metadata.

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
    classes: tuple[str, ...]
    config_from: Callable[..., Config]
    config_to_original: Callable[[Config], dict[str, Any]]
    config_to_diffusers: Callable[[Config], dict[str, Any]]
    dialect_of: Callable[[Mapping[str, Shape]], str]
    keymap: Callable[[Config, str], KeyMap]
    built_in: Callable[[Config, str], dict[str, tuple[Any, ...]] | None]
    library: str = "diffusers"
    own_classes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    fits: Callable[[Mapping[str, Shape]], bool] = lambda shapes: True
    not_written: tuple[str, ...] = ()
    metadata: Callable[[Config], dict[str, str]] = lambda config: {}
    scheduler: Callable[[Config], dict[str, Any]] = lambda config: {}
    pipelines: Mapping[str, PipelineKind] = field(default_factory=dict)
    releases: tuple[Release, ...] = ()
    autoencoders: Mapping[str, VaeTraits] = field(default_factory=dict)
    variants: tuple[Mapping[str, Any], ...] = ({},)
    guided_by_null_text: bool = False
    diffusers_reads_common_lora: bool = True
