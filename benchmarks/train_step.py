"""A whole training step on several ranks: stdit under ZeRO 1 against diffusers' Wan with accelerate (DDP).

Both train the same weights on the same clips, noise, levels and texts, with AdamW and clipping, in the same processes.
A step is: clips to packs (or batches), forward, backward, gradients summed over ranks, clipping, AdamW. stdit deals the
clips with its planner and runs them as packs. diffusers runs batches of equal shape: of each shape every rank gets its
equal share, and what is left over goes to the rank with the least work, so its ranks are as busy as batches allow; all
backward passes but the last are under `no_sync`. Gradients before clipping are asserted equal (1e-5 relative together,
1e-4 each) before anything is timed, the weights after the last step, too. Steps alternate; the slowest rank counts.

    python benchmarks/train_step.py                   # two ranks of one thread each, about five minutes
    python benchmarks/train_step.py --layers 1 --pairs 4
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table as Rows
from timing import interval, matmul_rate, relative
from torch.nn import functional as F
from transformer_step import EQUAL, MIXED, PADDING, Batch, Pair, make_batch, make_pair

from stdit.data.plan.split import StepItems, balance, split
from stdit.models.config import cost_coefficients
from stdit.models.packing import TextPack, TokenPack, output_tokens, pack_clips, pack_texts
from stdit.models.transformer import STDiT, TransformerConfig, count_parameters, transformer_flops
from stdit.training.engine.engine import Engine
from stdit.training.engine.make import ParallelConfig, make_engine
from stdit.training.engine.optimizer import EmaConfig, OptimizerConfig
from stdit.training.engine.parallel import World, join_world, leave_world

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))
from gradients import gradients_of  # as the tests read them

RATE = 1e-4
CLIP = 1.0
GOALS = {"equal": 1.0, "mixed": 1.5}  # times diffusers' useful tokens per second
GRADIENTS, EACH = 1e-5, 1e-4  # relative L2 of all gradients together, and of each; of each tensor of weights
LIMIT = 3600.0  # seconds for all ranks
SETS = {"equal": EQUAL, "mixed": MIXED}
Clips = Sequence[int]  # indices in the step


@dataclass
class PackBatch:
    """The input of `PackModule`."""

    pack: TokenPack
    text: TextPack
    target: torch.Tensor  # (N, pt·ph·pw·C)


class PackModule(torch.nn.Module):
    """The transformer with its loss, the sum of all squared errors of a pack."""

    def __init__(self, transformer: STDiT) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, batch: PackBatch) -> torch.Tensor:
        return (self.transformer(batch.pack, batch.text).float() - batch.target).square().sum()


class Ours:
    """stdit's step."""

    def __init__(self, pair: Pair, world: World) -> None:
        optimizer = OptimizerConfig(lr=RATE, weight_decay=0.0, clip=CLIP, betas=(0.9, 0.95), ema=EmaConfig(0))
        parallel = ParallelConfig(deepspeed="zero1" if world.size > 1 else None)
        self.world, self.patch = world, pair.ours.config.patch
        self.engine: Engine = make_engine(PackModule(pair.ours), optimizer, parallel, "fp32", world)

    def backward(self, batch: Batch, padding: int, packs: Sequence[Clips]) -> None:
        for number, clips in enumerate(packs):
            pack = pack_clips([batch.latents[i] for i in clips], [batch.levels[i] for i in clips], self.patch)
            text = pack_texts([batch.texts[i] for i in clips], padding)
            target = torch.cat([output_tokens(batch.targets[i], self.patch) for i in clips])
            self.engine.backward(PackBatch(pack, text, target), 1 / batch.elements, number == len(packs) - 1)

    def update(self) -> float:
        return self.engine.step(RATE)

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name.removeprefix("transformer."): one for name, one in gradients_of(self.engine).items()}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name.removeprefix("transformer."): one for name, one in self.engine.module.state_dict().items()}


