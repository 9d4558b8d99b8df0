"""The video VAE against diffusers' AutoencoderKLWan with the same weights: time, peak memory, memory over length.

Each measurement is a process of its own, in alternating order, after a warm-up with a small clip.

python benchmarks/vae.py                                  # Wan 2.1's own width, 17 and 81 frames at 256×256
python benchmarks/vae.py --base-dim 32 --clock cpu        # a third of the width, on a machine shared with others
python benchmarks/vae.py --layout 2.2 --base-dim 32       # Wan 2.2's layout
python benchmarks/vae.py --long --base-dim 16 --size 96   # only the peak memory of streaming 101 and 1,001 frames
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stdit.vae.autoencoder import CausalVAE
from stdit.vae.config import PRESETS, VaeConfig
from stdit.weights.families.wan_vae import FAMILY


def config_of(args: argparse.Namespace) -> VaeConfig:
    config = PRESETS[f"wan{args.layout}"]
    base = args.base_dim or config.base_dim
    decoder = config.decoder_base_dim and config.decoder_base_dim * base // config.base_dim
    return replace(config, base_dim=base, decoder_base_dim=decoder)


def ours_of(config: VaeConfig) -> CausalVAE:
    torch.manual_seed(0)
    return CausalVAE(config).requires_grad_(False)


def theirs_of(ours: CausalVAE) -> Any:
    """diffusers' VAE, sharing our tensors."""
    from diffusers import AutoencoderKLWan

    values = {k: v for k, v in FAMILY.written(ours.config, "diffusers").items() if not k.startswith("_")}
    with torch.device("meta"):
        theirs = AutoencoderKLWan(**values)
    state = ours.state_dict()
    table = FAMILY.keymap(ours.config, "diffusers").table({name: tuple(t.shape) for name, t in state.items()})
    theirs.load_state_dict(dict(table.to_foreign(state.__getitem__)), assign=True)
    return theirs.eval().requires_grad_(False)


def runs(name: str, config: VaeConfig, side: str) -> Callable[[Tensor], Tensor]:
    """The encoder (frames -> mode of the normalised latents) or decoder (-> frames in [−1, 1]) of an implementation."""
    ours = ours_of(config)
    if name == "stdit":
        return ours.encode if side == "encode" else ours.decode
    theirs = theirs_of(ours)
    if side == "encode":
        return lambda video: ours.normalise(theirs.encode(video).latent_dist.mean)
    return lambda latents: theirs.decode(ours.denormalise(latents)).sample


