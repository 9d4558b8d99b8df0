"""What ComfyUI, Wan's own code, musubi-tuner, DiffSynth-Studio and diffusers made of files that stdit saved.

Their outputs and the names that they used are kept by goldens/programs_golden.py; here stdit is held against them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import stdit
from stdit.weights.lora.adapters import merge
from stdit.weights.lora.write import write_adapter

sys.path.insert(0, str(Path(__file__).parent / "goldens"))
import programs_golden as golden
from golden_tools import relative

FACTS = json.loads(golden.FACTS.read_text())
CASES = ("original", "diffusers", "LoRA common")


def test_every_file_meant_for_a_program_is_used_whole():
    """Each program takes its own layout, and the common LoRA, without a tensor left or missing."""
    for program, names in golden.CASES.items():
        own = golden.LAYOUTS.get(program, ("original",))
        for name in names:
            for case in (*own, *(() if program.startswith("wan") else ("LoRA common",))):
                fact = FACTS[f"{program}|{name}|{case}"]
                assert fact["used"] and not fact["unused"] and not fact["missing"], (program, name, case)
                assert fact["error"] <= (3e-3 if program == "musubi" else 1e-5), (program, name, case)


@pytest.mark.parametrize("name", golden.MODELS)
def test_outputs_and_names_are_as_there(name, tmp_path):
    """To rounding; musubi's attention is in bfloat16."""
    model = golden.model_of(name)
    adapter, outputs = golden.adapter_of(model), {False: golden.ours(model, name)}
    write_adapter(adapter, tmp_path / "a.safetensors", model.config)
    found = {"LoRA common": names_in(tmp_path / "a.safetensors")}
    used = {case: set(FACTS[key].split()) for case in CASES if (key := f"names|{name}|{case}") in FACTS}
    for layout in used.keys() - found.keys():
        stdit.save_transformer(model, tmp_path / layout, layout)
        (file,) = (tmp_path / layout).glob("*.safetensors")
        found[layout] = names_in(file)
    assert used["original"] and all(found[case] == names for case, names in used.items())
    merge(model, [(adapter, 1.0)])
    outputs[True] = golden.ours(model, name)
    assert relative(outputs[True], outputs[False]) > 0.2
    kept = {key: value for key, value in np.load(golden.ARRAYS).items() if key.split("|")[1] == name}
    assert kept
    for key, wanted in kept.items():
        bound = 3e-3 if key.startswith("musubi") else 1e-5
        assert relative(outputs["LoRA" in key], torch.from_numpy(wanted)) <= bound, key


def names_in(path: Path) -> set[str]:
    """Without PixArt's table of positions, which ComfyUI computes."""
    with safe_open(path, "pt") as file:
        return set(file.keys()) - {"pos_embed"}
