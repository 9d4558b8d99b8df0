"""One training step of the transformer (forward, backward, no optimizer): stdit against diffusers' Wan.

Both run in one process, with the same weights, clips, noise levels and texts. Outputs and gradients are asserted equal
before anything is timed. The steps are timed in alternating pairs; the result is the median of the pairs' ratios.

    python benchmarks/transformer_step.py                      # CPU: six blocks of the preset small
    python benchmarks/transformer_step.py --device cuda --dtype bf16 --preset 1.3B --layers 0 --scale 2
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from rich.console import Console
from rich.table import Table as Rows
from timing import CLOCKS, alternate, interval, matmul_rate, relative, timed

from stdit.models.packing import pack_clips, pack_texts, unpack_clips
from stdit.models.transformer import STDiT, TransformerConfig, count_parameters, transformer_flops
from stdit.weights.families.wan import FAMILY
from stdit.weights.keymap import Table

# Latent shapes (T', H', W'); --scale multiplies heights and widths. With a VAE of 4×8×8 they are 128 pixels high.
ASPECTS = ((16, 24), (24, 16), (20, 20), (14, 28))
EQUAL = [(7, 16, 24)] * 8
MIXED = [(1, h, w) for h, w in ASPECTS for _ in range(4)] + [(t, h, w) for h, w in ASPECTS for t in (3, 5, 7, 9)]
GOALS = {"equal": 1.03, "mixed": 0.85}
PADDING = 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative L2 distance of outputs and of gradients that two correct computations in the dtype may have
TOLERANCE = {"fp32": (1e-4, 1e-4), "bf16": (3e-2, 1e-1)}


@dataclass
class Batch:
    """Clips with their noise levels, texts and loss targets."""

    latents: list[torch.Tensor]
    levels: list[torch.Tensor]
    texts: list[torch.Tensor]
    targets: list[torch.Tensor]

    @property
    def elements(self) -> int:
        return sum(target.numel() for target in self.targets)


@dataclass
class Pair:
    """Both models with the same weights, and the table that translates their keys."""

    ours: STDiT
    theirs: torch.nn.Module
    table: Table


def make_pair(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> Pair:
    """Both models with random weights (a head of zeros has no gradients), each tensor in diffusers' dtype for it."""
    torch.manual_seed(0)
    settings = {name: value for name, value in FAMILY.written(config, "diffusers").items() if not name.startswith("_")}
    theirs = WanTransformer3DModel(**settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
            elif "norm" in name:
                parameter.normal_(mean=1.0, std=0.1)
            elif not name.endswith("scale_shift_table"):
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    wide = tuple(theirs._keep_in_fp32_modules)
    theirs.to(device)
    for name, module in theirs.named_modules():
        for own, parameter in module.named_parameters(prefix=name, recurse=False):
            if not any(part in wide for part in own.split(".")):
                parameter.data = parameter.data.to(dtype)
    with torch.device("meta"):
        ours = STDiT(config)
    table = FAMILY.keymap(config, "diffusers").table({n: tuple(t.shape) for n, t in ours.state_dict().items()})
    state = {name: tensor.clone() for name, tensor in table.to_native(theirs.state_dict().__getitem__)}
    ours.load_state_dict(state, strict=True, assign=True)
    return Pair(ours, theirs, table)


def make_batch(
    shapes: list[tuple[int, int, int]],
    lengths: list[int],
    config: TransformerConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    order = list(range(len(shapes)))
    random.Random(0).shuffle(order)  # like the clips of a plan, not sorted by shape
    return Batch(
        [normal(config.in_channels, *shapes[i]) for i in order],
        [torch.rand((), generator=generator) for _ in order],
        [normal(lengths[i], config.text_dim) for i in order],
        [normal(config.out_channels, *shapes[i]) for i in order],
    )


def our_step(model: STDiT, batch: Batch, padding: int) -> list[torch.Tensor]:
    """Runs the batch as one pack. Returns the clips' outputs and leaves the gradients in the model."""
    model.zero_grad(set_to_none=True)
    pack = pack_clips(batch.latents, batch.levels, model.config.patch)
    out = unpack_clips(model(pack, pack_texts(batch.texts, padding)), pack, model.config.patch)
    loss = sum((o.float() - target.float()).square().sum() for o, target in zip(out, batch.targets)) / batch.elements
    loss.backward()
    return out


def their_step(model: torch.nn.Module, batch: Batch, padded: list[torch.Tensor], groups: list[list[int]]):
    """Runs forward and backward for each group of clips of equal shape; gradients add up."""
    model.zero_grad(set_to_none=True)
    out: list[torch.Tensor] = [torch.empty(0)] * len(batch.latents)
    for group in groups:
        latents = torch.stack([batch.latents[i] for i in group])
        t = torch.stack([batch.levels[i] for i in group]).to(latents.device) * 1000
        text = torch.stack([padded[i] for i in group])
        found = model(latents, t, text, return_dict=False)[0]
        target = torch.stack([batch.targets[i] for i in group])
        ((found.float() - target.float()).square().sum() / batch.elements).backward()
        for i, clip in zip(group, found):
            out[i] = clip
    return out


def check_equal(pair: Pair, ours: list[torch.Tensor], theirs: list[torch.Tensor], dtype: str) -> tuple[float, float]:
    """Returns the largest relative difference of a clip's output and of a gradient, asserted to be within tolerance."""
    outputs = max(relative(a.detach(), b.detach()) for a, b in zip(ours, theirs))
    grads = {name: parameter.grad for name, parameter in pair.ours.named_parameters()}
    wanted = {name: parameter.grad for name, parameter in pair.theirs.named_parameters()}
    apart = {name: relative(grad, wanted[name]) for name, grad in pair.table.to_foreign(grads.__getitem__)}
    worst = max(apart, key=lambda name: apart[name])
    limits = TOLERANCE[dtype]
    assert outputs <= limits[0], f"outputs differ by {outputs:.2e}"
    assert apart[worst] <= limits[1], f"gradients of {worst} differ by {apart[worst]:.2e}"
    return outputs, apart[worst]


def measure(
    pair: Pair,
    shapes: list[tuple[int, int, int]],
    text: str,
    pairs: int,
    device: torch.device,
    dtype: str,
    clock: str,
) -> dict:
    """Times one set of clips with padded or plain texts. Returns a column of the table, as JSON."""
    config = pair.ours.config
    varied = [8 + (7 * i) % 40 for i in range(len(shapes))]
    lengths, padding = (varied, PADDING) if text == "padded" else ([32] * len(shapes), 0)
    batch = make_batch(shapes, lengths, config, device, DTYPES[dtype])
    width = padding or lengths[0]
    padded = [torch.cat([t, t.new_zeros(width - len(t), t.shape[1])]) for t in batch.texts]
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, clip in enumerate(batch.latents):
        by_shape.setdefault(tuple(clip.shape), []).append(i)
    ways = {"batched by shape": list(by_shape.values()), "one clip at a time": [[i] for i in range(len(shapes))]}

    def ours() -> list[torch.Tensor]:
        return our_step(pair.ours, batch, padding)

    def theirs(way: str) -> list[torch.Tensor]:
        return their_step(pair.theirs, batch, padded, ways[way])

    apart = check_equal(pair, ours(), theirs("batched by shape"), dtype)
    tokens = [t * h * w // config.patch_volume for t, h, w in (tuple(clip.shape[1:]) for clip in batch.latents)]
    rate = matmul_rate(config.dim, config.ffn_dim, sum(tokens), device, DTYPES[dtype], clock)
    rate()
    trial = {way: [] for way in ways}
    for _ in range(3):
        for way in ways:
            trial[way].append(timed(lambda way=way: theirs(way), device, clock))
    trial_medians = {way: statistics.median(times) for way, times in trial.items()}
    way = min(trial_medians, key=lambda name: trial_medians[name])
    rates: list[float] = []
    ours_s, theirs_s = alternate(ours, lambda: theirs(way), pairs, device, clock, between=lambda: rates.append(rate()))
    ratios = [a / b for a, b in zip(ours_s, theirs_s)]
    flops = 3 * transformer_flops(config, tokens, [length + (padding > 0) for length in lengths])
    machine = statistics.median(rates)
    return {
        "text": f"zero-padded to {PADDING}" if padding else f"{lengths[0]} tokens each, no padding",
        "clips": len(shapes),
        "images": sum(shape[0] == 1 for shape in shapes),
        "shapes": len(by_shape),
        "tokens": sum(tokens),
        "text_tokens": {"ours": sum(length + (padding > 0) for length in lengths), "theirs": width * len(shapes)},
        "pairs": pairs,
        "theirs_is": way,
        "theirs_trial_s": trial_medians,
        "ours_s": statistics.median(ours_s),
        "theirs_s": statistics.median(theirs_s),
        "ratio": statistics.median(ratios),
        "ratio_interval_95": interval(ratios),
        "needed_flops": flops,
        "matmul_flops_per_s": machine,
        "ours_fraction": statistics.median(flops / t / r for t, r in zip(ours_s, rates)),
        "theirs_fraction": statistics.median(flops / t / r for t, r in zip(theirs_s, rates)),
        "outputs_apart": apart[0],
        "gradients_apart": apart[1],
        "raw": {"ours": ours_s, "theirs": theirs_s, "matmul_flops_per_s": rates},
    }


def show(result: dict) -> None:
    console = Console()
    console.width = max(console.width, 120)
    console.print(", ".join(f"{name} {value}" for name, value in result["setting"].items()), highlight=False)
    table = Rows("", *(name.replace(" ", ", ") for name in result["settings"]))

    def row(title: str, cell: Callable[[dict], str]) -> None:
        table.add_row(title, *(cell(found) for found in result["settings"].values()))

    row("clips", lambda r: f"{r['clips']}, {r['images']} of them images")
    row("shapes", lambda r: str(r["shapes"]))
    row("tokens", lambda r: f"{r['tokens']:,}")
    row("text", lambda r: r["text"])
    row("text tokens, stdit / diffusers", lambda r: f"{r['text_tokens']['ours']:,} / {r['text_tokens']['theirs']:,}")
    row("diffusers runs", lambda r: r["theirs_is"])
    for way in ("batched by shape", "one clip at a time"):
        row(f"diffusers {way}, 3 runs", lambda r, way=way: f"{r['theirs_trial_s'][way]:.3f} s")
    row("diffusers step", lambda r: f"{r['theirs_s']:.3f} s")
    row("stdit step", lambda r: f"{r['ours_s']:.3f} s")
    row("ratio", lambda r: "[bold]{:.3f}[/] [{:.3f}, {:.3f}]".format(r["ratio"], *r["ratio_interval_95"]))
    table.add_row("goal", *(str(GOALS[name.split()[0]]) if "padded" in name else "" for name in result["settings"]))
    row("matrix products here", lambda r: f"{r['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s")
    row("needed work at this rate, stdit", lambda r: f"{r['ours_fraction']:.0%}")
    row("needed work at this rate, diffusers", lambda r: f"{r['theirs_fraction']:.0%}")
    row("outputs, gradients apart", lambda r: f"{r['outputs_apart']:.0e}, {r['gradients_apart']:.0e}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--layers", type=int, default=6, help="how many blocks (0: the preset's)")
    parser.add_argument("--scale", type=int, default=1, help="multiplies heights and widths of the latents")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a machine shared with others")
    parser.add_argument("--only", nargs="+", default=["equal", "mixed"], choices=["equal", "mixed"])
    parser.add_argument("--text", nargs="+", default=["padded", "plain"], choices=["padded", "plain"])
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    config = TransformerConfig.preset(args.preset, **({"layers": args.layers} if args.layers else {}))
    pair = make_pair(config, device, dtype)
    sets = {"equal": EQUAL, "mixed": MIXED}
    settings = {}
    for name in args.only:
        shapes = [(t, h * args.scale, w * args.scale) for t, h, w in sets[name]]
        for text in args.text:
            settings[f"{name} {text}"] = measure(pair, shapes, text, args.pairs, device, args.dtype, args.clock)
    result = {
        "setting": {
            "model": f"{args.preset} ({config.layers} blocks of width {config.dim})",
            "parameters": count_parameters(config),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
            "dtype": args.dtype,
            "threads": args.threads,
            "clock": args.clock,
            "torch": torch.__version__,
            "diffusers": __import__("diffusers").__version__,
        },
        "settings": settings,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if args.json:
        print(json.dumps(result))
    else:
        show(result)


if __name__ == "__main__":
    main()
