"""Remote files as local ones: what fails and passes is tried again and counted, the folder of copies stays bounded."""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from stdit import files as files_module
from stdit.data.remote import storage as storage_module
from stdit.data.remote.failures import StorageError
from stdit.data.remote.local_cache import LocalCache
from stdit.data.remote.paths import Member, open_bytes, split_member
from stdit.data.remote.storage import Storage, in_parallel
from stdit.errors import StditError


class Flaky(MemoryFileSystem):
    """A file system in memory whose next requests fail as told."""

    protocol = ("flaky",)
    store: dict = {}  # noqa: RUF012 (fsspec's own way)
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False
    faults: list = []  # noqa: RUF012
    asked: list = []  # noqa: RUF012

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.asked.append((path, start, end))
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        content = super().cat_file(path, start, end, **kwargs)
        return content[: len(content) // 2] if fault == "short" else content

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A function that puts files into the file system."""
    for name, value in (("store", {}), ("faults", []), ("asked", [])):
        monkeypatch.setattr(Flaky, name, value)
    return lambda name, content: Flaky().pipe_file(f"/{name}", content)


def storage(tmp_path, limit=1 << 20, **options):
    return Storage(LocalCache(tmp_path / "copies", limit), **{"pause": 0.0, **options})


def copies(tmp_path):
    return sorted((tmp_path / "copies").iterdir())


def content_of(store, path):
    with store.local(path) as local, open_bytes(local) as file:
        return file.read()


def test_a_copy_has_the_same_bytes_and_is_fetched_once(tmp_path, files, monkeypatch):
    monkeypatch.setattr(storage_module, "BLOCK", 100)
    content = random.Random(0).randbytes(1234)
    files("clips/a.MP4", content)
    store = storage(tmp_path)
    with store.local("flaky://clips/a.MP4") as local:
        assert local.endswith(".mp4")
    for _ in range(2):
        assert content_of(store, "flaky://clips/a.MP4") == content
    assert [end - start for _, start, end in Flaky.asked] == [100] * 12 + [34]
    files("clips/a.MP4", content[::-1] + b"!")  # another file of that name, for another process
    assert content_of(storage(tmp_path), "flaky://clips/a.MP4") == content[::-1] + b"!"


def test_local_paths_are_themselves(tmp_path):
    with storage(tmp_path).local("/videos/a.mp4") as path:
        assert path == "/videos/a.mp4"
    with storage(tmp_path).local("file:///videos/a.mp4") as path:
        assert path == "/videos/a.mp4"


@pytest.mark.parametrize("remote", [False, True])
def test_of_a_tar_only_the_members_bytes_are_read(tmp_path, files, remote):
    content = random.Random(1).randbytes(5000)
    files("shard.tar", content)
    (tmp_path / "shard.tar").write_bytes(content)
    tar = "flaky://shard.tar" if remote else str(tmp_path / "shard.tar")
    member = Member(tar, 512, 700, "a/b.mp4")
    assert split_member(str(member)) == member
    store = storage(tmp_path)
    assert content_of(store, str(member)) == content[512:1212]
    assert [(start, end) for _, start, end in Flaky.asked] == ([(512, 1212)] if remote else [])
    with store.local(str(member)) as local, open_bytes(local) as file:
        file.seek(-10, os.SEEK_END)
        assert file.read(100) == content[1202:1212] and file.tell() == 700
        file.seek(3)
        assert file.read(2) == content[515:517]


def test_what_passes_is_tried_again_counted_and_logged(tmp_path, files, caplog, monkeypatch):
    monkeypatch.setattr(storage_module, "BLOCK", 100)
    content = random.Random(2).randbytes(250)
    files("a.bin", content)
    Flaky.faults += [OSError("503"), None, TimeoutError("slow"), "short", None, ConnectionResetError("cut")]
    store = storage(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert content_of(store, "flaky://a.bin") == content
    assert store.retries == 4 == len(caplog.records) and len(Flaky.asked) == 3 + 4
    assert "flaky://a.bin: try 1 of 8 failed (OSError: 503)" in caplog.text and "got 50 of 100 bytes" in caplog.text
    Flaky.faults += [OSError("down")] * 8
    with pytest.raises(StorageError, match=r"flaky://b.bin: 8 tries failed, .*down.*reachable") as error:
        files("b.bin", b"x")
        content_of(store, "flaky://b.bin")
    assert error.value.reason == "unreachable" and not [p for p in copies(tmp_path) if p.name.startswith(".")]


class WithStatus(Exception):
    def __init__(self, status):
        super().__init__(f"HTTP {status}")
        self.status = status


class BotocoreLike(Exception):
    def __init__(self, status):
        super().__init__("an error occurred")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason", "says"),
    [
        (FileNotFoundError("gone"), "missing", "no such file"),
        (caused(FileNotFoundError("a"), BotocoreLike(404)), "missing", "no such file"),
        (PermissionError("no"), "denied", "credentials"),
        (WithStatus(403), "denied", "credentials"),
        (BotocoreLike(403), "denied", "credentials"),
        (type("NoCredentialsError", (Exception,), {})("Unable to locate credentials"), "denied", "credentials"),
        (ValueError("no such bucket name"), "wrong", "Is the URL right"),
        (WithStatus(400), "wrong", "Is the URL right"),
    ],
)
def test_what_stays_is_said_at_once(tmp_path, files, error, reason, says):
    files("a.bin", b"content")
    Flaky.faults.append(error)
    store = storage(tmp_path)
    with pytest.raises(StorageError, match=f"flaky://a.bin: .*{says}") as found:
        content_of(store, "flaky://a.bin")
    assert found.value.reason == reason and store.retries == 0


@pytest.mark.parametrize(
    "error", [WithStatus(500), WithStatus(429), BotocoreLike(503), caused(FileNotFoundError("a"), WithStatus(502))]
)
def test_a_server_in_trouble_is_no_missing_file(tmp_path, files, error):
    files("a.bin", b"content")
    Flaky.faults.append(error)
    store = storage(tmp_path)
    assert content_of(store, "flaky://a.bin") == b"content" and store.retries == 1


def test_a_scheme_nobody_knows_says_so(tmp_path):
    with pytest.raises(StorageError, match=r"nosuch://a.*stdit\[remote\]") as error:
        content_of(storage(tmp_path), "nosuch://a")
    assert error.value.reason == "wrong"


def test_a_file_that_changes_while_it_is_read_is_never_a_mixture(tmp_path, files, monkeypatch):
    monkeypatch.setattr(storage_module, "BLOCK", 100)
    plain = Flaky.cat_file
    for other in (bytes(250), b"short"):  # of the same size, and of another
        files("a.bin", b"1" * 250)

        def change(self, path, start=None, end=None, other=other, **kwargs):
            if start == 100:
                files("a.bin", other)
            return plain(self, path, start, end, **kwargs)

        monkeypatch.setattr(Flaky, "cat_file", change)
        store = storage(tmp_path)
        with pytest.raises(StorageError, match=r"a\.bin: was modified while") as error:
            content_of(store, "flaky://a.bin")
        assert error.value.reason == "changed"
        monkeypatch.setattr(Flaky, "cat_file", plain)
        assert content_of(store, "flaky://a.bin") == other


def test_copies_stay_bounded_and_what_is_read_stays(tmp_path, files):
    for number in range(40):
        files(f"{number}.bin", bytes([number]) * 1000)
    store = storage(tmp_path, limit=10_000)
    with store.local("flaky://0.bin") as first:
        for number in range(1, 40):
            assert content_of(store, f"flaky://{number}.bin") == bytes([number]) * 1000
            assert sum(p.stat().st_size for p in copies(tmp_path)) <= 10_000
        assert os.path.exists(first)
    assert len(copies(tmp_path)) > 5
    asked = len(Flaky.asked)
    content_of(store, "flaky://39.bin")  # used last, still there
    assert len(Flaky.asked) == asked
    files("large.bin", bytes(10_001))
    with pytest.raises(StorageError, match=r"10001 bytes; STDIT_LOCAL_GB") as error:
        content_of(store, "flaky://large.bin")
    assert error.value.reason == "too_large"


def test_copies_stay_bounded_where_a_server_tells_no_sizes(tmp_path, files, monkeypatch):
    plain = Flaky.info
    monkeypatch.setattr(Flaky, "info", lambda self, path, **options: plain(self, path, **options) | {"size": None})
    store = storage(tmp_path, limit=10_000)
    for number in range(40):
        files(f"{number}.bin", bytes([number]) * 1000)
        assert content_of(store, f"flaky://{number}.bin") == bytes([number]) * 1000
        assert sum(p.stat().st_size for p in copies(tmp_path)) <= 11_000  # that of the part counted twice


def test_what_many_ask_for_at_once_is_fetched_once(tmp_path, files, monkeypatch):
    files("a.bin", b"content")
    plain = Flaky.cat_file

    def slow(self, *arguments, **options):
        time.sleep(0.05)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Flaky, "cat_file", slow)
    stores = [storage(tmp_path), storage(tmp_path)]  # as two processes
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda number: content_of(stores[number % 2], "flaky://a.bin"), range(8)))
    assert got == [b"content"] * 8 and len(Flaky.asked) == 1 == len(copies(tmp_path))


def test_many_threads_read_through_a_small_folder(tmp_path, files):
    for number in range(12):
        files(f"{number}.bin", bytes([number]) * 1000)
    stores = [storage(tmp_path, limit=3000), storage(tmp_path, limit=3000)]  # as two processes

    def work(seed):
        numbers = random.Random(seed).choices(range(12), k=60)
        return all(content_of(stores[seed % 2], f"flaky://{n}.bin") == bytes([n]) * 1000 for n in numbers)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert len(Flaky.asked) < 8 * 60


def test_written_files_are_listed_and_read(tmp_path, files):
    store = storage(tmp_path)
    for root in ("flaky://cache", str(tmp_path / "cache")):
        (tmp_path / "cache" / "deeper").mkdir(parents=True, exist_ok=True)
        assert store.names(root + "/nowhere") == []
        for name in ("b", "a", "deeper/c"):
            store.write(f"{root}/{name}", name.encode())
        assert store.names(root) == ["a", "b", "deeper"]
        assert in_parallel(store.read, [f"{root}/a", f"{root}/deeper/c"]) == [b"a", b"deeper/c"]
        with pytest.raises(StorageError, match="nowhere: no such file"):
            store.read(f"{root}/nowhere")
    store.write("flaky://cache/.hidden/d", b"")
    store.write("flaky://cache/.e", b"")
    assert set(store.find("flaky://cache/")) == {"a", "b", "deeper/c"}


def test_what_another_process_takes_for_a_leftover_is_written_again(tmp_path, monkeypatch):
    """Two `data encode` into one cache: each removes parts that no process finished, as it must believe."""
    store, sync, left = storage(tmp_path), files_module.sync, [2]

    def removed(part):
        if left[0]:
            left[0] -= 1
            part.unlink()
        sync(part)

    monkeypatch.setattr(files_module, "sync", removed)
    store.write(str(tmp_path / "a"), b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    left[0] = 3
    with pytest.raises(FileNotFoundError):
        store.write(str(tmp_path / "b"), b"content")


def test_a_full_disk_of_copies_is_said_and_no_missing_file(tmp_path, files):
    files("clips/a.tar", b"content")
    store = storage(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    store._block = full
    with pytest.raises(StditError, match=r"copies \(STDIT_LOCAL\): no space left on the disk") as caught:
        with store.local("flaky://clips/a.tar"):
            pass
    assert not isinstance(caught.value, StorageError) and copies(tmp_path) == []


def test_a_chain_of_file_systems_is_still_one(tmp_path):
    (tmp_path / "x").write_bytes(b"two")
    assert storage(tmp_path).read(f"simplecache::file://{tmp_path}/x") == b"two"


def test_the_environment_says_where_and_how_much(tmp_path, monkeypatch):
    monkeypatch.setenv("STDIT_LOCAL", str(tmp_path))
    monkeypatch.setenv("STDIT_LOCAL_GB", "1.5")
    store = Storage()
    assert store.local_cache.folder == tmp_path and store.local_cache.limit == 1_500_000_000
    for wrong in ("much", "nan", "-1", "0"):
        monkeypatch.setenv("STDIT_LOCAL_GB", wrong)
        store = Storage()
        for _ in range(2):
            with pytest.raises(StditError, match=f"STDIT_LOCAL_GB is '{wrong}'.*positive"):
                assert store.local_cache.limit


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        RuntimeError("Error while opening: I/O error: Input/output error (os error 5)"),  # as safetensors says it
    ],
)
def test_a_local_disk_that_fails_is_tried_again(tmp_path, error):
    store, failures = storage(tmp_path, tries=4), [error] * 3

    def request():
        if failures:
            raise failures.pop()
        return "read"

    assert store.from_disk("a.mp4", request) == "read" and store.retries == 3
    failures += [error] * 4
    with pytest.raises(StorageError, match=r"a\.mp4: 4 tries failed, .*(put/output|Stale).*move it away") as found:
        store.from_disk("a.mp4", request)
    assert found.value.reason == "unreachable"
    for other in (
        FileNotFoundError(errno.ENOENT, "no"),
        PermissionError(errno.EACCES, "no"),
        OSError("bad"),
        KeyError(),
    ):
        failures.append(other)
        with pytest.raises(type(other)):
            store.from_disk("a.mp4", request)
        assert not failures


def test_a_file_is_removed_wherever_it_is(tmp_path, files):
    store = storage(tmp_path)
    files("folder/a", b"1")
    (tmp_path / "b").write_bytes(b"2")
    for path in ("flaky://folder/a", str(tmp_path / "b"), f"file://{tmp_path}/b"):
        store.remove(path)
        store.remove(path)  # it is gone
    assert store.names("flaky://folder") == [] and not (tmp_path / "b").exists()
