"""A clip through a VAE in the smallest tiles, compared with whole frames: difference, seams, time and memory.

python benchmarks/vae_tiles.py --vae runs/asl/vae/model --clip VIDEOS/mixed/bikes.mp4
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from stdit.data.decode.video import read_frames
from stdit.pixels import to_video
from stdit.shapes import VideoShape
from stdit.vae import tiles
from stdit.weights.io import load_vae


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    work()
    began = time.perf_counter()
    return work(), time.perf_counter() - began


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, object]:
    vae = load_vae(args.vae, dtype=torch.float32).eval()
    shape = VideoShape.parse(f"{args.size}x{args.frames}")
    frames = read_frames(str(args.clip), shape.frames, (shape.width, shape.height), args.fps)
    video = to_video(torch.from_numpy(frames))[None]
    latent = shape.latent(vae.config.stride)
    side = tiles.SMALLEST_TILE
    result: dict[str, object] = {
        "clip": args.clip.name,
        "shape": str(shape),
        "latents": f"{latent.width}x{latent.height}x{latent.frames}",
    }
    latents = vae.encode(video)
    for name, run, given in (("encoder", vae.encode, video), ("decoder", vae.decode, latents)):
        sizes = (vae.config, name, 1)
        whole_bytes = tiles.working_bytes(*sizes, 1, latent.height, latent.width, 4)
        memory = tiles.working_bytes(*sizes, 1, side, side, 4)
        memory += tiles.coarse_bytes(vae.config, name, 1, latent.frames, latent.height, latent.width, 4)
        cut = tiles.slices(vae.config, name, (1, latent.frames, latent.height, latent.width), 4, memory)
        whole, seconds = timed(lambda run=run, given=given: run(given))
        tiled, tiled_seconds = timed(lambda run=run, given=given, memory=memory: run(given, memory=memory))
        found = {
            "tile": f"{cut.columns}x{cut.rows}",
            "relative_difference": float((tiled - whole).norm() / whole.norm()),
            "time_over_whole": tiled_seconds / seconds,
            "memory_over_whole": memory / whole_bytes,  # by the estimates of `tiles`
        }
        if name == "decoder":
            found["psnr_to_whole"] = 10 * math.log10(4 / float((tiled - whole).double().square().mean()))
            shared = torch.zeros(shape.width, dtype=torch.bool)
            for (_, end), (start, _) in itertools.pairwise(tiles.spans(latent.width, cut.columns)):
                shared[start * vae.config.stride[2] : end * vae.config.stride[2]] = True
            for what, decoded in (("tiled", tiled), ("whole", whole)):
                error = (decoded - video).abs().mean((0, 1, 2, 3))
                found[f"seam_over_elsewhere_{what}"] = float(error[shared].mean() / error[~shared].mean())
        result[name] = found
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="a VAE's folder")
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--size", default="384x256")
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--fps", type=float, default=15.0)
    print(json.dumps(measure(parser.parse_args()), indent=1))


if __name__ == "__main__":
    main()
