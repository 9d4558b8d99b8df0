"""Where the numbers of metrics.jsonl go as well: TensorBoard's files in the run folder, and Weights & Biases."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from stdit.errors import StditError
from stdit.files import publish_text, writing


class Board(Protocol):
    def write(self, numbers: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """step: where the run goes on; what was written of later steps is dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._place = folder / "tensorboard"
        self._writer: Any = SummaryWriter(str(self._place), purge_step=step + 1 if step else None)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        with writing(self._place):
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        with writing(self._place):
            self._writer.close()


class WeightsAndBiases:
    """A run of a project. Its id is kept in the run folder (wandb-id), so that a training that goes on continues it.

    The service's errors are told once and never stop a training: the numbers are in metrics.jsonl, too. WANDB_MODE and
    WANDB_API_KEY are its own settings; offline, `wandb sync` uploads the run folder's wandb/ later.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except Exception as error:  # also what a damaged installation raises
            raise StditError(
                f"log.wandb={project} needs Weights & Biases: pip install 'stdit[wandb]' ({error})."
            ) from error
        place = folder / "wandb-id"
        if not place.is_file():
            publish_text(place, f"{secrets.token_hex(8)}\n")
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=project, id=place.read_text().strip(), resume="allow", name=folder.name, dir=str(folder),
                config=dict(config),
            )  # fmt: skip
            # Steps are numbers of ours: a resumed run writes some of them again, which wandb's own would refuse.
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            self._give_up(error)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        if self._run is not None and numbers:
            try:
                self._run.log({**numbers, "step": step})
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        print(f"log.wandb: {error}. The training goes on without it; metrics.jsonl has all numbers.", file=sys.stderr)
