"""Fixtures of all tests."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement


@pytest.fixture(scope="session")
def videos() -> Path:
    """The folder of real video files: $STDIT_VIDEOS, or shared/videos beside the clone."""
    root = Path(__file__).parents[1]
    for folder in (os.environ.get("STDIT_VIDEOS"), root.parent / "shared" / "videos", root / "shared" / "videos"):
        if folder and (Path(folder) / "videos.json").is_file():
            return Path(folder)
    pytest.skip("real video files are not here: set STDIT_VIDEOS to the folder that has videos.json")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says in which versions the suite ran, and what of them differs from those that were tested together."""
    wanted, differ = {}, []
    for line in (Path(__file__).parents[1] / "constraints" / "tested.txt").read_text().splitlines():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            wanted[requirement.name] = str(requirement.specifier).removeprefix("==")
    for name, version in wanted.items():
        try:
            if (found := metadata.version(name)) != version:
                differ.append(f"{name} {found} (tested: {version})")
        except metadata.PackageNotFoundError:
            pass  # of another system
    ran = f"Python {platform.python_version()}, torch {metadata.version('torch')}"
    terminalreporter.write_line(f"{ran}; other than in constraints/tested.txt: {', '.join(differ) or 'nothing'}")


@pytest.fixture(autouse=True)
def retries_of_this_test_alone() -> None:
    """A process runs one command, which says how often it retried; here it runs many tests."""
    if (storage := sys.modules.get("stdit.data.remote.storage")) is not None:
        storage.STORAGE.retries = 0
