"""Times each family of open weights against its reference: forward, and forward with backward.

Models have two or three blocks of the family's head width, with random weights made by diffusers and loaded here.
Outputs and gradients are asserted equal before anything is timed. Reference and stdit alternate; the result is the
median of the pairs' ratios.

    python benchmarks/families.py                        # all families, CPU, two threads
    python benchmarks/families.py --only Wan LTX-Video --device cuda --scale 4
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import CLOCKS, alternate, interval, matmul_rate, relative

import stdit
from stdit.models.transformer import count_parameters, transformer_flops

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "weights"))
from references import FAMILIES, randomise  # the oracles of the tests: how each reference is called

GOAL = 1.03
TOLERANCE = (1e-5, 1e-4)  # relative distance of outputs and of the latents' gradient


@dataclass(frozen=True)
class Case:
    """A reference model and its inputs.

    settings: arguments of the reference's class.
    latents: T', H' and W'.
    text: number of text tokens per clip, padding included.
    given: other conditions.
    """

    settings: dict[str, Any]
    latents: tuple[int, int, int]
    text: int
    given: dict[str, Any] = field(default_factory=dict)


def _heads(count: int, width: int, **more: Any) -> dict[str, Any]:
    return {"num_attention_heads": count, "attention_head_dim": width, **more}


def _pixart_like(count: int, width: int, **more: Any) -> dict[str, Any]:
    return _heads(count, width, cross_attention_dim=count * width, **more)


CASES = {
    "Wan": Case(_heads(6, 128, ffn_dim=4608, num_layers=2), (5, 32, 32), 512),
    "Wan I2V": Case(
        _heads(6, 128, ffn_dim=4608, num_layers=2, in_channels=36, image_dim=1280, added_kv_proj_dim=768),
        (5, 32, 32),
        512,
    ),
    "LTX-Video": Case(_pixart_like(12, 64, num_layers=2), (5, 16, 16), 128, {"fps": 25}),
    "PixArt": Case(
        _pixart_like(10, 72, num_layers=3, caption_channels=4096, sample_size=128), (8, 32, 32), 120,
        {"size": (256, 256)},
    ),
    "Latte": Case(
        _pixart_like(
            10, 72, num_layers=2, caption_channels=4096, in_channels=4, out_channels=8, sample_size=64, video_length=8,
            patch_size=2, attention_bias=True, activation_fn="gelu-approximate", norm_type="ada_norm_single",
            num_embeds_ada_norm=1000, norm_elementwise_affine=False, norm_eps=1e-6,
        ),
        (8, 32, 32),
        120,
    ),
    "Allegro": Case(_pixart_like(8, 96, num_layers=2), (5, 32, 32), 512),
    "Cosmos-Predict": Case(
        _heads(
            6, 128, num_layers=2, in_channels=16, out_channels=16, text_embed_dim=1024, extra_pos_embed_type=None,
            rope_scale=(1.0, 3.0, 3.0),
        ),
        (5, 32, 32),
        512,
        {"fps": 24},
    ),
}  # fmt: skip


def measure(name: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Checks and times a family. Returns seconds, ratios, and shares of the machine's matrix-product rate."""
    family, device = FAMILIES[name], torch.device(args.device)
    frames, height, width = case.latents
    grid = (frames, height * args.scale, width * args.scale)
    theirs = randomise(family.build(case.settings), 0).to(device)
    with tempfile.TemporaryDirectory() as place:
        theirs.save_pretrained(place)
        ours = stdit.load_transformer(place, device=device)
    config = ours.config
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    latents = normal(args.clips, config.latent_channels, *grid)
    t = torch.rand(args.clips, generator=generator).to(device)
    text = normal(args.clips, case.text, config.text_dim)
    mask = torch.ones(args.clips, case.text, dtype=torch.bool, device=device)
    given = dict(case.given)
    if config.image_channels:
        given["image"] = normal(args.clips, config.image_channels, *grid)
    if config.image_text_dim:
        given["image_text"] = normal(args.clips, 257, config.image_text_dim)

    def our_forward(x: torch.Tensor = latents) -> torch.Tensor:
        return ours.predict(x, t, text, mask, **given)

    def their_forward(x: torch.Tensor = latents) -> torch.Tensor:
        return family.call(theirs, x, t, text, mask, given)

    ways = {"ours": (ours, our_forward), "theirs": (theirs, their_forward)}

    def step(way: str) -> tuple[torch.Tensor, torch.Tensor]:
        model, forward = ways[way]
        model.zero_grad(set_to_none=True)
        leaf = latents.clone().requires_grad_()
        out = forward(leaf)
        out.square().mean().backward()
        assert leaf.grad is not None
        return out.detach(), leaf.grad

    apart = [relative(found, wanted) for found, wanted in zip(step("ours"), step("theirs"))]
    assert apart[0] <= TOLERANCE[0] and apart[1] <= TOLERANCE[1], f"{name}: {apart}"

    def without_gradients(way: str) -> None:
        with torch.inference_mode():
            ways[way][1]()

    tokens = args.clips * grid[0] * grid[1] * grid[2] // config.patch_volume
    rate = matmul_rate(config.dim, config.ffn_dim, tokens, device, torch.float32, args.clock)
    rate()
    found: dict[str, Any] = {"tokens": tokens, "apart": apart, "parameters": count_parameters(config)}
    flops = _needed(ours, grid, case.text, args.clips)
    for kind, run, times in (("forward", without_gradients, 1), ("with backward", step, 3)):
        run("ours"), run("theirs")
        rates: list[float] = []
        a, b = alternate(
            lambda run=run: run("ours"), lambda run=run: run("theirs"), args.pairs, device, args.clock,
            between=lambda rates=rates: rates.append(rate()),
        )  # fmt: skip
        ratios = [x / y for x, y in zip(a, b)]
        found[kind] = {
            "ours_s": statistics.median(a),
            "theirs_s": statistics.median(b),
            "ratio": statistics.median(ratios),
            "ratio_interval_95": interval(ratios),
            "matmul_flops_per_s": statistics.median(rates),
            "ours_fraction": statistics.median(times * flops / x / r for x, r in zip(a, rates)),
        }
    return found


