"""A run's model folder, sampled here and by diffusers' WanPipeline from the same noise: how far apart are they?

    python benchmarks/wan_pipeline.py --model demo/dit/model --prompt "a large green circle moving right on a black …"

Two shapes, guidance 1 and 4, Euler and UniPC. Prints latents' relative L2 difference and the largest difference of a
frame's value, of 255. Exit status 1 where latents differ by more than 1e-4 or frames by more than 2.
"""

from __future__ import annotations

import argparse
import sys

import diffusers
import numpy as np
import torch

from stdit import Pipeline, SampleRequest
from stdit.diffusion.solvers import euler_config, unipc_config
from stdit.shapes import VideoShape


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--shape", action="append", help="WIDTHxHEIGHTxFRAMES; default: two of the folder's")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()

    ours = Pipeline.load(arguments.model)
    theirs = diffusers.WanPipeline.from_pretrained(arguments.model)
    theirs.set_progress_bar_config(disable=True)
    videos = [shape for shape in ours.settings.shapes if not VideoShape.parse(shape).is_image]
    far = False
    print(f"{'shape':>12} {'solver':>6} {'guidance':>8} {'latents':>9} {'frames':>6}")
    for name in arguments.shape or (videos[0], videos[-1]):
        shape = VideoShape.parse(name)
        latent = shape.latent(ours.vae.config.stride)
        size = (1, ours.vae.config.z_dim, latent.frames, latent.height, latent.width)
        noise = torch.randn(size, generator=torch.Generator().manual_seed(0))
        for solver, config in (("euler", euler_config(1.0)), ("unipc", unipc_config(1.0))):
            theirs.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
            for guidance in (1.0, 4.0):
                asked = dict(
                    height=shape.height, width=shape.width, num_frames=shape.frames, guidance_scale=guidance,
                    num_inference_steps=arguments.steps, max_sequence_length=ours.text_padding or 512,
                    prompt=arguments.prompt,
                )  # fmt: skip
                expected = theirs(latents=noise.clone(), output_type="latent", **asked).frames
                images = theirs(latents=noise.clone(), output_type="pil", **asked).frames[0]
                settings = dict(
                    size=(shape.width, shape.height), frames=shape.frames, steps=arguments.steps,
                    guidance=guidance, noise=noise, solver=config,
                )  # fmt: skip
                frames = ours(arguments.prompt, **settings)
                latents = next(ours.sample_latents(SampleRequest([arguments.prompt], **settings)))
                apart = float((latents - expected[0]).norm() / expected[0].norm())
                frame = int(np.abs(frames.astype(int) - np.stack([np.asarray(i) for i in images]).astype(int)).max())
                far |= apart > 1e-4 or frame > 2
                print(f"{name:>12} {solver:>6} {guidance:8.0f} {apart:9.1e} {frame:6d}", flush=True)
    return int(far)


if __name__ == "__main__":
    sys.exit(main())
