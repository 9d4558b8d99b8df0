"""The folders of Wan 2.2 A14B's two experts, and the noise level between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stdit.errors import StditError
from stdit.weights.tensor_files import read_json

EXPERT_NAMES = ("high", "low")
EXPERT_FOLDERS = {"diffusers": ("transformer", "transformer_2"), "original": ("high_noise_model", "low_noise_model")}
BOUNDARIES = {"text": 0.875, "image": 0.9}  # Wan 2.2 T2V-A14B's and I2V-A14B's, for folders that do not say it


def expert_folders(layout: str) -> dict[str, str]:
    """The name of each expert's folder in a layout."""
    return dict(zip(EXPERT_NAMES, EXPERT_FOLDERS["diffusers" if layout == "diffusers" else "original"]))


def expert_places(folder: Path) -> dict[str, Path] | None:
    """The paths of a folder's two experts; None if it has none."""
    for names in EXPERT_FOLDERS.values():
        if all((folder / name).is_dir() for name in names):
            return {expert: folder / name for expert, name in zip(EXPERT_NAMES, names)}
    return None


def boundary_of(folder: Path, from_image: bool) -> float:
    """The noise level between a folder's experts: model_index.json's boundary_ratio, else Wan 2.2's."""
    path = folder / "model_index.json"
    if not path.is_file():
        return BOUNDARIES["image" if from_image else "text"]
    found: Any = read_json(path).get("boundary_ratio")
    if type(found) not in (int, float) or not 0 < found < 1:
        raise StditError(f"{path}: boundary_ratio is {found!r}; it must be a noise level between 0 and 1.")
    return float(found)


def expert_adapter_places(folder: Path) -> dict[str, Path]:
    """The path of each expert's adapter (LoRA) in an exported model folder; an expert that did not train has none."""
    return {expert: folder / "lora" / name for expert, name in expert_folders("diffusers").items()}
