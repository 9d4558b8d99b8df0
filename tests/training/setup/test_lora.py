"""Training adapters: peft's gradients, a falling loss for every family, whole runs that go on and are exported."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from references import FAMILIES, randomise
from tensor_files import load_file

import stdit
from stdit.cli.main import app, run_command
from stdit.diffusion.solvers import unipc_config, write_scheduler
from stdit.errors import StditError
from stdit.evaluation import report
from stdit.evaluation.report import write_report
from stdit.models.blocks import LoraLinear
from stdit.models.packing import pack_clips, pack_texts
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.sampling.pipeline import Pipeline
from stdit.text.encoders import TextEncoder
from stdit.text.small import build_word_tokenizer, small_umt5
from stdit.training import run as run_module
from stdit.training import trainer as trainer_module
from stdit.training.config import LoraConfig, load_config
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.engine.engine import TorchEngine
from stdit.training.engine.optimizer import OptimizerConfig
from stdit.training.engine.parallel import World
from stdit.training.run import run
from stdit.training.setup.build import build
from stdit.training.setup.lora import adapter_of, add_lora, export_adapters
from stdit.training.setup.resolve import resolve
from stdit.weights.families import table_of
from stdit.weights.lora.adapters import Adapter, Pair, converted, merge
from stdit.weights.lora.read import read_adapter

ALONE = World(0, 1, torch.device("cpu"))
CASES = [("Wan", 1), ("LTX-Video", 1), ("PixArt", 1), ("Latte", 0), ("Allegro", 0), ("Cosmos-Predict", 1)]
WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 48, "freq_dim": 34,
    "in_channels": 4, "out_channels": 4, "text_dim": 16,
}  # fmt: skip


def checkpoint(name: str, number: int, place: Path) -> torch.nn.Module:
    """A model of diffusers' with random weights, saved."""
    model = randomise(FAMILIES[name].build(FAMILIES[name].configs[number]), 0)
    model.save_pretrained(place)
    return model


@pytest.mark.parametrize(("name", "number"), [("Wan", 1), ("PixArt", 1), ("Allegro", 0)])
def test_gradients_are_pefts(name, number, tmp_path):
    """A and B as peft drew them; B of Allegro's q and k has its rows permuted."""
    peft = pytest.importorskip("peft")
    theirs = checkpoint(name, number, tmp_path)
    ours = stdit.load_transformer(tmp_path)
    targets = [
        module for module, one in theirs.named_modules() if isinstance(one, torch.nn.Linear) and ".attn" in module
    ]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=4, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if ".lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.save_pretrained(tmp_path / "lora")
    adapter = read_adapter(tmp_path / "lora" / "adapter_model.safetensors", ours.config)
    add_lora(ours, LoraConfig(rank=3, alpha=4, targets=["*_attn.*"]), seed=0)
    layers = {key: one for key, one in ours.named_modules() if isinstance(one, LoraLinear)}
    assert {f"{key}.weight" for key in layers} == adapter.pairs.keys()
    with torch.no_grad():
        for key, layer in layers.items():
            layer.lora_down.weight.copy_(adapter.pairs[f"{key}.weight"].down)
            layer.lora_up.weight.copy_(adapter.pairs[f"{key}.weight"].up)
    latents = torch.randn(2, ours.config.in_channels, *FAMILIES[name].grids[number], generator=generator)
    t, text = torch.rand(2, generator=generator), torch.randn(2, 6, ours.config.text_dim, generator=generator)
    mask = torch.ones(2, 6, dtype=torch.bool)
    wanted = FAMILIES[name].call(theirs.base_model.model, latents, t, text, mask, {})
    found = ours.predict(latents, t, text, mask)
    probe = torch.randn(wanted.shape, generator=generator)
    (wanted * probe).sum().backward()
    (found * probe).sum().backward()
    assert relative(found, wanted) <= 1e-5
    assert all((p.grad is None) != (".lora_" in key) for key, p in ours.named_parameters())
    gradients = {
        f"{key}.weight": Pair(one.lora_down.weight.grad, one.lora_up.weight.grad, 1.0) for key, one in layers.items()
    }
    there = converted(Adapter(gradients), table_of(ours.config, "diffusers")).pairs
    parameters = dict(theirs.named_parameters())
    for key, pair in there.items():
        start = f"base_model.model.{key.removesuffix('.weight')}"
        for part, gradient in (("A", pair.down), ("B", pair.up)):
            assert relative(gradient, parameters[f"{start}.lora_{part}.default.weight"].grad) <= 1e-4, (key, part)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


