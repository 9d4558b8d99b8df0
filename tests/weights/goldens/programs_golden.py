"""How programs_golden.npz and .json were made: what other programs make of files that stdit saved.

    PYTHONPATH=. python tests/weights/goldens/programs_golden.py PROGRAM FOLDER "NAME AND COMMIT"
    python tests/weights/goldens/programs_golden.py table          # of docs/open-weights.md

PROGRAM: comfyui, wan2.1, wan2.2, musubi, diffsynth or diffusers (the one installed: any FOLDER). FOLDER: a checkout of
github.com/comfyanonymous/ComfyUI, Wan-Video/Wan2.1, Wan-Video/Wan2.2, kohya-ss/musubi-tuner or
modelscope/DiffSynth-Studio. Their own code finds out what a file is, loads it and runs, on the CPU and in fp32.
Stand-ins: Wan's attention, which is flash-attn's alone, is torch's, and its packages do not import their T5 and VAEs; a
device for musubi's text encoder; pandas and modelscope for DiffSynth. Those two and Wan are told the model's sizes.
Weights and adapters are not kept: golden_tools.py makes them from names and shapes, here and in the test.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from golden_tools import relative, stand_in, weights
from safetensors.torch import load_file
from torch.nn import functional as F

import stdit
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.weights.families import ltx, pixart
from stdit.weights.lora.adapters import Adapter, Pair, merge
from stdit.weights.lora.write import write_adapter

ARRAYS, FACTS = Path(__file__).with_suffix(".npz"), Path(__file__).with_suffix(".json")
# Heads of 128 and a text of 4096: programs that read Wan's files take both as given. LTX-Video has 32 heads,
# PixArt a width of 1152.
_WAN = {"dim": 256, "heads": 2, "layers": 2, "ffn_dim": 192, "text_dim": 4096}
_LTX = {"dim": 256, "heads": 32, "layers": 2, "ffn_dim": 1024, "text_dim": 4096, "in_channels": 128}
_PIXART = {"dim": 1152, "heads": 16, "layers": 1, "ffn_dim": 4608, "in_channels": 4, "text_dim": 4096}
MODELS: dict[str, dict[str, Any]] = {
    "native": _WAN,
    "Wan 2.1 I2V": {**_WAN, "in_channels": 36, "image_channels": 20, "image_text_dim": 1280},
    "Wan 2.2 I2V": {**_WAN, "in_channels": 36, "image_channels": 20},
    "LTX-Video": _LTX,
    "LTX-Video 0.9.5": {**_LTX, "rotary": "inner_causal"},
    "PixArt-Σ": _PIXART,
}
FPS, RANK, ALPHA = 25, 4, 6.0


def model_of(name: str) -> STDiT:
    """The model with weights that its tensors' names make."""
    settings: dict[str, Any] = {}
    if name.startswith("LTX"):
        settings = {**ltx.FAMILY.settings, "patch": (1, 1, 1), "out_channels": 128}
    elif name.startswith("PixArt"):
        settings = {**pixart.FAMILY.settings, "position_base": 32, "out_channels": 8}
    config = TransformerConfig(**{**settings, **MODELS[name]})
    model = STDiT(config)
    model.load_state_dict(weights({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}))
    return model.eval()


def adapter_of(model: STDiT) -> Adapter:
    """Pairs for all of attention and MLP, as large as the weights."""
    pairs = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2 and "modulation" not in name:
            made = weights({f"A of {name}": (RANK, tensor.shape[1]), f"B of {name}": (len(tensor), RANK)})
            pairs[name] = Pair(made[f"A of {name}"], made[f"B of {name}"], ALPHA)
    return Adapter(pairs)


