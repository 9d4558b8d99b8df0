"""LoRA files of every family and dialect: peft and diffusers make, save and open them; numbers are theirs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from references import FAMILIES, in_fp64, randomise
from safetensors import safe_open
from safetensors.torch import save_file
from tensor_files import load_file
from torch import nn

import stdit
from stdit.errors import StditError
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.weights.lora.adapters import Adapter, Pair, merge
from stdit.weights.lora.read import describe, is_adapter, open_adapter, read_adapter
from stdit.weights.lora.write import write_adapter

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

CASES = [(name, 0) for name in FAMILIES] + [("Cosmos-Predict", 3)]
FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def fresh(name: str, number: int) -> nn.Module:
    return randomise(FAMILIES[name].build(FAMILIES[name].configs[number]), number)


def by_peft(name: str) -> bool:
    """diffusers' PixArt, Latte and Allegro know no adapters: peft wraps them, saves and opens."""
    return name in ("PixArt", "Latte", "Allegro")


def adapted(name: str, number: int, place: Path, **more) -> tuple[nn.Module, Path]:
    """The reference with random A and B on every linear and convolution of it, made by peft, and the file of them.

    Both are of the size of the weights, so that what is added is as large as what was there.
    """
    theirs = fresh(name, number)
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    targets = [module for module, one in theirs.named_modules() if isinstance(one, kinds)]
    different = {targets[-1].replace(".", r"\."): 7}
    settings = {"r": 3, "lora_alpha": 4, "rank_pattern": {targets[2]: 2}, "alpha_pattern": different}
    config = peft.LoraConfig(target_modules=targets, **settings, **more)
    wrapped = peft.get_peft_model(theirs, config) if by_peft(name) else theirs.add_adapter(config)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if ".lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    if wrapped is None:
        theirs.save_lora_adapter(place)
        return theirs, place / FILE
    wrapped.save_pretrained(place)
    return theirs, place / PEFT_FILE


def deltas(theirs: nn.Module) -> dict[str, torch.Tensor]:
    """What peft adds to every tensor of the reference."""
    from peft.tuners.lora import LoraLayer

    layers = {key: one for key, one in theirs.named_modules() if isinstance(one, LoraLayer)}
    return {f"{key}.weight": one.get_delta_weight(next(iter(one.lora_A))).detach() for key, one in layers.items()}


def inputs(ours: STDiT, name: str, number: int):
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(number)
    latents = torch.randn(2, ours.config.latent_channels, *family.grids[number], generator=generator)
    text = torch.randn(2, family.text_tokens, ours.config.text_dim, generator=generator)
    t = torch.rand(2, generator=generator)
    return latents, t, text, torch.ones(text.shape[:2], dtype=torch.bool)


