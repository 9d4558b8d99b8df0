"""Hostile command lines (tests/shared/fuzz_cases.py) end in time, without a traceback, and write nothing outside."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from children import Child

SERVER = Path(__file__).parent / "shared" / "fuzz_server.py"
LIMIT = 300.0  # seconds a case may take on a busy machine; one that waits for ever takes longer


def faults(folder: Path, seed: int, count: int) -> list[str]:
    paths = [str(SERVER.parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "TOKENIZERS_PARALLELISM": "false"}
    child = Child([sys.executable, str(SERVER), str(folder), str(seed), str(count), str(LIMIT)], env=env)
    lines = child.finish(limit=600 + 60.0 * count).splitlines()
    results = [json.loads(line) for line in lines if line.startswith('{"')]
    assert results[-1] == {"done": count} and len(results) == count + 1
    return [json.dumps(result, indent=1) for result in results[:-1] if result["fault"]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="cases are forked processes")
def test_a_few_hostile_command_lines_end_as_they_should(tmp_path):
    found = faults(tmp_path, seed=0, count=20)
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.timeout(0)  # the child process has a limit
@pytest.mark.skipif(not hasattr(os, "fork"), reason="cases are forked processes")
@pytest.mark.parametrize("seed", [1, 2])
def test_hostile_command_lines_end_as_they_should(seed, tmp_path):
    """2,000 in all, about a quarter of an hour of a core. STDIT_FUZZ_SEED adds to the seeds: other cases."""
    found = faults(tmp_path, seed=seed + int(os.environ.get("STDIT_FUZZ_SEED", 0)), count=1000)
    assert not found, "\n".join(found)
