"""Runs the suite in one set of versions and adds what came of it to docs/versions.md.

    python3 .ci/versions.py SET [--python PYTHON] [--busy N] [-- pytest's arguments]

SET: tested (constraints/tested.txt), oldest (constraints/oldest.txt), or resolved (what pip finds by itself). Each set
and Python has an environment of its own in .versions/. --busy: so many processes that only compute run beside it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "versions.md"
NAMED = ("torch", "torchvision", "deepspeed", "transformers", "diffusers", "numpy", "av")
VERSION = (
    "import sys; from importlib.metadata import version as v; print(sys.version.split()[0], *map(v, sys.argv[1:]))"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=["tested", "oldest", "resolved"])
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--busy", type=int, default=0)
    ours, rest = sys.argv[1:], []
    if "--" in ours:
        ours, rest = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    asked = parser.parse_args(ours)
    release = subprocess.check_output(
        [asked.python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True
    )
    place = ROOT / ".versions" / f"{asked.set}-{release.strip()}"
    if not (place / ".installed").exists():
        subprocess.run([asked.python, ROOT / ".ci" / "install.py", place, asked.set], check=True)
    python = place / "bin" / "python"
    versions = subprocess.check_output([python, "-c", VERSION, *NAMED], text=True).split()
    others = [subprocess.Popen([python, "-c", "while True: pass"]) for _ in range(asked.busy)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-m", "not slow and not gpu", *rest]
    begun, last = time.monotonic(), ""
    try:
        suite = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        assert suite.stdout is not None
        for last in suite.stdout:
            print(last, end="", flush=True)
        status = suite.wait()
    finally:
        for other in others:
            other.kill()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    minutes = f"{(time.monotonic() - begun) / 60:.1f} min" + (
        f", {asked.busy} busy processes beside it" * (asked.busy > 0)
    )
    count = [counts.get(word, 0) for word in ("passed", "failed", "error", "skipped")]
    row = [time.strftime("%Y-%m-%d"), asked.set, *versions, *map(str, count), minutes]
    with TABLE.open("a") as table:
        table.write("| " + " | ".join(row) + " |\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
