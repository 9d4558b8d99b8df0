"""Loading a checkpoint of Wan's 1.3B (random weights, bf16), one file and shards, beside reading the file's bytes.

Every round of every loader is a fresh process: it loads a tiny model first (imports), then reads the files' bytes
into a buffer that is allocated and touched before, then loads the checkpoint and looks at every weight. The ratio of
those two is what counts. Memory is the peak of the resident set above what it was before the load; pages of a
mapped file count.

    python benchmarks/load_weights.py                 # about 12 GB of free disk
    python benchmarks/load_weights.py --layers 3 --rounds 3
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOADERS = ("stdit", "stdit, fp32 to bf16", "diffusers", "safetensors")


def write(folder: Path, layers: int | None) -> None:
    import torch

    from stdit import save_transformer
    from stdit.models.transformer import PRESETS, STDiT

    config = PRESETS["1.3B"] if layers is None else dataclasses.replace(PRESETS["1.3B"], layers=layers)
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for name, shape, limit in (("one", config, 10**12), ("sharded", config, 10**9), ("tiny", None, 10**12)):
        shape = shape or dataclasses.replace(config, dim=24, heads=2, ffn_dim=32, layers=2, text_dim=8)
        with torch.device("meta"):
            model = STDiT(shape).to(torch.bfloat16)
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            for piece in parameter.data.view(-1).split(len(noise)):
                piece.copy_(noise[: len(piece)])
        save_transformer(model, folder / name, shard_bytes=limit)
        if name != "sharded":
            save_transformer(model.float(), folder / f"{name}-fp32")


def loader(name: str) -> Callable[[Path], Any]:
    import torch

    if name == "diffusers":
        from diffusers import WanTransformer3DModel

        return lambda place: WanTransformer3DModel.from_pretrained(
            place, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True
        ).state_dict()
    if name == "safetensors":
        from safetensors.torch import load_file

        return lambda place: {k: t for file in place.glob("*.safetensors") for k, t in load_file(file).items()}
    from stdit import load_transformer

    dtype = torch.bfloat16 if "fp32" in name else None
    return lambda place: load_transformer(place, dtype).state_dict()


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure(name: str, folder: Path, layout: str, cold: bool) -> None:
    """In a process of its own: prints seconds (wall, processor) of the read and of the load, and the peak in bytes."""
    import mmap

    suffix = "-fp32" if "fp32" in name else ""
    load = loader(name)
    load(folder / f"tiny{suffix}")
    place = folder / f"{layout}{suffix}"
    files = sorted(place.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)

    def timed(work: Callable[[], object]) -> list[float]:
        if cold:
            for file in files:
                with open(file, "rb") as held:
                    os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        wall, processor = time.perf_counter(), time.process_time()
        work()
        return [time.perf_counter() - wall, time.process_time() - processor]

    buffer = mmap.mmap(-1, max(file.stat().st_size for file in files))
    for page in range(0, len(buffer), mmap.PAGESIZE):
        buffer[page] = 1

    def read() -> None:
        for file in files:
            with open(file, "rb", buffering=0) as held, memoryview(buffer) as view:
                done = 0
                while count := held.readinto(view[done:]):
                    done += count

    reading = timed(read)
    buffer.close()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    kept: dict[str, Any] = {}

    def whole() -> None:
        kept.update(load(place))
        if not name.startswith("stdit"):  # which has looked at every weight
            for tensor in kept.values():
                tensor.aminmax()

    loading = timed(whole)
    print(json.dumps({"read": reading, "load": loading, "peak": status("VmHWM") - before, "size": size}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="of 30")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a machine shared with others")
    parser.add_argument(
        "--cold", action="store_true", help="drop the files from the system's cache before each reading"
    )
    parser.add_argument("--folder", type=Path, help="for the checkpoints; removed afterwards")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure[0], args.folder, args.measure[1], args.cold)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write(Path(folder), args.layers)
        cases = [(name, layout) for name in LOADERS for layout in ("one", "sharded")]
        cases = [case for case in cases if case != ("stdit, fp32 to bf16", "sharded")]
        found: dict[tuple[str, str], list[dict[str, Any]]] = {case: [] for case in cases}
        for turn in range(args.rounds):
            for case in cases if turn % 2 == 0 else reversed(cases):
                command = [sys.executable, __file__, "--folder", folder, "--measure", *case]
                done = subprocess.run(
                    [*command, *["--cold"] * args.cold], check=True, stdout=subprocess.PIPE, text=True
                )
                found[case].append(json.loads(done.stdout.splitlines()[-1]))
    clock = ("wall", "cpu").index(args.clock)
    print(f"{args.rounds} rounds, {'cold' if args.cold else 'warm'}, {args.clock} seconds, medians")
    print(f"{'':22}{'':9}{'file':>9}{'read':>9}{'load':>9}{'ratio':>8}{'peak / loaded':>15}")
    for (name, layout), rounds in found.items():
        loaded = rounds[0]["size"] / (2 if "fp32" in name else 1)
        seconds = [statistics.median(one[what][clock] for one in rounds) for what in ("read", "load")]
        ratio = statistics.median(one["load"][clock] / one["read"][clock] for one in rounds)
        peak = max(one["peak"] for one in rounds) / loaded
        row = f"{name:22}{layout:9}{rounds[0]['size'] / 1e9:6.2f} GB{seconds[0]:9.2f}{seconds[1]:9.2f}"
        print(f"{row}{ratio:8.2f}{peak:15.3f}")


if __name__ == "__main__":
    main()
