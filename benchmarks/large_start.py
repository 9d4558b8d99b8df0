"""The host memory of ranks that start, save, resume and export a large model under ZeRO 3, against what they must hold.

Every rank is a process of this machine. A phase's memory is the most that its anonymous memory (RssAnon, read every
10 ms) grows above what the libraries take before the models are built; files that are mapped are not counted. What a
rank must hold is its share of weights, gradients, masters, optimizer state and average, from `--dry-run`'s forecast,
without activations. SGD without momentum and no average, so that 1.3B fits into 24 GB.

    python benchmarks/large_start.py --ranks 2 4                    # 1.3B, all blocks: 16 GB of memory, 12 of disk
    python benchmarks/large_start.py --ranks 2 --layers 2           # a trial
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from memory import make_inputs
from rich.console import Console
from rich.table import Table as Rows

GOAL = 1.25  # times what a rank must hold, at the most
LIMIT = 3600.0
GB = 1e9


class Peak:
    """The most anonymous memory since the last call of `take`."""

    def __init__(self) -> None:
        self.base = self.most = resident()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, resident())
            time.sleep(0.01)

    def take(self) -> float:
        """Bytes above the base since the last call."""
        most, self.most = max(self.most, resident()), resident()
        return most - self.base


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon:")))


def rank(config: str, settings: list[str], out: Path) -> None:
    """Runs the training of the present folder, and writes its peaks by phase."""
    import torch

    torch.set_num_threads(1)
    from stdit.training import run as run_module
    from stdit.training import trainer as trainer_module
    from stdit.training.config import load_config
    from stdit.training.engine.parallel import join_world, leave_world
    from stdit.training.engine.zero import _import_deepspeed
    from stdit.training.outputs import export as export_module
    from stdit.training.trainer import Trainer

    trainer_module.measure_peak = lambda *_: 1e12
    run_module.draw = run_module.report = lambda *_: None
    world = join_world()
    _import_deepspeed(world)
    torch.nn.Linear(8, 8)(torch.zeros(8, 8)).sum().backward()
    peak, found, order = Peak(), dict[str, float](), list[str]()

    def phase(owner: Any, name: str, title: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        def measured(*arguments: Any, **named: Any) -> Any:
            if order:
                found[order[-1]] = max(found.get(order[-1], 0.0), peak.take())
            order.append(title)
            try:
                return method(*arguments, **named)
            finally:
                found[title] = max(found.get(title, 0.0), peak.take())

        setattr(owner, name, measured)

    phase(Trainer, "prepare", "start")
    phase(Trainer, "accumulate", "backward")
    phase(Trainer, "update", "update")
    phase(Trainer, "save", "save")
    phase(export_module, "export", "export")
    run_module.run(load_config(config, settings), world)
    found["whole process"] = resident_peak()
    (out / f"{world.rank}.json").write_text(json.dumps(found))
    leave_world()


def resident_peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def launch(folder: Path, ranks: int, settings: list[str], name: str) -> list[dict[str, float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = folder / name
    out.mkdir()
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    environment |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, os.path.abspath(__file__), "--rank", str(out), *settings]
    children = [
        subprocess.Popen(command, cwd=folder, env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(ranks)
    ]
    try:
        end = time.monotonic() + LIMIT
        statuses = [child.wait(max(1, end - time.monotonic())) for child in children]
    finally:
        for child in children:
            child.kill()
    if any(statuses):
        sys.exit(f"ranks ended with {statuses}")
    return [json.loads((out / f"{r}.json").read_text()) for r in range(ranks)]


def must_hold(folder: Path, ranks: int) -> dict[str, Any]:
    """Bytes of a rank by part, of `--dry-run --json`."""
    command = [sys.executable, "-m", "stdit.cli.main", "train", "config.yaml", "--dry-run", "--json"]
    told = subprocess.run(
        [*command, "--world-size", str(ranks)], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(told.stdout)


def write_config(folder: Path, preset: str, layers: int) -> None:
    """config.yaml and the JSON of ZeRO 3, whose buffers are small."""
    buffers = {"reduce_bucket_size": 20_000_000, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    buffers |= {"stage3_max_live_parameters": 30_000_000, "sub_group_size": 20_000_000}
    zero3 = {"zero_optimization": {"stage": 3, "overlap_comm": False, **buffers}}
    (folder / "zero3.json").write_text(json.dumps(zero3))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["shapes"] = ["64x64"]
    config |= {
        "run": {"path": "run", "precision": "bf16"},
        "model": {"preset": preset} | ({"layers": layers} if layers else {}),
        "parallel": {"deepspeed": "zero3.json", "recompute": "all"},
        "optimizer": {"name": "sgd", "options": {"momentum": 0, "nesterov": False}, "ema": {"decay": 0}},
        "plan": {"largest_clips_per_step": 1},
        "checkpoint": {"every": 1, "keep": 1, "background": False},
        "schedule": {"steps": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        return rank("config.yaml", sys.argv[3:], Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1.3B")
    parser.add_argument("--layers", type=int, default=0, help="how many blocks (0: the preset's)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="also write JSON here")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        make_inputs(folder)
        write_config(folder, args.preset, args.layers)
        for ranks in args.ranks:
            told = must_hold(folder, ranks)
            first = launch(folder, ranks, ["schedule.steps=1"], f"first-{ranks}")
            again = launch(folder, ranks, ["schedule.steps=2"], f"again-{ranks}")
            shutil.rmtree(folder / "run")
            rows.append({"ranks": ranks, "told": told, "first": first, "again": again})
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    table = Rows(
        "ranks",
        "must hold, GB",
        *PHASES,
        f"the most (goal: {GOAL})",
        title="GB above the libraries' memory, of the fullest rank",
    )
    for row in rows:
        held = state_of(row["told"])
        seen = [max(one[name] for one in row[run]) for run, name in PHASES.values()]
        table.add_row(
            str(row["ranks"]), f"{held / GB:.2f}", *(f"{one / GB:.2f}" for one in seen), f"{max(seen) / held:.2f} times"
        )
    Console(width=120).print(table)


PHASES = {
    "start": ("first", "start"), "backward": ("first", "backward"), "update": ("first", "update"),
    "save": ("first", "save"), "export": ("first", "export"), "resume": ("again", "start"),
}  # fmt: skip


def state_of(told: dict[str, Any]) -> float:
    """What a rank must hold between two steps."""
    memory = told["configured"]["memory"]
    return sum(memory[name] for name in memory if name not in ("activations", "total"))


if __name__ == "__main__":
    main()