class Denoiser(torch.nn.Module):
    """Mixed shapes, images among them, in one pack."""

    def __init__(self, transformer: STDiT) -> None:
        super().__init__()
        self.transformer = transformer
        generator = torch.Generator().manual_seed(2)
        config = transformer.config
        grids = [[n * side for n, side in zip(grid, config.patch)] for grid in ((1, 2, 2), (4, 2, 3), (2, 3, 2))]
        clips = [torch.randn(config.in_channels, *grid, generator=generator) for grid in grids]
        levels = [torch.rand((), generator=generator, dtype=torch.float64) for _ in grids]
        self.pack = pack_clips(clips, levels, config.patch)
        texts = [torch.randn(length, config.text_dim, generator=generator) for length in (3, 5, 1)]
        self.text = pack_texts(texts, config.text_padding and 8)

    def forward(self, target: torch.Tensor) -> torch.Tensor:
        return (self.transformer(self.pack, self.text).float() - target).square().mean()


@pytest.mark.parametrize(("name", "number"), CASES)
def test_the_loss_of_every_family_falls_on_mixed_shapes(name, number, tmp_path):
    checkpoint(name, number, tmp_path)
    model = stdit.load_transformer(tmp_path)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    module = Denoiser(model)
    with torch.no_grad():
        start = model(module.pack, module.text).clone()
    config = LoraConfig(rank=4, alpha=8)
    add_lora(model, config, seed=3)
    teacher = stdit.load_transformer(tmp_path)
    add_lora(teacher, config, seed=4)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        assert torch.equal(model(module.pack, module.text), start)  # B is zero
        for key, parameter in teacher.named_parameters():
            if "lora_up" in key:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        target = teacher(module.pack, module.text)
    engine = TorchEngine(module, OptimizerConfig(weight_decay=0.0, clip=0.0), "fp32", ALONE)
    losses = []
    for _ in range(10):
        losses.append(float(engine.backward(target, 1.0, True)))
        engine.step(4e-3)
    assert losses[-1] < 0.9 * losses[0], losses
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items())
    adapter = adapter_of(state, config)
    assert len(adapter.pairs) == sum("_attn." in key or ".ffn." in key for key in before if key.endswith("weight")
                                     and before[key].ndim == 2)  # fmt: skip
    merged = stdit.load_transformer(tmp_path)
    merge(merged, [(adapter, 1.0)])
    with torch.no_grad():
        assert relative(merged(module.pack, module.text), model(module.pack, module.text)) <= 1e-5


