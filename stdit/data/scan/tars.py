"""Lists tar shards in WebDataset's layout for a scan: their media files with the captions that belong to them."""

from __future__ import annotations

import os
import posixpath
import tarfile
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

from stdit.data.captions import Caption, Fault
from stdit.data.decode.formats import HEAD, MEDIA, OTHER_SUFFIXES, content_of, suffix_of
from stdit.data.remote.failures import is_disk_failure
from stdit.data.remote.paths import Member
from stdit.data.scan.listing import CAPTION_BYTES, CAPTION_SUFFIXES, File, first_captions
from stdit.errors import StditError
from stdit.text_files import unicode_form

FORMAT = 2  # raise it when `tar_members` returns something else: scans then read all tars again
COMPRESSED = (
    ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4", ".tar.lzma", ".tar.z",
)  # fmt: skip
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
MAX_LINKS = 40  # followed in a row
_SPARSE = ("sparse", "is stored sparse in the tar, not in one piece. Pack it without --sparse (-S).")


@dataclass
class _Entry:
    """A media or caption file: the position of its bytes, or why they cannot be read."""

    name: str
    rest: str  # of the name, after the first dot
    offset: int = 0
    size: int = 0
    link: str | None = None  # the target of a symbolic link
    refused: tuple[str, str] | None = None  # reason and message
    linked: bool = False  # its bytes are another member's
    unsure: bool = False  # its name does not tell whether it is media


@dataclass
class _Group:
    """Neighbouring entries with the same key and different rests."""

    key: str
    media: list[_Entry] = field(default_factory=list)
    texts: list[_Entry] = field(default_factory=list)
    rests: set[str] = field(default_factory=set)
    elsewhere: bool = False  # captions of this key exist, but may belong to another clip


def tar_members(tar: File, local: str, column: str | None = None) -> tuple[list[File], str | None]:
    """The videos and images of a tar, and a description of damage further in, if any.

    local: the tar as a local file.
    column: the key of captions in .json files.

    Files whose names agree up to the first dot (the key) belong together: `clip.txt` (one caption per line) or else
    `clip.json` captions `clip.mp4`. Where a key occurs twice, only neighbours belong together, as when WebDataset reads
    them. Links to files in the tar are resolved; a member that cannot be read in place is `refused`. Raises
    tarfile.TarError or OSError if it is not a tar.
    """
    groups: list[_Group] = []
    files: dict[str, _Entry] = {}  # regular files, the last of a name
    links: dict[str, str] = {}
    damage = None
    with _opened(local) as shard:
        try:
            for info in shard:
                if info.issym():
                    links[_inside(info.name)] = info.linkname
                entry = _entry(info, files)
                if entry is not None:
                    _add_to_group(groups, entry)
        except (tarfile.TarError, OSError, ValueError) as error:
            if is_disk_failure(error):
                raise
            damage = f"cannot be read to the end ({error})."
        assert shard.fileobj is not None
        shard.fileobj.seek(shard.offset)
        if damage is None and any(shard.fileobj.read(tarfile.BLOCKSIZE)):  # a tar ends in zeros
            damage = f"is not a tar from byte {shard.offset} on."
    for group in groups:
        for entry in (*group.media, *group.texts):
            _follow_links(entry, links, files)
    linked = {entry.offset for group in groups for entry in group.media if entry.linked}
    found = []
    with open(local, "rb") as file:
        for group in groups:
            group.media = [e for e in group.media if not e.unsure or (e.offset not in linked and _is_media(file, e))]
        _join_groups(groups)
        for group in filter(lambda group: group.media, groups):
            texts, fault = _captions(group, file, column)
            for entry in group.media:
                path = str(Member(tar.path, entry.offset, entry.size, entry.name))
                found.append(File(f"{tar.name}/{entry.name}", path, tar.state, tuple(texts), fault, entry.refused))
    return found, damage


def _is_media(file: BinaryIO, entry: _Entry) -> bool:
    file.seek(entry.offset)
    return content_of(file.read(min(HEAD, entry.size))) is not None


def _opened(local: str) -> tarfile.TarFile:
    try:
        return tarfile.open(local, "r:")
    except tarfile.ReadError as error:
        with open(local, "rb") as file:
            first = file.read(6)
        if packed := next((kind for magic, kind in _MAGIC.items() if first.startswith(magic)), None):
            message = f"it is {packed}, and files can be read in place from a plain .tar only"
            raise tarfile.ReadError(message) from error
        raise


