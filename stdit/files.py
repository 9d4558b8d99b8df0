"""Atomic files and folders: written under a temporary name, flushed to the disk, then renamed into place."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from stdit.errors import StditError

_KEPT = "and run the same command again: what was finished before is kept."
_TROUBLES = {  # errors of disks and limits: (words in the messages of systems and libraries, our message)
    errno.ENOSPC: ("No space left on", f"no space left on the disk. Free some, or write elsewhere, {_KEPT}"),
    errno.EDQUOT: ("quota exceeded", f"the disk quota is used up. Free some, or write elsewhere, {_KEPT}"),
    errno.EFBIG: ("File too large", f"larger than disk or `ulimit -f` allow. Write elsewhere, or raise it, {_KEPT}"),
    errno.EROFS: ("Read-only file system", "the file system is read-only. Choose another path."),
    errno.EMFILE: ("Too many open files", f"too many open files. Raise `ulimit -n` {_KEPT}"),
    errno.ENFILE: ("open files in system", f"too many open files on this machine. Close some programs {_KEPT}"),
}  # fmt: skip


def part_folder(path: str | os.PathLike[str], part: str) -> Path:
    """The subfolder `part` ("vae", "text_encoder") of a model folder, or the path itself if it has none."""
    folder = Path(path).expanduser()
    return folder / part if (folder / part).is_dir() else folder


class DiskError(StditError):
    """A full or read-only disk, a quota, or a limit of the system. The message names the path and the remedy."""


def disk_trouble(error: BaseException) -> str:
    """Describes a full disk, a quota or a limit on files, with its remedy; '' for any other error."""
    number = getattr(error, "errno", None)
    if number in _TROUBLES:
        return _TROUBLES[number][1]
    if isinstance(error, OSError) and isinstance(number, int):
        return ""
    text = str(error).lower()  # libraries wrap such errors in their own (safetensors: "os error 28")
    for code, (words, message) in _TROUBLES.items():
        if words.lower() in text or f"os error {code})" in text:
            return message
    return ""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns errors of a disk or limit that is met while writing `path` into a DiskError that names it."""
    try:
        yield
    except StditError:
        raise
    except Exception as error:
        if message := disk_trouble(error):
            raise DiskError(f"{path}: {message}") from error
        raise


@contextmanager
def _creating(path: Path) -> Iterator[None]:
    """Turns FileNotFoundError while creating `path` into a StditError (file systems such as /proc)."""
    try:
        with writing(path):
            yield
    except FileNotFoundError as error:
        raise StditError(f"{path}: no file or folder can be made there. Choose another path.") from error


def make_folder(path: str | Path) -> Path:
    """Makes a folder and its parents if missing, and returns its path."""
    path = Path(path)
    with _creating(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def no_empty_folders(*places: Path) -> Iterator[None]:
    """If the work fails, removes the folders that it made and left empty, among `places` and their parents."""
    made = {place for end in places for place in (end, *end.parents) if not os.path.lexists(place)}
    try:
        yield
    except BaseException:
        for place in sorted(made, key=lambda place: len(place.parts), reverse=True):
            with suppress(OSError):  # not made, or not empty
                place.rmdir()
        raise


def local_path(what: str, given: str | Path) -> Path:
    """A path on this machine to write to, with ~ expanded. Raises StditError, which names `what`, for any other."""
    text = str(given).removeprefix("file://")
    if not text.strip() or "\0" in text or not is_utf8(text):
        raise StditError(f"{what} is {text!r}: it must be a path{', in UTF-8' if text.strip() else ''}.")
    if "://" in text:
        raise StditError(f"{what} is {text}: a URL. Only a path on this machine can be written to; copy it afterwards.")
    return Path(text).expanduser()


def is_utf8(path: str) -> bool:
    """Whether a path is valid UTF-8, so that a manifest or a JSON file can hold it."""
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in path)


def local_folder(what: str, given: str | Path) -> Path:
    """`local_path` of a folder to write to. Raises StditError if it cannot be made."""
    path = local_path(what, given)
    _check_place(path)
    return path


def local_file(what: str, given: str | Path) -> Path:
    """`local_path` of a file to write. Raises StditError if a folder has its name or its folder cannot be made."""
    path = local_path(what, given)
    if path.is_dir():
        raise StditError(f"{path}: is a folder. Name the file in it: {path / 'NAME'}, or choose another path.")
    _check_place(path.parent)
    return path