@pytest.fixture
def made(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint by diffusers, a frozen text encoder, and lora.yaml."""
    monkeypatch.setattr(trainer_module, "measure_peak", lambda *args: 1e12)
    monkeypatch.setattr(run_module, "draw", lambda *args: None)
    monkeypatch.setattr(report, "write_report", lambda folder: folder)
    randomise(FAMILIES["Wan"].build(WAN), 0).save_pretrained(tmp_path / "base")
    tokenizer = build_word_tokenizer(["a red circle moves left"])
    TextEncoder(small_umt5(len(tokenizer), 16, 1, 2), tokenizer).save(
        tmp_path / "text" / "text_encoder", tmp_path / "text" / "tokenizer"
    )
    config = yaml.safe_load((tiny / "flow.yaml").read_text())
    lora = {"rank": 2, "alpha": 4, "merged": True}
    config["model"] = {"init": str(tmp_path / "base"), "lora": lora}
    config["text"] = {"path": str(tmp_path / "text"), "padding": 32}
    config["schedule"] = {"steps": 5, "decay": "constant"}
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def train(made: Path, name: str, *overrides: str) -> Path:
    run(load_config(made / "lora.yaml", [f"run={made / name}", *overrides]), ALONE)
    return made / name


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_under_deepspeed_the_base_is_read_in_parts(made, stage):
    """It stays on the meta device until the engine asks for what the rank holds."""
    pytest.importorskip("deepspeed")
    config = load_config(made / "lora.yaml", [f"run={made / 'parts'}", f"parallel.deepspeed={stage}"])
    objective = build(resolve(config), ALONE).objective
    parameters = dict(objective.module.named_parameters())
    assert all(p.is_meta != p.requires_grad for p in parameters.values())
    for name, weight in stdit.load_transformer(made / "base").named_parameters():
        part = objective.numbers(f"transformer.{name}", 3, 11)
        assert torch.equal(part, weight.detach().flatten()[3:11].float()), name


def test_a_run_goes_on_exactly_and_exports_its_adapter(made):
    whole, parted = train(made, "whole"), train(made, "parted", "schedule.steps=3")
    train(made, "parted")
    file = "model/pytorch_lora_weights.safetensors"
    assert (whole / file).read_bytes() == (parted / file).read_bytes()
    saved = Checkpoint.latest(whole)
    names = set(saved.about["parameters"])
    assert len(names) == 2 * 2 * 10 and all(".lora_" in name for name in names)
    base = stdit.load_transformer(made / "base")
    adapter = read_adapter(whole / file, base.config)
    averages = adapter_of(saved.weights("ema"), LoraConfig(rank=2, alpha=4))
    assert adapter.pairs.keys() == averages.pairs.keys()
    for key, pair in adapter.pairs.items():  # alpha / rank, here 2, is in B
        assert torch.equal(pair.up * pair.scale, averages.pairs[key].up * 2) and pair.up.any()
    merge(base, [(adapter, 1.0)])
    stdit.save_transformer(base, made / "merged")
    merged = load_file(whole / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    wanted = load_file(made / "merged" / "diffusion_pytorch_model.safetensors")
    assert merged.keys() == wanted.keys() and all(torch.equal(merged[key], wanted[key]) for key in wanted)

    moved = (made / "base").rename(made / "moved")
    train(made, "parted", "schedule.steps=6", f"model.init={moved}")
    weights = moved / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(StditError, match=r"goes with other weights: the transformer, .* has changed since"):
        train(made, "parted", "schedule.steps=7", f"model.init={moved}")


@pytest.mark.parametrize(("name", "number"), CASES)
def test_what_is_exported_unasked(name, number, tmp_path):
    """ComfyUI's names without alphas, where diffusers looks in a folder; of Cosmos each program has a file."""
    checkpoint(name, number, tmp_path / "base")
    ours = stdit.load_transformer(tmp_path / "base")
    add_lora(ours, LoraConfig(rank=3, alpha=4), seed=0)
    weights = {f"transformer.{key}": torch.randn(t.shape) for key, t in ours.state_dict().items() if ".lora_" in key}
    export_adapters(weights, tmp_path / "out", ours.config, LoraConfig(rank=3, alpha=4), None)
    files = {path.name: load_file(path) for path in (tmp_path / "out").iterdir()}
    assert sorted(files) == ["lora.safetensors", "pytorch_lora_weights.safetensors"][name != "Cosmos-Predict" :]
    common = files.get("lora.safetensors", files["pytorch_lora_weights.safetensors"])
    assert all(key.startswith("diffusion_model.") and ".lora_" in key for key in common)
    if name == "Cosmos-Predict":
        assert all(key.startswith("transformer.") for key in files["pytorch_lora_weights.safetensors"])
    wanted = {
        key: pair.up @ pair.down.flatten(1) * 4 / 3 for key, pair in adapter_of(weights, LoraConfig()).pairs.items()
    }
    for file in files:
        pairs = read_adapter(tmp_path / "out" / file, ours.config).pairs
        assert pairs.keys() == wanted.keys()
        for key, pair in pairs.items():
            torch.testing.assert_close(pair.up @ pair.down.flatten(1) * pair.scale, wanted[key], rtol=1e-5, atol=1e-5)


def test_bf16_keeps_adapters_in_fp32_and_any_layout_is_exported(made):
    folder = train(made, "bf16", "run.precision=bf16", "model.lora.layout=kohya", "model.lora.merged=false",
                   "schedule.steps=2")  # fmt: skip
    assert sorted(path.name for path in (folder / "model").iterdir()) == [
        "base.json", "export.json", "lora.safetensors", "scheduler", "stdit.json",
    ]  # fmt: skip
    tensors = load_file(folder / "model" / "lora.safetensors")
    assert "lora_unet_blocks_0_self_attn_q.lora_down.weight" in tensors
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    down = tensors["lora_unet_blocks_0_self_attn_q.lora_down.weight"]
    assert not torch.equal(down, down.bfloat16().float())


@pytest.mark.parametrize("init", ["base", "two"])
def test_an_adapters_folder_alone_samples_is_measured_and_reported(made, two, init, capsys):
    """Over a transformer's folder with a VAE and a text encoder of elsewhere, and over a model folder."""
    extra = ["model.lora.merged=false"]
    if init == "two":
        shutil.rmtree(two / "transformer_2")
        index = json.loads((two / "model_index.json").read_text())
        index = {key: value for key, value in index.items() if key not in ("transformer_2", "boundary_ratio")}
        (two / "model_index.json").write_text(json.dumps(index))
        extra += ["vae.path=null", "text.path=null"]
    settings = [f"model.init={made / init}", "eval={steps: 2, guidance: 1}", "objective.flow.noise_levels.shift=5"]
    alone, merged = train(made, "alone", *settings, *extra), train(made, "merged", *settings, *extra[1:])
    assert not (alone / "model" / "transformer").exists()
    pipelines = [Pipeline.load(run / "model") for run in (alone, merged)]
    assert pipelines[0].settings == pipelines[1].settings
    assert pipelines[0].scheduler == pipelines[1].scheduler and pipelines[0].scheduler["flow_shift"] == 5
    frames = [pipeline("a red circle", steps=2).astype(int) for pipeline in pipelines]
    assert abs(frames[0] - frames[1]).max() <= 1
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(1, 4, 2, 4, 6, generator=generator), torch.randn(1, 3, 16, generator=generator)
    before = Pipeline.load(alone / "model")
    before.add_loras([(alone / "model", -1.0)])
    with torch.no_grad():
        outputs = [one.transformer.predict(latents, torch.tensor([0.4]), text) for one in (*pipelines, before)]
    assert relative(outputs[0], outputs[1]) <= 1e-6 and relative(outputs[0], outputs[2]) > 1e-3

    few = ["--device", "cpu", "--steps", "1", "--guidance", "1"]
    for words in (
        ["sample", "--prompt", "a red circle", "--out", made / "clips"],
        ["eval", "captions", "--out", alone, "--clips", "2", "--levels", "1", "--draws", "1"],
    ):
        assert run_command(app, [*map(str, words), "--model", str(alone / "model"), *few]) == 0, capsys.readouterr().err
    assert (
        list((made / "clips").glob("000-a-red-circle-seed0-*.mp4")) and (alone / "evaluation-captions.json").is_file()
    )
    assert write_report(alone).is_file()

    with pytest.raises(StditError, match=r"is an adapter \(LoRA\); base.json names its base model"):
        stdit.load_transformer(alone / "model")
    (made / init).rename(made / "elsewhere")
    with pytest.raises(StditError, match=r"base\.json: transformer, .*, over which .* was trained, does not exist"):
        Pipeline.load(alone / "model")


@pytest.fixture
def alone(made: Path) -> Path:
    """The model folder of an adapter alone, over parts of three places."""
    return train(made, "alone", "model.lora.merged=false", "schedule.steps=1") / "model"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("transformer", "base/diffusion_pytorch_model.safetensors"),
        ("transformer's config", "base/config.json"),
        ("vae", "own/vae/diffusion_pytorch_model.safetensors"),
        ("text_encoder", "text/text_encoder/model.safetensors"),
        ("tokenizer", "text/tokenizer/tokenizer.json"),
    ],
)
def test_other_weights_below_an_adapter_are_refused(made, tiny, alone, part, file):
    """base.json names them by content; where they lie does not matter."""
    shutil.copytree(tiny / "vae", made / "own" / "vae")
    path, written = alone / "base.json", json.loads((alone / "base.json").read_text())
    (made / "there").mkdir()
    for name in ("base", "text", "own"):
        shutil.move(made / name, made / "there" / name)
    moved = {"transformer": "base", "vae": "own", "text_encoder": "text"}
    written |= {name: str(made / "there" / place) for name, place in moved.items()}
    path.write_text(json.dumps(written))
    Pipeline.load(alone)
    place = made / "there" / file
    if place.suffix == ".json":
        place.write_text(place.read_text() + "\n")
    else:
        flip(place)
    with pytest.raises(StditError, match=r"base\.json: the weights at its paths have changed") as caught:
        Pipeline.load(alone)
    said, wanted = str(caught.value), written["content"][part]
    assert re.search(rf"since: {part} is \w{{64}}, the adapter was trained over {wanted} \(SHA-256\)\. Restore", said)
    assert f"--lora {alone}" in said and said.count("trained over") == 1
    if part == "transformer":  # as the SHA-256 of the files says, by another program
        found = hashlib.sha256(place.read_bytes()).hexdigest()
        assert hashlib.sha256(found.encode()).hexdigest() in said
    assert set(written["content"]) == {"transformer", "transformer's config", "vae", "text_encoder", "tokenizer"}
    del written["content"]  # as earlier versions wrote it
    path.write_text(json.dumps(written))
    Pipeline.load(alone)


