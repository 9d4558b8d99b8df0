"""How a config.json becomes our settings and back, and what several families' configs and key maps share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from stdit.errors import StditError, nearest_name
from stdit.models.config import TransformerConfig
from stdit.weights.keymap import Flatten, KeyMap, Rule, Shape, Unflatten

Settings = dict[str, Any]
FORMAT = 1  # of the settings that stdit adds to other programs' config.json, under "_stdit"
DIFFUSERS_VERSION = "0.36.0"  # the first whose WanPipeline reads every key that is written
PIXART_LIKE: Settings = {"cross_norm": "none", "qk_norm": "none", "text_padding": 0}  # of PixArt and its descendants
PICTURE_KEPT = ("heads", "position_base", "position_stretch", "text_padding")  # written beside originals
LINEAR_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def check_keys(found: Mapping[str, Any], keys: Collection[str], own: Collection[str], place: object) -> Settings:
    """Our settings under "_stdit" of a config.json.

    Raises StditError for a setting that is not one of `own`, and for a key that is not one of `keys`, except those that
    begin with an underscore.
    """
    for name in found:
        if name not in keys and not name.startswith("_"):
            raise StditError(f"{place}: unknown key {name!r}.{nearest_name(name, keys)}")
    added = found.get("_stdit", {"format": FORMAT})
    if not isinstance(added, dict) or added.get("format") != FORMAT:
        raise StditError(f"{place}: _stdit is {added!r}; this version of stdit reads format {FORMAT} of it.")
    settings = {name: value for name, value in added.items() if name != "format"}
    for name in settings:
        if name not in own:
            raise StditError(f"{place}: unknown key {name!r} in _stdit.{nearest_name(name, own)}")
    return settings


Write = Callable[[Any], Any]  # from our config to the value of a key
_UNSET: Any = object()


@dataclass(frozen=True)
class Key:
    """A key of a config.json; made by `setting`, `only` and `made`, or of a plain value, its default.

    default: its value where it is absent, which also gives its type.
    setting: which of our settings it is; "" if it is none as it stands.
    only: the values with which stdit runs such models. (): any.
    write(config): what is written.
    """

    default: Any
    setting: str = ""
    only: tuple[Any, ...] = ()
    write: Write | None = None


def setting(name: str, default: Any = _UNSET, write: Write | None = None) -> Key:
    """A key that is one of our settings. Without a default ours holds, and our config alone checks the value."""
    return Key(default, name, write=write or attrgetter(name))


def only(*values: Any, default: Any = _UNSET, write: Write | None = None) -> Key:
    """A key of which stdit runs these values; the first is the default, and written, if nothing else is given."""
    first = values[0]
    return Key(first if default is _UNSET else default, only=values, write=write or (lambda config: first))


def made(write: Write, default: Any = _UNSET) -> Key:
    """A key that is calculated from our settings; the `ours` of its ConfigJson reads it."""
    return Key(default, write=write)


@dataclass(frozen=True)
class ConfigJson:
    """The config.json of one class, and how it becomes our settings and back.

    table: its keys; a plain value is a default, and is written.
    passed: keys that do not matter and are not written.
    own: our settings that are written under "_stdit".
    ours(values, theirs, place): further settings, or other values of them. values: our settings so far, those under
        "_stdit" too. theirs: all keys, with defaults. Raises StditError that names `place`.
    bare: releases have no config.json, so that tensors tell all settings but `own`; stdit writes one.
    versioned: whether diffusers' version is written.
    """

    class_name: str
    table: Mapping[str, Any] = field(default_factory=dict)
    passed: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    ours: Callable[[Settings, Settings, object], Settings] = lambda values, theirs, place: {}
    bare: bool = False
    versioned: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Of all keys that it may have."""
        return (*self.table, *self.passed)

    def read(self, found: Mapping[str, Any], place: object) -> Settings:
        """Our settings of a config.json. Raises StditError that names `place` and the key."""
        added = check_keys(found, self.names, self.own, place)
        values: Settings = {}
        theirs = dict(found)
        for name, key in self._keys().items():
            value = found.get(name, key.default)
            if value is _UNSET:
                continue
            theirs[name] = value
            if key.only and value not in key.only:
                runs = " or ".join(map(repr, key.only))
                raise StditError(f"{place}: {name} is {value!r}; stdit runs such models with {runs} only.")
            if key.default is not _UNSET and not _of_type(value, key.default, least=0 if key.setting else 1):
                raise StditError(f"{place}: {name} is {value!r}, not of the kind of {key.default!r}.")
            if key.setting:
                values[key.setting] = value
        values |= added
        return values | self.ours(values, theirs, place)

    def write(self, config: Any) -> Settings:
        """The config.json of `config`, every value explicit."""
        found: Settings = {"_class_name": self.class_name}
        if self.versioned and not self.bare:
            found["_diffusers_version"] = DIFFUSERS_VERSION
        if self.own:
            found["_stdit"] = {"format": FORMAT, **listed({name: getattr(config, name) for name in self.own})}
        keys = self._keys().items()
        return found | listed({name: key.write(config) if key.write else key.default for name, key in keys})

    def _keys(self) -> dict[str, Key]:
        return {name: key if isinstance(key, Key) else Key(key) for name, key in self.table.items()}


