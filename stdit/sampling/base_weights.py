"""An adapter's model folder: its base.json says where the weights are that the adapter was trained over."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stdit import settings
from stdit.errors import StditError
from stdit.files import publish_text
from stdit.heartbeat import HEARTBEAT
from stdit.prepare.encode import text_identity, vae_identity
from stdit.weights.identity import folder_identity
from stdit.weights.sources import expert_places, find, transformer_identity
from stdit.weights.tensor_files import read_json

FORMAT = 1  # of base.json


@dataclass(frozen=True)
class BaseWeights:
    """The paths of the weights below an adapter, and what was there when it was trained.

    transformer: a model folder, or a transformer's folder or file.
    vae, text_encoder: paths as `load_vae` and `load_text_encoder` take them.
    pipeline: the pipeline class to sample as, if `transformer` is no model folder.
    content: SHA-256 (hex) of the weights at the paths, by part; empty if an earlier stdit wrote base.json.
    """

    transformer: str
    vae: str
    text_encoder: str
    pipeline: str = "WanPipeline"
    content: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> BaseWeights:
        """From a model folder. A folder without base.json is its own base."""
        path = folder / "base.json"
        if not path.is_file():
            return cls(str(folder), str(folder), str(folder), pipeline="")
        found = read_json(path)
        if found.pop("format", None) != FORMAT or {"content", *found} != cls.__dataclass_fields__.keys():
            raise StditError(f"{path}: not of format {FORMAT} with {', '.join(cls.__dataclass_fields__)}.")
        base = settings.read(cls, found, str(path))
        for name in ("transformer", "vae", "text_encoder"):
            if not Path(getattr(base, name)).exists():
                raise StditError(
                    f"{path}: {name}, {getattr(base, name)}, over which this adapter was trained, does not exist. "
                    f"Correct the path; or load that model with the adapter: --model MODEL --lora {folder}."
                )
        return base

    def contents(self) -> dict[str, str]:
        """The SHA-256 of what is at the paths now, by part; of two experts both transformers count as one part."""
        folder = Path(self.transformer)
        places = (expert_places(folder) or {"": folder}).values()
        weights, configs = transformer_identity(find("transformer", place) for place in places)
        text = text_identity(self.text_encoder)
        found = {
            "transformer": weights,
            "transformer's config": configs,
            "vae": vae_identity(self.vae),
            "text_encoder": text["text_encoder"],
            "tokenizer": text["tokenizer"],
        }
        if (folder / "image_encoder").is_dir():
            found["image_encoder"] = folder_identity(folder / "image_encoder")
        return found

    def check(self, folder: Path) -> None:
        """Raises StditError unless the adapter in `folder` was trained over the weights that are at the paths now."""
        if not self.content:
            return
        HEARTBEAT.doing("checking the weights below the adapter")
        now = self.contents()
        HEARTBEAT.doing(f"loading {folder}")
        lines = [
            f"{name} is {now.get(name, 'gone')}, the adapter was trained over {self.content.get(name, 'none')}"
            for name in {**self.content, **now}
            if now.get(name) != self.content.get(name)
        ]
        if lines:
            raise StditError(
                f"{folder / 'base.json'}: the weights at its paths have changed since: {'; '.join(lines)} (SHA-256). "
                f"Restore them, or correct the paths; or load other weights with the adapter all the same: --model "
                f"MODEL --lora {folder}."
            )

    def write(self, folder: Path) -> None:
        publish_text(folder / "base.json", json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")
