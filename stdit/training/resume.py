"""Checks that a run goes on with the config and the data it began with, the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable

from stdit.errors import StditError
from stdit.training.config import MAY_DIFFER, RunConfig, differences
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.engine.parallel import World
from stdit.training.setup.build import RunComponents
from stdit.training.setup.networks import with_networks


def check_config(resumed: Checkpoint, config: RunConfig) -> None:
    """Raises StditError with the settings that may not differ from the checkpoint's and do."""
    changed = differences(with_networks(resumed.state, config), config, named="frozen" in resumed.state)
    if changed:
        free = ", ".join(key.rstrip(".") for key in MAY_DIFFER)
        raise StditError(
            f"{resumed.path} belongs to another config:\n  " + "\n  ".join(changed) + "\n"
            f"Put these back, or choose another run=PATH. Only {free} may change."
        )


def check_data(components: RunComponents, resumed: Checkpoint | None, world: World) -> None:
    """Raises StditError if the ranks' plans differ (they would wait for one another), or the checkpoint's does."""
    manifest, plan = components.config.data.manifest, components.plan_hash
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


def report_lr_jump(resumed: Checkpoint, config: RunConfig, say: Callable[[str], None]) -> None:
    """Says so if another `schedule.steps` moves the decay and with it the learning rate."""
    steps_before = resumed.state["config"]["schedule"]["steps"]
    if jump := config.schedule.jump(steps_before, resumed.step, config.optimizer.lr):
        say(jump)
