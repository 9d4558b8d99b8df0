"""Training that starts from a model folder, of every family: made by diffusers, with random weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoints import save

import stdit
from stdit.cli.data.encode import encode
from stdit.data.load.loader import embedding
from stdit.errors import StditError
from stdit.evaluation import report
from stdit.models.config import TransformerConfig
from stdit.models.operators import Recompute
from stdit.models.transformer import STDiT
from stdit.sampling.model_folder import ModelFolder
from stdit.sampling.pipeline import Pipeline
from stdit.text.encoders import TextEncoder
from stdit.text.small import build_word_tokenizer, small_umt5
from stdit.training import run as run_module
from stdit.training import trainer as trainer_module
from stdit.training.config import load_config
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.engine.engine import Engine
from stdit.training.engine.make import make_engine
from stdit.training.engine.parallel import World
from stdit.training.objectives.protocol import StepKey
from stdit.training.outputs.evaluation import sample
from stdit.training.outputs.export import make_pipeline, trained_module, write_model
from stdit.training.setup.build import RunComponents, build
from stdit.training.setup.footprint import build_on_meta, footprint
from stdit.training.setup.resolve import resolve
from stdit.weights.sources import find

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
from open_sora_golden import vae_folder
from references import FAMILIES, randomise, small_reason

ALONE = World(0, 1, torch.device("cpu"))
HEADS = {"num_attention_heads": 2, "attention_head_dim": 18, "num_layers": 2}
WAN = {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 10, "ffn_dim": 50, "freq_dim": 34}
PIXART = {**HEADS, "cross_attention_dim": 36, "in_channels": 4, "out_channels": 8, "caption_channels": 10}
# As many channels as the tests' VAE has latents: 4; its stride of frames is 2.
SMALL: dict[str, dict[str, Any]] = {
    "Wan": WAN,
    "Wan I2V": {**WAN, "in_channels": 10, "image_dim": 12, "added_kv_proj_dim": 36},
    "Wan FLF2V": {**WAN, "in_channels": 10, "image_dim": 12, "added_kv_proj_dim": 36, "pos_embed_seq_len": 10},
    "LTX-Video": {**HEADS, "cross_attention_dim": 36, "in_channels": 4, "out_channels": 4, "caption_channels": 10},
    "Cosmos-Predict": {
        **HEADS, "in_channels": 5, "out_channels": 4, "text_embed_dim": 10, "adaln_lora_dim": 6,
        "extra_pos_embed_type": None,
    },
    "PixArt": {**PIXART, "sample_size": 128, "use_additional_conditions": True},
    "Latte": {
        **PIXART, "sample_size": 64, "patch_size": 2, "attention_bias": True, "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False, "norm_eps": 1e-6,
    },
    "Allegro": {
        **HEADS, "cross_attention_dim": 36, "in_channels": 4, "out_channels": 4, "caption_channels": 10,
        "patch_size": 2,
    },
    "Cosmos-Predict1": {
        **HEADS, "in_channels": 4, "out_channels": 4, "text_embed_dim": 10, "adaln_lora_dim": 6,
        "max_size": (8, 24, 24),
    },
    "Cosmos-Predict2.5": {
        **HEADS, "in_channels": 5, "out_channels": 4, "text_embed_dim": 10, "adaln_lora_dim": 6,
        "extra_pos_embed_type": None, "use_crossattn_projection": True, "crossattn_proj_in_channels": 2 * 16,
        "encoder_hidden_states_channels": 10,
    },
}  # fmt: skip
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
LINEAR = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "PixArt": {"_class_name": "DPMSolverMultistepScheduler", **LINEAR},
    "Latte": {"_class_name": "DDIMScheduler", **LINEAR, "clip_sample": False},
    "Allegro": {"_class_name": "EulerAncestralDiscreteScheduler", **LINEAR},
    "Cosmos-Predict1": {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5},
    "STDiT3": {"_class_name": "RFLOW", "use_timestep_transform": False},
}
STDIT3 = TransformerConfig(
    dim=24, heads=2, layers=2, ffn_dim=96, in_channels=4, out_channels=8, text_dim=10, family="stdit3",
    attention="spatial_temporal_text", cross_norm="none", qk_norm="per_head_self", text_padding=0, rotary="time",
    position="space_resolution", position_base=32, level_condition="fps", null_text=4,
)  # fmt: skip


def save_transformer(name: str, place: Path, seed: int = 0) -> None:
    if name == "STDiT3":
        model = randomise(STDiT(STDIT3), seed)
        assert isinstance(model, STDiT)
        stdit.save_transformer(model, place, "original")
    else:
        family = FAMILIES[name.removesuffix("1").removesuffix("2.5").replace("FLF2V", "I2V")]
        randomise(family.build(SMALL[name]), seed).save_pretrained(place)


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model folder of a family, with the tests' VAE and a small text encoder."""
    root = tmp_path_factory.mktemp("folders")
    tokenizer = build_word_tokenizer(["a small red circle moves left on black"])
    TextEncoder(small_umt5(len(tokenizer), 10, 1, 2), tokenizer).save(root / "text_encoder", root / "tokenizer")

    def make(name: str) -> Path:
        place = root / name
        if place.exists():
            return place
        save_transformer(name, place / "transformer")
        if name == "Cosmos-Predict2.5":
            text_encoder, words = small_reason(["a small red circle moves left on black"])
            text_encoder.save_pretrained(place / "text_encoder"), words.save_pretrained(place / "tokenizer")
        else:
            for part in ("text_encoder", "tokenizer"):
                shutil.copytree(root / part, place / part)
        shutil.copytree(tiny / "vae", place / "vae")
        (place / "scheduler").mkdir()
        scheduler = json.dumps(SCHEDULERS.get(name, FLOW))
        (place / "scheduler" / "scheduler_config.json").write_text(scheduler)
        index: dict[str, Any] = {"_class_name": "APipeline", "boundary_ratio": None}
        parts = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
        (place / "model_index.json").write_text(json.dumps(index | {part: ["a", "b"] for part in parts}))
        return place

    return make


