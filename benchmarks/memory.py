"""The memory that `--dry-run` predicts, against what trainings take: small ones on a CPU, mostly activations.

Each training runs in a process of its own for a few steps, on rendered clips, by the trainer itself. Its memory is what
the resident set grows by at most, from before the models are built, where a tiny training has run before, so that
libraries are there. Freed tensors go back to the system at once (MALLOC_MMAP_THRESHOLD_).

python benchmarks/memory.py                      # a table; exit status 1 if one is more than 15 % off
python benchmarks/memory.py --only attention     # one of them
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HONEST = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "10000000", "MALLOC_TRIM_THRESHOLD_": "65536"}
GOAL = 0.15  # of the measured memory that the prediction may be off
LEAST = 0.5  # share of the activations in what is predicted
STEPS = 2
MODEL = {"preset": "toy", "dim": 192, "heads": 4, "layers": 8, "ffn_dim": 768, "frequency_dim": 64}
CASES: dict[str, list[str]] = {
    "none": [],
    "every 2nd": ["parallel.recompute=2"],
    "every 3rd, bf16, EMA": ["parallel.recompute=3", "run.precision=bf16", "optimizer.ema.decay=0.99"],
    "attention": ["parallel.recompute=attention"],
    "all": ["parallel.recompute=all"],
    "attention, half of the tokens routed": [
        "parallel.recompute=attention", "objective.flow.routing={share: 0.5, start: 1, end: 7}",
    ],
    "LoRA": ["model.preset=null", "model.lora.rank=8", "text.trained=null"],
    "all, ZeRO 2": ["parallel.recompute=all", "parallel.deepspeed=zero2.json"],
}  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Clips, a VAE, a model folder to fine-tune, and a config."""
    import torch
    import yaml

    from stdit.data.scan.scan import scan
    from stdit.data.toy import ToySettings, make_toy
    from stdit.models.transformer import STDiT, TransformerConfig
    from stdit.text.encoders import TextEncoder
    from stdit.text.small import build_word_tokenizer, small_umt5
    from stdit.vae.autoencoder import CausalVAE, VaeConfig
    from stdit.weights.io import save_transformer, save_vae

    toy = ToySettings(clips=60, held_out=1, shapes=("64x64", "96x64"), scales=(1.0,), seconds=(0.7,), fps=(16,),
                      image_share=0.2)  # fmt: skip
    make_toy(folder / "clips", toy)
    scan(folder / "clips" / "train", out=folder / "manifest.parquet")
    torch.manual_seed(1)
    vae = VaeConfig(base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,), z_dim=4, patch_size=2)
    save_vae(CausalVAE(vae), folder / "vae")
    sizes = MODEL | {"in_channels": 4, "out_channels": 4, "text_dim": 32, "text_padding": 32}
    save_transformer(STDiT(TransformerConfig.preset(str(sizes.pop("preset")), **sizes)), folder / "init")
    tokenizer = build_word_tokenizer(["a small red circle moves left"])
    TextEncoder(small_umt5(len(tokenizer), 32, 1, 2), tokenizer).save(
        folder / "text" / "text_encoder", folder / "text" / "tokenizer"
    )
    buckets = {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 500_000}
    (folder / "zero2.json").write_text(json.dumps({"zero_optimization": buckets}))
    config = {
        "model": MODEL,
        "vae": {"path": "vae"},
        "text": {"trained": {"dim": 32, "layers": 1, "heads": 2}, "padding": 32},
        "data": {"manifest": "manifest.parquet", "shapes": ["64x64x9", "96x64x9", "64x64"], "fps": 16, "workers": 0},
        "plan": {"largest_clips_per_step": 24, "tokens_per_pack": 6000},
        "optimizer": {"ema": {"decay": 0}},
        "log": {"tensorboard": False, "progress": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def measure(case: str) -> dict[str, Any]:
    """Runs a training in the present folder. Returns predicted and measured bytes."""
    from stdit.training.config import load_config
    from stdit.training.engine.parallel import World, join_world
    from stdit.training.setup.forecast import forecast
    from stdit.training.setup.resolve import resolve
    from stdit.training.trainer import Trainer

    told = [*CASES[case], *(["model.init=init", "text.path=text"] if case == "LoRA" else [])]
    config = resolve(load_config("config.yaml", told))
    predicted = forecast(config, 1).configured.memory
    world: World = join_world()

    def train(settings: list[str], steps: int) -> None:
        trainer = Trainer(load_config("config.yaml", settings), world)
        trainer.prepare(resolve(trainer.config))
        for clips in _steps(trainer, steps):
            trainer.accumulate(clips)
            trainer.update()

    small = [f"model.{name}={size}" for name, size in (("dim", 24), ("heads", 2), ("layers", 2), ("ffn_dim", 48))]
    train([*(told if case != "LoRA" else []), *small, "objective.flow.routing=null"], 1)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    train(told, STEPS)
    measured = _resident("VmHWM") - before
    return {
        "case": case, "predicted": predicted.total, "activations": predicted.activations, "measured": measured,
    }  # fmt: skip


def _steps(trainer: Any, steps: int) -> Any:
    from stdit.training.batches import StepLoader

    loader = StepLoader(trainer.components.plan_of, trainer.components.loader, 0, 1, 0)
    with contextlib.closing(loader):
        for _ in range(steps):
            yield next(loader.steps)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def in_its_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What work(*arguments) returns in a fork of this process, which has the libraries and nothing else."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            with os.fdopen(writer, "w") as out:
                json.dump(work(*arguments), out)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as found:
        answer = found.read()
    os.waitpid(child, 0)
    return json.loads(answer)


def table(rows: list[dict[str, Any]], say: Callable[[str], None]) -> bool:
    """Prints Markdown. Returns whether all rows meet the goal."""
    good = True
    say("| recompute | predicted, MB | of it activations | measured, MB | predicted / measured |")
    say("|---|---|---|---|---|")
    for row in rows:
        ratio, share = row["predicted"] / row["measured"], row["activations"] / row["predicted"]
        good = good and abs(ratio - 1) <= GOAL and share >= LEAST
        predicted, measured = (f"{row[name] / 1e6:.0f}" for name in ("predicted", "measured"))
        say(f"| {row['case']} | {predicted} | {share:.0%} | {measured} | {ratio:.2f} |")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    told = parser.parse_args()
    if any(name not in os.environ for name in HONEST):  # which the C library reads when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | HONEST)
    import stdit.training.run
    import stdit.training.setup.forecast  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        in_its_own_process(make_inputs, Path(folder))
        rows = []
        for case in told.only:
            rows.append(in_its_own_process(measure, case))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        os.chdir("/")
    return 0 if table(rows, print) else 1


if __name__ == "__main__":
    sys.exit(main())
