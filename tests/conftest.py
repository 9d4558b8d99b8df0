"""Fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def videos() -> Path:
    """The folder of real video files: $STDIT_VIDEOS, or shared/videos beside the clone."""
    root = Path(__file__).parents[1]
    for folder in (os.environ.get("STDIT_VIDEOS"), root.parent / "shared" / "videos", root / "shared" / "videos"):
        if folder and (Path(folder) / "videos.json").is_file():
            return Path(folder)
    pytest.skip("real video files are not here: set STDIT_VIDEOS to the folder that has videos.json")