class Theirs:
    """diffusers' step, as a script with accelerate makes it."""

    def __init__(self, pair: Pair, world: World) -> None:
        from accelerate import Accelerator

        self.world, self.accelerator = world, Accelerator(cpu=True)
        optimizer = torch.optim.AdamW(pair.theirs.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
        self.model, self.optimizer = self.accelerator.prepare(pair.theirs, optimizer)

    def backward(self, batch: Batch, padding: int, batches: Sequence[Clips]) -> None:
        width = padding or len(batch.texts[0])
        for number, clips in enumerate(batches):
            latents = torch.stack([batch.latents[i] for i in clips])
            t = torch.stack([batch.levels[i] for i in clips]) * 1000
            texts = [batch.texts[i] for i in clips]
            text = torch.stack([F.pad(one, (0, 0, 0, width - len(one))) for one in texts])
            target = torch.stack([batch.targets[i] for i in clips])
            reduces = number == len(batches) - 1
            with nullcontext() if reduces else self.accelerator.no_sync(self.model):
                found = self.model(latents, t, text, return_dict=False)[0]
                loss = (found.float() - target).square().sum() / batch.elements
                self.accelerator.backward(loss * self.world.size)  # DDP averages over ranks

    def update(self) -> float:
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    @property
    def network(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.model)


@dataclass
class Dealt:
    """What each rank runs, by rank."""

    packs: list[list[Clips]]
    batches: list[list[Clips]]
    balance: float  # of the packs
    balance_of_batches: float


def deal(batch: Batch, config: TransformerConfig, ranks: int, bound: int) -> Dealt:
    tokens = [clip[0].numel() // (config.patch_volume) for clip in batch.latents]
    linear, quadratic = cost_coefficients(config)
    work = [linear * n + quadratic * n * n for n in tokens]
    shapes = [tuple(clip.shape) for clip in batch.latents]
    kinds = {shape: number for number, shape in enumerate(dict.fromkeys(shapes))}
    bucket = np.array([kinds[shape] for shape in shapes])
    first = [shapes.index(shape) for shape in kinds]
    row, zero = np.arange(len(shapes)), np.zeros(len(shapes), np.int64)
    items = StepItems(row, zero, bucket, row, [tokens[i] for i in first], [work[i] for i in first])
    micro_steps = split(items, ranks, bound)
    packs = [[[item.row for item in micro[rank]] for micro in micro_steps] for rank in range(ranks)]

    batches: list[list[Clips]] = [[] for _ in range(ranks)]
    load, left = [0] * ranks, []
    for kind in range(len(kinds)):
        clips = np.flatnonzero(bucket == kind).tolist()
        each = len(clips) // ranks
        for rank in range(ranks):
            if each:
                batches[rank].append(clips[rank * each : (rank + 1) * each])
                load[rank] += each * work[clips[0]]
        left += clips[ranks * each :]
    for clip in sorted(left, key=lambda clip: -work[clip]):
        rank = load.index(min(load))
        load[rank] += work[clip]
        same = next((one for one in batches[rank] if shapes[one[0]] == shapes[clip]), None)
        batches[rank].append([clip]) if same is None else same.append(clip)
    return Dealt(packs, batches, balance(micro_steps), sum(load) / ranks / max(load))


@dataclass
class Times:
    """Seconds of the slowest rank, by pair."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)


def timed(step: Callable[[], object], world: World) -> float:
    """Seconds until the last rank is done."""
    world.gather(None)
    start = time.perf_counter()
    step()
    return max(world.gather(time.perf_counter() - start))


def measure(name: str, text: str, args: argparse.Namespace, config: TransformerConfig, world: World) -> dict[str, Any]:
    pair = make_pair(config, world.device, torch.float32)
    shapes = SETS[name]
    varied = [8 + (7 * i) % 40 for i in range(len(shapes))]
    lengths, padding = (varied, PADDING) if text == "padded" else ([32] * len(shapes), 0)
    batch = make_batch(shapes, lengths, config, world.device, torch.float32)
    tokens = [clip[0].numel() // config.patch_volume for clip in batch.latents]
    dealt = deal(batch, config, world.size, args.tokens_per_pack)
    packs, batches = dealt.packs[world.rank], dealt.batches[world.rank]
    ours, theirs = Ours(pair, world), Theirs(pair, world)

    ours.backward(batch, padding, packs)
    theirs.backward(batch, padding, batches)
    wanted = {key: parameter.grad for key, parameter in theirs.network.named_parameters()}
    found = dict(pair.table.to_foreign(ours.gradients().__getitem__))
    together = relative(*(torch.cat([one[key].flatten() for key in found]) for one in (found, wanted)))
    apart = {key: relative(one, wanted[key]) for key, one in found.items()}
    worst = max(apart, key=apart.__getitem__)
    assert together <= GRADIENTS and apart[worst] <= EACH, f"gradients: {together:.2e}, of {worst} {apart[worst]:.2e}"
    ours.update(), theirs.update()

    def our_step() -> None:
        ours.backward(batch, padding, packs)
        ours.update()

    def their_step() -> None:
        theirs.backward(batch, padding, batches)
        theirs.update()

    rate = matmul_rate(config.dim, config.ffn_dim, sum(tokens) // world.size, world.device, torch.float32)
    rate()
    times, rates = Times(), list[float]()
    for number in range(args.pairs):
        for mine in (True, False) if number % 2 == 0 else (False, True):
            seconds = timed(our_step if mine else their_step, world)
            (times.ours if mine else times.theirs).append(seconds)
        world.gather(None)
        rates.append(sum(world.gather(rate())))
    other = dict(theirs.network.named_parameters())
    weights = max(relative(one, other[key]) for key, one in pair.table.to_foreign(ours.weights().__getitem__))
    assert weights <= EACH, f"weights differ by {weights:.2e} after {args.pairs + 1} steps"
    flops = 3 * transformer_flops(config, tokens, [length + (padding > 0) for length in lengths])
    faster = [b / a for a, b in zip(times.ours, times.theirs)]
    return {
        "clips": len(shapes),
        "shapes": len({tuple(clip.shape) for clip in batch.latents}),
        "tokens": sum(tokens),
        "text": f"zero-padded to {PADDING}" if padding else f"{lengths[0]} tokens each",
        "packs": len(packs),
        "batches": [len(one) for one in dealt.batches],
        "balance": dealt.balance,
        "balance_of_batches": dealt.balance_of_batches,
        "ours_s": statistics.median(times.ours),
        "theirs_s": statistics.median(times.theirs),
        "ours_tokens_per_s": sum(tokens) / statistics.median(times.ours),
        "theirs_tokens_per_s": sum(tokens) / statistics.median(times.theirs),
        "faster": statistics.median(faster),
        "faster_interval_95": interval(faster),
        "matmul_flops_per_s": statistics.median(rates),
        "ours_fraction": statistics.median(flops / t / r for t, r in zip(times.ours, rates)),
        "theirs_fraction": statistics.median(flops / t / r for t, r in zip(times.theirs, rates)),
        "gradients_apart": together,
        "gradient_apart": apart[worst],
        "weights_apart": weights,
        "raw": {"ours": times.ours, "theirs": times.theirs, "matmul_flops_per_s": rates},
    }


def rank(args: argparse.Namespace) -> None:
    """One of the ranks; the first writes what was measured."""
    torch.set_num_threads(args.threads)
    world = join_world()
    config = TransformerConfig.preset(args.preset, **({"layers": args.layers} if args.layers else {}))
    settings = {}
    for name in args.only:
        for text in args.text:
            settings[f"{name} {text}"] = measure(name, text, args, config, world)
    if world.is_main:
        result = {
            "setting": {
                "model": f"{args.preset} ({config.layers} blocks of width {config.dim})",
                "parameters": count_parameters(config),
                "ranks": world.size,
                "threads a rank": args.threads,
                "device": platform.machine() + " CPU",
                "torch": torch.__version__,
                **{name: __import__(name).__version__ for name in ("diffusers", "accelerate", "deepspeed")},
            },
            "settings": settings,
        }
        args.result.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    dist.barrier()
    leave_world()


def launch(args: argparse.Namespace) -> dict[str, Any]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(args.ranks)}
        environment |= {"OMP_NUM_THREADS": str(args.threads), "LOCAL_WORLD_SIZE": str(args.ranks)}
        environment |= {"ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, __file__, *sys.argv[1:], "--result", str(result)]
        ranks = [
            subprocess.Popen(command, env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(args.ranks)
        ]
        try:
            end = time.monotonic() + LIMIT
            statuses = [one.wait(max(1, end - time.monotonic())) for one in ranks]
        finally:
            for one in ranks:
                one.kill()
        if any(statuses):
            sys.exit(f"ranks ended with {statuses}")
        return json.loads(result.read_text())


def show(result: dict[str, Any]) -> None:
    console = Console()
    console.width = max(console.width, 120)
    console.print(", ".join(f"{name} {value}" for name, value in result["setting"].items()), highlight=False)
    table = Rows("", *(name.replace(" ", ", ") for name in result["settings"]))

    def row(title: str, cell: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(title, *(cell(found) for found in result["settings"].values()))

    row("clips, shapes, tokens", lambda r: f"{r['clips']}, {r['shapes']}, {r['tokens']:,}")
    row("text", lambda r: r["text"])
    row("packs a rank / batches of each", lambda r: f"{r['packs']} / {', '.join(map(str, r['batches']))}")
    row("balance, stdit / diffusers", lambda r: f"{r['balance']:.3f} / {r['balance_of_batches']:.3f}")
    row("diffusers step", lambda r: f"{r['theirs_s']:.3f} s, {r['theirs_tokens_per_s']:,.0f} tokens/s")
    row("stdit step", lambda r: f"{r['ours_s']:.3f} s, {r['ours_tokens_per_s']:,.0f} tokens/s")
    row(
        "times as many tokens/s",
        lambda r: "[bold]{:.2f}[/] [{:.2f}, {:.2f}]".format(r["faster"], *r["faster_interval_95"]),
    )
    table.add_row("goal", *(f"{GOALS[name.split()[0]]:.1f}" for name in result["settings"]))
    row("matrix products of all ranks", lambda r: f"{r['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s")
    row(
        "needed work at this rate, stdit / diffusers",
        lambda r: f"{r['ours_fraction']:.0%} / {r['theirs_fraction']:.0%}",
    )
    row(
        "apart: gradients, each, weights",
        lambda r: f"{r['gradients_apart']:.0e}, {r['gradient_apart']:.0e}, {r['weights_apart']:.0e}",
    )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--layers", type=int, default=2, help="how many blocks (0: the preset's)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--tokens-per-pack", type=int, default=65_536)
    parser.add_argument("--only", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--text", nargs="+", default=["padded", "plain"], choices=["padded", "plain"])
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.result:
        return rank(args)
    result = launch(args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if args.json:
        print(json.dumps(result))
    else:
        show(result)


if __name__ == "__main__":
    main()