def listed(values: Mapping[str, Any]) -> Settings:
    """Values as JSON reads them back: tuples become lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _of_type(value: Any, like: Any, least: int = 1) -> bool:
    """Whether a value is of the type of `like`, and finite. least: for an integer. It is 1 for those that a family
    calculates with, and 0 for those that become a setting as they are: TransformerConfig checks their ranges."""
    if like is None or value is None:
        return value is None or type(value) in (int, float, bool)
    if isinstance(like, float):
        return type(value) in (int, float) and 0 <= value < math.inf
    if isinstance(like, tuple | list):
        return isinstance(value, tuple | list) and len(value) == len(like) and all(map(_of_type, value, like))
    if type(like) is int:
        return type(value) is int and least <= value < 2**31
    return type(value) is type(like)


@dataclass(frozen=True)
class Tensors:
    """The shapes of tensors without a config.json, to tell settings by.

    keymap: from our names to theirs. blocks: a pattern of blocks' names, as in `Family`. title: the family's.
    heads: the number of heads, if the user gave it.
    """

    shapes: Mapping[str, Shape]
    keymap: KeyMap
    blocks: str
    title: str
    place: object
    heads: int | None

    def theirs(self, name: str, rank: int = 2) -> Shape:
        """The shape of a tensor by its own name. Raises StditError if it is absent or has another rank."""
        if len(self.shapes.get(name, ())) != rank:
            raise StditError(
                f"{self.place}: no config.json, and no {name} of rank {rank} to tell the size by ({self.title})."
            )
        return self.shapes[name]

    def ours(self, name: str, rank: int = 2) -> Shape:
        """The same by our name."""
        return self.theirs(self.keymap.foreign(name), rank)

    def find(self, name: str) -> Shape:
        """The shape of a tensor by our name; () if it is absent."""
        return self.shapes.get(self.keymap.foreign(name), ())

    def sizes(self, axes: int, heads: Mapping[int, int], patch: Shape = (1, 1, 1)) -> Settings:
        """The settings that shapes tell in every family, and the number of heads.

        axes: those of the convolution that embeds patches; 0 if it is a Linear, over patches of size `patch`.
        heads: their number in the releases, by width. It is taken if the user gave none: no tensor tells it.
        """
        dim, channels, *sides = self.ours("patch_embedding.weight", 2 + axes)
        if axes:
            patch = (*(1,) * (3 - axes), *sides)
        volume = math.prod(patch)
        text = "text_embedding.0.weight"
        return {
            "dim": dim,
            "heads": self._heads(dim, heads),
            "layers": count(self.shapes, self.blocks),
            "ffn_dim": self.ours("blocks.0.ffn.0.weight")[0],
            "in_channels": channels if axes else channels // volume,
            "out_channels": self.ours("head.head.weight")[0] // volume,
            "patch": patch,
            "text_dim": self.ours(text if self.find(text) else "blocks.0.cross_attn.k.weight")[1],
        }

    def _heads(self, dim: int, released: Mapping[int, int]) -> int:
        heads = released.get(dim) if self.heads is None else self.heads
        if heads is None:
            raise StditError(
                f"{self.place}: no config.json, and the tensors do not tell the number of heads ({self.title}, {dim} "
                "wide). Put the weights' config.json beside the file, or give the number: load_transformer(heads=N), "
                "or `stdit weights convert FILE OUT --heads N`, which makes a folder for all commands."
            )
        if heads < 1 or dim % heads:
            raise StditError(f"{self.place}: {heads} heads do not divide a width of {dim}.")
        return heads


def count(shapes: Mapping[str, Shape], blocks: str) -> int:
    """The number of blocks. blocks: a pattern whose group is a block's number."""
    return len({found[1] for name in shapes if (found := re.match(blocks, name))})