def _needed(model: stdit.STDiT, grid: tuple[int, int, int], text: int, clips: int) -> int:
    """FLOPs of the matrix products in a forward, without attention over time, which is small."""
    config = model.config
    pt, ph, pw = config.patch
    frames, place = grid[0] // pt, grid[1] // ph * (grid[2] // pw)
    apart = config.attention != "full"
    counts = [place] * frames * clips if apart else [frames * place] * clips
    return transformer_flops(config, counts, [text] * len(counts))


def show(result: dict[str, Any]) -> None:
    console = Console()
    console.width = max(console.width, 130)
    console.print(", ".join(f"{name} {value}" for name, value in result["setting"].items()), highlight=False)
    table = Table("family", "tokens", "forward, stdit / reference", "ratio", "with backward", "ratio", "of the limit")
    for name, found in result["families"].items():
        cells = []
        for kind in ("forward", "with backward"):
            part = found[kind]
            low, high = part["ratio_interval_95"]
            cells += [
                f"{part['ours_s']:.3f} / {part['theirs_s']:.3f} s",
                f"[bold]{part['ratio']:.3f}[/] [{low:.3f}, {high:.3f}]",
            ]
        shares = " / ".join(f"{found[kind]['ours_fraction']:.0%}" for kind in ("forward", "with backward"))
        table.add_row(name, f"{found['tokens']:,}", *cells, shares)
    console.print(table)
    console.print(f"Goal: each ratio ≤ {GOAL}. Of the limit: needed matrix products at the rate measured beside them.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--scale", type=int, default=1, help="multiplies heights and widths of the latents")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a machine shared with others")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    result: dict[str, Any] = {
        "setting": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
            "threads": args.threads,
            "clips": args.clips,
            "pairs": args.pairs,
            "clock": args.clock,
            "torch": torch.__version__,
            "diffusers": __import__("diffusers").__version__,
        },
        "families": {},
    }
    for name in args.only:
        result["families"][name] = measure(name, CASES[name], args)
        print(f"{name} done", file=sys.stderr, flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    show(result)


if __name__ == "__main__":
    main()
