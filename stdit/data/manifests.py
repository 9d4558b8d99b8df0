"""Several manifests as one data set."""

from __future__ import annotations

import glob
import logging
import os
import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stdit.data.manifest import Manifest, read_manifest
from stdit.data.remote.paths import is_remote, join
from stdit.data.remote.storage import STORAGE
from stdit.errors import StditError

NAMED = 3  # manifests that a message names
_ABSOLUTE = r"^(/|[A-Za-z]:[\\/])|://"

log = logging.getLogger(__name__)


def read_manifests(places: str | Sequence[str]) -> Manifest:
    """Reads one manifest, or several as one data set, in the order of the list.

    places: files or URLs, or patterns of them (`sets/*.parquet`), whose matches come sorted by name.

    A clip that several manifests have counts once, as the first of them has it. Paths that are relative to a manifest
    come with its folder, as it was given. Columns that only some have are empty in the others.
    """
    paths = manifest_paths(places)
    if len(paths) == 1:
        return read_manifest(paths[0])
    return join_manifests([read_manifest(path) for path in paths])


def manifest_paths(places: str | Sequence[str]) -> list[str]:
    """The files or URLs that are meant. Raises StditError for a pattern that nothing matches."""
    found: list[str] = []
    for place in [places] if isinstance(places, str) else places:
        found += _matches(place)
    return list(dict.fromkeys(found))


def _matches(place: str) -> list[str]:
    if is_remote(place):
        folder, _, name = place.rpartition("/")
        if "*" not in name:  # "?" begins a query
            return [place]
        found = [join(folder, other) for other in STORAGE.names(folder) if fnmatchcase(other, name)]
    elif os.path.lexists(place) or not glob.has_magic(place):
        return [place]
    else:
        found = sorted(glob.glob(place, recursive=True))
    if not found:
        raise StditError(f"{place}: no manifest matches this pattern.")
    return found


def join_manifests(manifests: Sequence[Manifest]) -> Manifest:
    """See `read_manifests`."""
    source = named([manifest.source for manifest in manifests])
    try:
        table = pa.concat_tables([_with_folder(manifest) for manifest in manifests], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise StditError(f"{source} cannot be joined: a column of one name has several types ({error}).") from error
    ids = table.column("id")
    if repeated := len(ids) - pc.count_distinct(ids).as_py():
        first = pc.index_in(ids, value_set=ids.combine_chunks()).to_numpy()
        table = table.filter(pa.array(first == np.arange(len(ids))))
        log.warning("%d clips are in several of %s: each counts once, as the first of them has it.", repeated, source)
    return Manifest(table, ".", source, checked=True)


def _with_folder(manifest: Manifest) -> pa.Table:
    """The table with paths that need no folder."""
    paths = manifest.table.column("path")
    folder, nothing = (pa.scalar(text, paths.type) for text in (join(manifest.folder, ""), ""))
    joined = pc.binary_join_element_wise(folder, paths, nothing)
    paths = pc.if_else(pc.match_substring_regex(paths, _ABSOLUTE), paths, joined)
    return manifest.table.set_column(manifest.table.column_names.index("path"), "path", paths)


def named(places: str | Sequence[str]) -> str:
    """The manifests as a command takes them; not all of many."""
    if isinstance(places, str):
        return places
    return shlex.join(places[:NAMED]) + (f" and {len(places) - NAMED} more" if len(places) > NAMED else "")
