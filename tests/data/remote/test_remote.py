"""Clips and cache of an S3-compatible server that fails, dawdles and cuts connections: nothing is lost, all is counted.

moto's server on loopback is the store; what goes wrong happens in a proxy before it.
"""

from __future__ import annotations

import csv
import http.client
import io
import json
import os
import tarfile
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import numpy as np
import pytest
import torch
from doubles import FakeVae

from stdit.cli.main import app, run_command
from stdit.data.config import DataConfig
from stdit.data.decode.write import write_video
from stdit.data.load.cache import Cache, latent_key, latent_settings
from stdit.data.load.loader import Loader
from stdit.data.manifest import read_manifest
from stdit.data.plan.buckets import assign
from stdit.data.plan.split import PlanItem
from stdit.data.remote import storage as storage_module
from stdit.data.remote.failures import StorageError
from stdit.data.remote.local_cache import LocalCache
from stdit.data.remote.paths import Member, join, split_member
from stdit.data.remote.storage import STORAGE
from stdit.data.scan.scan import scan
from stdit.errors import StditError
from stdit.prepare.encode import encode_manifest

pytest.importorskip("moto.server", reason="moto's server is not installed: pip install 'stdit[dev]'")
pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'stdit[remote]'")

TIMEOUT = 1.5
CONFIG = DataConfig(shapes=["16x16x5"], fps=8.0, max_crop=0.7)


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on; those of objects go wrong as `faults` says, one after another."""

    protocol_version = "HTTP/1.1"
    upstream = ""
    faults: list = []  # noqa: RUF012
    done: Counter = Counter()  # noqa: RUF012
    seen: list = []  # noqa: RUF012
    lock = threading.Lock()

    def _pass_on(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection(self.upstream)
        connection.request(self.command, self.path, content, dict(self.headers))
        answer = connection.getresponse()
        body = answer.read()
        with self.lock:
            self.seen.append((self.command, self.path))
            of_object = self.path.count("/") > 1 and "list-type" not in self.path
            fault = self.faults.pop(0) if self.faults and of_object else None
            self.done[fault] += 1
        if fault in (500, 503, 403):
            return self._answer(
                fault, {}, b"<Error><Code>InternalError</Code></Error>" if self.command != "HEAD" else b""
            )
        if fault == "stalls":
            time.sleep(3 * TIMEOUT)
        if fault == "refuses":
            self.close_connection = True
            return None
        self._answer(answer.status, dict(answer.getheaders()), body, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on

    def _answer(self, status, headers, body, fault=None):
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut" and len(body) > 1:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        pieces = 5 if fault == "slow" else 1  # slow: within the time it may take
        for part in np.array_split(np.frombuffer(body, np.uint8), pieces):
            self.wfile.write(part.tobytes())
            time.sleep(0.1 * (pieces > 1))

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    """moto's server and the proxy before it: (boto3's client of the server itself, the proxy's URL)."""
    import boto3
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "*", "no_proxy": "*",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        moto.start()
        host, port = moto.get_host_and_port()
        Proxy.upstream = f"{host}:{port}"
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        proxy.handle_error = lambda *_: None  # of connections that are cut
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{proxy.server_address[1]}"
        patch.setenv("AWS_ENDPOINT_URL_S3", url)
        client = boto3.client("s3", endpoint_url=f"http://{Proxy.upstream}")
        client.create_bucket(Bucket="bucket")
        yield client, url
        proxy.shutdown()
        moto.stop()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Six captioned clips, three of them in a tar."""
    folder, apart = tmp_path_factory.mktemp("videos"), tmp_path_factory.mktemp("apart")
    for number in range(6):
        frames = np.random.default_rng(number).integers(0, 256, (10, 16, 24, 3), dtype=np.uint8)
        where = folder if number < 3 else apart
        write_video(where / f"{number}.mp4", frames, 8)
        (where / f"{number}.txt").write_text(f"clip {number}")
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for file in sorted(apart.iterdir()):
            shard.add(file, file.name)
    return folder


@pytest.fixture
def store(server, tmp_path, monkeypatch):
    """What reads the store, with fresh copies and quick to try again."""
    settings = {
        "local_cache": LocalCache(tmp_path / "copies", 1 << 30),
        "retries": 0,
        "pause": 0.01,
        "timeout": TIMEOUT,
    }
    for name, value in settings.items():
        monkeypatch.setattr(STORAGE, name, value)
    monkeypatch.setattr(storage_module, "BLOCK", 2000)
    for name, value in (("faults", []), ("done", Counter()), ("seen", [])):
        monkeypatch.setattr(Proxy, name, value)
    STORAGE._info.cache_clear()
    return STORAGE


@pytest.fixture
def uploaded(server, videos):
    for file in videos.iterdir():
        server[0].upload_file(str(file), "bucket", f"videos/{file.name}")
    return videos


# what needs another try: 500, 503, "cut", "stalls" (not "refuses": aiohttp opens a connection anew by itself)
TROUBLE = [500, "slow", "cut", None, "stalls", 503, None, "slow", "cut", 500]


def counted():
    return sum(Proxy.done[fault] for fault in (500, 503, "cut", "stalls"))


def examples(manifest, workers=0):
    assignment = assign(manifest, CONFIG)
    items = [PlanItem(row, 0, 0, 0, 0, 0) for row in range(len(manifest))]
    loader = Loader(manifest, assignment, CONFIG, seed=5, workers=workers)
    return next(loader.iterate([(0, items)]))


def by_content(manifest):
    return {clip.id: replace(clip, path="") for clip in manifest}


def test_a_scan_loses_nothing(uploaded, store, tmp_path, caplog, capsys):
    here = scan(uploaded, workers=1)
    Proxy.faults.extend(TROUBLE)
    command = ["data", "scan", "s3://bucket/videos", "--out", str(tmp_path / "m.parquet"), "--workers", "1", "--json"]
    assert run_command(app, command, "stdit") == 0 and json.loads(capsys.readouterr().out)["retries"] == 6
    found = read_manifest(tmp_path / "m.parquet")
    assert by_content(found) == by_content(here.manifest) and len(found) == 6
    assert not Proxy.faults and store.retries == counted() == 6
    assert len([record for record in caplog.records if record.name == "stdit.data.remote.storage"]) == 6
    assert all(clip.path.startswith("s3://bucket/videos/") for clip in found)
    server_asked = len(Proxy.seen)
    again = scan("s3://bucket/videos", out=tmp_path / "m.parquet", workers=1)
    assert again.reused == 6 and again.manifest.hash == found.hash
    asked = Proxy.seen[server_asked:]
    assert not [path for method, path in asked if ".mp4" in path or ".tar" in path]  # captions alone are read again


def test_clips_are_those_of_the_files(uploaded, store, tmp_path):
    here = examples(scan(uploaded, workers=1).manifest)
    scan("s3://bucket/videos", out=tmp_path / "m.parquet", workers=1)
    for copy in (tmp_path / "copies").iterdir():
        copy.unlink()
    before = store.retries
    Proxy.done.clear()
    Proxy.faults.extend(TROUBLE)
    got = examples(read_manifest(tmp_path / "m.parquet"), workers=2)
    assert not Proxy.faults and store.retries - before == counted() == 6
    wanted = {example.clip_id: example for example in here}
    assert [example.weight for example in got] == [1] * 6
    assert all(torch.equal(example.frames, wanted[example.clip_id].frames) for example in got)
    members = [split_member(clip.path) for clip in read_manifest(tmp_path / "m.parquet")]
    sizes = {copy.stat().st_size for copy in (tmp_path / "copies").iterdir()}
    assert {member.size for member in members if member} < sizes  # of the tar its members alone


def test_a_cache_is_written_and_read_through_it_all(server, videos, store, tmp_path):
    manifest = scan(videos, workers=1).manifest
    assignment = assign(manifest, CONFIG)

    def encode(out):
        return encode_manifest(
            manifest, assignment, CONFIG, FakeVae(), None, out, vae_id="vae", batch=2, clips_per_shard=2
        )

    encode(tmp_path / "cache")
    Proxy.faults.extend([None, 500, None, 503, 500, "slow", None, "stalls"])
    assert encode("s3://bucket/cache").clips == 6
    assert not Proxy.faults and store.retries == counted() == 4
    listed = server[0].list_objects_v2(Bucket="bucket", Prefix="cache/")["Contents"]
    stored = {o["Key"]: server[0].get_object(Bucket="bucket", Key=o["Key"])["Body"].read() for o in listed}
    here = {str(p.relative_to(tmp_path)): p.read_bytes() for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    assert stored == here and len(here) == 8  # three shards of two files, their index, the settings
    assert encode("s3://bucket/cache").reused == 6

    Proxy.faults.extend(TROUBLE[:7])  # the merged index leaves few requests
    before = store.retries
    Proxy.done.clear()
    cache = Cache.open("s3://bucket/cache", latent_settings(CONFIG, "vae"))
    local = Cache.open(tmp_path / "cache", latent_settings(CONFIG, "vae"))
    for clip in manifest:
        key = latent_key(clip.id, assignment.shapes[0])
        assert torch.equal(cache.tensor(cache.position(key)), local.tensor(local.position(key)))
    assert not Proxy.faults and store.retries - before == counted() == 4
    with pytest.raises(StditError, match="vae vae there, other wanted"):
        Cache.open("s3://bucket/cache", latent_settings(CONFIG, "other"))


def test_what_stays_wrong_names_the_file_and_the_way_out(uploaded, store, tmp_path, server):
    scan("s3://bucket/videos", out=tmp_path / "m.parquet", workers=1)
    manifest = read_manifest(tmp_path / "m.parquet")
    for copy in (tmp_path / "copies").iterdir():
        copy.unlink()
    store._info.cache_clear()
    server[0].delete_object(Bucket="bucket", Key="videos/1.mp4")
    got = {manifest[example.row].path: example for example in examples(manifest)}
    gone = got["s3://bucket/videos/1.mp4"]
    assert gone.weight == 0 and gone.reason == "missing" and "s3://bucket/videos/1.mp4: no such file" in gone.failure
    assert sum(example.weight for example in got.values()) == 5
    for copy in (tmp_path / "copies").iterdir():
        copy.unlink()
    Proxy.faults.append(403)
    with pytest.raises(StorageError, match=r"s3://bucket/videos/.*access denied.*credentials"):
        examples(manifest)
    Proxy.faults[:] = ["refuses"] * 100
    with pytest.raises(StorageError, match=r"8 tries failed.*reachable"):
        examples(manifest)


def test_over_http_too(uploaded, store, server):
    """As a plain web server, which lists its folders as pages and knows no ranges."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(uploaded))
    handler.func.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_address[1]}"
        found = scan(url, workers=1)
        assert by_content(found.manifest) == by_content(scan(uploaded, workers=1).manifest)
        assert [example.weight for example in examples(found.manifest)] == [1] * 6
        web.shutdown()


