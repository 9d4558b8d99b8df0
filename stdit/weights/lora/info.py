"""Describes a LoRA file without its model: families, ranks, alphas, layers."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from stdit.weights.families import families, table_of
from stdit.weights.families.record import Family
from stdit.weights.lora.read import LoraFile, fitted, open_adapter

if TYPE_CHECKING:
    from stdit.models.config import TransformerConfig


def describe(path: str | os.PathLike[str], config: TransformerConfig | None = None) -> dict[str, Any]:
    """The families whose names a LoRA file has, its ranks, alphas and adapted layers.

    config: of its model, to check shapes too; without it only names are compared.
    """
    found = open_adapter(path, partly=True)
    if config is not None:
        fitted(found, config)
    targets = Counter(re.sub(r"(?<=block)\d+|(?<=[._])\d+(?=[._])", "*", name, count=1) for name in found.modules)
    return {
        "kind": "adapter",
        "path": str(found.files.path),
        "fits": [f"{family} ({dialect} names)" for family, dialect in fitting(found)],
        "prefix": found.files.prefix,
        "ranks": dict(sorted(Counter(found.ranks.values()).items())),
        "alphas": dict(sorted(Counter(map(found.alpha, found.ranks)).items())),
        "for_other_models": len(found.others),
        "differences": sum("diff" in parts or "diff_b" in parts for parts in found.modules.values()),
        "parameters": sum(math.prod(entry.shape) for entry in found.files.entries.values()),
        "dtypes": dict(Counter(entry.dtype for entry in found.files.entries.values())),
        "targets": dict(targets),
    }


def fitting(found: LoraFile) -> list[tuple[str, str]]:
    """Every (family, dialect) that has all of a file's names, at any size."""
    numbers = [
        int(number) for module in found.modules for number in re.findall(r"blocks?[._]?(\d{1,3})(?=[._])", module)
    ]
    fits = []
    for family in families("transformer"):
        for dialect in ("original", "diffusers"):
            for config in _samples(family, max(numbers, default=0) + 1):
                table = table_of(config, dialect)
                if len(found.resolve(table)) == len(found.modules) and (family.title, dialect) not in fits:
                    fits.append((family.title, dialect))
    return fits


def _samples(family: Family, layers: int) -> list[TransformerConfig]:
    """Small models of a family that together have every tensor of its models."""
    from stdit.models.config import TransformerConfig

    sizes = {"dim": 12, "heads": 1, "ffn_dim": 4, "text_dim": 4, "frequency_dim": 12, "in_channels": 1}
    sizes |= {"layers": layers, "out_channels": 1, "position_base": 1}
    return [TransformerConfig(**{**sizes, **family.settings, **variant}) for variant in family.variants]
