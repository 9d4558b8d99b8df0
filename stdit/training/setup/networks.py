"""Records the settings of the trained networks in checkpoints, since defaults of presets and families may change.

Many settings do not show in tensor shapes (heads, eps, rope_theta): a checkpoint would load into another network
without an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from typing import Any

from stdit.errors import StditError
from stdit.models.transformer import PRESETS, TransformerConfig
from stdit.training.config import RunConfig
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.objectives.flow import FlowObjective
from stdit.training.objectives.protocol import Objective
from stdit.training.objectives.two_experts import ExpertsObjective
from stdit.training.objectives.vae import VaeObjective
from stdit.vae.config import VaeConfig

FORMER_HEADS = {"small": 6, "base": 12, "large": 16}  # of presets before their heads became 128 wide
FOLLOW = ("in_channels", "out_channels", "text_dim", "text_padding")  # from the VAE and the text encoder

Networks = dict[str, dict[str, Any]]


def networks_of(objective: Objective) -> Networks:
    """The settings of the trained networks, in plain values: "vae" or "model"; of two experts, "model" and "low"."""
    if isinstance(objective, VaeObjective):
        found: dict[str, TransformerConfig | VaeConfig] = {"vae": objective.vae.config}
    elif isinstance(objective, ExpertsObjective):
        found = {"model": objective.high.model_config, "low": objective.low.model_config}
    else:
        assert isinstance(objective, FlowObjective)
        found = {"model": objective.model_config}
    plain: Networks = json.loads(json.dumps({name: asdict(config) for name, config in found.items()}))
    return plain


def with_networks(state: dict[str, Any], now: RunConfig) -> dict[str, Any]:
    """The config that a run began with, completed by its network's values of the settings that only `now` sets.

    So a former default of a preset can be restored by name: `model.heads=6`.
    """
    then = dict(state["config"])
    known = state.get("networks") or {}
    if (former := _former_heads(state)) and now.model.overrides.get("heads") in former:
        known = {"model": {"heads": now.model.overrides["heads"]}}
    for section, given in (("model", now.model.overrides), ("vae", now.vae.overrides)):
        told = {name: value for name, value in known.get(section, {}).items() if name in given}
        then[section] = told | then.get(section, {})
    return then


def check_networks(
    config: RunConfig, objective: Objective, resumed: Checkpoint | None, say: Callable[[str], None]
) -> Networks:
    """Returns the settings to record in checkpoints. Raises StditError if a resumed run would train another network."""
    now = networks_of(objective)
    if resumed is None:
        return now
    then: Networks | None = resumed.state.get("networks")
    if then is not None:
        _compare(resumed, then, now, config)
    elif (former := _former_heads(resumed.state)) and "heads" not in config.model.overrides:
        before, today = former
        raise StditError(
            f"{resumed.path}: an earlier stdit wrote it, without its network's settings, and model.preset="
            f"{config.model.preset} has {today} heads now; it had {before} in the first versions. Add model.heads="
            f"{before} if the run began with one of those, else model.heads={today}."
        )
    else:
        say(f"{resumed.path}: an earlier stdit wrote it, without its network's settings: they are not checked.")
    return now


def _former_heads(state: dict[str, Any]) -> tuple[int, int] | None:
    """The preset's number of heads (then, today), if it has changed and the checkpoint does not record it."""
    model = state["config"].get("model", {})
    preset = model.get("preset")
    if "networks" in state or model.get("init") or "heads" in model or preset not in FORMER_HEADS:
        return None
    return FORMER_HEADS[preset], PRESETS[preset].heads


def _compare(resumed: Checkpoint, then: Networks, now: Networks, config: RunConfig) -> None:
    lines, remedies = [], []
    for section, found in now.items():
        kind = VaeConfig if section == "vae" else TransformerConfig
        defaults = {one.name: one.default for one in fields(kind) if one.default is not MISSING}
        # A setting that this version added had its default before.
        wanted = {**json.loads(json.dumps(defaults)), **then.get(section, {})}
        fresh = config.vae.path is None if section == "vae" else config.model.init is None
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) == wanted.get(name):
                continue
            lines.append(
                f"{section}.{name} is {_word(found.get(name))} now, the run began with {_word(wanted.get(name))}"
            )
            if fresh and name in found and name not in FOLLOW:
                remedies.append(f"{section}.{name}={_word(wanted.get(name))}")
    if not lines:
        return
    remedy = f"Add {' '.join(remedies)}" if len(remedies) == len(lines) else "Resume with the stdit that it began with"
    raise StditError(f"{resumed.path} is of another network: {'; '.join(lines)}. {remedy}, or choose another run=PATH.")


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
