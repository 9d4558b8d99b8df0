"""Weights that go to the disk parameter by parameter are those of a module that holds them all."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import ALONE

from stdit.training.config import load_config
from stdit.training.outputs import export
from stdit.training.setup.resolve import resolve
from stdit.training.trainer import Trainer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_files_with_and_without_a_module(tiny: Path, tmp_path: Path, precision: str) -> None:
    """A transformer, and a text encoder that trains along."""
    settings = [f"run={tmp_path}", f"run.precision={precision}", "data.workers=0"]
    trainer = Trainer(load_config(tiny / "flow.yaml", settings), ALONE)
    trainer.prepare(resolve(trainer.config))
    parts, engine = trainer.components, trainer.engine
    module = export.trained_module(parts, export.averaged_weights(engine, ALONE), ALONE)

    def files() -> dict[str, bytes]:
        model = tmp_path / "model"
        return {str(path.relative_to(model)): path.read_bytes() for path in model.rglob("*") if path.is_file()}

    export.export(parts, engine, ALONE, 1, module)
    expected = files()
    export.export(parts, engine, ALONE, 1, None)
    found = files()
    assert found.keys() == expected.keys() and len(found) >= 8
    assert [name for name in expected if found[name] != expected[name]] == []
