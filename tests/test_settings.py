"""docs/settings.md is what the code says, and every setting says what it means."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
from pydantic import Field

from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.settings import check, read
from stdit.training.objectives.config import FlowConfig

DOCS = Path(__file__).parents[1] / "docs"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("settings_page", DOCS / "settings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_all_settings_is_what_the_code_says() -> None:
    page = generator().page()  # a KeyError: a field without a line `name: meaning` in its docstring
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == page, "run `make docs`"
    for setting in (
        "run.path",
        "model.lora.rank",
        "model.layers",
        "data.stages.epochs",
        "objective.flow.noise_levels.std",
    ):
        assert f"| `{setting}` |" in page


def test_types_in_words() -> None:
    type_of = generator().type_of
    assert type_of(Annotated[int, Field(ge=1, le=5)] | None) == "integer ≥ 1, ≤ 5 or null"
    assert type_of(tuple[float, float]) == "[number; number]" and type_of(tuple[bool, ...]) == "list: true or false"


def test_an_instance_made_in_python_is_checked_like_one_that_is_read() -> None:
    check(FlowConfig(), "here")
    with pytest.raises(StditError, match=r"^here: a\.noise_levels\.std is 0; it must be above 0\.$"):
        wrong = FlowConfig()
        object.__setattr__(wrong.noise_levels, "std", 0)
        check(wrong, "here", "a")
    with pytest.raises(StditError, match=r"^transformer: patch is \[1, 2\]; it must be a list of 3 values\.$"):
        TransformerConfig.preset("toy", patch=(1, 2))
    with pytest.raises(StditError, match=r"^here: tasks\.extend is '1'; it must be a number\.$"):
        read(FlowConfig, {"tasks": {"extend": "1"}}, "here")