ODD = [
    "ha#sh", "q?x", "q?x=1&y", "per%20cent", "plus+plus", "sp ace", "日本語", "dou//ble", "/lead", "semi;co", "star*",
    "br[1]", "quo\"te'", "back\\slash", "a::b", ":", "tra/../il", "./dot", "{brace}", "~tilde", "é" * 100, "tail /x",
    "s.tar#1+2/x",
]  # fmt: skip


@pytest.mark.parametrize("folder", ["odd", "o#d?d/ sub"])
def test_every_key_that_a_store_lists_is_read(server, store, tmp_path, folder):
    for name in ODD:
        server[0].put_object(Bucket="bucket", Key=f"{folder}/{name}.bin", Body=name.encode())
    server[0].put_object(Bucket="bucket", Key=f"{folder}/sub/", Body=b"")  # as consoles mark a folder
    server[0].put_object(Bucket="bucket", Key=f"{folder}-beside/x.bin", Body=b"")
    found = store.find(f"s3://bucket/{folder}")
    assert sorted(found) == sorted(f"{name}.bin" for name in ODD)
    for name in set(ODD) - {"s.tar#1+2/x"}:  # that one is read as a tar's member
        path = join(f"s3://bucket/{folder}", f"{name}.bin")
        assert store.read(path).decode() == name and store.state(path) == found[f"{name}.bin"]
        with store.local(path) as local, open(local, "rb") as file:
            assert file.read().decode() == name and local.endswith(".bin")