@torch.no_grad()
def outputs(ours: STDiT, theirs, name: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    given, (latents, t, text, mask) = FAMILIES[name].given(FAMILIES[name].configs[number]), inputs(ours, name, number)
    wanted = FAMILIES[name].call(theirs, latents, t, text, mask, given)
    return ours.predict(latents, t, text, mask, **given), wanted


def base(name: str, number: int, place: Path) -> STDiT:
    fresh(name, number).save_pretrained(place)
    return stdit.load_transformer(place)


def product(tensors: dict[str, torch.Tensor], start: str) -> torch.Tensor:
    """alpha / rank · up · down of a file in ComfyUI's keys, written out."""
    down, up = tensors[f"{start}.lora_down.weight"], tensors[f"{start}.lora_up.weight"]
    whole = up.flatten(1) @ down.flatten(1) * (tensors[f"{start}.alpha"] / len(down))
    return whole.view(len(up), *down.shape[1:])


@pytest.mark.parametrize(("name", "number"), CASES)
@in_fp64()
def test_what_diffusers_saved_changes_the_output_as_there_and_goes_back(name, number, tmp_path):
    """In fp64: adapters as large as the weights amplify what fp32 rounds past 1e-4."""
    (theirs, file), ours = adapted(name, number, tmp_path), base(name, number, tmp_path / "base")
    before = outputs(ours, theirs, name, number)[0]
    adapter = read_adapter(file, ours.config)
    merge(ours, [(adapter, 1.0)])
    found, wanted = outputs(ours, theirs, name, number)
    assert relative(before, wanted) > 0.5
    assert relative(found, wanted) <= 1e-10
    other = fresh(name, number)
    if by_peft(name):
        write_adapter(adapter, tmp_path / "back" / PEFT_FILE, ours.config, "peft")
        peft.PeftModel.from_pretrained(other, tmp_path / "back")
    else:
        write_adapter(adapter, tmp_path / "back" / FILE, ours.config, "diffusers")
        other.load_lora_adapter(tmp_path / "back", use_safetensors=True)  # without it diffusers passes over the alphas
    first, second = deltas(theirs), deltas(other)
    assert first.keys() == second.keys()
    assert max(relative(second[key], first[key]) for key in first) <= 1e-12
    assert relative(found, outputs(ours, other, name, number)[1]) <= 1e-10


@pytest.mark.parametrize(("name", "number"), CASES)
def test_original_names_say_the_same_by_diffusers_own_converters(name, number, tmp_path):
    (theirs, file), ours = adapted(name, number, tmp_path), base(name, number, tmp_path / "base")
    adapter = read_adapter(file, ours.config)
    for layout in ("common", "original", "kohya"):
        write_adapter(adapter, tmp_path / f"{layout}.safetensors", ours.config, layout)
        again = read_adapter(tmp_path / f"{layout}.safetensors", ours.config)
        assert again.pairs.keys() == adapter.pairs.keys() and not again.differences
        for key, pair in adapter.pairs.items():
            other = again.pairs[key]
            assert torch.equal(other.down, pair.down) and other.rank == pair.rank, key
            assert relative(other.up * other.scale, pair.up * pair.scale) <= 1e-6, key
    if not FAMILIES[name].converters:
        return
    stdit.save_transformer(ours, tmp_path / "original", "original")
    tensors = load_file(tmp_path / "original" / "diffusion_pytorch_model.safetensors")
    change = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    held = load_file(tmp_path / "original.safetensors")
    for key in {key.rsplit(".lora_", 1)[0] for key in held if ".lora_" in key}:
        change[f"{key.removeprefix('diffusion_model.')}.weight"] += product(held, key)
    moved = FAMILIES[name].converters["original"](change)
    for key, delta in deltas(theirs).items():
        assert relative(moved[key], delta) <= 1e-6, key


def test_an_adapter_of_fused_weights_is_split(tmp_path):
    """Trained on PixArt's own qkv: A is shared, B split; written back bit for bit."""
    name, number = "PixArt", 1
    ours = base(name, number, tmp_path / "base")
    dim = ours.config.dim
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for module, rows in (("blocks.1.attn.qkv", 3 * dim), ("blocks.0.cross_attn.kv_linear", 2 * dim)):
        tensors[f"diffusion_model.{module}.lora_down.weight"] = torch.randn(3, dim, generator=generator)
        tensors[f"diffusion_model.{module}.lora_up.weight"] = torch.randn(rows, 3, generator=generator)
        tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "fused.safetensors")
    adapter = read_adapter(tmp_path / "fused.safetensors", ours.config)
    assert sorted(adapter.pairs) == [
        *(f"blocks.0.cross_attn.{p}.weight" for p in "kv"),
        *(f"blocks.1.self_attn.{p}.weight" for p in "kqv"),
    ]
    stdit.save_transformer(ours, tmp_path / "original", "original")
    weights = load_file(tmp_path / "original" / "diffusion_pytorch_model.safetensors")
    for key in ("blocks.1.attn.qkv", "blocks.0.cross_attn.kv_linear"):
        weights[f"{key}.weight"] += product(tensors, f"diffusion_model.{key}")
    theirs = FAMILIES[name].build(FAMILIES[name].configs[number])
    moved = FAMILIES[name].converters["original"](weights)
    for key in ("y_embedder.y_embedding", "pos_embed"):  # of which diffusers has no parameter
        moved.pop(key, None)
    theirs.load_state_dict({**theirs.state_dict(), **moved})
    merge(ours, [(adapter, 1.0)])
    assert relative(*outputs(ours, theirs, name, number)) <= 1e-5
    write_adapter(adapter, tmp_path / "again.safetensors", ours.config, "original")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("layout", ["common", "original", "kohya"])
