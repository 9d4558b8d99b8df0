"""Checks that a run goes on with the config, the networks and the data it began with, the same on all ranks.

Checkpoints record the settings of the trained networks, since defaults of presets and families may change. Many do not
show in tensor shapes (heads, eps, rope_theta): a checkpoint would load into another network without an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from typing import Any

from stdit import keyed
from stdit.data.manifests import named
from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.training.config import MAY_DIFFER, RunConfig, differences
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.engine.parallel import World
from stdit.training.objectives.protocol import Objective
from stdit.training.objectives.two_experts import TransformerObjective
from stdit.training.setup.build import RunComponents
from stdit.vae.config import VaeConfig

FOLLOW = ("in_channels", "out_channels", "text_dim", "text_padding")  # from the VAE and the text encoder

Networks = dict[str, dict[str, Any]]


def check_config(resumed: Checkpoint, config: RunConfig) -> None:
    """Raises StditError with the settings that may not differ from the checkpoint's and do."""
    changed = differences(_with_networks(resumed.state, config), config, named="frozen" in resumed.state)
    if changed:
        free = ", ".join(key.rstrip(".") for key in MAY_DIFFER)
        raise StditError(
            f"{resumed.path} belongs to another config:\n  " + "\n  ".join(changed) + "\n"
            f"Put these back, or choose another run=PATH. Only {free} may change."
        )


def _with_networks(state: dict[str, Any], now: RunConfig) -> dict[str, Any]:
    """The config that a run began with, completed by its network's values of the settings that only `now` sets.

    So a former default of a preset can be restored by name: `model.heads=6`.
    """
    then = dict(state["config"])
    known = state.get("networks") or {}
    for section, given in (("model", now.model.overrides), ("vae", now.vae.overrides)):
        told = {name: value for name, value in known.get(section, {}).items() if name in given}
        then[section] = told | then.get(section, {})
    return then


def check_networks(
    config: RunConfig, objective: Objective, resumed: Checkpoint | None, say: Callable[[str], None]
) -> Networks:
    """Returns the networks' settings for checkpoints to record. Raises StditError if a resumed run would train others.

    They are plain values, by section: "vae" or "model"; of two experts, "model" and "low".
    """
    found: dict[str, Any] = {"vae": objective.vae.config}
    if isinstance(objective, TransformerObjective):
        found = {name: flow.model_config for name, flow in zip(("model", "low"), objective.flows)}
    now: Networks = _plain({section: asdict(settings) for section, settings in found.items()})
    if resumed is None:
        return now
    then: Networks | None = resumed.state.get("networks")
    if then is not None:
        _compare(resumed, then, now, config)
    else:
        say(f"{resumed.path}: an earlier stdit wrote it, without its network's settings: they are not checked.")
    return now


def _compare(resumed: Checkpoint, then: Networks, now: Networks, config: RunConfig) -> None:
    lines, remedies = [], []
    for section, found in now.items():
        kind = VaeConfig if section == "vae" else TransformerConfig
        defaults = _plain({one.name: one.default for one in fields(kind) if one.default is not MISSING})
        wanted = defaults | then.get(section, {})  # a setting that this version added had its default before
        fresh = config.vae.path is None if section == "vae" else config.model.init is None
        for name in sorted(found.keys() | wanted.keys()):
            today, before = found.get(name), wanted.get(name)
            if today == before:
                continue
            lines.append(f"{section}.{name} is {_word(today)} now, the run began with {_word(before)}")
            if fresh and name in found and name not in FOLLOW:
                remedies.append(f"{section}.{name}={_word(before)}")
    if lines:
        remedy = f"Add {' '.join(remedies)}"
        if len(remedies) < len(lines):
            remedy = "Resume with the stdit that it began with"
        raise StditError(
            f"{resumed.path} is of another network: {'; '.join(lines)}. {remedy}, or choose another run=PATH."
        )


def _plain(value: Any) -> Any:
    """As JSON has it: lists for tuples."""
    return json.loads(json.dumps(value))


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def check_randomness(resumed: Checkpoint | None) -> None:
    """Raises StditError if the run began with other noise than this version draws of the same seed."""
    if resumed is not None and (began := resumed.state.get("randomness", 1)) != keyed.VERSION:
        raise StditError(
            f"{resumed.path}: another stdit began this run (randomness {began}, here {keyed.VERSION}), and drew other "
            f"noise of the same seed: the run would not go on as it began. Resume with that stdit, or start another "
            f"run=PATH from its weights (model.init, vae.path)."
        )


def check_data(components: RunComponents, resumed: Checkpoint | None, world: World) -> None:
    """Raises StditError if the ranks' plans differ (they would wait for one another), or the checkpoint's does."""
    manifest, plan = named(components.config.data.manifest), components.plan_hash
    plans = world.gather(plan)
    other = next((rank for rank, found in enumerate(plans) if found != plans[0]), None)
    if other is not None:
        raise StditError(
            f"rank {other} has other data than rank 0: {manifest} is not the same there, or was written to while it "
            f"was read. Give all machines the same one and start again."
        )
    if resumed is not None and resumed.state["plan"] != plan:
        raise StditError(
            f"{resumed.path} was made with other data: {manifest} has changed since, so its steps would be others. "
            f"Restore the manifest, or choose another run=PATH."
        )