def started(tiny: Path, tmp_path: Path, init: Path, *overrides: str) -> RunComponents:
    """What a config builds that names the model folder alone, beside data and optimizer."""
    raw = yaml.safe_load((tiny / "flow.yaml").read_text())
    raw = {key: raw[key] for key in ("data", "plan", "optimizer", "schedule", "log")}
    raw["optimizer"] = {"lr": 3e-3}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(raw | {"model": {"init": str(init)}}))
    return build(resolve(load_config(tmp_path / "tune.yaml", ["data.workers=0", *overrides])), ALONE)


def train(parts: RunComponents, steps: int) -> tuple[Engine, list[float]]:
    """Steps on the plan's first step, one pack, the same noise each time; the losses."""
    config = parts.config
    engine = make_engine(parts.objective.module, config.optimizer, config.parallel, config.run.precision, ALONE)
    items = parts.plan.step(0)
    shapes = {parts.assignment.shapes[item.bucket] for item in items}
    assert {shape.is_image for shape in shapes} == {True, False} and len({s.width / s.height for s in shapes}) == 2
    examples, losses = parts.loader.fetch(items, 0), []
    for _ in range(steps):
        batch = parts.objective.prepare(examples, items, StepKey(0, 0, 0, len(items)))
        losses.append(float(engine.backward(batch, 1 / batch.weight, last=True)) / batch.weight)
        engine.step(config.optimizer.lr)
    return engine, losses