# Parts of tables. What stdit runs of all blocks like PixArt's:
PLAIN_BLOCKS = {
    "attention_bias": only(True),
    "activation_fn": only("gelu-approximate"),
    "norm_elementwise_affine": only(False),
    "norm_eps": only(1e-6),
}


def width_keys(heads: int, head_dim: int, dim: int | None) -> Settings:
    """The keys that `width` reads, of a class with these defaults."""
    return {
        "num_attention_heads": made(attrgetter("heads"), heads),
        "attention_head_dim": made(attrgetter("head_dim"), head_dim),
        "cross_attention_dim": made(attrgetter("dim"), dim),
    }


def width(theirs: Mapping[str, Any], place: object) -> Settings:
    """Settings of families that give a head's width and have an MLP four times as wide as the model; their
    cross_attention_dim must be the model's width."""
    dim = theirs["num_attention_heads"] * theirs["attention_head_dim"]
    if theirs["cross_attention_dim"] != dim:
        raise StditError(f"{place}: cross_attention_dim {theirs['cross_attention_dim']} is not {dim}.")
    return {"heads": theirs["num_attention_heads"], "dim": dim, "ffn_dim": 4 * dim}


def picture_keys(out_channels: int | None, patch: int | None, sample: int) -> Settings:
    """The keys that `picture` reads besides, of a class with these defaults."""
    return {
        "out_channels": made(attrgetter("out_channels"), out_channels),
        "patch_size": made(lambda config: config.patch[1], patch),
        "sample_size": made(lambda config: config.position_base * config.patch[1], sample),
    }


