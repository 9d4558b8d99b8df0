"""The Slurm script of docs/multi-node.md, with stand-ins for srun and scontrol that do what Slurm's do."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import losses

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[2]
LIMIT = 600.0

# Starts the tasks of a step. Each file in "signals" is used up by one step, which gets SIGTERM after its third line.
SRUN = f"""#!{sys.executable}
import os, pathlib, signal, subprocess, sys, time
command, here = sys.argv[1:], pathlib.Path(__file__).parent
while command[0].startswith("-"):
    command = command[1:]
tasks = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_NTASKS": "2"}})
    for i in range(2)
]
metrics, signals = pathlib.Path(os.environ["RUN"]) / "metrics.jsonl", sorted((here / "signals").iterdir())
if signals:
    signals[0].unlink()
    while all(task.poll() is None for task in tasks):
        if metrics.exists() and metrics.read_text().count('"train"') >= 3:
            for task in tasks:
                task.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$(dirname "$0")/said"; fi
"""


@pytest.mark.slow
def test_the_script_goes_on_after_its_time_is_up(tiny: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "multi-node.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", page, re.DOTALL)
    bin_folder, run = tmp_path / "bin", tmp_path / "run"
    (bin_folder / "signals").mkdir(parents=True)
    (bin_folder / "signals" / "0").touch()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("job.sh", script)):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    path = os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "RUN": str(run)}
    environment |= {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "7", "MASTER_PORT": port}
    settings = [f"run={run}", "parallel.deepspeed=zero1", "schedule.steps=30", "checkpoint.every=1000"]
    command = [str(bin_folder / "job.sh"), str(tiny / "flow.yaml"), *settings]

    first = subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMIT, capture_output=True, text=True)
    assert first.returncode == 75, first.stderr
    assert (bin_folder / "said").read_text() == "requeue 7\n"
    done = max(losses(run))
    assert 3 <= done < 30 and f"saved after step {done}" in first.stderr
    second = subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMIT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert (bin_folder / "said").read_text() == "requeue 7\n"
    assert list(losses(run)) == list(range(1, 31))