@pytest.mark.parametrize("name", [*SMALL, "STDiT3"])
def test_a_family_trains_on_mixed_shapes(
    name: str, tiny: Path, tmp_path: Path, folder: Any, image_folder: Path
) -> None:
    init = folder(name)
    if name in ("Wan I2V", "Wan FLF2V") and not (init / "image_encoder").exists():
        for part in ("image_encoder", "image_processor"):
            shutil.copytree(image_folder / part, init / part)
    parts = started(tiny, tmp_path, init)
    assert parts.config.objective.flow.noise_levels.shift == (1 if name in SCHEDULERS else 3)
    paths = {"PixArt": "ddpm", "Latte": "ddpm", "Allegro": "ddpm", "Cosmos-Predict1": "edm"}
    assert parts.objective.path.name == paths.get(name, "flow") and parts.config.vae.path == str(init)
    assert parts.config.objective.flow.tasks == {
        {"Wan I2V": "image_to_video", "Wan FLF2V": "first_last_to_video"}.get(name, "text_to_video"): 1
    }
    assert parts.config.text.padding == (512 if name.startswith(("Wan", "Cosmos")) else 0)
    _, losses = train(parts, 6)
    print(name, [round(loss, 4) for loss in losses])
    assert losses[-1] < 0.9 * losses[0]


def test_noise_levels_move_by_the_clips_size_as_ltx_own_trainer_draws_them(
    tiny: Path, tmp_path: Path, folder: Any
) -> None:
    """Lightricks' ShiftedLogitNormalTimestepSampler: the normal's mean is diffusers' calculate_shift of the tokens."""
    from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

    init = shutil.copytree(folder("LTX-Video"), tmp_path / "ltx")
    described = {**FLOW, "shift": 1.0, "use_dynamic_shifting": True, "base_image_seq_len": 16, "shift_terminal": 0.1}
    described |= {"max_image_seq_len": 64, "base_shift": 0.95, "max_shift": 2.05, "time_shift_type": "exponential"}
    (init / "scheduler" / "scheduler_config.json").write_text(json.dumps(described))
    parts, plain = (started(tiny, tmp_path, init, *more) for more in ([], ["objective.flow.noise_levels.shift=1"]))
    assert parts.config.objective.flow.noise_levels.shift is None
    items = parts.plan.step(0)
    moved, drawn = (one.objective.levels(items, StepKey(0, 0, 0, len(items))) for one in (parts, plain))
    means = [calculate_shift(item.tokens, 16, 64, 0.95, 2.05) for item in items]
    assert len(set(means)) > 2
    wanted = torch.logit(drawn) + torch.tensor(means, dtype=torch.float64)
    torch.testing.assert_close(torch.logit(moved), wanted, rtol=1e-9, atol=1e-9)

    for one, config in ((parts, described), (plain, {**described, "use_dynamic_shifting": False})):
        weights = {name: p.detach() for name, p in one.objective.module.named_parameters()}
        write_model(one, trained_module(one, weights.items(), ALONE), {}, tmp_path / "model")
        assert json.loads((tmp_path / "model" / "scheduler" / "scheduler_config.json").read_text()) == config
        shutil.rmtree(tmp_path / "model")