def test_wans_files_open_in_diffusers_pipeline(layout, tmp_path):
    """diffusers takes ComfyUI's and musubi's Wan files apart by name, with an alpha for every layer of the blocks."""
    from diffusers.loaders import WanLoraLoaderMixin

    (theirs, file), ours = adapted("Wan", 1, tmp_path), base("Wan", 1, tmp_path / "base")
    adapter = read_adapter(file, ours.config)
    adapter = Adapter({key: pair for key, pair in adapter.pairs.items() if key.startswith("blocks.")})
    write_adapter(adapter, tmp_path / "out.safetensors", ours.config, layout)
    state = WanLoraLoaderMixin.lora_state_dict(str(tmp_path / "out.safetensors"))
    other = fresh("Wan", 1)
    other.load_lora_adapter(state)
    first, second = deltas(theirs), deltas(other)
    assert len(second) == len(adapter.pairs)
    assert max(relative(second[key], first[key]) for key in second) <= 1e-6


@pytest.mark.parametrize("kind", ["rslora", "bias", "pipeline", "no alpha"])
def test_other_ways_to_say_the_scale(kind, tmp_path):
    more = {"rslora": {"use_rslora": True}, "bias": {"lora_bias": True}}.get(kind, {})
    (theirs, place), ours = adapted("Wan", 0, tmp_path, **more), base("Wan", 0, tmp_path / "base")
    if kind == "pipeline":
        from diffusers import WanPipeline
        from diffusers.training_utils import _collate_lora_metadata
        from peft.utils import get_peft_model_state_dict

        layers = get_peft_model_state_dict(theirs, adapter_name="default")
        WanPipeline.save_lora_weights(tmp_path, layers, **_collate_lora_metadata({"transformer": theirs}))
    wanted = deltas(theirs)
    if kind == "no alpha":
        save_file(tensors := load_file(place), place)
        for key, delta in wanted.items():
            down, up = (tensors[key.replace(".weight", f".lora_{part}.weight")].flatten(1) for part in "AB")
            wanted[key] = (up @ down).view(delta.shape)
    write_adapter(read_adapter(place, ours.config), tmp_path / "out.safetensors", ours.config, "original")
    adapter = read_adapter(tmp_path / "out.safetensors", ours.config)
    if kind == "bias":
        assert len(adapter.differences) == len(adapter.pairs)
        merge(ours, [(adapter, 1.0)])
        assert relative(*outputs(ours, theirs, "Wan", 0)) <= 1e-4
        with pytest.raises(StditError, match="which diffusers' LoRA files cannot hold"):
            write_adapter(adapter, tmp_path / "no.safetensors", ours.config, "diffusers")
        return
    state = added(tmp_path / "out.safetensors", ours)
    assert max(relative(state[key], delta) for key, delta in wanted.items()) <= 1e-6


def added(path: Path, ours: STDiT) -> dict[str, torch.Tensor]:
    """What a file adds to our weights, by diffusers' names."""
    model = STDiT(ours.config)
    for tensor in model.state_dict().values():
        tensor.zero_()
    merge(model, [(read_adapter(path, ours.config), 1.0)])
    stdit.save_transformer(model, path.parent / "added")
    return load_file(path.parent / "added" / "diffusion_pytorch_model.safetensors")


def test_several_adapters_add_up_in_fp32_and_are_rounded_once():
    config = TransformerConfig(dim=12, heads=2, layers=1, ffn_dim=8, text_dim=4)
    model = STDiT(config).bfloat16()
    name = "blocks.0.ffn.0.weight"
    generator = torch.Generator().manual_seed(0)
    pairs = [Pair(torch.randn(r, 12, generator=generator), torch.randn(8, r, generator=generator), 3.0) for r in (2, 5)]
    bias = torch.randn(8, generator=generator)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    merge(model, [(Adapter({name: pairs[0]}), 0.7), (Adapter({name: pairs[1]}, {"blocks.0.ffn.0.bias": bias}), -1.5)])
    wanted = before[name].double()
    for pair, strength, rank in zip(pairs, (0.7, -1.5), (2, 5)):
        wanted += strength * 3 / rank * pair.up.double() @ pair.down.double()
    after = model.state_dict()
    assert ((after[name].double() - wanted).abs() <= wanted.abs() * 2**-8).all()  # half a step of bfloat16
    before["blocks.0.ffn.0.bias"] = (-1.5 * bias).bfloat16()  # it was zero
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items() if key != name)


