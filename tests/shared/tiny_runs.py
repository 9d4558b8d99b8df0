"""What the tests of whole runs share: how they are made quick, and what they left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.evaluation import report
from stdit.evaluation.report import read_metrics
from stdit.training import run as run_module
from stdit.training import trainer as trainer_module
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.engine.parallel import World
from stdit.training.outputs.step_log import SCHEMA

ALONE = World(0, 1, torch.device("cpu"))


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "measure_peak", lambda *args: 1e12)
    monkeypatch.setattr(run_module, "draw", lambda *args: None)
    monkeypatch.setattr(report, "write_report", lambda folder: folder)


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(folder, "train")}


def same_weights(one: Path, other: Path) -> bool:
    states = [Checkpoint.latest(folder) for folder in (one, other)]
    assert all(state is not None and state.step == 8 for state in states)
    files = [[(p.name, p.read_bytes()) for p in sorted(state.path.glob("*.safetensors"))] for state in states if state]
    return files[0] == files[1]


def check_lines(folder: Path) -> None:
    """Every line of metrics.jsonl against the committed schema (the parts of JSON Schema that it uses)."""
    schema = json.loads(SCHEMA.read_text())
    kinds = {"integer": int, "number": (int, float), "string": str, "array": list, "object": dict}
    kinds["null"] = type(None)

    def valid(rule: Any, value: Any) -> bool:
        if rule is True:
            return True
        if ("const" in rule and value != rule["const"]) or ("enum" in rule and value not in rule["enum"]):
            return False
        wanted = rule.get("type", [])
        if wanted and not any(
            isinstance(value, kinds[one]) for one in ([wanted] if isinstance(wanted, str) else wanted)
        ):
            return False
        inner = rule.get("additionalProperties", True)
        if isinstance(value, dict) and not all(valid(inner, part) for part in value.values()):
            return False
        return value is None or "minimum" not in rule or value >= rule["minimum"]

    def fits(rule: dict[str, Any], line: dict[str, Any]) -> bool:
        rest = rule.get("additionalProperties", True)
        return set(rule.get("required", [])) <= set(line) and all(
            valid(rule["properties"][name], value) if name in rule["properties"] else rest and valid(rest, value)
            for name, value in line.items()
        )

    for line in read_metrics(folder):
        assert fits({key: schema[key] for key in ("required", "properties")}, line), line
        assert sum(fits(rule, line) for rule in schema["oneOf"]) == 1, line