def _check_place(folder: Path) -> None:
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if there.exists() and not there.is_dir():
        raise StditError(f"{there}: is a file, not a folder. Choose another path.")
    if not there.exists():
        raise StditError(f"{there}: is a link to {os.readlink(there)}, which is not there. Remove the link.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StditError(f"{there}: {os.strerror(errno.EACCES)}. Change its permissions, or choose another path.")


@contextmanager
def publish(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write a file to, which then replaces `path` atomically.

    Readers see the old file or the new one, even after a power cut. If writing fails, nothing is left behind. The
    folder is made if missing. If no file can be made there, raises OSError or StditError before the work.
    """
    path = Path(path)
    with suppress(FileNotFoundError, NotADirectoryError):  # a name that is too long raises here
        if stat.S_ISDIR(os.stat(path).st_mode):  # replacing it would fail, on some systems with "busy"
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    name = os.fsdecode(os.fsencode(path.name)[:200])  # a name may have 255 bytes
    part = make_folder(path.parent) / f".{name}.{secrets.token_hex(4)}.part"
    with _creating(path):
        part.touch()
        part.unlink()
    try:
        with writing(path):
            yield part
            sync(part)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def publish_text(path: str | Path, text: str) -> None:
    """Publishes a text as UTF-8, with its line ends unchanged."""
    with publish(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def publish_folder(part: Path, path: Path, unsynced: Iterable[Path] | None = None) -> None:
    """Replaces the folder `path` by `part`, a folder beside it, and removes the old one.

    unsynced: what in `part` is not on the disk yet; all of it, unless given.

    On Linux the two are exchanged atomically, so a reader always finds one of them. Elsewhere a process that is killed
    between two renames leaves the old one aside; `heal_folder` puts it back.
    """
    heal_folder(path)
    for file in (*(part.rglob("*") if unsynced is None else unsynced), part):
        sync(file)
    old = part
    if not os.path.lexists(path):
        part.rename(path)
    elif not _exchange(part, path):
        old = _aside(path)
        path.rename(old)
        part.rename(path)
    sync(path.parent)
    with suppress(OSError):  # the new one is in place; the next call removes what is left of the old one
        remove_folder(old)


def heal_folder(path: Path) -> None:
    """Completes a `publish_folder` that was killed: the old folder gets its name back, or is removed."""
    aside = _aside(path)
    if os.path.lexists(aside):
        if os.path.lexists(path):
            remove_folder(aside)
        else:
            aside.rename(path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two names atomically (Linux's renameat2). Returns False if the system or the disk cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def remove_folder(path: Path) -> None:
    """Removes a folder, read-only parts too, or a link. It need not exist."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    if not path.is_dir():
        return
    with suppress(OSError):
        path.chmod(0o700)
    for here, folders, _ in os.walk(path):
        for name in folders:
            place = os.path.join(here, name)
            if not os.path.islink(place):
                with suppress(OSError):  # another user's folder; rmtree reports it
                    os.chmod(place, 0o700)
    shutil.rmtree(path)


def check_copyable(place: Path) -> None:
    """Raises StditError if a file or folder has dangling links, links to parents, special files or unreadable ones."""
    if not place.exists():
        why = "which is not there: was a download stopped? Fetch it again, or remove the link."
        raise StditError(f"{place}: is a link to {os.readlink(place)}, {why}")
    if not os.access(place, os.R_OK):
        raise StditError(f"{place}: {os.strerror(errno.EACCES)}. Change its permissions.")
    if place.is_dir():
        if place.is_symlink() and within(place.parent, place):
            raise StditError(f"{place}: is a link to its own parent {os.readlink(place)}. Remove the link.")
        for entry in sorted(place.iterdir()):
            check_copyable(entry)
    elif not place.is_file():
        raise StditError(f"{place}: is not a file that can be copied. Remove it.")


def copy_folder(source: Path, target: Path) -> None:
    """Copies a folder and follows its links. The copy is writable, whatever the permissions of the source."""
    make_folder(target)
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            copy_folder(entry, target / entry.name)
        else:
            with writing(target / entry.name):
                shutil.copyfile(entry, target / entry.name)


def publish_copy(source: Path, folder: Path) -> None:
    """Publishes a copy of a file or of a folder (see `copy_folder`) in `folder`, under the same name."""
    if not source.is_dir():
        with publish(folder / source.name) as part:
            shutil.copyfile(source, part)
        return
    part = folder / f".{source.name}.part"
    remove_folder(part)
    try:
        copy_folder(source, part)
        publish_folder(part, folder / source.name)
    finally:
        with suppress(OSError):
            remove_folder(part)


def within(path: str | Path, folder: str | Path) -> bool:
    """Whether a path is the folder or lies within it, regardless of links and letter case."""
    real = Path(os.path.realpath(path))
    for place in (real, *real.parents):
        with suppress(OSError):  # one of them is not there
            if os.path.samefile(place, folder):
                return True
    return False


def sync(path: Path) -> None:
    """Flushes a file's content, or a folder's list of names, to the disk."""
    windows = os.name == "nt"  # flushes only files that are open for writing, and no folders
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks cannot
            error.filename = str(path)
            raise
    finally:
        os.close(descriptor)


def sha256_of(file: BinaryIO) -> str:
    """SHA-256 (hex) of the rest of an open file."""
    total = hashlib.sha256()
    while block := file.read(1 << 20):
        total.update(block)
    return total.hexdigest()


def unpickled(path: str | Path) -> Any:
    """Reads a file of torch.save that holds only tensors in plain containers; None if it holds more or is damaged.

    torch's own message is dropped, since it advises to run the code in the file.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except (PermissionError, MemoryError):
        raise
    except Exception:  # damage raises errors of any kind
        return None


def whole_objects(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file of lines, without those that a crash cut off; none if there is no file."""
    found = []
    # not splitlines(): it also splits at characters that JSON does not escape
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


Journal = tuple[list[dict[str, Any]], Callable[[list[dict[str, Any]]], None]]


@contextmanager
def journal(path: str | Path) -> Iterator[Journal]:
    """Yields the JSON objects in a file of lines, and a function that appends more, in one write per call.

    Objects survive the process from the moment they are added. A line that was cut off by a kill is skipped.
    """
    path = Path(path)
    make_folder(path.parent)
    found = whole_objects(path)
    with _creating(path):
        path.touch()
    with open(path, "ab", buffering=0) as file:  # unbuffered, so several threads may add

        def write(content: bytes) -> None:
            with writing(path):
                while content:  # a nearly full disk takes a part first, and fails at the next write
                    content = content[file.write(content) :]

        write(b"\n")  # after a line that was cut off

        def add(lines: list[dict[str, Any]]) -> None:
            write("".join(json.dumps(line) + "\n" for line in lines).encode())  # ASCII, for file names of any bytes

        yield found, add
