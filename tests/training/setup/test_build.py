"""What a run is built from, where ranks or folders do not agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.data.config import DataConfig
from stdit.data.load.cache import Cache, CacheMissing, latent_settings
from stdit.errors import StditError
from stdit.training.engine.parallel import World
from stdit.training.setup.build import _open

SETTINGS = latent_settings(DataConfig(), "vae")


class Second(World):
    """Rank 1 of two; rank 0 has the cache."""

    def gather(self, value: Any) -> list[Any]:
        return [True if isinstance(value, bool) else None, value]


def test_ranks_that_do_not_see_the_same_cache_stop(tmp_path: Path) -> None:
    """A rank that encoded captions by itself would differ from the others, or wait for them."""
    here = Second(1, 2, torch.device("cpu"))
    with pytest.raises(StditError, match=r"rank 1 does not see the latents in .* that others see"):
        _open(str(tmp_path), SETTINGS, here)
    Cache.create(tmp_path, SETTINGS)
    assert _open(str(tmp_path), SETTINGS, here).settings == SETTINGS
    with pytest.raises(CacheMissing, match="holds no latents"):
        _open(str(tmp_path / "none"), SETTINGS, World(0, 1, torch.device("cpu")))


def test_what_rank_0_cannot_find_ends_every_rank() -> None:
    def find() -> str:
        raise OSError("no such file")

    alone = World(0, 1, torch.device("cpu"))
    assert alone.from_main(lambda: "found") == "found"
    with pytest.raises(OSError, match="no such file"):
        alone.from_main(find)

    class Told(World):
        def gather(self, value: Any) -> list[Any]:
            return ["OSError: no such file", value]

    with pytest.raises(StditError, match="another rank stopped: OSError: no such file"):
        Told(1, 2, torch.device("cpu")).from_main(find)
