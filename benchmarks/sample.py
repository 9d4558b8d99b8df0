"""How fast sampling is, and what speed costs.

python benchmarks/sample.py --model demo/dit/model                 # all three
python benchmarks/sample.py --model demo/dit/model --only packs
python benchmarks/sample.py --only peer --width 1536               # random weights of Wan 1.3B's width, two blocks

peer: the same folder, noise, steps and guidance here and in diffusers' WanPipeline, from the prompt to frames, in
    alternating pairs: CPU seconds of ours over theirs, by shape; how far apart latents and frames are. Exit status 1
    where latents differ by more than 1e-4, relative, or frames by more than 2 of 255.
packs: eight prompts of four shapes in one call, in one call a shape, and one by one; and the largest difference of a
    frame's value, of 255.
reuse: `--reuse`, fewer steps, and diffusers' first-block cache. Each row is compared with the same program's own run
    without it, at the same noise: PSNR of the frames, decoded by one VAE, the mean over prompts; and seconds of
    denoising. diffusers runs WanPipeline on the same folder.
long: held-out captions of the toy set at 1, 2, 4 and 8 times a length that the model was trained at, whole and in
    windows of it: the share of clips that show what the caption says, read from the pixels of all frames; how far the
    mean colour of the first and the last quarter of the frames are apart (of 255); seconds a clip.

Medians of `--times` runs on one thread: a second core that is busy would decide.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.hooks import FirstBlockCacheConfig
from timing import alternate, interval, relative

from stdit import Pipeline, SampleRequest
from stdit.data.toy import held_out_prompts
from stdit.diffusion.solvers import unipc_config
from stdit.evaluation.toy import read_clip, score_readings
from stdit.shapes import VideoShape
from stdit.text.small import build_word_tokenizer, small_umt5

PROMPTS = (
    "a large green circle moving right on a black background",
    "a small yellow square moving down on a black background",
    "a small magenta triangle moving left on a grey background",
)
SHAPES = ("64x64x17", "96x48x17", "48x96x9", "64x64x25")
PEER_SHAPES = ("64x64x17", "64x64x65", "128x128x17", "128x128x65")
CAPTIONS = 24
TOLERANCES = (0.03, 0.05, 0.1, 0.15, 0.2, 0.3)


def decibels(ours: list[np.ndarray], full: list[np.ndarray]) -> float:
    errors = [((a.astype(float) - b.astype(float)) ** 2).mean() for a, b in zip(ours, full)]
    return float(np.mean([10 * np.log10(255**2 / max(error, 1e-6)) for error in errors]))


def timed(run: Callable[[], list[torch.Tensor]], times: int) -> tuple[list[torch.Tensor], float]:
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        found = run()
        seconds.append(time.perf_counter() - begun)
    return found, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; default: random weights (peer only)")
    parser.add_argument("--width", type=int, default=1536, help="of random weights, a multiple of 128")
    parser.add_argument("--prompt", action="append")
    parser.add_argument("--shape", action="append", help="repeatable for peer")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--solver", action="append", choices=("euler", "unipc"))
    parser.add_argument("--only", choices=("peer", "packs", "reuse", "long"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = [args.only] if args.only else ["peer", "packs", "reuse", "long"]
    if "peer" in parts:
        with tempfile.TemporaryDirectory() as temporary:
            if not args.model:
                save_random(args.width, temporary)
            far = peer(args.model or temporary, args.shape or list(PEER_SHAPES), args)
        if far:
            sys.exit(1)
    if "packs" in parts:
        packs(Pipeline.load(args.model), args.steps, args.guidance, args.times)
    if "reuse" in parts:
        reuse(args)
    if "long" in parts:
        long(Pipeline.load(args.model), VideoShape.parse((args.shape or SHAPES)[0]), args.steps, args.guidance)


def long(pipeline: Pipeline, shape: VideoShape, steps: int, guidance: float) -> None:
    """Clips of several lengths, whole and in windows."""
    prompts = held_out_prompts(CAPTIONS, 0)
    print(f"{CAPTIONS} held-out captions, {steps} steps, guidance {guidance:g}, UniPC, one thread")
    for times in (1, 2, 4, 8):
        frames = times * (shape.frames - 1) + 1
        for window in (None, shape.frames) if times > 1 else (None,):
            begun = time.perf_counter()
            clips = pipeline(
                prompts, size=(shape.width, shape.height), frames=frames, steps=steps, guidance=guidance,
                solver="unipc", window=window, tokens_per_pack=4096,
            )  # fmt: skip
            seconds = (time.perf_counter() - begun) / len(prompts)
            scores = score_readings(prompts, [read_clip(clip) for clip in clips])
            quarter = max(1, frames // 4)
            ends = [[part.mean((0, 1, 2)) for part in (clip[:quarter], clip[-quarter:])] for clip in clips]
            drift = float(np.mean([np.abs(first - last).mean() for first, last in ends]))
            shares = ", ".join(f"{name} {100 * score.share:.0f}" for name, score in scores.items())
            what = "whole" if window is None else f"in windows of {window}"
            print(f"  {frames:4d} frames {what:16}: {shares} %; drift {drift:.1f}; {seconds:.2f} s", flush=True)


def save_random(width: int, folder: str) -> None:
    """A model folder of diffusers: Wan's transformer with two blocks, Wan's autoencoder, and a small text encoder."""
    torch.manual_seed(0)
    tokenizer = build_word_tokenizer(list(PROMPTS))
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=width // 128, attention_head_dim=128, text_dim=64, ffn_dim=width * 35 // 6, num_layers=2
    )
    text = small_umt5(len(tokenizer), 64, 1, 2).eval()
    scheduler = diffusers.UniPCMultistepScheduler.from_config(unipc_config(3.0))
    diffusers.WanPipeline(tokenizer, text, diffusers.AutoencoderKLWan(), scheduler, transformer).save_pretrained(folder)


def peer(folder: str, shapes: list[str], args: argparse.Namespace) -> bool:
    """Prints a row a shape. Returns whether any is too far apart."""
    ours, theirs = Pipeline.load(folder), diffusers.WanPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    steps, prompt, far = args.steps, (args.prompt or PROMPTS)[0], False
    print(f"{steps} steps, guidance {args.guidance:g}, one thread: CPU seconds from the prompt to frames")
    for name in shapes:
        shape = VideoShape.parse(name)
        size = (1, ours.vae.config.z_dim, *shape.latent(ours.vae.config.stride).sizes)
        noise = torch.randn(size, generator=torch.Generator().manual_seed(0))
        settings = dict(
            size=(shape.width, shape.height), frames=shape.frames, steps=steps, guidance=args.guidance, noise=noise
        )
        asked = dict(
            prompt=prompt, height=shape.height, width=shape.width, num_frames=shape.frames,
            guidance_scale=args.guidance, num_inference_steps=steps, max_sequence_length=ours.text_padding or 512,
        )  # fmt: skip

        def run_ours(settings: dict[str, Any] = settings, **more: Any) -> np.ndarray:
            return ours(prompt, **settings, **more)

        def run_theirs(
            asked: dict[str, Any] = asked, noise: torch.Tensor = noise, output_type: str = "np"
        ) -> np.ndarray:
            return theirs(latents=noise.clone(), output_type=output_type, **asked).frames[0]

        frames, images = run_ours().astype(int), (run_theirs() * 255).round().astype(int)
        latents, wanted = (
            next(ours.sample_latents(SampleRequest([prompt], **settings))),
            run_theirs(output_type="latent"),
        )
        apart, off = relative(latents, wanted), int(np.abs(frames - images).max())
        far |= apart > 1e-4 or off > 2
        mine, others = alternate(run_ours, run_theirs, args.times, torch.device("cpu"), "cpu")
        ratios = [a / b for a, b in zip(mine, others)]
        low, high = interval(ratios)
        spared, _ = alternate(partial(run_ours, reuse=0.2), run_theirs, 1, torch.device("cpu"), "cpu")
        print(
            f"  {name:>12}  {statistics.median(mine):7.2f} s of {statistics.median(others):7.2f} s: "
            f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}); with --reuse 0.2 "
            f"{spared[0] / statistics.median(others):.2f}; latents {apart:.1e}, frames {off} of 255",
            flush=True,
        )
    return far


def packs(pipeline: Pipeline, steps: int, guidance: float, times: int) -> None:
    """Eight prompts of four shapes, sampled together and apart."""

    def requests(number: int) -> list[SampleRequest]:
        shape = VideoShape.parse(SHAPES[number // 2])
        return [
            SampleRequest(
                [PROMPTS[number % len(PROMPTS)]], size=(shape.width, shape.height), frames=shape.frames, steps=steps,
                guidance=guidance, indices=[number],
            )
        ]  # fmt: skip

    def sampled(calls: list[list[SampleRequest]]) -> list[torch.Tensor]:
        return [clip for call in calls for clip in pipeline.sample_together(call)]

    apart = [requests(number) for number in range(8)]
    by_shape = [[*apart[number], *apart[number + 1]] for number in range(0, 8, 2)]
    together = [[request for call in apart for request in call]]
    print(f"eight prompts, {', '.join(SHAPES)}, {steps} steps, guidance {guidance:g}, one thread")
    alone, whole = timed(partial(sampled, apart), times)
    frames = [pipeline.decode(clip).astype(int) for clip in alone]
    print(f"  one by one        {whole:6.2f} s")
    for what, calls in (("two of a shape", by_shape), ("all in one call", together)):
        clips, seconds = timed(partial(sampled, calls), times)
        off = max(int(np.abs(pipeline.decode(a).astype(int) - b).max()) for a, b in zip(clips, frames))
        print(f"  {what:16}  {seconds:6.2f} s  {whole / seconds:5.2f} ×  frames differ by {off} of 255", flush=True)


def reuse(args: argparse.Namespace) -> None:
    prompts, shape = args.prompt or list(PROMPTS), VideoShape.parse((args.shape or SHAPES)[0])
    ours = Pipeline.load(args.model)
    latent = shape.latent(ours.vae.config.stride)
    noise = torch.randn(
        len(prompts), ours.vae.config.z_dim, *latent.sizes, generator=torch.Generator().manual_seed(0)
    )  # fmt: skip
    theirs = diffusers.WanPipeline.from_pretrained(args.model)
    theirs.set_progress_bar_config(disable=True)

    def decode(latents: list[torch.Tensor]) -> list[np.ndarray]:
        return [ours.decode(one) for one in latents]

    def mine(solver: str, steps: int, reuse: float) -> list[torch.Tensor]:
        request = SampleRequest(
            prompts, size=(shape.width, shape.height), frames=shape.frames, steps=steps, guidance=args.guidance,
            noise=noise, solver=solver, reuse=reuse,
        )  # fmt: skip
        return list(ours.sample_latents(request))

    def diffusers_latents() -> list[torch.Tensor]:
        found = theirs(
            prompt=prompts, height=shape.height, width=shape.width, num_frames=shape.frames,
            guidance_scale=args.guidance, num_inference_steps=args.steps, latents=noise.clone(), output_type="latent",
            max_sequence_length=ours.text_padding or 512,
        ).frames  # fmt: skip
        return list(found)

    print(f"{len(prompts)} prompts, {shape}, {args.steps} steps, guidance {args.guidance:g}, one thread")
    for solver in args.solver or ("unipc", "euler"):
        full, whole = timed(partial(mine, solver, args.steps, 0.0), args.times)
        frames = decode(full)
        print(f"{solver}: every step {whole:.2f} s", flush=True)
        for reuse in TOLERANCES:
            found, seconds = timed(partial(mine, solver, args.steps, reuse), args.times)
            print(f"  reuse {reuse:<5g} {whole / seconds:5.2f} × {decibels(decode(found), frames):6.1f} dB", flush=True)
        for share in (0.8, 2 / 3, 0.5, 0.4, 1 / 3):
            steps = round(share * args.steps)
            found, seconds = timed(partial(mine, solver, steps, 0.0), args.times)
            print(f"  {steps} steps    {whole / seconds:5.2f} × {decibels(decode(found), frames):6.1f} dB", flush=True)
    full, whole = timed(diffusers_latents, args.times)
    frames = decode(full)
    print(f"WanPipeline, its folder's solver: every step {whole:.2f} s")
    for threshold in (0.02, 0.05, 0.1, 0.2, 0.4):
        theirs.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        found, seconds = timed(diffusers_latents, args.times)
        what = f"first-block cache {threshold:g}"
        print(f"  {what:22} {whole / seconds:5.2f} × {decibels(decode(found), frames):6.1f} dB", flush=True)
        theirs.transformer.disable_cache()


if __name__ == "__main__":
    main()