def test_the_folder_comes_back_with_what_trained_in_its_place(tiny: Path, tmp_path: Path, folder: Any) -> None:
    init = folder("LTX-Video")
    parts = started(tiny, tmp_path, init, "model.trainable=['blocks.*.self_attn.q.*','head.*']")
    before = stdit.load_transformer(init).state_dict()
    engine, _ = train(parts, 2)
    weights = {piece.name: flat.detach() for flat, (piece,) in zip(engine.flat_masters, engine.pieces)}
    write_model(parts, trained_module(parts, weights.items(), ALONE), {}, tmp_path / "model")
    after = stdit.load_transformer(tmp_path / "model").state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    trained = {name for name in after if ".self_attn.q." in name or name.startswith("head.")}
    assert changed == trained == {name.removeprefix("transformer.") for name in weights}
    listed = {path.relative_to(init) for path in init.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "model") for path in (tmp_path / "model").rglob("*") if path.is_file()} == {
        *listed, Path("stdit.json"),
    }  # fmt: skip
    for name in listed:
        if name.parts[0] != "transformer":
            same = (init / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
            assert same or name.name == "model_index.json", name
    assert find("transformer", tmp_path / "model").config == find("transformer", init).config


def test_what_was_put_together_from_downloads_comes_back_whole(tiny: Path, tmp_path: Path, folder: Any) -> None:
    """Open-Sora's folder: an index of one line and no scheduler. A dropped caption is its weights' text for "no text",
    as long as the caption."""
    init = shutil.copytree(folder("STDiT3"), tmp_path / "OpenSora")
    shutil.rmtree(init / "scheduler"), shutil.rmtree(init / "vae")
    vae_folder(init / "vae", 2)
    (init / "model_index.json").write_text('{"_class_name": "OpenSoraPipeline"}')
    parts = started(tiny, tmp_path, init, "data.shapes=['32x32','48x32']", "objective.flow.caption_dropout=1")
    objective, items = parts.objective, parts.plan.step(0)
    assert objective.scheduler["_class_name"] == "RFLOW"
    examples, key = parts.loader.fetch(items, 0), StepKey(0, 0, 0, len(items))
    null = objective.module.transformer.get_buffer("null_text")
    lengths = [
        len(objective.text_encoder.tokenize([clip.example.caption])[0])
        for clip in objective.sorted_clips(examples, items, key)
    ]
    text = objective.prepare(examples, items, key).text
    assert torch.equal(text.tokens, torch.cat([null[:length] for length in lengths])) and min(lengths) > 1
    shape, outlined = parts.shapes[0], build_on_meta(parts.config)
    assert outlined.tokens(shape) == objective.tokens(shape)
    assert footprint(parts.config, outlined, shape, 2 * objective.tokens(shape), ranks=1).vae > 0

    weights = {name: p.detach() + 1 for name, p in objective.module.named_parameters()}
    write_model(parts, trained_module(parts, weights.items(), ALONE), {}, tmp_path / "model")
    found = ModelFolder.load(tmp_path / "model")
    assert found.scheduler == objective.scheduler and found.settings.fps == parts.config.data.fps
    same = "vae/model.safetensors"
    assert (tmp_path / "model" / same).read_bytes() == (init / same).read_bytes()
    assert torch.equal(found.transformer.head.head.bias, weights["transformer.head.head.bias"])


def test_a_run_of_some_of_the_weights_goes_on_where_it_stopped(
    tiny: Path, tmp_path: Path, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "measure_peak", lambda *args: 1e12)
    monkeypatch.setattr(run_module, "draw", lambda *args: None)
    monkeypatch.setattr(report, "write_report", lambda folder: folder)
    settings = ["data.workers=0", "schedule={warmup: 1, decay: constant}", "model.trainable=['blocks.0.*']"]
    started(tiny, tmp_path, folder("Wan"))  # writes the config
    for name, ends in (("whole", [3]), ("parts", [1, 3])):
        for steps in ends:
            told = [*settings, f"run={tmp_path / name}", f"schedule.steps={steps}"]
            run_module.run(load_config(tmp_path / "tune.yaml", told), ALONE)
    weights = "model/transformer/diffusion_pytorch_model.safetensors"
    whole, parts = ((tmp_path / name / weights).read_bytes() for name in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize(
    ("name", "pipeline", "length"),
    [
        ("Wan", "Wan", 512),
        ("LTX-Video", "LTX", 128),
        ("LTX-Video", "LTXCondition", 256),
        ("PixArt", "PixArtAlpha", 120),
        ("PixArt", "PixArtSigma", 300),
        ("Latte", "Latte", 120),
        ("STDiT3", "OpenSora", 300),
        ("Allegro", "Allegro", 512),
        ("Cosmos-Predict", "Cosmos2VideoToWorld", 512),
        ("Cosmos-Predict1", "CosmosTextToWorld", 512),
        ("Cosmos-Predict2.5", "Cosmos2_5_PredictBase", 512),
    ],
)
def test_training_finds_the_texts_that_encode_wrote(
    name: str, pipeline: str, length: int, tiny: Path, tmp_path: Path, folder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    init = shutil.copytree(folder(name), tmp_path / "model")
    (init / "model_index.json").write_text(json.dumps({"_class_name": f"{pipeline}Pipeline", "boundary_ratio": None}))
    settings = ["data.shapes=['32x32']", "data.start=first", "data.crop=centre"]
    started(tiny, tmp_path, init, *settings)  # writes the config
    encode([str(tiny / "manifest.parquet"), *settings], tmp_path / "tune.yaml", str(tmp_path / "cache"))
    parts = started(tiny, tmp_path, init, *settings, f"data.cache={tmp_path / 'cache'}")
    assert "while training" not in capsys.readouterr().out
    cache = parts.loader.text_cache
    assert cache is not None and cache.settings["max_length"] == length
    caption = parts.loader.fetch(parts.plan.step(0)[:1], 0)[0].caption
    (wanted,) = ModelFolder.load(init, torch.float32).text_encoder.encode([caption])
    objective, key = parts.objective, StepKey(0, 0, 0, 4)
    assert all(p.is_meta for p in objective.text_encoder.encoder.parameters())  # nothing needs its weights
    text = objective._text(["", caption], parts.loader.fetch(parts.plan.step(0)[:1], 0) * 2)
    batch = objective.prepare(parts.loader.fetch(parts.plan.step(0), 0), parts.plan.step(0), key)
    assert text is not None and batch.text is not None
    assert all(p.is_meta for p in objective.text_encoder.encoder.parameters())
    if name != "STDiT3":  # whose weights have a text for "no text"
        empty = embedding(cache, "")
        assert torch.equal(text.tokens[: len(empty)], empty)
    if name != "Cosmos-Predict2.5":  # whose texts are padded to the length that is asked for
        torch.testing.assert_close(embedding(cache, caption), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*SMALL, "STDiT3"])
def test_the_plan_tells_the_memory_of_every_family(
    tiny: Path, tmp_path: Path, folder: Any, name: str, image_folder: Path
) -> None:
    init = folder(name)
    if name.startswith("Wan ") and not (init / "image_encoder").exists():
        for part in image_folder.iterdir():
            shutil.copytree(part, init / part.name)
    parts = started(tiny, tmp_path, init)
    objective = build_on_meta(parts.config)
    assert objective.cost == parts.objective.cost
    shape = parts.shapes[0]
    assert objective.tokens(shape) == parts.objective.tokens(shape)
    found = footprint(parts.config, objective, shape, 2 * objective.tokens(shape), ranks=1)
    assert found.weights == 4 * sum(p.numel() for p in parts.objective.module.parameters())
    text = sum(p.numel() for p in parts.objective.text_encoder.encoder.parameters())
    assert found.text_encoder == 4 * text
    assert found.vae == 4 * sum(p.numel() for p in parts.objective.vae.parameters())
    assert found.activations > 4 * 2 * objective.tokens(shape) * parts.objective.model_config.dim


def test_an_inflated_model_trains_its_new_blocks_alone(tiny: Path, tmp_path: Path, folder: Any) -> None:
    init = folder("PixArt")
    parts = started(tiny, tmp_path, init, "model.inflate=true", "model.freeze=pretrained")
    assert build_on_meta(parts.config).cost == parts.objective.cost
    image, video = stdit.load_transformer(init), parts.objective.module.transformer
    latents, t = torch.randn(1, 4, 3, 8, 8), torch.tensor([0.5])
    text, size = torch.randn(1, 4, 10), (32, 32)
    with torch.no_grad():
        before, wanted = (model.predict(latents, t, text, size=size) for model in (video, image))
        assert (before - wanted).norm() <= 1e-6 * wanted.norm()
    engine, losses = train(parts, 6)
    assert losses[-1] < losses[0]
    state = video.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in image.state_dict().items())
    weights = {piece.name: flat.detach() for flat, (piece,) in zip(engine.flat_masters, engine.pieces)}
    assert {name.removeprefix("transformer.") for name in weights} == state.keys() - image.state_dict().keys()
    write_model(parts, trained_module(parts, weights.items(), ALONE), {}, tmp_path / "model")
    again = stdit.load_transformer(tmp_path / "model")
    with torch.no_grad():
        after = again.predict(latents, t, text, size=size)
        assert torch.equal(after, video.predict(latents, t, text, size=size))
    assert not torch.allclose(after, before, rtol=1e-3)
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["transformer"] == ["stdit", "STDiT"]
    with pytest.raises(StditError, match=r"model\.init: only a model of images can be inflated"):
        started(tiny, tmp_path, folder("Wan"), "model.inflate=true")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.layers=3"], r"model\.init: .*: its layers is 2, model's 3"),
        (["model.trainable=['blocks.*.self_attention.*']"], r"'blocks\.\*\.self_attention\.\*' is no parameter's name"),
        (
            ["text.path=null", "text.trained={dim: 16, layers: 1, heads: 2}"],
            "its text_dim is 10, the text encoder's 16",
        ),
        (["model.expert=low"], "holds no two experts"),
    ],
)
def test_what_contradicts_the_weights_is_named(
    tiny: Path, tmp_path: Path, folder: Any, overrides: list[str], words: str
) -> None:
    with pytest.raises(StditError, match=words):
        started(tiny, tmp_path, folder("Wan"), *overrides)


