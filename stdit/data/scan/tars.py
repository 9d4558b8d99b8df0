"""What a scan looks at in tar shards of WebDataset's layout: media files, and the captions that belong to them."""

from __future__ import annotations

import os
import posixpath
import tarfile
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

from stdit.data.captions import Caption, Fault
from stdit.data.decode.formats import HEAD, MEDIA, OTHER_SUFFIXES, content_of, suffix_of
from stdit.data.remote.paths import Member
from stdit.data.scan.listing import CAPTION_BYTES, CAPTION_SUFFIXES, File, first_captions
from stdit.errors import StditError
from stdit.text_files import unicode_form

FORMAT = 2  # of what `tar_members` says
COMPRESSED = (
    ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4", ".tar.lzma", ".tar.z",
)  # fmt: skip
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
LINKS = 40  # that follow one another
_SPARSE = ("sparse", "is stored sparse in the tar, not in one piece. Pack it without --sparse (-S).")


@dataclass
class _Entry:
    """A media or caption file: where its bytes lie, or why they cannot be had."""

    name: str
    rest: str  # of its name, after the first dot
    offset: int = 0
    size: int = 0
    link: str | None = None  # the name that a symbolic link stands for
    refused: tuple[str, str] | None = None
    linked: bool = False  # its bytes are another member's
    unsure: bool = False  # whether it is media: its name does not say


@dataclass
class _Group:
    """Neighbours with one key; of the same rest of the name, one."""

    key: str
    media: list[_Entry] = field(default_factory=list)
    texts: list[_Entry] = field(default_factory=list)
    rests: set[str] = field(default_factory=set)
    elsewhere: bool = False  # captions of this key are there, and may be another clip's


def tar_members(tar: File, local: str, column: str | None = None) -> tuple[list[File], str | None]:
    """The videos and images of a tar, whose bytes are in the file `local`, and what is wrong further in, if anything.

    Files whose names are the same up to the first dot (the key) belong together: `clip.txt` (a caption a line) or else
    `clip.json` captions `clip.mp4`. Where a key comes twice, only neighbours do, as in WebDataset's own reading. Links
    to files in the tar are those files; a member that cannot be read where it lies is `refused`. column: the key of
    captions in .json files. Raises tarfile.TarError, OSError: it is no tar.
    """
    groups: list[_Group] = []
    files: dict[
        str, tuple[int, int] | None
    ] = {}  # where the plain files lie, by name, the last of a name; None: sparse
    links: dict[str, str] = {}
    damage = None
    with _opened(local) as shard:
        try:
            for info in shard:
                if info.issym():
                    links[_inside(info.name)] = info.linkname
                entry = _entry(info, files)
                if entry is not None:
                    _keep(groups, entry)
        except (tarfile.TarError, OSError, ValueError) as error:
            damage = f"cannot be read to its end ({error})."
        assert shard.fileobj is not None
        shard.fileobj.seek(shard.offset)
        if damage is None and any(shard.fileobj.read(tarfile.BLOCKSIZE)):  # an end is empty
            damage = f"is no tar from byte {shard.offset} on."
    for group in groups:
        for entry in (*group.media, *group.texts):
            _follow(entry, links, files)
    linked = {entry.offset for group in groups for entry in group.media if entry.linked}
    found = []
    with open(local, "rb") as file:
        for group in groups:
            group.media = [e for e in group.media if not e.unsure or (e.offset not in linked and _is_media(file, e))]
        _joined(groups)
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
            raise tarfile.ReadError(f"it is {packed}: only in a plain .tar can a file be read where it lies") from error
        raise


def _entry(info: tarfile.TarInfo, files: dict[str, tuple[int, int] | None]) -> _Entry | None:
    """What a member is, if it is media or may hold captions; notes where plain files lie."""
    name = _inside(info.name)  # without a way out of the tar
    sparse = info.issparse()
    plain = info.isreg() and not sparse
    if plain or sparse:
        files[name] = (info.offset_data, info.size) if plain else None
    base = posixpath.basename(name)
    suffix = suffix_of(base)
    unsure = suffix not in CAPTION_SUFFIXES and suffix not in MEDIA
    if base.startswith(".") or info.isdir() or (unsure and (suffix in OTHER_SUFFIXES or not plain)):
        return None
    entry = _Entry(name, base.partition(".")[2].lower(), info.offset_data, info.size, unsure=unsure)
    if sparse:
        entry.refused = _SPARSE
    elif info.islnk():
        target = _inside(info.linkname)
        _point(entry, files, target, f"is a hard link to {target}, which does not come before it in the tar.")
    elif info.issym():
        entry.link = info.linkname
    elif not plain:
        kind = "a named pipe" if info.isfifo() else "a device" if info.isdev() else f"of type {info.type!r}"
        entry.refused = ("special", f"is {kind} in the tar, not a file.")
    return entry


def _inside(name: str) -> str:
    return posixpath.normpath("/" + name.lstrip("/"))[1:]


def _point(entry: _Entry, files: dict[str, tuple[int, int] | None], target: str, missing: str) -> None:
    """Makes a link the file that it stands for."""
    if target not in files:
        entry.refused = ("link", missing)
    elif (place := files[target]) is None:
        entry.refused = _SPARSE
    else:
        entry.offset, entry.size = place
        entry.linked = True


def _keep(groups: list[_Group], entry: _Entry) -> None:
    folder, base = posixpath.split(entry.name)
    key = unicode_form(posixpath.join(folder, base.partition(".")[0]))
    if not groups or groups[-1].key != key or entry.rest in groups[-1].rests:
        groups.append(_Group(key))
    group = groups[-1]
    group.rests.add(entry.rest)
    (group.texts if suffix_of(base) in CAPTION_SUFFIXES else group.media).append(entry)


def _follow(entry: _Entry, links: dict[str, str], files: dict[str, tuple[int, int] | None]) -> None:
    """Makes a symbolic link the file that it stands for, through links in the tar."""
    if entry.link is None:
        return
    missing = f"is a symbolic link to {entry.link}, which is not a file in the tar."
    name, target = entry.name, entry.link
    for _ in range(LINKS):
        name = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        if name.startswith(("/", "../")) or name not in links:
            break
        target = links[name]
    _point(entry, files, name, missing)


def _joined(groups: list[_Group]) -> None:
    """Brings the parts of a key together that do not lie side by side (a tar of all videos and then all texts), where
    nothing comes twice and no clip has a caption beside it: else a part may be another shard's."""
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
        message = f"the tar has several {group.key}, and no caption is right beside this one."
        return [], ("no_caption", message)
    size = os.fstat(file.fileno()).st_size

    def read(text: _Entry) -> bytes:
        if text.refused:
            raise StditError(f"{text.name} {text.refused[1]}")
        if text.size > CAPTION_BYTES:
            raise StditError(f"{text.name} has {text.size} bytes, a caption at most {CAPTION_BYTES}.")
        if text.offset + text.size > size:
            raise StditError(f"{text.name} ends beyond the tar.")
        file.seek(text.offset)
        return file.read(text.size)

    texts = sorted(group.texts, key=lambda text: (not text.rest.endswith("txt"), len(text.rest)))
    return first_captions([(partial(read, text), text.name) for text in texts], column)