def test_a_tar_of_any_key_gives_its_clips(server, videos, store, tmp_path):
    names = ["s?x.tar", "a#b.tar", "dou//ble.tar", "sp ace%20.TAR"]
    for number, name in enumerate(names):
        with tarfile.open(tmp_path / "one.tar", "w") as shard:  # others than in the tar beside it
            frames = np.random.default_rng(100 + number).integers(0, 256, (10, 16, 24, 3), dtype=np.uint8)
            write_video(tmp_path / "c?l#i p.mp4", frames, 8)
            shard.add(tmp_path / "c?l#i p.mp4", "c?l#i p.mp4")
        server[0].upload_file(str(tmp_path / "one.tar"), "bucket", f"tars/{name}")
    found = scan("s3://bucket/tars", uncaptioned=True, workers=1)
    assert not found.skipped and sorted(split_member(clip.path).tar for clip in found.manifest) == sorted(
        f"s3://bucket/tars/{name}" for name in names
    )
    for copy in (tmp_path / "copies").iterdir():
        copy.unlink()
    assert [example.weight for example in examples(found.manifest)] == [1] * len(names)


def test_a_web_pages_names_are_those_of_people(videos, store, tmp_path):
    """What a page writes as sp%20ace.mp4?download=1 is captioned as "sp ace.mp4", and fetched as it is written."""
    names = ["sp ace.mp4", "ha#sh.mp4", "per%20cent.mp4", "日本.mp4", "q?x.mp4"]
    for number, name in enumerate(names):
        frames = np.random.default_rng(number).integers(0, 256, (10, 16, 24, 3), dtype=np.uint8)
        write_video(tmp_path / "web" / name, frames, 8)
    with open(tmp_path / "web" / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "caption"), *((name, f"of {name}") for name in names)])

    class Handler(SimpleHTTPRequestHandler):
        asked: list = []  # noqa: RUF012

        def list_directory(self, path):
            written = [quote(name) + ("?download=1" if name.startswith("sp") else "") for name in os.listdir(path)]
            page = "".join(f'<a href="{name}">{name}</a>' for name in written).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            return io.BytesIO(page)

        def log_message(self, *_):
            self.asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "web"))) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_address[1]}"
        found = scan(url, workers=1)
        assert {clip.captions[0].text for clip in found.manifest} == {f"of {name}" for name in names}
        assert f"{url}/sp%20ace.mp4?download=1" in [clip.path for clip in found.manifest]
        assert [example.weight for example in examples(found.manifest)] == [1] * len(names)
        member = Member(f"{url}/shard.tar?sig=a/b", 512, 7, "x.mp4")  # of a tar whose address is signed
        assert split_member(str(member)) == member
        web.shutdown()