def test_both_experts_below_an_adapter_are_named(made, two):
    settings = [f"model.init={two}", "model.expert=low", "vae.path=null", "text.path=null", "text.padding=null"]
    folder = train(made, "low", *settings, "model.lora.merged=false", "schedule.steps=1") / "model"
    Pipeline.load(folder)
    flip(two / "transformer" / "diffusion_pytorch_model.safetensors")  # not the one that the adapter is of
    with pytest.raises(StditError, match=r"since: transformer is \w{64}, the adapter was trained over"):
        Pipeline.load(folder)


def test_weights_that_change_under_a_training_are_not_named_as_its_base(made, monkeypatch):
    write = trainer_module.export.write_model
    weights = made / "base" / "diffusion_pytorch_model.safetensors"

    def changed(*given):
        flip(weights)
        return write(*given)

    monkeypatch.setattr(trainer_module.export, "write_model", changed)
    with pytest.raises(StditError, match=r"the transformer, .*base: has changed while the run trained over it"):
        train(made, "alone", "model.lora.merged=false", "schedule.steps=1")
    monkeypatch.setattr(trainer_module.export, "write_model", write)
    assert not (made / "alone" / "model").exists()
    flip(weights)
    assert (train(made, "alone", "model.lora.merged=false", "schedule.steps=1") / "model" / "base.json").is_file()