def written(tmp_path: Path, config: TransformerConfig) -> Path:
    pairs = {}
    for key, shape in (("blocks.0.self_attn.q.weight", (12, 12)), ("blocks.1.ffn.2.weight", (12, 8))):
        pairs[key] = Pair(torch.ones(2, shape[1]), torch.ones(shape[0], 2), 2.0)
    write_adapter(Adapter(pairs), tmp_path / "a.safetensors", config, "original")
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("Q.lora_up.weight"), r"q\.lora_down\.weight has no lora_up beside it"),
        (lambda t: t.pop("Q.lora_down.weight"), r"q\.lora_up\.weight has no lora_down beside it"),
        (lambda t: t.update({"Q.lora_down.weight": torch.ones(3, 12)}), r"lora_up\.weight is \(12, 2\); .* \(12, 3\)"),
        (lambda t: t.update({"Q.lora_down.weight": torch.ones(2, 13)}), r"is \(2, 13\).*of another size"),
        (lambda t: t.update({"Q.lora_down.weight": torch.ones(2, 12).int()}), "int32, not floating point"),
        (
            lambda t: t.update({"Q.lora_up.weight": torch.full((12, 2), math.nan)}),
            "lora_up.weight holds NaN or infinity",
        ),
        (lambda t: t.update({"Q.alpha": torch.tensor(math.inf)}), "alpha holds NaN or infinity"),
        (lambda t: t.update({"Q.dora_scale": torch.ones(12, 1)}), r"holds DoRA \(diffusion_model.blocks.0"),
        (lambda t: t.update({"Q.lokr_w1": torch.ones(2, 2)}), "holds LoKr"),
        (lambda t: t.update({"Q.hada_w1_a": torch.ones(2, 2)}), "holds LoHa"),
        (lambda t: t.update({"Q.weight": torch.ones(12, 12)}), "is not part of a LoRA"),
        (lambda t: t.update({"Q.diff_b": torch.ones(11)}), r"diff_b is \(11,\)"),
        (lambda t: t.update({"text_encoder.q.lora_A.weight": torch.ones(1, 2)}), "an adapter for a model other than"),
        (lambda t: t.update({"transformer_2.q.lora_A.weight": torch.ones(1, 2)}), "an adapter for a model other than"),
        (
            lambda t: t.update({key.replace("s.1.", "s.7."): t.pop(key) for key in list(t) if "s.1." in key}),
            r"adapts 1 layers that this Wan transformer of 2 blocks does not have, such as diffusion_model\.blocks\.7",
        ),
    ],
)
def test_damage_is_named(change, message, tmp_path):
    config = TransformerConfig(dim=12, heads=2, layers=2, ffn_dim=8, text_dim=4)
    path = written(tmp_path, config)
    short = {key.replace("diffusion_model.blocks.0.self_attn.q", "Q"): t for key, t in load_file(path).items()}
    change(short)
    save_file({key.replace("Q", "diffusion_model.blocks.0.self_attn.q"): t for key, t in short.items()}, path)
    with pytest.raises(StditError, match=message) as error:
        read_adapter(path, config)
    assert str(path) in str(error.value)


def test_damaged_settings_and_other_families_are_named(tmp_path):
    config = TransformerConfig(dim=12, heads=2, layers=2, ffn_dim=8, text_dim=4)
    tensors = {
        "transformer.proj_out.lora_A.weight": torch.ones(1, 12),
        "transformer.proj_out.lora_B.weight": torch.ones(64, 1),
    }
    for text, message in [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"transformer.use_dora": true}', "holds DoRA"),
        ('{"init_lora_weights": "pissa_niter_4"}', "over changed base weights"),
        ('{"alpha_pattern": {"(a+)+b": 3}}', "alpha_pattern"),
        ('{"lora_alpha": "16"}', "alpha of proj_out is '16'"),
    ]:
        save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(StditError, match=message):
            read_adapter(tmp_path / "a.safetensors", config)
    _, file = adapted("Allegro", 0, tmp_path)
    with pytest.raises(StditError, match="family it is tells `stdit weights inspect"):
        read_adapter(file, config)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_tells_what_it_is_without_its_model(name, tmp_path):
    theirs, file = adapted(name, 0, tmp_path / "adapter")
    found = describe(file)
    family = {"Wan I2V": "Wan"}.get(name, name)
    assert any(one.startswith(family) and "diffusers" in one for one in found["fits"]), found["fits"]
    assert found["ranks"].keys() == {2, 3} and set(found["alphas"]) == {4, 7}
    assert found["parameters"] == sum(p.numel() for key, p in theirs.named_parameters() if ".lora_" in key)
    base(name, 0, tmp_path / "base")
    assert is_adapter(file) and not is_adapter(tmp_path / "base")