def test_a_manifest_and_its_reports_go_to_a_url(uploaded, store, server, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server[0].put_object(Bucket="bucket", Key="videos/broken.mp4", Body=b"not a video")
    here = scan(uploaded, workers=1)
    command = ["data", "scan", "s3://bucket/videos", "--out", "s3://bucket/out/m.parquet", "--workers", "1"]
    try:
        for reused in (0, 7):
            assert run_command(app, [*command, "--json"], "stdit") == 0
            told = json.loads(capsys.readouterr().out)
            assert told["manifest"] == "s3://bucket/out/m.parquet" and told["reused"] == reused
    finally:
        server[0].delete_object(Bucket="bucket", Key="videos/broken.mp4")
    found = read_manifest("s3://bucket/out/m.parquet")
    assert by_content(found) == by_content(here.manifest)
    assert all(clip.path.startswith("s3://bucket/videos/") for clip in found)
    keys = sorted(one["Key"] for one in server[0].list_objects_v2(Bucket="bucket", Prefix="out/")["Contents"])
    assert keys == ["out/m.parquet", "out/m.probed.jsonl", "out/m.skipped.jsonl"]
    assert b"broken.mp4" in server[0].get_object(Bucket="bucket", Key="out/m.skipped.jsonl")["Body"].read()
    assert not [name for name in os.listdir(tmp_path) if name.startswith("s3")]
    assert not list((tmp_path / "copies" / "journals").iterdir())


def test_a_scan_that_was_ended_goes_on_though_its_manifest_is_far(uploaded, store, server, monkeypatch):
    class Stopped(BaseException):
        pass

    def stop(*_):
        raise Stopped

    with pytest.raises(Stopped):
        scan("s3://bucket/videos", out="s3://bucket/again/m.parquet", workers=1, on_file=stop)
    assert scan("s3://bucket/videos", out="s3://bucket/again/m.parquet", workers=1).reused > 0


@pytest.mark.parametrize("out", ["s3://nowhere/m.parquet", "http://127.0.0.1:9/m.parquet", "nosuch://x/m.parquet"])
def test_a_url_that_takes_no_files_is_told_before_the_work(uploaded, store, out, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(STORAGE, "tries", 2)
    monkeypatch.setattr("stdit.data.scan.scan.probe_files", None)
    assert run_command(app, ["data", "scan", str(uploaded), "--out", out], "stdit") == 1
    error = capsys.readouterr().err
    assert out.removesuffix(".parquet") in error and len(error.strip().splitlines()) <= 2, error


def test_clips_here_are_named_in_full_in_a_manifest_that_is_far(uploaded, store, monkeypatch):
    monkeypatch.chdir(uploaded)
    found = scan(".", out="s3://bucket/local/m.parquet", workers=1).manifest
    far = read_manifest("s3://bucket/local/m.parquet")
    assert by_content(far) == by_content(found) and all(clip.path.startswith(str(uploaded)) for clip in far)