@pytest.fixture
def experts(tmp_path: Path, folder: Any) -> Path:
    """A model folder of two experts, whose weights differ."""
    init = shutil.copytree(folder("Wan"), tmp_path / "A14B")
    save_transformer("Wan", init / "transformer_2", seed=1)
    index = json.loads((init / "model_index.json").read_text())
    index |= {"_class_name": "WanPipeline", "boundary_ratio": 0.875, "transformer_2": ["a", "b"]}
    (init / "model_index.json").write_text(json.dumps(index))
    return init


@pytest.mark.parametrize(("expert", "span"), [("high", (0.875, 1)), ("low", (0, 0.875))])
def test_an_expert_trains_at_its_own_noise_levels(
    tiny: Path, tmp_path: Path, experts: Path, expert: str, span: tuple[float, float]
) -> None:
    init = experts
    parts = started(tiny, tmp_path, init, f"model.expert={expert}", "objective.flow.tasks={text_to_video: 1}")
    name, other = ("transformer", "transformer_2") if expert == "high" else ("transformer_2", "transformer")
    mine = stdit.load_transformer(init / name).state_dict()
    trained = parts.objective.module.transformer.state_dict()
    assert all(torch.equal(trained[key], tensor) for key, tensor in mine.items())
    items = parts.plan.step(0)
    for step in range(3):
        batch = parts.objective.prepare(parts.loader.fetch(items, 0), items, StepKey(0, 0, step, len(items)))
        assert span[0] <= batch.pack.levels.min() and batch.pack.levels.max() <= span[1]
    weights = {n: p.detach() + 1 for n, p in parts.objective.module.named_parameters()}
    write_model(parts, trained_module(parts, weights.items(), ALONE), {}, tmp_path / "model")
    kept, new = (stdit.load_transformer(tmp_path / "model" / n).state_dict() for n in (other, name))
    assert all(torch.equal(kept[key], t) for key, t in stdit.load_transformer(init / other).state_dict().items())
    assert all(torch.equal(new[key], mine[key] + 1) for key in mine)