def inputs(name: str) -> dict[str, torch.Tensor]:
    """latents, t, text (padded to Wan's 512 positions with zeros), and an image where the model takes one."""
    config, draw = MODELS[name], np.random.default_rng(7).standard_normal
    shapes = {"LTX": (1, 128, 3, 2, 3), "Pix": (1, 4, 1, 40, 28)}
    shape = shapes.get(name[:3], (1, 16, 3, 4, 6))
    made = {"latents": draw(shape, dtype=np.float32), "t": np.array([0.7])}
    made["text"] = draw((1, 7, 4096), dtype=np.float32)
    if name != "LTX-Video":
        made["text"] = np.concatenate([made["text"], np.zeros((1, 505, 4096), np.float32)], 1)
    if config.get("in_channels") == 36:
        made["image"] = draw((1, 20, 3, 4, 6), dtype=np.float32)
    if "image_text_dim" in config:
        made["image_text"] = draw((1, 257, 1280), dtype=np.float32)
    return {key: torch.from_numpy(value) for key, value in made.items()}


@torch.no_grad()
def ours(model: STDiT, name: str) -> torch.Tensor:
    out = model.predict(**inputs(name), **({"fps": FPS} if name.startswith("LTX") else {}))
    return out[:, : out.shape[1] // 2] if name.startswith("PixArt") else out  # the variance is left out


@dataclass
class Answer:
    """What a program made of a file: names of it that it used and did not, its own that were not there, its output."""

    used: list[str]
    unused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    output: torch.Tensor | None = None
    note: str = ""


# A program: (model's name, file of the model, file of the adapter or None) to an answer about the last of them.
Program = Callable[[str, Path, Path | None], Answer]


@contextmanager
def _heard() -> Iterator[list[str]]:
    """The messages that a program logs."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    ear = Ear()
    logging.getLogger().addHandler(ear)
    try:
        yield said
    finally:
        logging.getLogger().removeHandler(ear)


def comfyui(name: str, file: Path, adapter: Path | None) -> Answer:
    """load_diffusion_model and load_lora_for_models, as its nodes call them."""
    import comfy.lora
    import comfy.lora_convert
    import comfy.sd
    import comfy.utils

    given, held = inputs(name), load_file(file)
    patcher = comfy.sd.load_diffusion_model(str(file))
    prefix = "model.diffusion_model." if all(key.startswith("model.") for key in held) else ""
    names = {key.removeprefix(prefix) for key in held}
    own = set(patcher.model.diffusion_model.state_dict())
    computed = {"pos_embed"} if name.startswith("PixArt") else set()  # ComfyUI makes PixArt's table of positions
    own -= {"y_embedder.y_embedding"}  # and its null text is for training
    answer = Answer(sorted(names & own), sorted(names - own - computed), sorted(own - names))
    if adapter is not None:
        state = load_file(adapter)
        with _heard() as said:
            patcher, _ = comfy.sd.load_lora_for_models(patcher, None, state, 1.0, 0.0)
        unused = sorted({line.removeprefix("lora key not loaded: ") for line in said if "key not loaded" in line})
        patcher.patch_model()
        answer = Answer(sorted(set(state) - set(unused)), unused)
    network = patcher.model.diffusion_model
    if name.startswith("LTX"):
        out = network(given["latents"].clone(), given["t"].float(), given["text"], None, FPS)
    elif name.startswith("PixArt"):
        out = network(given["latents"][:, :, 0], given["t"].float() * 1000, given["text"])[:, :, None]
    else:
        x = torch.cat([given["latents"], *([given["image"]] if "image" in given else [])], 1)
        out = network(x, given["t"].float() * 1000, given["text"], clip_fea=given.get("image_text"))
    answer.output = out
    return answer


def _attention(q, k, v, k_lens=None, **_):
    """What flash_attention says it computes, of one clip whose keys all count."""
    assert k_lens is None or int(k_lens[0]) == k.shape[1]
    return F.scaled_dot_product_attention(*(x.transpose(1, 2).float() for x in (q, k, v))).transpose(1, 2).to(q)


def wan(name: str, file: Path, adapter: Path | None) -> Answer:
    """WanModel.from_pretrained, of either release."""
    place = next(str(Path(one) / "wan") for one in sys.path if (Path(one) / "wan" / "modules" / "model.py").is_file())
    stand_in("wan", __path__=[place])
    stand_in("wan.modules", __path__=[f"{place}/modules"])
    import wan.modules.model as module

    module.flash_attention = _attention
    given = inputs(name)
    model, loaded = module.WanModel.from_pretrained(file.parent, output_loading_info=True)
    y = {"y": list(given["image"])} if "image" in given else {}
    if "image_text" in given:
        y["clip_fea"] = given["image_text"]
    out = model(list(given["latents"]), given["t"].float() * 1000, [given["text"][0, :7]], 3 * 2 * 3, **y)[0][None]
    unused = sorted(loaded["unexpected_keys"])
    return Answer(sorted(set(load_file(file)) - set(unused)), unused, sorted(loaded["missing_keys"]), out)


def musubi(name: str, file: Path, adapter: Path | None) -> Answer:
    """load_wan_model, with a LoRA merged as wan_generate_video.py does it, or as convert_lora.py first makes it."""
    torch.cuda.current_device = lambda: "cpu"  # its text encoder's default, asked for by importing it
    from musubi_tuner.convert_lora import convert_from_diffusers
    from musubi_tuner.wan.modules.model import load_wan_model

    given, settings = inputs(name), MODELS[name]
    state = load_file(adapter) if adapter else None
    note = ""
    if state is not None and not next(iter(state)).startswith("lora_unet_"):
        state, note = convert_from_diffusers("lora_unet_", state), "after its convert_lora.py"
    config = SimpleNamespace(
        i2v="image_text_dim" in settings or settings.get("in_channels") == 36, flf2v=False, eps=1e-6, freq_dim=256,
        v2_2=name.startswith("Wan 2.2"), in_dim=settings.get("in_channels", 16), out_dim=16, text_len=512,
        dim=settings["dim"], ffn_dim=settings["ffn_dim"], num_heads=settings["heads"], num_layers=settings["layers"],
    )  # fmt: skip
    loaded = [state] if state else None
    with _heard() as said:
        model = load_wan_model(config, "cpu", str(file), "torch", False, "cpu", torch.float32, lora_weights_list=loaded)
    image = {"y": list(given["image"])} if "image" in given else {}
    if "image_text" in given:
        image["clip_fea"] = given["image_text"]
    out = model(list(given["latents"]), given["t"].float() * 1000, [given["text"][0, :7]], 3 * 2 * 3, **image)[0][None]
    if state is None:
        return Answer(sorted(load_file(file)), output=out)  # it loads strictly
    weighed = {f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}" for key in model.state_dict()}
    used = sorted(key for key in state if key.partition(".")[0] in weighed)
    unused = sorted(set(state) - set(used))
    assert bool(unused) == any("not all LoRA keys" in line for line in said)
    return Answer(used, unused, output=out, note=note)


def diffsynth(name: str, file: Path, adapter: Path | None) -> Answer:
    """load_model of its WanModel, strictly; GeneralLoRALoader, as its pipelines' load_lora calls it."""
    for absent in ("pandas", "modelscope"):  # for tables of data sets, for downloads
        stand_in(absent, __spec__=ModuleSpec(absent, None), snapshot_download=None)
    from diffsynth.core.loader.model import load_model
    from diffsynth.models.wan_video_dit import WanModel
    from diffsynth.pipelines.wan_video import model_fn_wan_video
    from diffsynth.utils.lora import GeneralLoRALoader

    given, settings = inputs(name), MODELS[name]
    config = {
        "dim": settings["dim"], "in_dim": settings.get("in_channels", 16), "ffn_dim": settings["ffn_dim"],
        "out_dim": 16, "text_dim": 4096, "freq_dim": 256, "eps": 1e-6, "patch_size": (1, 2, 2),
        "num_heads": settings["heads"], "num_layers": settings["layers"],
        "has_image_input": "image_text_dim" in settings, "require_clip_embedding": "image_text_dim" in settings,
    }  # fmt: skip
    model = load_model(WanModel, str(file), config, torch.float32, "cpu")
    answer = Answer(sorted(load_file(file)))
    if adapter is not None:
        state, loader = load_file(adapter), GeneralLoRALoader("cpu", torch.float32)
        fused = {key.replace(".lora_A.weight", "") for key in loader.convert_state_dict(state) if ".lora_A." in key}
        fused &= {key for key, _ in model.named_modules()}
        loader.fuse_lora_to_base_model(model, state)
        used = sorted(key for key in state if any(f"{module}." in key for module in fused))
        answer = Answer(used, sorted(set(state) - set(used)))
    image = {"clip_feature": given.get("image_text"), "y": given.get("image")}
    time = given["t"].float() * 1000
    answer.output = model_fn_wan_video(model, latents=given["latents"], timestep=time, context=given["text"], **image)
    return answer


def diffusers(name: str, file: Path, adapter: Path | None) -> Answer:
    """from_pretrained of the transformer, and load_lora_weights of its pipeline."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
        WanPipeline,
        WanTransformer3DModel,
    )

    given, ltx = inputs(name), name.startswith("LTX")
    kind, pipeline = (LTXVideoTransformer3DModel, LTXPipeline) if ltx else (WanTransformer3DModel, WanPipeline)
    model, loaded = kind.from_pretrained(file.parent, output_loading_info=True)
    unused = sorted(loaded["unexpected_keys"])
    answer = Answer(sorted(set(load_file(file)) - set(unused)), unused, sorted(loaded["missing_keys"]))
    if adapter is not None:
        names = sorted(load_file(adapter))
        others = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
        pipe = pipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **others)
        try:
            pipe.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
        except ValueError as error:
            answer = Answer([], names, note=f"refused: {error}"[:90])
        else:
            layers = sum(".lora_A." in key for key, _ in model.named_parameters())
            whole = layers == sum("lora_A." in key or "lora_down." in key for key in names)
            answer = Answer(names if whole else [], [] if whole else names)
    latents, time = given["latents"], given["t"].float() * 1000
    if ltx:
        grid = latents.shape[2:]
        packed, mask = latents.flatten(2).transpose(1, 2), torch.ones(1, given["text"].shape[1])
        scale = (8 / FPS, 32, 32)
        out = model(
            packed, given["text"], time[:, None], mask, *grid, rope_interpolation_scale=scale, return_dict=False
        )
        answer.output = out[0].transpose(1, 2).unflatten(2, grid)
    else:
        x = torch.cat([latents, *([given["image"]] if "image" in given else [])], 1)
        answer.output = model(x, time, given["text"], given.get("image_text"), return_dict=False)[0]
    return answer


PROGRAMS: dict[str, Program] = {
    "comfyui": comfyui, "wan2.1": wan, "wan2.2": wan, "musubi": musubi, "diffsynth": diffsynth, "diffusers": diffusers,
}  # fmt: skip
CASES: dict[str, tuple[str, ...]] = {  # the models that each knows
    "comfyui": tuple(MODELS),
    "wan2.1": ("native", "Wan 2.1 I2V"),
    "wan2.2": ("native", "Wan 2.2 I2V"),
    "musubi": ("native", "Wan 2.1 I2V", "Wan 2.2 I2V"),
    "diffsynth": ("native", "Wan 2.1 I2V", "Wan 2.2 I2V"),
    "diffusers": ("native", "Wan 2.1 I2V", "Wan 2.2 I2V", "LTX-Video"),
}
LAYOUTS = {"comfyui": ("original", "comfyui"), "diffusers": ("diffusers",)}
LORAS = ("common", "original", "kohya", "diffusers")


@torch.no_grad()
def measured(program: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What it made of files in the layouts that are its own and of adapters in the common one, and how it took each
    file of stdit's."""
    arrays, facts = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES[program]:
            model, merged = model_of(name), model_of(name)
            merge(merged, [(adapter_of(model), 1.0)])
            for layout in LAYOUTS.get(program, ("original",)):
                stdit.save_transformer(model, Path(folder) / name / layout, layout)
                (file,) = (Path(folder) / name / layout).glob("*.safetensors")
                cases: dict[str, Path | None] = {layout: None}
                if layout != "comfyui" and PROGRAMS[program] is not wan:  # which has no LoRA
                    for kind in LORAS:
                        cases[f"LoRA {kind}"] = Path(folder) / f"{kind}.safetensors"
                        write_adapter(adapter_of(model), Path(folder) / f"{kind}.safetensors", model.config, kind)
                for case, adapter in cases.items():
                    answer, key = PROGRAMS[program](name, file, adapter), f"{program}|{name}|{case}"
                    assert answer.output is not None
                    facts[key] = {
                        "used": len(answer.used), "unused": len(answer.unused), "missing": len(answer.missing),
                        "error": float(f"{relative(answer.output, ours(merged if adapter else model, name)):.1e}"),
                        "note": answer.note,
                    }  # fmt: skip
                    print(key, facts[key], flush=True)
                    if case in ("original", "diffusers", "LoRA common"):
                        arrays[key] = answer.output.numpy()
                        if "convert" not in answer.note:
                            facts[f"names|{name}|{case}"] = " ".join(answer.used)
    return arrays, facts


def table(facts: dict[str, Any]) -> str:
    """In Markdown: a row for each model and each LoRA layout of a family, a column for each program."""
    lines = ["| written by stdit | " + " | ".join(facts[f"program|{program}"] for program in PROGRAMS) + " |"]
    lines += ["|---" * (1 + len(PROGRAMS)) + "|"]
    rows = [(name, (name,), ("original", "comfyui", "diffusers")) for name in MODELS]
    of = {"Wan": ("native", "Wan"), "LTX-Video": ("LTX",), "PixArt-Σ": ("PixArt",)}  # how its models' names begin
    for family, starts in of.items():
        names = tuple(name for name in MODELS if name.startswith(starts))
        rows += [(f"{family}, LoRA {kind}", names, (f"LoRA {kind}",)) for kind in LORAS]
    for row, names, cases in rows:
        cells = []
        for program in PROGRAMS:
            keys = (f"{program}|{name}|{case}" for name in names for case in cases)
            found = [facts[key] for key in keys if key in facts]
            cells.append(_cell(found) if found else "")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: list[dict[str, Any]]) -> str:
    """All names used, and the largest relative error of the output; or that none are."""
    if not any(fact["unused"] or fact["missing"] for fact in found):
        converted = " after convert_lora.py" if any("convert" in fact["note"] for fact in found) else ""
        return f"{max(fact['error'] for fact in found):.0e}{converted}"
    if any("refused" in fact["note"] for fact in found):
        return "refused"
    return "nothing used" if not any(fact["used"] for fact in found) else "a part used"


def main() -> None:
    program, *more = sys.argv[1:]
    if program == "table":
        return print(table(json.loads(FACTS.read_text())))
    folder = Path(more[0]).resolve() if program != "diffusers" else Path()
    sys.path[:0] = [str(folder / "src") if program == "musubi" else str(folder)] if more else []
    label = more[1] if len(more) > 1 else program  # at the head of the table's column
    if program == "comfyui":
        sys.argv = [sys.argv[0], "--cpu"]
        from comfy import options

        options.enable_args_parsing()
    arrays, facts = measured(program)
    kept = dict(np.load(ARRAYS)) if ARRAYS.exists() else {}
    old = json.loads(FACTS.read_text()) if FACTS.exists() else {}
    start = f"{program}|"
    np.savez_compressed(ARRAYS, **{k: v for k, v in kept.items() if not k.startswith(start)}, **arrays)
    old = {k: v for k, v in old.items() if not k.startswith(start)} | facts | {f"program|{program}": label}
    FACTS.write_text(json.dumps(old, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