def input_of(config: VaeConfig, side: str, frames: int, size: int) -> Tensor:
    t, h, w = config.stride
    generator = torch.Generator().manual_seed(1)
    if side == "decode":
        return torch.randn((1, config.z_dim, 1 + (frames - 1) // t, size // h, size // w), generator=generator)
    return torch.rand((1, 3, frames, size, size), generator=generator) * 2 - 1


def flops_of(config: VaeConfig, side: str, given: Tensor) -> int:
    """FLOPs of the convolutions and the attention for the whole clip, counted on the meta device."""
    with torch.device("meta"):
        vae = CausalVAE(config)
    with FlopCounterMode(display=False) as counter:
        vae.encode_moments(given.to("meta")) if side == "encode" else vae.decode_raw(given.to("meta"))
    return counter.get_total_flops()


def convolution_rate(config: VaeConfig, size: int, clock: Callable[[], float]) -> float:
    """FLOP/s of oneDNN's channels-last 3×3×3 convolution, with the channels of the widest level and four frames."""
    c, side = config.decoder_base_dim or config.base_dim, size // config.patch_size
    x = torch.randn(1, 6, side, side, c).movedim(-1, 1)
    weight = torch.randn(c, c, 3, 3, 3)
    start = clock()
    F.conv3d(x, weight, padding=(0, 1, 1))
    return 2 * 27 * c * c * 4 * side * side / (clock() - start)


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def peak_above(work: Callable[[], object]) -> int:
    """Peak resident memory of `work` in bytes, above the memory that is resident before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    return time.perf_counter if args.clock == "wall" else time.process_time


def measure_here(args: argparse.Namespace) -> None:
    """Runs in a process of its own: prints an implementation's time and peak memory, and saves its result to --out."""
    name, side, frames = args.measure.split(",")
    config, results = config_of(args), list[Any]()
    if name == "stream":
        vae, count = ours_of(config), int(frames)
        frame = input_of(config, "encode", 1, args.size)[0, :, 0]
        latent = input_of(config, "decode", 1, args.size)[0]
        runs("stdit", config, side)(input_of(config, side, 5, 32))

        def work() -> None:
            encoded = vae.encode_stream(frame.clone() for _ in range(count))
            decoded = vae.decode_stream(latent.clone() for _ in range(1 + (count - 1) // config.stride[0]))
            results.extend(float(chunk.sum()) for chunk in (encoded if side == "encode" else decoded))
    else:
        run, given = runs(name, config, side), input_of(config, side, int(frames), args.size)
        run(input_of(config, side, 5, 32))  # warm-up

        def work() -> None:
            results.append(run(given))

    clock = clock_of(args)
    start = clock()
    peak = peak_above(work)
    print(json.dumps({"peak": peak, "seconds": clock() - start}))
    if args.out:
        torch.save(results[0], args.out)


def measured(args: argparse.Namespace, what: str, result: Path | None = None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", what, "--layout", args.layout, "--size", str(args.size)]
    command += ["--base-dim", str(args.base_dim or 0), "--threads", str(args.threads or torch.get_num_threads())]
    command += ["--clock", args.clock, *(["--out", str(result)] if result else [])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=("2.1", "2.2"), default="2.1")
    parser.add_argument("--base-dim", type=int, default=0, help="of the encoder; 0: the release's own")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, nargs="+", default=[17, 81])
    parser.add_argument("--sides", nargs="+", default=["encode", "decode"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--out", type=Path, help="write the numbers to a JSON file, too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if args.measure:
        measure_here(args)
        return
    rows: list[dict[str, Any]] = long_rows(args) if args.long else speed_rows(args)
    if args.out:
        args.out.write_text(json.dumps({**vars(args), "out": str(args.out), "rows": rows}, indent=2) + "\n")


def long_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for side in args.sides:
        few, many = (measured(args, f"stream,{side},{frames}")["peak"] for frames in (101, 1001))
        rows.append({"side": side, "101": few, "1001": many, "ratio": many / few})
        print(f"{side}: 101 frames {few >> 20} MiB, 1,001 frames {many >> 20} MiB, ratio {many / few:.3f}", flush=True)
    return rows


def speed_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    config = config_of(args)
    print(f"Wan {args.layout}, base {config.base_dim}, {args.size}x{args.size}, {torch.get_num_threads()} threads")
    rows = []
    for side in args.sides:
        for frames in args.frames:
            pairs, rates = [], []
            for pair in range(args.pairs):
                order = ["stdit", "diffusers"][:: -1 if pair % 2 else 1]
                with tempfile.TemporaryDirectory() as folder:
                    files = {name: Path(folder) / name for name in order}
                    pairs.append({name: measured(args, f"{name},{side},{frames}", files[name]) for name in order})
                    mine, other = (torch.load(files[name]) for name in ("stdit", "diffusers"))
                apart = float((mine - other).norm() / other.norm())
                assert apart <= 1e-5, f"{side}, {frames} frames: {apart:.1e} apart"
                rates.append(convolution_rate(config, args.size, clock_of(args)))
            ratios = [pair["stdit"]["seconds"] / pair["diffusers"]["seconds"] for pair in pairs]
            took = statistics.median(pair["stdit"]["seconds"] for pair in pairs)
            memory = {name: max(pair[name]["peak"] for pair in pairs) for name in pairs[0]}
            share = flops_of(config, side, input_of(config, side, frames, args.size)) / took / statistics.median(rates)
            row = {"side": side, "frames": frames, "apart": apart, "pairs": pairs, "ratio": ratios}
            rows.append(row | {"memory": memory, "share_of_limit": share})
            print(
                f"{side} {frames} frames: {took:.2f} s, {statistics.median(ratios):.2f} of diffusers' time "
                f"({min(ratios):.2f} to {max(ratios):.2f}), {share:.0%} of what oneDNN's direct convolution does; "
                f"{memory['stdit'] >> 20} MiB, {memory['stdit'] / memory['diffusers']:.2f} of its "
                f"{memory['diffusers'] >> 20}; {apart:.0e} apart",
                flush=True,
            )
    return rows


if __name__ == "__main__":
    main()
