"""Two ranks under ZeRO 1, 2 and 3 against one rank of plain torch, on mixed shapes, in fp32; adapters in bf16 too.

All ranks run in two processes, one after the other under every stage, since starting them costs most of the time. AdamW
hides errors in the gradients' scale, so gradients before clipping are compared, and SGD is run too, on the whole model.
test_exact_steps.py has all combinations of ranks and stages.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from children import Child, finish_together
from exact_gradients import state_of
from tensor_files import load_file
from tiny_models import save_tiny_model

from stdit.shipped import DEEPSPEED
from stdit.training.config import LoraConfig
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.setup.lora import adapter_of
from stdit.weights.lora.read import read_adapter
from stdit.weights.sources import find

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("zero_worker.py")
STEPS = 6
STAGES = ("zero1", "zero2", "zero3")
KINDS = ("frozen", "routed", "lora", "lora-bf16")
VAE_STEPS = 4
LIMIT = 1800.0  # seconds for all trainings together, on a machine that is busy with other things
MUON_STEPS = 3
MUON = [("muon", stage) for stage in STAGES] + [("lora-bf16-muon", "zero3"), ("vae-muon", "zero2")]
# of state and losses, three times what was seen or more: a last bit of fp32 becomes 0.4 % of a number in bf16
MUON_LIMITS = {"muon": (1e-4, 1e-5), "lora-bf16-muon": (1e-2, 2e-3), "vae-muon": (3e-3, 5e-4)}
VAE_STAGES = ("zero0", "zero1", "zero2-buckets")


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders NAME-OPTIMIZER with gradients.safetensors, seen.json and checkpoints; NAME is one, zero1, zero2, …"""
    out = tmp_path_factory.mktemp("zero")
    config = (tiny / "flow.yaml").read_text().replace("tokens_per_pack: 200", "tokens_per_pack: 100")
    assert "tokens_per_pack: 100" in config
    config += f"eval: {{manifest: {tiny / 'manifest.parquet'}, clips: 4}}\n"
    (out / "flow.yaml").write_text(config)
    vae = yaml.safe_load((tiny / "vae.yaml").read_text())
    vae["plan"] = {"largest_clips_per_step": 4, "tokens_per_pack": 48 * 32 * 5}
    vae["objective"]["vae"] = {"wavelet": 0.5, "outlier": 1.0, "discriminator": {"dim": 8, "layers": 3, "lr": 2e-3}}
    (out / "vae.yaml").write_text(yaml.safe_dump(vae))
    partitioned = json.loads((DEEPSPEED / "zero3.json").read_text())
    partitioned["zero_optimization"]["stage3_param_persistence_threshold"] = (
        0  # parameters as small as ours are cut too
    )
    (out / "zero3.json").write_text(json.dumps(partitioned))
    jsons = {stage: DEEPSPEED / f"{stage}.json" for stage in STAGES} | {"zero3": out / "zero3.json"}
    buckets = json.loads(jsons["zero2"].read_text())
    buckets["zero_optimization"]["reduce_bucket_size"] = 1000  # many: each holds the same gradients on both ranks
    jsons["zero2-buckets"] = out / "buckets.json"
    jsons["zero2-buckets"].write_text(json.dumps(buckets))
    jsons["zero0"] = out / "zero0.json"
    jsons["zero0"].write_text(json.dumps({"zero_optimization": {"stage": 0}}))

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    engines = [f"{stage}={jsons[stage]}={STEPS}" for stage in STAGES]
    engines += [f"moved={jsons['zero3']}={STEPS + 2}=zero1"]
    engines += [f"{kind}-{stage}={jsons[stage]}=2" for kind in KINDS for stage in STAGES]
    engines += [f"{kind}-moved={jsons['zero1']}=4={kind}-zero3" for kind in ("frozen", "lora")]
    engines += [f"vae-{stage}={jsons[stage]}={VAE_STEPS}" for stage in VAE_STAGES]
    engines += [f"{kind}-{stage}={jsons[stage]}={MUON_STEPS}" for kind, stage in MUON]
    engines += [f"muon-moved={jsons['zero3']}={MUON_STEPS + 1}=muon-zero1"]
    save_tiny_model(out, heads=2)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["TORCH_EXTENSIONS_DIR"] = str(out / "compiled")
    ranks = [
        start(out, engines, environment | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2"}) for r in (0, 1)
    ]
    alone = [f"one=={STEPS}", f"more=={STEPS + 2}=one", "frozen-one==2", "lora-one==2", "lora-more==4=lora-one"]
    alone += ["frozen-more==4=frozen-one", "lora-bf16-one==2", "routed-one==2"]
    alone += [f"{kind}-one=={MUON_STEPS}" for kind in ("muon", "lora-bf16-muon", "vae-muon")]
    alone += [f"muon-more=={MUON_STEPS + 1}=muon-one"]
    alone += [f"vae-one=={VAE_STEPS}", f"vae-more=={VAE_STEPS + 2}=vae-one"]
    finish_together([*ranks, start(out, alone, environment)], LIMIT)
    (out / "rank0.txt").write_text(ranks[0].output)
    (out / "rank1.txt").write_text(ranks[1].output)
    finish_together(
        [start(out, [f"alone=={STEPS + 2}=zero3", f"vae-alone=={VAE_STEPS + 2}=vae-zero1"], environment)], LIMIT
    )
    return out


def start(out: Path, engines: list[str], environment: dict[str, str]) -> Child:
    return Child([sys.executable, str(WORKER), str(out / "flow.yaml"), str(out), *engines], environment)


def seen(runs: Path, name: str) -> dict[str, Any]:
    return json.loads((runs / name / "seen.json").read_text())


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.double(), other.double()
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_of_deepspeeds_own_is_in_the_log(runs: Path, rank: int) -> None:
    """Neither warnings at every collective nor its memory at start-up: a user's log of many ranks would be buried."""
    lines = (runs / f"rank{rank}.txt").read_text().splitlines()
    assert not [line for line in lines if not line.startswith("schedule.steps was ")]  # ours: the runs go on that way


def test_no_rank_waits_for_a_compiler(runs: Path) -> None:
    """torch's lock around compiling outlives a killed process, and then every later start waits for it for ever."""
    assert not list((runs / "compiled").rglob("*"))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_losses_and_clips_equal_one_rank(runs: Path, stage: str, optimizer: str) -> None:
    expected, found = (load_file(runs / f"{name}-{optimizer}" / "gradients.safetensors") for name in ("one", stage))
    assert expected.keys() == found.keys() and len(found) > 50
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert relative(found[name], gradient) <= 1e-5, name

    expected, found = seen(runs, f"one-{optimizer}"), seen(runs, f"{stage}-{optimizer}")
    assert found["ids"] == expected["ids"]
    assert len(found["losses"]) == STEPS
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["losses"][-1] < 0.9 * found["losses"][0]
    first, second = found["packs"]
    assert all(len(a) == len(b) >= 2 for a, b in zip(first, second))  # the same number of micro-steps, several
    assert any(0 in step for step in first + second)  # and ranks that had nothing to do in one


@pytest.mark.parametrize(("stage", "reductions"), [("zero1", 1), ("zero2", None)])
def test_what_a_step_sends(runs: Path, stage: str, reductions: int | None) -> None:
    """On two ranks: an all-reduce of the fp32 gradients, in ZeRO 1 one a step, in ZeRO 2 one in each micro-step; then
    every rank gets the other's half of the weights. Besides, sums of a few numbers."""
    found = seen(runs, f"{stage}-adamw")
    micro_steps = list(map(len, found["packs"][0]))
    assert len(set(micro_steps)) > 1 and min(micro_steps) > 1
    for sent, count in zip(found["sent"], micro_steps):
        expected = 4 * found["numbers"] * ((reductions or count) + 1 / 2)
        assert expected <= sent <= 1.01 * expected + 2000, (sent / 4 / found["numbers"], count)
    assert seen(runs, "one-adamw")["sent"] == [0] * STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_the_held_out_loss_equals_one_ranks(runs: Path, stage: str) -> None:
    expected, found, later = (seen(runs, f"{name}-adamw")["evaluated"] for name in ("one", stage, "more"))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5) and found["loss"] != later["loss"]
    assert found["loss_by_level"] == pytest.approx(expected["loss_by_level"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_routed_tokens_train_as_on_one_rank(runs: Path, stage: str) -> None:
    """Also where a rank has no clip, and so no token that skips."""
    names = ("routed-one", f"routed-{stage}", "one")
    places = [runs / f"{name}-adamw" / "gradients.safetensors" for name in names]
    expected, found, unrouted = map(load_file, places)
    assert expected.keys() == found.keys() == unrouted.keys()
    assert max(relative(found[name], gradient) for name, gradient in expected.items()) <= 1e-5
    assert min(relative(unrouted[name], gradient) for name, gradient in expected.items()) > 1e-3
    one, other = (seen(runs, f"{name}-adamw")["losses"] for name in names[:2])
    assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_only_what_trains_has_gradients_and_is_kept(runs: Path, stage: str) -> None:
    expected, found = (load_file(runs / f"frozen-{name}-adamw" / "gradients.safetensors") for name in ("one", stage))
    ours = {name for name in found if name.startswith("transformer.")}
    assert expected.keys() == found.keys() and len(ours) > 20
    assert all(".self_attn." in name or name.startswith("transformer.blocks.1.ffn.") for name in ours)
    assert max(relative(found[name], gradient) for name, gradient in expected.items()) <= 1e-5
    kept = Checkpoint.latest(runs / f"frozen-{stage}-adamw")
    assert kept is not None and kept.weights().keys() == found.keys()
    assert seen(runs, f"frozen-{stage}-adamw")["losses"] == pytest.approx(
        seen(runs, "frozen-one-adamw")["losses"], rel=1e-5
    )


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_train_resume_and_are_exported_as_on_one_rank(runs: Path, stage: str) -> None:
    one, other = runs / "lora-one-adamw", runs / f"lora-{stage}-adamw"
    expected, found = (load_file(folder / "gradients.safetensors") for folder in (one, other))
    assert expected.keys() == found.keys() and len(found) == 2 * 2 * 10
    assert all(".lora_" in name for name in found)
    assert all(gradient.any() for gradient in expected.values())
    assert max(relative(found[name], gradient) for name, gradient in expected.items()) <= 1e-5
    assert seen(runs, other.name)["losses"] == pytest.approx(seen(runs, one.name)["losses"], rel=1e-5)
    config = find("transformer", runs / "init").config
    adapter = read_adapter(other / "model" / "pytorch_lora_weights.safetensors", config)
    kept = Checkpoint.latest(other)
    assert kept is not None and kept.weights().keys() == found.keys()
    averages = adapter_of(kept.weights("ema"), LoraConfig(rank=3, alpha=5))
    assert adapter.pairs.keys() == averages.pairs.keys()
    for name, pair in averages.pairs.items():
        assert torch.equal(adapter.pairs[name].up, pair.up) and torch.equal(adapter.pairs[name].down, pair.down), name
    expected, found = (
        load_file(folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors") for folder in (one, other)
    )
    before = load_file(runs / "init" / "diffusion_pytorch_model.safetensors")
    assert all(relative(found[name], weight) <= 1e-5 for name, weight in expected.items() if weight.any())
    assert sum(not torch.equal(found[name], weight) for name, weight in before.items()) == 2 * 10


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_in_bf16_train_as_on_one_rank(runs: Path, stage: str) -> None:
    """As near to one rank in bf16 as that is to fp32: the sums over packs are rounded in another order."""
    exact, one, other = (f"lora-{name}-adamw" for name in ("one", "bf16-one", f"bf16-{stage}"))
    wanted, expected, found = (load_file(runs / name / "gradients.safetensors") for name in (exact, one, other))
    assert expected.keys() == found.keys() == wanted.keys()
    whole = [torch.cat([one[name].flatten().double() for name in sorted(one)]) for one in (wanted, expected, found)]
    rounding = relative(whole[1], whole[0])
    assert 1e-4 < rounding < 3e-2 and relative(whole[2], whole[1]) <= 1.5 * rounding
    assert seen(runs, other)["losses"] == pytest.approx(seen(runs, one)["losses"], rel=5e-3)
    kept = Checkpoint.latest(runs / other)
    assert kept is not None
    assert not any(torch.equal(weight, weight.bfloat16().float()) for weight in kept.weights().values())


@pytest.mark.parametrize("kind", ["frozen", "lora"])
def test_what_trains_goes_on_beside_its_frozen_weights_under_another_stage(runs: Path, kind: str) -> None:
    """No checkpoint holds frozen weights: they are read from model.init again."""
    expected, found = seen(runs, f"{kind}-more-adamw"), seen(runs, f"{kind}-moved-adamw")
    assert len(found["losses"]) == 2 and found["ids"] == expected["ids"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_hold_the_same_numbers_whoever_wrote_them(runs: Path, stage: str) -> None:
    one, other = (Checkpoint.latest(runs / f"{name}-adamw") for name in ("one", stage))
    assert one is not None and other is not None and len(other.about["shards"]) == 2
    for kind in ("master", "ema", "exp_avg", "exp_avg_sq"):
        expected, found = one.weights(kind), other.weights(kind)
        assert expected.keys() == found.keys()
        whole, difference = (
            torch.cat([part.flatten() for part in parts])
            for parts in (expected.values(), [found[name] - weight for name, weight in expected.items()])
        )
        assert float(difference.norm() / whole.norm()) <= 1e-4, kind


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["moved", "alone"])
def test_a_run_goes_on_under_another_stage_and_number_of_ranks(runs: Path, name: str, optimizer: str) -> None:
    """moved: two ranks, from ZeRO 1 to 3. alone: from two ranks under ZeRO 3 to one of plain torch."""
    expected, found = seen(runs, f"more-{optimizer}"), seen(runs, f"{name}-{optimizer}")
    assert len(found["losses"]) == 2 and found["ids"] == expected["ids"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)


@pytest.mark.parametrize("stage", VAE_STAGES)
def test_a_vae_and_its_discriminator_equal_one_rank(runs: Path, stage: str) -> None:
    expected, found = (load_file(runs / f"vae-{name}-adamw" / "gradients.safetensors") for name in ("one", stage))
    assert expected.keys() == found.keys()
    assert {name.split(".")[0] for name in found} == {"vae", "discriminator"}
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert relative(found[name], gradient) <= 1e-4, name
    expected, found = seen(runs, "vae-one-adamw"), seen(runs, f"vae-{stage}-adamw")
    assert found["ids"] == expected["ids"] and all(len(step) >= 2 for rank in found["packs"] for step in rank)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)


def test_a_vae_goes_on_with_its_discriminator_on_another_number_of_ranks(runs: Path) -> None:
    expected, found = seen(runs, "vae-more-adamw"), seen(runs, "vae-alone-adamw")
    assert len(found["losses"]) == 2 and found["ids"] == expected["ids"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)


@pytest.mark.parametrize(("kind", "stage"), MUON)
def test_muon_trains_transformer_adapters_and_vae_as_on_one_rank(runs: Path, kind: str, stage: str) -> None:
    """Muon's arithmetic is in bf16, whose rounding turns a sum's last bit in fp32 into 0.4 % of a number now and then.

    test_muon.py is exact: its gradients are.
    """
    expected, found = (state_of(runs / f"{kind}-{name}-muon", MUON_STEPS) for name in ("one", stage))
    assert expected.keys() == found.keys()
    kinds = {key.split("/")[0] for key in found}
    assert {"master", "momentum_buffer"} <= kinds and ("exp_avg" in kinds) == (kind != "lora-bf16-muon")  # all matrices
    of_state, of_losses = MUON_LIMITS[kind]
    for state in ("master", "momentum_buffer"):
        keys = [key for key in expected if key.startswith(f"{state}/")]
        whole, other = (torch.cat([one[key] for key in keys]) for one in (expected, found))
        assert whole.any() and relative(other, whole) <= of_state, state
    wanted = seen(runs, f"{kind}-one-muon")["losses"]
    assert seen(runs, f"{kind}-{stage}-muon")["losses"] == pytest.approx(wanted, rel=of_losses)


def test_muon_goes_on_under_another_stage_and_number_of_ranks(runs: Path) -> None:
    """From ZeRO 1 to 3 on two ranks, against one rank that goes on from its own."""
    expected, found = (seen(runs, f"muon-{name}-muon")["losses"] for name in ("more", "moved"))
    assert len(found) == 1 and found == pytest.approx(expected, rel=1e-5)
