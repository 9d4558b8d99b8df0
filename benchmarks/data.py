"""Clips per second from files and from the cache, compared with plain PyAV and torchcodec loops that read the same
frames of the same files; and the loader's memory over 10,000 clips.

python benchmarks/data.py --out docs/data.json                      # quiet machine, two cores, about 6 minutes
python benchmarks/data.py --only memory
python benchmarks/data.py --reads 40 --trials 2 --memory-reads 400  # a quick look

Real clips come from $STDIT_VIDEOS (else ../shared/videos) or --videos; toy clips are rendered. torchcodec is used if
installed, or from --torchcodec FOLDER (pip install --no-deps --target FOLDER torchcodec); if the system has no FFmpeg
libraries, it gets those that come with PyAV.

"here": reading in this process, on one thread. "beside": in one other process, which may crash: ours returns frames
through memory that both map; the loops are the dataset of a torch DataLoader with one worker. In both cases one process
decodes on one thread, so clips per second are per core.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes.util
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch

from stdit.data.config import DataConfig
from stdit.data.decode.pixels import covering_size
from stdit.data.load.cache import Cache, latent_key, latent_settings
from stdit.data.load.loader import Loader
from stdit.data.manifest import Manifest
from stdit.data.plan.buckets import Assignment, assign
from stdit.data.scan.scan import scan
from stdit.data.toy import ToySettings, make_toy

LATENT_CHANNELS, STRIDE = 16, (4, 8, 8)  # of Wan 2.1
GROWTH_WANTED, CACHE_WANTED = 50.0, 20.0  # MB; multiple of the better loop
CACHE_READS = 2000  # per trial, at least: fewer take no longer than starting a thread


class Item(NamedTuple):
    row: int
    occurrence: int
    bucket: int


class Read(NamedTuple):
    """One read, with the loader's choice of start and crop, and the file's size and fps from the manifest."""

    path: str
    count: int
    size: tuple[int, int]
    fps: float
    start: float
    crop: tuple[float, float]
    source_size: tuple[int, int] = (0, 0)
    source_fps: float = 0.0


class Set(NamedTuple):
    name: str
    manifest: Manifest
    assignment: Assignment
    config: DataConfig
    items: list[Item]
    reads: list[Read]


def plain_pyav(read: Read) -> np.ndarray:
    """Seeks, decodes on one thread, takes the frame nearest to each time, scales and converts with swscale, crops."""
    out = []
    times = [read.start + k / read.fps for k in range(read.count)]
    with av.open(read.path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        origin = float((stream.start_time or 0) * stream.time_base)
        if read.start > 1.0:
            container.seek(int((read.start + origin) / stream.time_base), stream=stream)
        shown = None
        for frame in container.decode(stream):
            now = frame.time - origin
            while shown is not None and len(out) < read.count and times[len(out)] <= (shown.time - origin + now) / 2:
                out.append(pixels(shown, read))
            shown = frame
            if len(out) == read.count:
                break
        while len(out) < read.count:
            out.append(pixels(shown, read))
    return np.stack(out)


def pixels(frame: av.VideoFrame, read: Read) -> np.ndarray:
    size = covering_size((frame.width, frame.height), read.size)
    return cut(frame.reformat(*size, "rgb24", interpolation="BICUBIC", threads=1).to_ndarray(), read)


def cut(frames: Any, read: Read) -> Any:
    """Crops (…, H, W, 3) to the read's size."""
    (height, width), (x, y) = frames.shape[-3:-1], read.crop
    left, top = round((width - read.size[0]) * x), round((height - read.size[1]) * y)
    return frames[..., top : top + read.size[1], left : left + read.size[0], :]


def plain_torchcodec(read: Read) -> np.ndarray:
    """The frames shown half a source frame after each time, which are the nearest, scaled by torchcodec's transform.

    Uses its default mode, which scans the file: the approximate mode misses frames of some of these files.
    """
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    size = covering_size(read.source_size, read.size)
    decoder = VideoDecoder(
        read.path,
        dimension_order="NHWC",
        num_ffmpeg_threads=1,
        transforms=[Resize((size[1], size[0]))],
    )
    begin, end = decoder.metadata.begin_stream_seconds or 0.0, decoder.metadata.end_stream_seconds - 1e-4
    first = begin + read.start + 0.5 / read.source_fps
    times = [min(first + k / read.fps, end) for k in range(read.count)]
    return np.ascontiguousarray(cut(decoder.get_frames_played_at(times).data, read))


class Reads(torch.utils.data.Dataset):
    def __init__(self, loop: Callable[[Read], np.ndarray], reads: Sequence[Read]) -> None:
        self.loop, self.reads = loop, reads

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.loop(self.reads[index]))