def test_both_experts_train_each_on_the_clips_of_its_levels(tiny: Path, tmp_path: Path, experts: Path) -> None:
    """Two equal experts have the loss of one model, where tokens skip a block too; different ones both change, and come
    back as a folder of two."""
    routing = "objective.flow.routing={start: 1, end: 2}"
    same = shutil.copytree(experts, tmp_path / "same")
    shutil.copytree(same / "transformer", same / "transformer_2", dirs_exist_ok=True)
    one = started(tiny, tmp_path, experts / "transformer", f"vae.path={experts}", f"text.path={experts}",
                  "objective.flow.noise_levels.shift=3", routing)  # fmt: skip
    parts = started(tiny, tmp_path, same, "model.expert=both", routing)
    items = parts.plan.step(0)
    examples, sides = parts.loader.fetch(items, 0), set()
    for step in range(4):
        key = StepKey(0, 0, step, len(items))
        both, alone = parts.objective.prepare(examples, items, key), one.objective.prepare(examples, items, key)
        assert both.weight == alone.weight == parts.objective.weight(examples, key)
        assert both.low.pack.levels.max() < 0.875 or both.low.weight == 0
        assert both.high.pack.levels.min() >= 0.875
        sides |= {(both.high.weight > 0, both.low.weight > 0)}
        with torch.no_grad():
            assert float(parts.objective.module(both)) == pytest.approx(float(one.objective.module(alone)), rel=1e-5)
    assert (True, True) in sides
    gradients = []
    for kind in ("none", "attention"):
        for flow in parts.objective.flows:
            flow.module.transformer.recompute = Recompute.of(kind)
        gradients.append(torch.autograd.grad(parts.objective.module(both), list(parts.objective.module.parameters())))
    assert all(map(torch.equal, *gradients))

    parts = started(tiny, tmp_path, experts, "model.expert=both", "objective.flow.noise_levels.shift=9",
                    "eval={prompts: [a small red circle], steps: 4, guidance: 2}", f"run={tmp_path}")  # fmt: skip
    engine, losses = train(parts, 4)
    assert losses[-1] < losses[0]
    weights = {piece.name: flat.detach() for flat, (piece,) in zip(engine.flat_masters, engine.pieces)}
    write_model(parts, trained_module(parts, weights.items(), ALONE), {}, tmp_path / "model")
    for name in ("transformer", "transformer_2"):
        old, new = (stdit.load_transformer(place / name).state_dict() for place in (experts, tmp_path / "model"))
        assert old.keys() == new.keys() and not torch.equal(old["head.head.weight"], new["head.head.weight"]), name

    pipeline, used = make_pipeline(parts, trained_module(parts, weights.items(), ALONE)), set()
    for name in ("high", "low"):
        getattr(pipeline.transformer, name).register_forward_hook(lambda *_, name=name: used.add(name))
    (file,) = sample(pipeline, parts.config.eval, parts.config.data.fps, tmp_path, 4, ALONE)
    assert used == {"high", "low"} and (tmp_path / file).is_file()
    arguments = {"steps": 4, "guidance": 2, "seed": 3}
    frames = Pipeline.load(tmp_path / "model")("a small red circle", **arguments)
    assert np.array_equal(pipeline("a small red circle", **arguments), frames)


def test_checkpoints_hold_what_trains(tiny: Path, tmp_path: Path, folder: Any) -> None:
    pattern = "model.trainable=['blocks.1.*']"
    parts = started(tiny, tmp_path, folder("Wan"), pattern)
    engine, _ = train(parts, 1)
    save(tmp_path, 1, [engine], ALONE)
    found = Checkpoint.latest(tmp_path)
    assert found is not None
    assert {name.split(".")[1:3] == ["blocks", "1"] for name in found.about["parameters"]} == {True}
    assert parts.parameters == sum(weight.numel() for weight in found.weights().values())
    again = started(tiny, tmp_path, folder("Wan"), pattern)
    found.load_weights(again.objective.module)
    theirs = dict(parts.objective.module.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in again.objective.module.named_parameters())
