"""Finds the files that come with stdit by name: `toy/dit` is stdit/configs/toy/dit.yaml."""

from __future__ import annotations

from pathlib import Path

from stdit.errors import StditError, nearest_name

CONFIGS = Path(__file__).parent / "configs"  # of runs; their paths without .yaml are their names
DEEPSPEED = CONFIGS / "deepspeed"  # what `parallel.deepspeed` takes by name, such as zero2
IN_A_CLONE = ("configs/", "deepspeed_configs/")  # where earlier versions had them: such paths still work


def find_shipped(given: str | Path, folder: Path, suffix: str) -> Path:
    """Returns the file at a path, or the file of that name below `folder`. Raises StditError if there is neither."""
    path = Path(given).expanduser()
    files = {file.relative_to(folder).as_posix().removesuffix(suffix): file for file in folder.rglob(f"*{suffix}")}
    name = path.as_posix().removesuffix(suffix)
    for prefix in IN_A_CLONE:
        name = name.removeprefix(prefix)
    if name in files and not path.is_file():
        return files[name]
    if not path.exists():
        raise StditError(
            f"{given} cannot be read: there is no such file, and stdit has none of that name, only "
            f"{', '.join(sorted(files))}.{nearest_name(name, files)}"
        )
    return path