def picture(theirs: Mapping[str, Any], place: object) -> Settings:
    """Settings of image models: width, patches, channels, and sinusoids stretched to the trained image size."""
    patch, sample = theirs["patch_size"], theirs["sample_size"]
    return {
        **width(theirs, place),
        "out_channels": theirs["out_channels"] or theirs["in_channels"],
        "patch": (1, patch, patch),
        "position_base": sample // patch,
        "position_stretch": float(max(sample // 64, 1)),
    }


def pixart_built_in(config: TransformerConfig) -> dict[str, tuple[Any, ...]]:
    """`built_in` of PixArt and its descendants: patches are squares of one frame, texts are projected."""
    square = (1, config.patch[1], config.patch[1])
    mlp = (4 * config.dim,)
    return {"patch": (square,), "ffn_dim": mlp, "blank_channels": (0,), "text_embedding": ("mlp",)}


def as_many_out(shapes: Mapping[str, Shape]) -> bool:
    """Whether tensors under diffusers' names are Allegro's, with as many output as input channels, not PixArt's, which
    have more (a variance)."""
    head, patch = shapes.get("proj_out.weight", (0,)), shapes.get("pos_embed.proj.weight", (0, 0, 0, 0))
    return "proj_out.weight" in shapes and head[0] == math.prod(patch[1:])


def patch_rules(config: TransformerConfig, theirs: str = "pos_embed.proj", axes: int = 2) -> list[Rule]:
    """A patch embedding that is a convolution there: a Conv2d per frame, or a Conv3d."""
    kernel = (config.in_channels, *config.patch[-axes:])
    return [
        Rule("patch_embedding.weight", f"{theirs}.weight", Unflatten(1, kernel)),
        Rule("patch_embedding.bias", f"{theirs}.bias"),
    ]


def attention_rules(ours: str, theirs: str, q_norm: str = "norm_{p}") -> list[Rule]:
    """Both attentions of a block, under the names of all of diffusers' transformers."""
    rules = []
    for mine, yours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        a, b = f"{ours}.{{i}}.{mine}", f"{theirs}.{{i}}.{yours}"
        rules += [
            Rule(f"{a}.{{p:q|k|v}}.{{leaf}}", f"{b}.to_{{p}}.{{leaf}}"),
            Rule(f"{a}.o.{{leaf}}", f"{b}.to_out.0.{{leaf}}"),
            Rule(f"{a}.norm_{{p:q|k}}.weight", f"{b}.{q_norm}.weight"),
        ]
    return rules


def block_rules(ours: str = "blocks", theirs: str = "transformer_blocks", q_norm: str = "norm_{p}") -> list[Rule]:
    """The blocks of diffusers' PixArt and its descendants."""
    return [
        *attention_rules(ours, theirs, q_norm),
        Rule(f"{ours}.{{i}}.ffn.0.{{leaf}}", f"{theirs}.{{i}}.ff.net.0.proj.{{leaf}}"),
        Rule(f"{ours}.{{i}}.ffn.2.{{leaf}}", f"{theirs}.{{i}}.ff.net.2.{{leaf}}"),
        Rule(f"{ours}.{{i}}.modulation", f"{theirs}.{{i}}.scale_shift_table", Flatten(0, (1, 6))),
    ]


def end_rules(time: str = "adaln_single") -> list[Rule]:
    """Time embedding, text embedding and head of the same models."""
    return [
        Rule("time_embedding.0.{leaf}", f"{time}.emb.timestep_embedder.linear_1.{{leaf}}"),
        Rule("time_embedding.2.{leaf}", f"{time}.emb.timestep_embedder.linear_2.{{leaf}}"),
        Rule("time_projection.1.{leaf}", f"{time}.linear.{{leaf}}"),
        Rule("text_embedding.0.{leaf}", "caption_projection.linear_1.{leaf}"),
        Rule("text_embedding.2.{leaf}", "caption_projection.linear_2.{leaf}"),
        Rule("head.modulation", "scale_shift_table", Flatten(0, (1, 2))),
        Rule("head.head.{leaf}", "proj_out.{leaf}"),
    ]


def original_rules(config: TransformerConfig, axes: int, blocks: Mapping[str, str]) -> list[Rule]:
    """PixArt's own names, which STDiT3 shares. axes: as in `patch_rules`. blocks: our name of each list: theirs."""
    rules = [
        *patch_rules(config, "x_embedder.proj", axes),
        Rule("time_embedding.{i}.{leaf}", "t_embedder.mlp.{i}.{leaf}"),
        Rule("time_projection.1.{leaf}", "t_block.1.{leaf}"),
        Rule("text_embedding.0.{leaf}", "y_embedder.y_proj.fc1.{leaf}"),
        Rule("text_embedding.2.{leaf}", "y_embedder.y_proj.fc2.{leaf}"),
        Rule("null_text", "y_embedder.y_embedding"),
        Rule("head.modulation", "final_layer.scale_shift_table", Flatten(0, (1, 2))),
        Rule("head.head.{leaf}", "final_layer.linear.{leaf}"),
    ]
    for ours, theirs in blocks.items():
        a, b = f"{ours}.{{i}}", f"{theirs}.{{i}}"
        rules += [
            Rule(tuple(f"{a}.self_attn.{p}.{{leaf}}" for p in "qkv"), f"{b}.attn.qkv.{{leaf}}"),
            Rule(f"{a}.self_attn.norm_{{p:q|k}}.weight", f"{b}.attn.{{p}}_norm.weight"),
            Rule(f"{a}.self_attn.o.{{leaf}}", f"{b}.attn.proj.{{leaf}}"),
            Rule(f"{a}.cross_attn.q.{{leaf}}", f"{b}.cross_attn.q_linear.{{leaf}}"),
            Rule(tuple(f"{a}.cross_attn.{p}.{{leaf}}" for p in "kv"), f"{b}.cross_attn.kv_linear.{{leaf}}"),
            Rule(f"{a}.cross_attn.o.{{leaf}}", f"{b}.cross_attn.proj.{{leaf}}"),
            Rule(f"{a}.ffn.0.{{leaf}}", f"{b}.mlp.fc1.{{leaf}}"),
            Rule(f"{a}.ffn.2.{{leaf}}", f"{b}.mlp.fc2.{{leaf}}"),
            Rule(f"{a}.modulation", f"{b}.scale_shift_table", Flatten(0, (1, 6))),
        ]
    return rules
