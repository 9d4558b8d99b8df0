"""Identifies by content the weights and files that a run reads but no checkpoint holds: a resumed run must find the
same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from stdit.errors import StditError
from stdit.prepare.encode import text_identity, vae_identity
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.engine.parallel import World
from stdit.training.setup.resolve import InitialModel, ResolvedConfig
from stdit.weights.identity import file_identity, files_identity, folder_identity
from stdit.weights.sources import transformer_identity


class Part(NamedTuple):
    """A frozen part of a run: its SHA-256 (hex) or settings in words, and the path it was read from."""

    content: str
    place: str


def frozen_parts(config: ResolvedConfig) -> dict[str, Part]:
    """The weights, tokenizers and files that a run reads and does not keep.

    The initial weights are among them, even if all of them train.
    """
    parts: dict[str, Part] = {}
    if config.vae.path:
        parts["VAE"] = Part(vae_identity(config.vae.path), config.vae.path)
    if config.objective.kind == "vae":
        lpips = config.objective.vae.lpips
        if lpips is not None and lpips.path:
            parts["LPIPS"] = Part(folder_identity(lpips.path), lpips.path)
        return parts
    if place := config.text.path:
        found = text_identity(place, config.text.padding)
        parts["text encoder"] = Part(found.pop("text_encoder"), place)
        parts["tokenizer"] = Part(found.pop("tokenizer"), place)
        parts["treatment of texts"] = Part(", ".join(f"{name} {value}" for name, value in found.items()), place)
    if config.initial is not None:
        contents = _initial_contents(config, config.initial)
        parts |= {name: Part(content, str(config.initial.folder)) for name, content in contents.items()}
    return parts


def _initial_contents(config: ResolvedConfig, initial: InitialModel) -> dict[str, str]:
    levels, init = config.objective.flow.noise_levels, initial.folder
    follows = f"text.padding {config.text.padding}, shift {levels.shift}, range {levels.range}"
    weights, settings = transformer_identity(initial.sources.values())
    contents = {"transformer": weights, "transformer's config": settings}
    contents["settings that follow from it"] = f"{follows}, tasks {config.objective.flow.tasks}"
    if (scheduler := init / "scheduler" / "scheduler_config.json").is_file():
        contents["scheduler"] = file_identity(scheduler)
    if (init / "image_encoder").is_dir():
        contents["image encoder"] = folder_identity(init / "image_encoder")
        contents["image processor"] = files_identity(sorted((init / "image_processor").glob("*.json")))
    return contents


def check_frozen(
    config: ResolvedConfig, resumed: Checkpoint | None, world: World, say: Callable[[str], None]
) -> dict[str, str]:
    """Returns the content of each part, which checkpoints record; rank 0 reads it.

    Raises StditError on every rank if a part is not what a resumed run began with.
    """
    parts = world.from_main(lambda: frozen_parts(config))
    if resumed is not None:
        then, now = resumed.state.get("frozen"), parts
        if then is None and (base := resumed.state.get("base")) is not None:  # earlier versions recorded one part
            then = {"VAE" if config.objective.kind == "vae" else "transformer": base}
            now = {name: part for name, part in parts.items() if name in then}
        if then is None:
            say(f"{resumed.path}: an earlier stdit wrote it, without what its frozen parts are: they are not checked.")
        else:
            _compare(resumed.path, then, now)
    return {name: part.content for name, part in parts.items()}


def _compare(path: Path, then: dict[str, str], now: dict[str, Part]) -> None:
    lines = []
    for name in {**then, **now}:
        part, wanted = now.get(name), then.get(name)
        if part is None:
            lines.append(f"the {name} is gone (the run began with {wanted})")
        elif part.content != wanted:
            began = f"the run began with {wanted}" if wanted else "the run began without one"
            lines.append(f"the {name}, {part.place}, has changed since: {part.content} now, {began}")
    if lines:
        raise StditError(
            f"{path} goes with other weights: {'; '.join(lines)}. Restore them, or choose another run=PATH."
        )


def check_unchanged(config: ResolvedConfig, then: dict[str, str]) -> None:
    """Raises StditError if a part has changed since the run started. then: what `check_frozen` returned."""
    parts = frozen_parts(config) if then else {}
    changed = [f"the {name}, {one.place}" for name, one in parts.items() if one.content != then.get(name)]
    if changed:
        raise StditError(
            f"{'; '.join(changed)}: has changed while the run trained over it. Restore it and give the same command "
            f"again: it goes on from the last checkpoint."
        )
