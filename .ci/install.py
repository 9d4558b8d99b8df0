"""Makes a virtual environment with stdit in it, in the versions that were tested together.

Where they cannot be had (another index, a PIP_CONSTRAINT of one's own, a new Python), with what pip resolves by itself.
Says which. `python3 .ci/install.py VENV [tested|resolved|oldest]`: only that set, or an error.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = {name: ROOT / "constraints" / f"{name}.txt" for name in ("tested", "oldest")}


def main(place: str, only: str | None = None) -> int:
    folder = Path(place)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)  # completes an interrupted one, too
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    print(f"Installing stdit and what it needs into {folder}: some minutes, about 6 GB.", flush=True)
    for versions in (only,) if only else ("tested", "resolved"):
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-e", ".[train,dev]"]
        if versions != "resolved":
            pip += ["-c", str(CONSTRAINTS[versions])]
        done = subprocess.run(pip, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode == 0:
            break
        said = done.stdout.splitlines()
        why = [line.strip() for line in said if line.startswith(("ERROR", "error")) or "The user requested" in line]
        print(f"The {versions} versions cannot be installed here:", *(why or said[-20:]), sep="\n  ")
        if versions == "tested" and not only:
            print("Installing what pip resolves by itself.", flush=True)
    else:
        return 1
    where = f", constraints/{versions}.txt" if versions in CONSTRAINTS else " by pip"
    print(f"Installed: the {versions} versions{where}.")
    (folder / ".installed").write_text(f"{versions}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
