"""fp8 weights with scales, as ComfyUI and others store them: value = stored × scale, per tensor or per row.

    blocks.0.self_attn.q.weight        float8_e4m3fn or float8_e5m2
    blocks.0.self_attn.q.scale_weight  ComfyUI's first form (with a tensor `scaled_fp8` that marks the file)
    blocks.0.self_attn.q.weight_scale  its later form (with `comfy_quant`, a JSON text), compressed-tensors', torchao's
    blocks.0.self_attn.q.input_scale   or scale_input: of activations, which stdit does not quantise

Other quantisations (a scale per block, int8, 4 bits) are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

from stdit.errors import StditError
from stdit.weights.tensor_files import Entry, TensorFiles

FP8 = ("float8_e4m3fn", "float8_e5m2")
_SCALE = re.compile(r"(.+\.)(scale_weight|weight_scale)")
_PASSED_OVER = re.compile(r"(.+\.)?(scaled_fp8|scale_input|input_scale|comfy_quant)")
_REFUSED = {
    r"\.weight_scale_2$": "NVFP4 (4 bits with two scales)",
    r"\.weight_scale_inv$": "fp8 in blocks",
    r"\.(absmax|quant_map|nested_absmax)$|\.quant_state\.": "bitsandbytes' (8 or 4 bits)",
    r"\.(qweight|qzeros|wscales|smooth_factor)$": "GPTQ's, AWQ's or Nunchaku's (4 bits)",
}
_ADVICE = "Take the release's bf16 or fp16 weights, or plain or scaled fp8."


def scaled(files: TensorFiles) -> TensorFiles:
    """Gives fp8 weights their scales, which `read` then applies. Raises StditError for other quantisations."""
    for pattern, kind in _REFUSED.items():
        if names := [name for name in files.entries if re.search(pattern, name)]:
            raise StditError(f"{files.path}: is quantised as {kind} ({names[0]}), which stdit does not read. {_ADVICE}")
    left = dict(files.entries)
    for name, entry in files.entries.items():
        if name.endswith("comfy_quant"):
            _check_format(files, name)
        found = _SCALE.fullmatch(name)
        if found is None or (weight := files.entries.get(f"{found[1]}weight")) is None:
            continue
        count = math.prod(entry.shape)
        whole = count == 1 or (weight.shape and count == weight.shape[0] == max(entry.shape))
        if weight.dtype in ("int8", "uint8", "int32") or not whole:
            raise StditError(
                f"{files.path}: {found[1]}weight is {weight.dtype} of shape {weight.shape} with a scale of shape "
                f"{entry.shape}; stdit reads floating-point weights with one scale, or one per row. {_ADVICE}"
            )
        left[f"{found[1]}weight"] = replace(weight, scale=entry)
        left.pop(name)
    if not any(is_quantised(entry) for entry in left.values()):
        return files
    return replace(files, entries={name: entry for name, entry in left.items() if not _PASSED_OVER.fullmatch(name)})


def is_quantised(entry: Entry) -> bool:
    """Whether a tensor is fp8 or has a scale."""
    return entry.dtype in FP8 or entry.scale is not None


def _check_format(files: TensorFiles, name: str) -> None:
    try:
        kind = json.loads(bytes(files.read(name).tolist())).get("format")
    except (ValueError, AttributeError, TypeError):
        kind = None
    if kind not in FP8:
        raise StditError(f"{files.path}: {name} says {kind!r}; stdit reads {' and '.join(FP8)}. {_ADVICE}")