def make_set(name: str, folder: Path, config: DataConfig, count: int) -> Set:
    manifest = scan(folder, uncaptioned=True, workers=1).manifest
    assignment = assign(manifest, config)
    rows = np.flatnonzero(assignment.bucket >= 0)
    taken = rows[np.arange(count) % len(rows)]
    items = [Item(int(row), n // len(rows), int(assignment.bucket[row])) for n, row in enumerate(taken)]
    reads: list[Read] = []

    def note(path: str, count: int, size: tuple[int, int], fps: float, start: float, crop: Any, *_: Any) -> np.ndarray:
        reads.append(Read(path, count, size, fps, start, crop))
        return np.zeros((count, size[1], size[0], 3), np.uint8)

    Loader(manifest, assignment, config, seed=0, workers=0, reader=note).fetch(items, epoch=0)
    for number, item in enumerate(items):
        clip = manifest[item.row]
        reads[number] = reads[number]._replace(source_size=(clip.width, clip.height), source_fps=clip.fps)
    return Set(name, manifest, assignment, config, items, reads)


def loader_of(data: Set, workers: int, cache: Cache | None = None) -> Callable[[], Iterator[torch.Tensor]]:
    """The loader's clips. Cached latents are copied, so that they are really read, and repeated up to CACHE_READS."""
    config = data.config if cache is None else data.config.fixed()
    loader = Loader(data.manifest, data.assignment, config, seed=0, cache=cache, workers=workers)
    items = data.items if cache is None else data.items * math.ceil(CACHE_READS / len(data.items))

    def clips() -> Iterator[torch.Tensor]:
        for (example,) in loader.iterate([[item] for item in items], epoch=0):
            assert example.weight == 1, example.failure
            yield example.frames if cache is None else example.latents.clone()

    return clips


def loop_of(data: Set, loop: Callable[[Read], np.ndarray], beside: bool) -> Callable[[], Iterator[torch.Tensor]]:
    if not beside:
        return lambda: (torch.from_numpy(loop(read)) for read in data.reads)
    # started once, like ours: only reading is compared
    reads = Reads(loop, data.reads)
    loader = torch.utils.data.DataLoader(reads, None, num_workers=1, prefetch_factor=4, persistent_workers=True)
    return lambda: iter(loader)


def make_cache(data: Set, folder: Path) -> Cache:
    settings = latent_settings(data.config.fixed(), "benchmark")
    cache = Cache.create(folder, settings)
    tensors = {}
    for row in data.assignment.rows().tolist():
        shape = data.assignment.shapes[data.assignment.bucket[row]]
        size = shape.latent(STRIDE)
        latents = torch.randn(LATENT_CHANNELS, size.frames, size.height, size.width)
        tensors[latent_key(data.manifest[row].id, shape)] = latents
    cache.write_shard("all", tensors, {})
    return Cache.open(folder, settings)


def compare(data: Set, folder: Path, trials: int, with_torchcodec: bool) -> dict[str, Any]:
    cache = make_cache(data, folder)
    loops = {"PyAV": plain_pyav} | ({"torchcodec": plain_torchcodec} if with_torchcodec else {})
    differs = {name: agreement(data, loop) for name, loop in loops.items()}
    found: dict[str, Any] = {"set": data.name, "reads": len(data.reads), "files": len({r.path for r in data.reads})}
    found |= {"shapes": sorted({f"{r.size[0]}x{r.size[1]}x{r.count}" for r in data.reads}), "fps": data.config.fps}
    found["mean_difference_of_frames"] = differs
    for beside in (False, True):
        runs = {"stdit, files": loader_of(data, int(beside)), "stdit, cache": loader_of(data, int(beside), cache)}
        runs |= {name: loop_of(data, loop, beside) for name, loop in loops.items()}
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for trial in range(-1, trials):  # the first is a warm-up
            order = list(runs)[trial % len(runs) :] + list(runs)[: trial % len(runs)]
            for name in order:
                gc.collect()
                start = time.perf_counter()
                count = sum(1 for _ in runs[name]())
                seconds = time.perf_counter() - start
                assert count >= len(data.items)
                if trial >= 0:
                    rates[name].append(count / seconds)
        better = [max(rates[name][t] for name in loops) for t in range(trials)]
        row = {name: statistics.median(values) for name, values in rates.items()}
        row["files_over_better_loop"] = statistics.median(a / b for a, b in zip(rates["stdit, files"], better))
        row["cache_over_better_loop"] = statistics.median(a / b for a, b in zip(rates["stdit, cache"], better))
        found["beside" if beside else "here"] = row
        shown = ", ".join(f"{name} {row[name]:.1f}" for name in runs)
        print(
            f"{data.name}, {'beside' if beside else 'here'}: clips/s {shown}; files "
            f"{row['files_over_better_loop']:.2f} × the better loop (wanted 1), cache "
            f"{row['cache_over_better_loop']:.1f} × (wanted {CACHE_WANTED:g})",
            flush=True,
        )
    return found


def agreement(data: Set, loop: Callable[[Read], np.ndarray]) -> float:
    """Mean difference (of 255) between a loop's frames and the loader's; large if it read other frames."""
    ours = loader_of(data, 0)()
    differences = []
    for read, frames in zip(data.reads[:: max(1, len(data.reads) // 16)], list(ours)[:: max(1, len(data.reads) // 16)]):
        theirs = loop(read)
        assert theirs.shape == tuple(frames.shape)
        differences.append(float(np.abs(theirs.astype(int) - frames.numpy().astype(int)).mean()))
    assert max(differences) < 12, f"{loop.__name__} reads other frames: {differences}"
    return statistics.mean(differences)


def memory_growth(data: Set, reads: int, cache: Cache | None) -> dict[str, Any]:
    """Resident memory of this process and its children while reading clips."""
    config = data.config if cache is None else data.config.fixed()
    loader = Loader(data.manifest, data.assignment, config, seed=0, cache=cache, workers=1)
    batches = ([data.items[n % len(data.items)]] for n in range(reads))
    sizes = []
    for number, (example,) in enumerate(loader.iterate(batches, epoch=0), 1):
        assert example.weight == 1
        if number % max(1, reads // 50) == 0:
            gc.collect()
            sizes.append(resident())
    settled = len(sizes) // 10
    growth = max(sizes[settled:]) - sizes[settled]
    what = "files" if cache is None else "cache"
    print(
        f"memory over {reads} clips from {what}: {sizes[settled]:.0f} MB after a tenth, at most {max(sizes):.0f} MB, "
        f"growth {growth:.1f} MB (wanted: {GROWTH_WANTED:g})",
        flush=True,
    )
    return {"from": what, "reads": reads, "megabytes": [round(size, 1) for size in sizes], "growth": growth}


def resident() -> float:
    """MB of this process and its children (Linux)."""
    pids = [os.getpid()]
    for task in Path("/proc/self/task").iterdir():
        pids += map(int, (task / "children").read_text().split())
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def find_torchcodec(folder: str | None) -> str | None:
    """torchcodec's version, or None. Without a system FFmpeg, restarts this process with PyAV's libraries."""
    if folder:
        sys.path.append(folder)
    if importlib.util.find_spec("torchcodec") is None:
        print("torchcodec is not installed")
        return None
    bundled = Path(av.__file__).parents[1] / "av.libs"
    if ctypes.util.find_library("avutil") is None and "STDIT_FFMPEG" not in os.environ and bundled.is_dir():
        links = tempfile.mkdtemp(prefix="stdit-ffmpeg-")
        for library in bundled.iterdir():  # libavutil-5809ad29.so.60.26.102 as libavutil.so.60
            name, _, version = library.name.partition(".so.")
            os.symlink(library, Path(links) / f"{name.rpartition('-')[0]}.so.{version.split('.')[0]}")
        path = os.pathsep.join(filter(None, (links, str(bundled), os.environ.get("LD_LIBRARY_PATH"))))
        environment = {**os.environ, "LD_LIBRARY_PATH": path, "STDIT_FFMPEG": links}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    if links := os.environ.get("STDIT_FFMPEG"):
        atexit.register(shutil.rmtree, links, ignore_errors=True)
    return importlib.metadata.version("torchcodec")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("rates", "memory"))
    parser.add_argument("--reads", type=int, default=200, help="clips per trial")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--memory-reads", type=int, default=10_000)
    parser.add_argument("--videos", type=Path, default=Path(os.environ.get("STDIT_VIDEOS", "../shared/videos")))
    parser.add_argument("--torchcodec", metavar="FOLDER")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    version = find_torchcodec(args.torchcodec) if args.only != "memory" else None
    found: dict[str, Any] = {"av": av.__version__, "torch": torch.__version__, "torchcodec": version or "not available"}
    with tempfile.TemporaryDirectory() as folder:
        make_toy(Path(folder) / "toy", ToySettings(clips=40, held_out=0, image_share=0.0), lambda *_: None)
        toy_config = DataConfig(shapes=["64x64x9", "80x48x9", "48x80x9"], fps=8.0)
        toy = make_set("toy clips", Path(folder) / "toy", toy_config, args.reads)
        sets = [toy]
        if (args.videos / "asl").is_dir():
            real_config = DataConfig(shapes=["320x240x17"], fps=16.0)
            sets.append(make_set("real clips, 640x480 h264", args.videos / "asl", real_config, args.reads))
        else:
            print(f"{args.videos}/asl is not there: toy clips alone")
        if args.only != "memory":
            found["rates"] = [
                compare(data, Path(folder) / f"cache{number}", args.trials, version is not None)
                for number, data in enumerate(sets)
            ]
        if args.only != "rates":
            cache = make_cache(toy, Path(folder) / "memory")
            found["memory"] = [memory_growth(toy, args.memory_reads, one) for one in (None, cache)]
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
