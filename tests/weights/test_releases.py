"""Every released config that diffusers has is told by its name."""

from __future__ import annotations

import pytest
from references import FAMILIES

from stdit.models.transformer import PRESETS
from stdit.weights.families import recognised, release_of

OTHERS = {  # where settings alone do not tell more
    "Wan 2.1 and 2.2 T2V 14B": "Wan 2.1 T2V 14B, or an expert of Wan 2.2 T2V A14B",
    "Wan 2.2 I2V A14B": "an expert of Wan 2.2 I2V A14B",
    "PixArt-α XL 256": "PixArt XL of at most 512 pixels (α or Σ)",
    "PixArt-α XL 512-MS": "PixArt XL of at most 512 pixels (α or Σ)",
}
RELEASED = [(family, name) for family, known in FAMILIES.items() for name in known.released]


@pytest.mark.parametrize(("family", "name"), RELEASED)
def test_a_released_config_is_told_by_its_name(family, name):
    found = {"_class_name": FAMILIES[family].name, **FAMILIES[family].released[name]}
    release = release_of(recognised("transformer", found, {}).config_from(found, {}))
    assert release is not None
    assert release.name == OTHERS[name] if name in OTHERS else name.startswith(release.name)


def test_sizes_that_nobody_released_are_none():
    assert release_of(PRESETS["toy"]) is None and release_of(PRESETS["base"]) is None
