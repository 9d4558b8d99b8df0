"""Whole runs in small: to their end, killed and continued, stopped by signals, refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from children import LIMIT, Child
from tiny_runs import ALONE, check_lines, losses, make_quick, same_weights

from stdit.data.load.loader import Loader
from stdit.errors import Interrupted, StditError
from stdit.evaluation.report import read_metrics
from stdit.training import trainer as trainer_module
from stdit.training.batches import StepClips, StepLoader
from stdit.training.config import load_config
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.engine.parallel import World
from stdit.training.objectives.flow import FlowObjective
from stdit.training.objectives.protocol import StepResult, Update
from stdit.training.outputs import export
from stdit.training.outputs.step_log import StepLog
from stdit.training.run import run
from stdit.training.setup.build import build, open_caches
from stdit.training.setup.resolve import resolve

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same thread count as the processes that are started; no time spent on the peak rate and on pictures."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    make_quick(monkeypatch)
    yield
    torch.set_num_threads(before)


def train(tiny: Path, folder: Path, *overrides: str, config: str = "flow") -> None:
    run(load_config(tiny / f"{config}.yaml", [f"run={folder}", *overrides]), ALONE)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    prompts = "eval.prompts=[a red circle moving left]"
    train(tiny, folder, prompts, "eval.every=5", "eval.steps=2", "log.tensorboard=true")
    return folder


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    assert list(losses(whole)) == list(range(1, 9))
    samples = [line["samples"] for line in read_metrics(whole, "eval")]
    assert len(samples) == 2 and all((whole / one).stat().st_size > 0 for few in samples for one in few)
    assert json.loads((whole / "model" / "stdit.json").read_text())["shapes"][0] == "48x32x5"
    assert (whole / "report.html").exists() and (whole / "config.yaml").exists() and (whole / "plan.png").exists()
    assert list((whole / "tensorboard").iterdir())
    from stdit.sampling.pipeline import Pipeline

    frames = Pipeline.load(whole / "model")("a red circle", steps=1)
    assert frames.shape == (5, 32, 48, 3)


def test_the_exported_weights_are_the_average(whole: Path) -> None:
    from stdit.weights.io import load_transformer

    found = Checkpoint.latest(whole)
    assert found is not None
    exported = load_transformer(whole / "model").state_dict()
    for name, weight in found.weights("ema").items():
        if name.startswith("transformer."):
            assert torch.equal(exported[name.removeprefix("transformer.")], weight), name


def test_the_loss_falls_on_clips_seen_again(tiny: Path, tmp_path: Path) -> None:
    steps = [
        "schedule.steps=80",
        "log.every=20",
        "checkpoint.every=80",
        "optimizer.lr=0.01",
        "plan.tokens_per_pack=2000",
    ]
    train(tiny, tmp_path / "run", *steps)
    found = losses(tmp_path / "run")
    assert list(found) == [20, 40, 60, 80]
    assert found[80] < 0.75 * found[20]


def test_kill_9_and_the_same_command_again(tiny: Path, whole: Path, tmp_path: Path) -> None:
    """Losses and all state equal the uninterrupted run's, bit for bit, wherever the kill fell."""
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), str(tiny / "flow.yaml"), f"run={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = Child(command, environment)
    deadline = time.monotonic() + LIMIT
    moment = random.randint(1, 7)
    while max(losses(folder), default=0) < moment and child.popen.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    assert child.status() == -signal.SIGKILL, f"it ended before it could be killed: {child.output}"
    (folder / "checkpoints" / ".tmp-step-00000099").mkdir(parents=True)  # as if killed while saving
    train(tiny, folder)
    assert losses(folder) == losses(whole)
    assert same_weights(folder, whole)
    assert not list((folder / "checkpoints").glob(".tmp*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_saves_and_says_how_to_go_on(
    tiny: Path, whole: Path, tmp_path: Path, number: signal.Signals, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    update = trainer_module.Trainer.update

    def send(self: trainer_module.Trainer) -> Any:
        if self.step == 3:
            os.kill(os.getpid(), number)
        return update(self)

    monkeypatch.setattr(trainer_module.Trainer, "update", send)
    handlers = signal.getsignal(number)
    with pytest.raises(Interrupted, match="same command") as stopped:
        train(tiny, folder)
    assert stopped.value.status == status
    assert signal.getsignal(number) == handlers
    found = Checkpoint.latest(folder)
    assert found is not None and found.step == 5  # noticed in the next step, which is finished
    monkeypatch.undo()
    make_quick(monkeypatch)
    if status == 130:
        train(tiny, folder)
        assert losses(folder) == losses(whole) and same_weights(folder, whole)


def test_losses_are_means_over_the_lines_steps_also_across_a_resume(tiny: Path, whole: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path / "a", "log.every=4")
    train(tiny, tmp_path / "b", "log.every=4", "schedule.steps=8", "checkpoint.every=6", "checkpoint.keep=0")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000008")
    shutil.rmtree(tmp_path / "b" / "model")
    train(tiny, tmp_path / "b", "log.every=4")
    each = losses(whole)
    assert losses(tmp_path / "a")[8] == pytest.approx(sum(each[i] for i in (5, 6, 7, 8)) / 4, rel=1e-12)
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


def test_an_evaluation_lost_to_a_kill_is_made_up_for(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["eval.prompts=[a]", "eval.every=2", "eval.steps=1", "checkpoint.every=2", "schedule.steps=3"]

    def killed(*args: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(trainer_module.Trainer, "_evaluate", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(tiny, tmp_path / "run", *settings)
    monkeypatch.undo()
    make_quick(monkeypatch)
    train(tiny, tmp_path / "run", *settings)
    assert [line["step"] for line in read_metrics(tmp_path / "run", "eval")] == [2, 3]


def test_only_one_micro_steps_tensors_are_there_at_a_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_module.Trainer(load_config(tiny / "flow.yaml", ["plan.tokens_per_pack=80"]), ALONE)
    trainer.prepare(resolve(trainer.config))
    alive: list[weakref.ref[Any]] = []
    prepare = FlowObjective.prepare
    counts = []

    def watched(self: FlowObjective, *args: Any) -> Any:
        counts.append(sum(one() is not None for one in alive))
        batch = prepare(self, *args)
        alive.append(weakref.ref(batch))
        return batch

    monkeypatch.setattr(FlowObjective, "prepare", watched)
    feed = StepLoader(trainer.components.plan_of, trainer.components.loader, 0, 1, 0)
    step = next(feed.steps)
    loss = float(trainer.accumulate(step).loss)
    feed.close()
    assert len(counts) == len(step.micro_steps) > 2 and not any(counts)
    assert loss > 0


def test_failures_are_counted_over_all_ranks(tiny: Path, tmp_path: Path) -> None:
    """Before a checkpoint shares them, and each clip once."""

    class TwoRanks(World):
        def sum_(self, values: torch.Tensor) -> torch.Tensor:
            return values.add_(torch.tensor([1.0, 0.0, 5.0, 7.0, 2.0, 3.0, 8.0, 0.0, 2.0, 0.0], dtype=torch.float64))

        def gather(self, value: Any) -> list[Any]:
            return [value, {"a": {}, "b": {}} if isinstance(value, dict) else (0.5, 2.0**60)]

    world = TwoRanks(0, 2, torch.device("cpu"))
    trainer = trainer_module.Trainer(load_config(tiny / "flow.yaml", [f"run={tmp_path}"]), ALONE)
    trainer.world = trainer.failures.world = world
    trainer.failures.by_id, trainer.failures.unshared = {"a": {}}, 1
    trainer.losses = [torch.tensor(2.0), torch.tensor(3.0)]
    trainer.by_level = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    trainer.log = StepLog(trainer.config, world, 0, 1.0, ["0-0.5", "0.5-1"])
    trainer.log.end_step(StepResult(torch.tensor(3.0), None, 10, 20, 0, torch.zeros(2, 2)))
    trainer._write_metrics(StepClips(0, 0, 4, []), Update(1.0, 0.1), None)
    trainer.log.close()
    (line,) = read_metrics(tmp_path, "train")
    assert (line["failed"], line["loss"], line["tokens"]) == (2, 3.0, 15) and trainer.failures.unshared == 0
    assert line["storage_retries"] == 3
    assert line["loss_by_level"] == {"0-0.5": 3.0, "0.5-1": None}
    assert (line["wait_seconds"], line["memory_gib"]) == (0.5, 2.0**30)


def test_the_wait_for_data_is_measured_and_logged(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, nap = Loader._example, 0.1

    def slow(self: Loader, *arguments: Any, **named: Any) -> Any:
        time.sleep(nap)
        return example(self, *arguments, **named)

    monkeypatch.setattr(Loader, "_example", slow)
    train(tiny, tmp_path / "run", "schedule.steps=2", "data.workers=0")
    for line in read_metrics(tmp_path / "run", "train"):
        assert nap <= line["wait_seconds"] < line["step_seconds"]


def test_stages_and_sources_make_the_plans_of_a_run(tiny: Path) -> None:
    whole = build(resolve(load_config(tiny / "flow.yaml", [])), ALONE)
    stages = "data.stages=[{epochs: 2, frames: 1}, {epochs: 1, area: 32x32}, {}]"
    parts = build(resolve(load_config(tiny / "flow.yaml", [stages, "data.sources={'*': 2}"])), ALONE)
    used = [{str(shape) for shape, n in zip(parts.assignment.shapes, parts.plan_of(e).counts) if n} for e in range(5)]
    assert used[0] == used[1] == {shape for shape in used[3] if shape.endswith("x1")}
    assert used[2] == {"32x32x1", "32x32x5"} and used[3] == used[4] >= {"32x32x1", "32x32x5", "48x32x5"}
    assert parts.plan_of(3).num_items == 2 * whole.plan.num_items
    later = "data.stages=[{epochs: 3, frames: 1}, {epochs: 1, area: 32x32}, {}]"
    assert whole.plan_hash == whole.plan.hash
    other = build(resolve(load_config(tiny / "flow.yaml", [later, "data.sources={'*': 2}"])), ALONE)
    assert len({whole.plan_hash, parts.plan_hash, other.plan_hash}) == 3


def test_a_finished_run_says_so(tiny: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    train(tiny, whole)
    assert "is finished after 8 steps" in capsys.readouterr().out
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_run_that_went_on_is_finished_only_when_its_own_weights_are_exported(
    tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "report.html").unlink()
    assert export.exported_step(folder) == 8

    def killed(*args: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(trainer_module.Trainer, "_finish", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(tiny, folder, "schedule.steps=9")
    monkeypatch.undo()
    make_quick(monkeypatch)
    train(tiny, folder, "schedule.steps=9")
    assert "goes on after step 9" in capsys.readouterr().out
    assert export.exported_step(folder) == 9
    train(tiny, folder, "schedule.steps=9")
    told = capsys.readouterr().out
    assert "is finished after 9 steps" in told and "report: " in told


def test_another_config_is_refused_with_the_difference(tiny: Path, whole: Path) -> None:
    with pytest.raises(StditError, match=r"optimizer\.lr: 0\.002 → 0\.5"):
        train(tiny, whole, "optimizer.lr=0.5")


def test_changed_data_are_refused(tiny: Path, whole: Path, tmp_path: Path) -> None:
    from stdit.data.manifest import Manifest, read_manifest, write_manifest

    shutil.copytree(whole / "checkpoints", tmp_path / "run" / "checkpoints")
    manifest = read_manifest(tiny / "manifest.parquet")
    kept = (tiny / "manifest.parquet").read_bytes()
    write_manifest(Manifest(manifest.table.slice(1), manifest.folder), tiny / "manifest.parquet")
    try:
        with pytest.raises(StditError, match=r"manifest\.parquet has changed"):
            train(tiny, tmp_path / "run", "schedule.steps=9")
    finally:
        (tiny / "manifest.parquet").write_bytes(kept)


def test_ranks_with_other_data_are_told_before_they_wait_for_each_other(tiny: Path, tmp_path: Path) -> None:
    class Others(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, value, f"not {value}" if value else value]  # no rank has an error

    config = load_config(tiny / "flow.yaml", [f"run={tmp_path / 'run'}"])
    trainer = trainer_module.Trainer(config, ALONE)
    trainer.world = Others(0, 3, torch.device("cpu"))
    with pytest.raises(StditError, match=r"rank 2 has other data than rank 0: .*manifest\.parquet"):
        trainer.prepare(resolve(config))


def test_a_clip_that_went_bad_is_named_counted_and_skipped(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny / "clips", tmp_path / "clips")
    shutil.copy(tiny / "manifest.parquet", tmp_path / "manifest.parquet")
    bad = sorted((tmp_path / "clips" / "train").glob("*.mp4"))[2]
    bad.write_bytes(b"not a video")
    train(tiny, tmp_path / "run", f"data.manifest={tmp_path / 'manifest.parquet'}", "schedule.steps=4")
    assert bad.name in capsys.readouterr().out
    found = Checkpoint.latest(tmp_path / "run")
    assert found is not None
    (failure,) = found.state["failures"].values()
    assert bad.name in failure["failure"]
    assert [line["failed"] for line in read_metrics(tmp_path / "run", "train")][-1] == 1


def test_the_vae_trains_and_exports_measured_latents(tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path / "run", f"eval.manifest={tiny / 'manifest.parquet'}", config="vae")
    from stdit.weights.io import load_vae

    vae = load_vae(tmp_path / "run" / "model")
    assert vae.config.latents_std is not None and vae.config.latents_mean is not None
    kept = Checkpoint.latest(tmp_path / "run")
    assert kept is not None
    masters, state = kept.weights(), vae.state_dict()
    for name, average in kept.weights("ema").items():  # what comes out is the average
        assert torch.equal(state[name.removeprefix("vae.")], average) and not torch.equal(average, masters[name]), name
    assert read_metrics(tmp_path / "run", "eval")[-1]["psnr"] > 3
    check_lines(tmp_path / "run")


def test_a_vae_is_not_asked_for_captions(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(StditError, match=r"eval\.toy samples captions: a VAE knows none"):
        train(tiny, tmp_path / "run", "eval.toy={captions: 2}", config="vae")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["vae.path=null"], "vae.path"),
        (["vae.path=nowhere"], "vae.path: nowhere: no such file"),
        (["model.preset=null", "model.init=nowhere"], "model.init: nowhere: no such file"),
        (["text.trained=null"], "text.path or text.trained"),
        (["data.manifest=''"], "data.manifest"),
        (["data.shapes=[640x640x33]"], "no clip is in any bucket"),
        (["data.shapes=[36x32x5]"], "data.shapes: 36x32x5: .*Nearest: 32x32 or 40x32"),
        (["model.in_channels=16"], "model.in_channels is 16"),
        (["model.preset=tyo"], "'toy'"),
        (["model.init=nowhere"], "preset toy and init nowhere are both set"),
        (["vae.preset=toy"], "vae: path .* and preset toy are both set"),
        (["vae.z_dim=5"], "vae.z_dim is 5, but .* has 4"),
        (["model.expert=low"], "expert low needs the weights of init, which is not set"),
        (["model.preset=null", "model.init=a", "model.freeze=pretrained"], "freeze pretrained needs inflate"),
        (["model.attention_backend=fast"], "model.attention_backend: .*'fast' does not exist"),
        (["model.attention_backend=flash"], "model.attention_backend: .*runs on a GPU only"),
        (["parallel.deepspeed=nowhere.json"], "nowhere.json"),
        (["plan.tokens_per_pack=10"], "tokens_per_pack"),
        (["checkpoint.every=0"], r"checkpoint\.every is 0; it must be above 0"),
        (["log.every=0"], r"log\.every is 0; it must be above 0"),
        (["optimizer.lr=0"], r"optimizer\.lr is 0; it must be above 0"),
        (["optimizer.options={momentun: 1}"], "momentun"),
        (["optimizer.name=adan"], "takes 3 betas"),
        (["eval.size=64p"], "'64p' is not a shape"),
        (["eval.size=48x32x5"], "eval.frames sets"),
        (["eval.prompts=[a]", "eval.size=50x32"], r"eval\.size=50x32.*48x32"),
        (["eval.prompts=[a]", "eval.frames=4"], r"eval\.frames=4.*nearest are 3 and 5"),
        (["eval.steps=0"], r"eval\.steps is 0; it must be above 0"),
        (["eval.manifest=nowhere.parquet"], "nowhere.parquet"),
        (["eval.toy={captions: 73}"], r"eval\.toy\.captions is 73"),
        (["eval.toy={shapes: [64by64]}"], "64by64"),
        (["eval.toy={shapes: [50x32x5]}"], r"eval\.toy\.shapes: size 50x32.*48x32"),
        (["model.patch=[2, 2, 2]"], "image_to_video cannot be learned"),
    ],
)
def test_mistakes_end_before_training(tiny: Path, tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(StditError, match=words):
        train(tiny, tmp_path / "run", *overrides)


def test_metrics_follow_their_schema(whole: Path) -> None:
    assert [line["kind"] for line in read_metrics(whole)][0::9] == ["start", "train"]
    check_lines(whole)


def test_a_frozen_text_encoder_and_a_cache_train_as_without_them(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stdit.data.load.cache import Cache
    from stdit.data.manifest import read_manifest
    from stdit.data.plan.buckets import assign
    from stdit.data.remote.failures import StorageError
    from stdit.prepare.encode import encode_manifest, text_identity, vae_identity
    from stdit.text.encoders import TextEncoder
    from stdit.text.loading import load_text_encoder
    from stdit.text.places import Treatment
    from stdit.text.small import build_word_tokenizer, small_umt5
    from stdit.weights.io import load_vae

    tokenizer = build_word_tokenizer(["a small red circle moves left on black"])
    encoder = TextEncoder(small_umt5(len(tokenizer), 16, 1, 2), tokenizer)
    encoder.save(tmp_path / "text" / "text_encoder", tmp_path / "text" / "tokenizer")
    overrides = ["text.trained=null", f"text.path={tmp_path / 'text'}", "data.start=first", "data.crop=centre"]
    config = load_config(tiny / "flow.yaml", overrides)
    manifest = read_manifest(config.data.manifest)
    encode_manifest(
        manifest,
        assign(manifest, config.data),
        config.data,
        load_vae(tiny / "vae"),
        load_text_encoder(tmp_path / "text", Treatment(), max_length=32),
        tmp_path / "cache",
        vae_id=vae_identity(tiny / "vae"),
        text_id=text_identity(tmp_path / "text", 32),
    )
    overrides += [f"eval.manifest={tiny / 'manifest.parquet'}", "eval.clips=5"]
    train(tiny, tmp_path / "fly", *overrides, "schedule.steps=4")
    with monkeypatch.context() as patched:
        patched.setattr(Loader, "_decode", None)  # not even for the evaluation
        patched.setattr(TextEncoder, "encode", None)
        train(tiny, tmp_path / "cached", *overrides, "schedule.steps=4", f"data.cache={tmp_path / 'cache'}")
    assert "captions are encoded while training" not in capsys.readouterr().out
    other = load_config(tiny / "flow.yaml", [*overrides, f"data.cache={tmp_path / 'cache'}", "text.padding=9"])
    with pytest.raises(StditError, match=r"holds other text:\n.*max_length 32 there, 9 wanted"):
        open_caches(other, ALONE)  # and not a text encoder in every step

    def away(root: str, settings: dict[str, Any]) -> Cache:
        if settings["kind"] == "text":
            raise StorageError(root, "unreachable", "8 tries failed.")
        return opened(root, settings)

    opened, cached = Cache.open, load_config(tiny / "flow.yaml", [*overrides, f"data.cache={tmp_path / 'cache'}"])
    with monkeypatch.context() as patched, pytest.raises(StorageError):
        patched.setattr(Cache, "open", staticmethod(away))
        open_caches(cached, ALONE)
    assert all(cache is not None for cache in open_caches(cached, ALONE))
    assert not capsys.readouterr().out
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "fly"), rel=1e-5)
    (here,), (there,) = (read_metrics(tmp_path / name, "eval") for name in ("fly", "cached"))
    assert there["loss"] == pytest.approx(here["loss"], rel=1e-5)
    found = Checkpoint.latest(tmp_path / "fly")
    assert found is not None and all(name.startswith("transformer.") for name in found.about["parameters"])
    assert (tmp_path / "fly" / "model" / "text_encoder" / "config.json").exists()