def test_ltx_videos_common_file_opens_in_diffusers_pipeline(tmp_path):
    """Its converter takes the prefix away and knows no alpha: a file with alphas is refused there."""
    from diffusers.loaders import LTXVideoLoraLoaderMixin

    (theirs, file), ours = adapted("LTX-Video", 0, tmp_path), base("LTX-Video", 0, tmp_path / "base")
    adapter = read_adapter(file, ours.config)
    adapter = Adapter({key: pair for key, pair in adapter.pairs.items() if "_attn." in key or ".ffn." in key})
    write_adapter(adapter, tmp_path / "out.safetensors", ours.config)
    state = LTXVideoLoraLoaderMixin.lora_state_dict(str(tmp_path / "out.safetensors"))
    assert all("lora" in key for key in state)
    other = fresh("LTX-Video", 0)
    other.load_lora_adapter(state)
    first, second = deltas(theirs), deltas(other)
    assert len(second) == len(adapter.pairs) > 10
    assert max(relative(second[key], first[key]) for key in second) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [2.0, 0.5, 3.0, 7.3])
def test_the_common_layout_needs_no_alpha(alpha, dtype, tmp_path):
    """B·A alone is what is added: no reader can be off by alpha / rank. A power of two is exact in every dtype."""
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator).to(dtype) for shape in ((4, 12), (12, 4)))
    config = TransformerConfig(dim=12, heads=2, layers=1, ffn_dim=8, text_dim=4)
    path = tmp_path / "a.safetensors"
    for layout in ("common", "comfyui", "diffusion-pipe"):
        write_adapter(Adapter({"blocks.0.cross_attn.q.weight": Pair(down, up, alpha)}), path, config, layout)
        found = load_file(path)
        start = "diffusion_model.blocks.0.cross_attn.q"
        assert sorted(found) == [f"{start}.lora_A.weight", f"{start}.lora_B.weight"]
        wanted = up.double() @ down.double() * (alpha / 4)
        product = found[f"{start}.lora_B.weight"].double() @ found[f"{start}.lora_A.weight"].double()
        assert relative(product, wanted) <= (0 if alpha in (2.0, 0.5) else 1e-7)
        assert read_adapter(path, config).pairs["blocks.0.cross_attn.q.weight"].scale == 1


I2V = TransformerConfig(
    dim=12, heads=2, layers=2, ffn_dim=8, text_dim=4, in_channels=36, image_channels=20, image_text_dim=6
)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet__"])
def test_lightx2vs_distilled_files_are_read_with_all_they_hold(prefix, tmp_path):
    """Pairs, and whole differences of biases (diff_b), norms (diff) and modulations (diff_m)."""
    generator = torch.Generator().manual_seed(0)
    model = STDiT(I2V)
    endings = {"diff_b": "bias", "diff_m": "modulation", "diff": "weight"}
    held = [
        "blocks.1.self_attn.q.diff_b", "blocks.1.self_attn.norm_q.diff", "blocks.0.cross_attn.norm_k_img.diff",
        "blocks.0.norm3.diff", "blocks.0.norm3.diff_b", "blocks.0.diff_m", "head.diff_m", "img_emb.proj.0.diff",
    ]  # fmt: skip
    changed = {name: re.sub(r"\w+$", lambda ending: endings[ending[0]], name) for name in held}
    stdit.save_transformer(model, tmp_path / "before", "original")
    before = load_file(tmp_path / "before" / "diffusion_pytorch_model.safetensors")
    tensors = {name: torch.randn(before[changed[name]].shape, generator=generator) for name in held}
    pair = {"down": torch.randn(3, 12, generator=generator), "up": torch.randn(12, 3, generator=generator)}
    written = tensors | {f"blocks.0.self_attn.v.lora_{part}.weight": tensor for part, tensor in pair.items()}

    def named(name: str) -> str:
        module = re.sub(r"\.(lora_\w+\.weight|diff\w*)$", "", name)
        return prefix + (module.replace(".", "_") if "lora_unet" in prefix else module) + name[len(module) :]

    save_file({named(name): tensor for name, tensor in written.items()}, tmp_path / "a.safetensors")
    merge(model, [(read_adapter(tmp_path / "a.safetensors", I2V), 1.0)])
    stdit.save_transformer(model, tmp_path / "after", "original")
    after = load_file(tmp_path / "after" / "diffusion_pytorch_model.safetensors")
    wanted = {changed[name]: before[changed[name]] + tensor for name, tensor in tensors.items()}
    wanted["blocks.0.self_attn.v.weight"] = before["blocks.0.self_attn.v.weight"] + pair["up"] @ pair["down"]
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, wanted.get(name, before[name]))