def _entry(info: tarfile.TarInfo, files: dict[str, _Entry]) -> _Entry | None:
    """A member as an entry, if it may be media or captions. Adds regular files to `files`."""
    name = _inside(info.name)
    base = posixpath.basename(name)
    suffix, sparse = suffix_of(base), info.issparse()
    unsure = suffix not in CAPTION_SUFFIXES and suffix not in MEDIA
    refused = _SPARSE if sparse else None
    entry = _Entry(name, base.partition(".")[2].lower(), info.offset_data, info.size, refused=refused, unsure=unsure)
    if info.isreg():
        files[name] = entry
    if base.startswith(".") or info.isdir() or (unsure and (suffix in OTHER_SUFFIXES or sparse or not info.isreg())):
        return None
    if info.islnk():
        target = _inside(info.linkname)
        _resolve(entry, files, target, f"is a hard link to {target}, which does not come before it in the tar.")
    elif info.issym():
        entry.link = info.linkname
    elif not info.isreg():
        kind = "a named pipe" if info.isfifo() else "a device" if info.isdev() else f"of type {info.type!r}"
        entry.refused = ("special", f"is {kind} in the tar, not a file.")
    return entry


def _inside(name: str) -> str:
    """A name without a way out of the tar."""
    return posixpath.normpath("/" + name.lstrip("/"))[1:]


def _resolve(entry: _Entry, files: dict[str, _Entry], target: str, missing: str) -> None:
    """Gives a link the bytes of its target."""
    if found := files.get(target):
        entry.offset, entry.size, entry.refused, entry.linked = found.offset, found.size, found.refused, True
    else:
        entry.refused = ("link", missing)


def _add_to_group(groups: list[_Group], entry: _Entry) -> None:
    folder, base = posixpath.split(entry.name)
    key = unicode_form(posixpath.join(folder, base.partition(".")[0]))
    if not groups or groups[-1].key != key or entry.rest in groups[-1].rests:
        groups.append(_Group(key))
    group = groups[-1]
    group.rests.add(entry.rest)
    (group.texts if suffix_of(base) in CAPTION_SUFFIXES else group.media).append(entry)


def _follow_links(entry: _Entry, links: dict[str, str], files: dict[str, _Entry]) -> None:
    """Resolves a symbolic link, also through other links in the tar."""
    if entry.link is None:
        return
    name, target = entry.name, entry.link
    for _ in range(MAX_LINKS):
        name = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        if name.startswith(("/", "../")) or name not in links:
            break
        target = links[name]
    _resolve(entry, files, name, f"is a symbolic link to {entry.link}, which is not a file in the tar.")


def _join_groups(groups: list[_Group]) -> None:
    """Joins captions and media of a key that are not neighbours (a tar of all videos, then all texts).

    Only where no name occurs twice and no clip has a neighbouring caption: otherwise a part may be from another shard.
    """
    by_key: dict[str, list[_Group]] = {}
    for group in groups:
        by_key.setdefault(group.key, []).append(group)
    for parts in by_key.values():
        if len(parts) == 1:
            continue
        alone = sum(len(part.rests) for part in parts) == len({rest for part in parts for rest in part.rests})
        if alone and not any(part.media and part.texts for part in parts):
            texts = [text for part in parts for text in part.texts]
            for part in parts:
                part.texts = texts if part.media else []
        elif any(part.texts for part in parts):
            for part in parts:
                part.elsewhere = not part.texts


def _captions(group: _Group, file: BinaryIO, column: str | None) -> tuple[list[Caption], Fault | None]:
    if group.elsewhere:
        return [], ("no_caption", f"the tar has several {group.key}, and no caption is next to this one.")
    size = os.fstat(file.fileno()).st_size

    def read(text: _Entry) -> bytes:
        if text.refused:
            raise StditError(f"{text.name} {text.refused[1]}")
        if text.size > CAPTION_BYTES:
            raise StditError(f"{text.name} has {text.size} bytes; a caption file has at most {CAPTION_BYTES}.")
        if text.offset + text.size > size:
            raise StditError(f"{text.name} extends beyond the end of the tar.")
        file.seek(text.offset)
        return file.read(text.size)

    texts = sorted(group.texts, key=lambda text: (not text.rest.endswith("txt"), len(text.rest)))
    return first_captions({text.name: partial(read, text) for text in texts}, column)
