"""Local access to the files of a manifest's clips, and checks that they are the files that were scanned."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from stdit.data.decode.checks import CHANGED, VideoError, check_content
from stdit.data.manifest import Clip, Manifest
from stdit.data.remote.failures import FILE_REASONS, StorageError
from stdit.data.remote.paths import file_of, is_remote, split_member
from stdit.data.remote.storage import STORAGE, Storage
from stdit.errors import StditError


@contextmanager
def local_file(clip: Clip, storage: Storage = STORAGE) -> Iterator[str]:
    """A local path to a clip's file while the context is open.

    Problems of this file raise VideoError, also if it is not the one that was scanned. Problems of the storage, which
    may concern all clips, raise StorageError.
    """
    try:
        with storage.local(clip.path) as path:
            if clip.state and not _is_as_scanned(clip, storage):
                check_content(path, clip.sha256)  # a file that was copied or touched may be the same
            yield path
    except VideoError as error:  # it may name a local copy
        raise VideoError(clip.path, error.reason, error.message) from error
    except StorageError as error:
        if error.reason in FILE_REASONS:
            raise VideoError(clip.path, error.reason, error.message) from error
        raise


def check_files(manifest: Manifest) -> None:
    """Raises StditError if none of a few clips' files exists: the manifest or the videos were moved."""
    files = [file_of(manifest[row].path) for row in range(0, len(manifest), max(1, len(manifest) // 8))]
    if files and not any(is_remote(file) or os.path.lexists(file) for file in files):
        raise StditError(
            f"{manifest.source}: its files do not exist, such as {files[0]}. Were it or they moved? Paths in a "
            "manifest are relative to its own folder: move it back, or scan again."
        )


def _is_as_scanned(clip: Clip, storage: Storage) -> bool:
    """Whether a file's size and time are the same as when it was scanned. Raises VideoError if its size differs."""
    member = split_member(clip.path)
    file = member.tar if member else clip.path.removeprefix("file://")
    try:
        then = json.loads(clip.state)
        assert isinstance(then, list)
    except (ValueError, AssertionError):
        return False  # written by another program
    try:
        now = storage.state(file) if is_remote(file) else [(found := os.stat(file)).st_size, found.st_mtime_ns]
    except OSError:
        return True  # reading it will tell what is wrong
    pairs = [(a, b) for a, b in zip(then, now) if a is not None and b is not None]  # listings have fewer fields
    if pairs and member is None and then[0] is not None and now[0] is not None and str(then[0]) != str(now[0]):
        message = f"{CHANGED} ({now[0]} bytes, {then[0]} then). Scan again: stdit data scan."
        raise VideoError(clip.path, "changed", message)
    return all(str(a) == str(b) for a, b in pairs)