PAIR = {"lora_A.weight": torch.ones(1, 12), "lora_B.weight": torch.ones(12, 1)}


@pytest.mark.parametrize(
    ("start", "ending"),
    [
        ("", ".default"),  # DiffSynth-Studio's
        ("pipe.dit.", ".default"),  # its training checkpoints
        ("diffusion_model.", ""),  # diffusion-pipe's
        ("base_model.model.", ""),
        ("transformer.", ".style"),
    ],
)
def test_every_programs_prefix_is_read(start, ending, tmp_path):
    module = "blocks.1.attn1.to_q" if start == "transformer." else "blocks.1.self_attn.q"
    tensors = {f"{start}{module}.{key.replace('.weight', f'{ending}.weight')}": value for key, value in PAIR.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert list(read_adapter(tmp_path / "a.safetensors", I2V).pairs) == ["blocks.1.self_attn.q.weight"]


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ("diffusion_model.blocks.{}.cross_attn.k_img", r"blocks\.\*\.cross_attn\.k_img"),
        ("diffusion_model.blocks.7{}.ffn.0", r"blocks\.\*\.ffn\.0"),
        ("text_encoder.layers.{}.q", r"text_encoder\.layers\.0"),
        ("lora_te1_text_model_{}", "lora_te1_text_model_0"),
    ],
)
def test_what_a_model_does_not_have_is_left_out_only_if_asked(extra, named, tmp_path):
    """A Wan 2.1 I2V adapter on Wan 2.2 I2V, which has no image branch, and its kind."""
    config = replace(I2V, image_text_dim=0)
    tensors = {f"diffusion_model.blocks.0.self_attn.q.{key}": value for key, value in PAIR.items()}
    for number in range(2):
        tensors |= {f"{extra.format(number)}.{key}": value.clone() for key, value in PAIR.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(StditError, match="--lora-partly"):
        read_adapter(tmp_path / "a.safetensors", config)
    with pytest.warns(UserWarning, match=rf"1 layers are adapted\. Left out.*{named}"):
        found = read_adapter(tmp_path / "a.safetensors", config, partly=True)
    assert list(found.pairs) == ["blocks.0.self_attn.q.weight"]
    save_file({name: t for name, t in tensors.items() if ".0.self_attn.q." not in name}, tmp_path / "b.safetensors")
    with pytest.raises(StditError, match=r"does not have|holds no tensors for a transformer"):
        read_adapter(tmp_path / "b.safetensors", config, partly=True)


def test_names_joined_by_underscores_are_the_models_own(tmp_path):
    config = TransformerConfig(dim=12, heads=2, layers=11, ffn_dim=8, text_dim=4, image_text_dim=6)
    start = "lora_unet_blocks_10_cross_attn_k_img"
    tensors = {f"{start}.lora_down.weight": torch.ones(1, 12), f"{start}.lora_up.weight": torch.ones(12, 1)}
    tensors[f"{start}.alpha"] = torch.tensor(3)  # whole numbers are written too
    save_file(tensors, tmp_path / "a.safetensors")
    pairs = read_adapter(tmp_path / "a.safetensors", config).pairs
    assert list(pairs) == ["blocks.10.cross_attn.k_img.weight"]
    assert pairs["blocks.10.cross_attn.k_img.weight"].scale == 3
    assert open_adapter(tmp_path / "a.safetensors").joined


def test_diffusers_metadata_is_what_its_loader_takes(tmp_path):
    config = TransformerConfig(dim=12, heads=2, layers=1, ffn_dim=8, text_dim=4)
    pairs = {
        "blocks.0.ffn.0.weight": Pair(torch.ones(2, 12), torch.ones(8, 2), 2.5),
        "head.head.weight": Pair(torch.ones(3, 12), torch.ones(64, 3), 8.0),
        "blocks.0.ffn.2.weight": Pair(torch.ones(2, 8), torch.ones(12, 2), 8.0),
    }
    write_adapter(Adapter(pairs), tmp_path / "a.safetensors", config, "diffusers")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        found = json.loads(file.metadata()["lora_adapter_metadata"])
    assert found["transformer.r"] == 2 and found["transformer.rank_pattern"] == {"^proj_out": 3}
    assert found["transformer.lora_alpha"] == 8
    assert found["transformer.alpha_pattern"] == {r"^blocks\.0\.ffn\.net\.0\.proj": 2.5}