@pytest.fixture
def two(made: Path, tiny: Path) -> Path:
    """A model folder of two experts, whose weights differ."""
    folder = made / "two"
    shutil.copytree(made / "base", folder / "transformer")
    randomise(FAMILIES["Wan"].build(WAN), 1).save_pretrained(folder / "transformer_2")
    shutil.copytree(tiny / "vae", folder / "vae")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(made / "text" / part, folder / part)
    write_scheduler(unipc_config(3.0), folder / "scheduler")
    parts = ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler")
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875, **{part: ["diffusers", "A"] for part in parts}}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("expert", ["both", "low"])
def test_each_expert_has_an_adapter_that_diffusers_puts_into_its_own_transformer(made, two, expert):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    settings = [f"model.init={two}", f"model.expert={expert}", "vae.path=null", "text.path=null", "text.padding=null"]
    settings += ["model.lora.merged=false", "objective.flow.noise_levels.shift=9"]
    whole, parted = train(made, "whole", *settings), train(made, "parted", *settings, "schedule.steps=2")
    train(made, "parted", *settings)
    names = ["transformer", "transformer_2"] if expert == "both" else ["transformer_2"]
    assert sorted(path.name for path in (whole / "model" / "lora").iterdir()) == names
    files = [whole / "model" / "lora" / name / "pytorch_lora_weights.safetensors" for name in names]
    for file in files:
        assert file.read_bytes() == (parted / file.relative_to(whole)).read_bytes()

    theirs = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), boundary_ratio=0.875,
        **{name: WanTransformer3DModel.from_pretrained(two / name) for name in ("transformer", "transformer_2")},
    )  # fmt: skip
    for file in files:
        second = file.parent.name == "transformer_2"
        theirs.load_lora_weights(file.parent, weight_name=file.name, load_into_transformer_2=second)
    ours, plain = Pipeline.load(whole / "model").transformer, stdit.load_transformer(two)
    added = Pipeline.load(two)
    added.add_loras([(file, 1.0) for file in files if file.parent.name == "transformer"], [(files[-1], 1.0)])
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(2, 4, 2, 4, 6, generator=generator), torch.randn(2, 3, 16, generator=generator)
    t = torch.tensor([0.95, 0.3])
    with torch.no_grad():
        found, before, told = (model.predict(latents, t, text) for model in (ours, plain, added.transformer))
        models = (theirs.transformer, theirs.transformer_2)
        each = [m(latents[i : i + 1], t[i : i + 1] * 1000, text[i : i + 1])[0] for i, m in enumerate(models)]
        wanted = torch.cat(each)
    assert relative(found, wanted) <= 1e-5 and torch.equal(found, told)
    assert [bool(relative(found[i], before[i]) > 1e-3) for i in (0, 1)] == [expert == "both", True]

    few = ["--clips", "2", "--levels", "4", "--draws", "1", "--steps", "1", "--guidance", "1", "--device", "cpu"]
    assert run_command(app, ["eval", "captions", "--model", f"{whole / 'model'}", "--out", f"{whole}", *few]) == 0

    single = Pipeline.load(two)
    single.transformer = single.transformer.high
    for given in (([(whole / "model", 1.0)],), ([], [(files[0], 1.0)])):
        with pytest.raises(StditError, match="these weights are one transformer"):
            single.add_loras(*given)
    with pytest.raises(StditError, match="goes with other weights"):
        content = bytearray((two / "transformer_2" / "diffusion_pytorch_model.safetensors").read_bytes())
        content[-2] ^= 1
        (two / "transformer_2" / "diffusion_pytorch_model.safetensors").write_bytes(content)
        train(made, "parted", *settings, "schedule.steps=6")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.init=null"], "needs the weights of init, which is not set"),
        (["text.path=null", "text.trained={}"], "model.lora trains adapters alone: set text.path"),
        (["model.lora.targets=[blocks.9.*]"], r"model\.lora\.targets: 'blocks\.9\.\*' is no linear layer"),
        (["model.lora.rank=0"], "model\\.lora\\.rank is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_is_named(made, overrides, message):
    with pytest.raises(StditError, match=message):
        train(made, "wrong", *overrides)


def test_adapters_start_as_keyed_and_in_pefts_range():
    config = TransformerConfig(dim=12, heads=2, layers=2, ffn_dim=48, text_dim=4)
    models = [STDiT(config), STDiT(config), STDiT(config)]
    for model, targets, seed in zip(models, (["*ffn*"], ["*ffn*", "*q"], ["*ffn*"]), (5, 5, 6)):
        add_lora(model, LoraConfig(rank=30, targets=targets), seed)
    first, wider, other = (model.get_parameter("blocks.1.ffn.2.lora_down.weight") for model in models)
    assert torch.equal(first, wider) and not torch.equal(first, other)  # keyed by the layer, not drawn in sequence
    assert 0.95 * 48**-0.5 < first.abs().max() <= 48**-0.5
    trained = [name for name, p in models[0].named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2 and all(".ffn." in name and ".lora_" in name for name in trained)
