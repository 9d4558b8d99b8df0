"""All ranks resume the same checkpoint: rank 0 chooses it, and every rank checks that it sees the same files."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stdit.errors import StditError
from stdit.files import make_folder
from stdit.heartbeat import HEARTBEAT
from stdit.training.engine.checkpoint import Checkpoint, DamagedCheckpoint, candidates
from stdit.training.engine.parallel import World

REMEDY = (
    "All machines must see the same run folder. Put run=PATH on a disk that they share. If it is on one, some machine "
    "has an old listing: wait a minute, then give the same command again."
)


@dataclass(frozen=True)
class Seen:
    """What a rank sees. what: such as the name of the newest checkpoint; "" for nothing."""

    what: str
    host: str


def agree(run: Path, world: World, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of a run folder, the same on all ranks; None if there is none at all.

    Its shards are verified, each by one rank. A damaged or incomplete checkpoint is named by `say` with the reason, and
    the one before is taken. All ranks call this together.
    Raises StditError on every rank if one does not see what rank 0 sees, or if all checkpoints are damaged.
    """
    newest = [path.name for path in candidates(run)[-1:]]
    _compare(run / "checkpoints", "as the newest checkpoint", "".join(newest), world)
    refused = []
    for name in world.from_main(lambda: [path.name for path in reversed(candidates(run))]):
        path = run / "checkpoints" / name
        HEARTBEAT.doing(f"verifying {path}")
        damage, found = "", None
        with world.together():  # another format is everybody's error
            try:
                found = Checkpoint(path)
            except DamagedCheckpoint as error:
                damage = str(error)
        _compare(path, "as its manifest's SHA-256", found.sha256 if found else damage, world)
        if found is not None:
            damage = next(filter(None, world.gather(found.find_damage(world.rank, world.size))), "")
            if not damage:
                return found
        refused.append(f"{name} is refused: {damage}.")
        say(refused[-1])
    if refused:
        raise StditError(
            f"{run / 'checkpoints'}: no checkpoint is whole. {' '.join(refused)} Restore one of them, or choose "
            "another run=PATH to start from the beginning."
        )
    return None


def check_shared(run: Path, world: World) -> None:
    """Raises StditError on every rank if one does not see what rank 0 writes to the run folder."""
    if world.size == 1:
        return

    def write() -> str:
        token = make_folder(run) / f".shared-{secrets.token_hex(8)}"  # a new name: nobody remembers that it was missing
        token.touch()
        return token.name

    token = run / world.from_main(write)
    try:
        _compare(run, "of what rank 0 has just written", token.name if token.exists() else "", world)
    finally:
        if world.is_main:
            token.unlink(missing_ok=True)


def _compare(place: Path, as_what: str, mine: str, world: World) -> None:
    """Raises StditError, the same on every rank, if a rank sees something else than rank 0."""
    seen = world.gather(Seen(mine, socket.gethostname()))
    others = [rank for rank, one in enumerate(seen) if one.what != seen[0].what]
    if not others:
        return
    told = " and ".join(
        f"rank {rank} (on {seen[rank].host}) sees {seen[rank].what or 'nothing'}" for rank in (0, others[0])
    )
    many = f", {len(others)} of {world.size} ranks differ from rank 0" if len(others) > 1 else ""
    raise StditError(f"{place}: {told} {as_what}{many}. {REMEDY}")
