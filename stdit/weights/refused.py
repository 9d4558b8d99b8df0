"""Recognises what stdit does not run: adapters given as models, and other models, by class and tensor names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stdit.errors import StditError
from stdit.weights.families import class_names, titles

_ADAPTER = re.compile(
    r"(.*[._])?(lora_(A|B|down|up|mid|magnitude_vector|embedding_A)|lora\.(down|up)|hada_w[12]_[ab]|lokr_w[12](_[ab])?"
    r"|dora_scale|oft_blocks|diff|diff_b)(\.\w+)*(\.(weight|bias))?"
)
_JOINT = "its text and video attend jointly, which is another network"
_CLASSES = {  # by the start of the class name in config.json
    "HunyuanVideo": f"HunyuanVideo: {_JOINT}",
    "Mochi": f"Mochi: {_JOINT}",
    "CogVideoX": f"CogVideoX: {_JOINT}",
    "LTX2": "LTX-2: it has a second kind of tokens, for sound",
    "Flux": f"Flux: {_JOINT}",
    "SD3": f"Stable Diffusion 3: {_JOINT}",
    "QwenImage": f"Qwen-Image: {_JOINT}",
    "Kandinsky": "Kandinsky: its blocks differ",
    "UNet": "a U-Net like Stable Diffusion's",
    "ChronoEdit": "ChronoEdit: Wan I2V's tensors, but its last frame stands at another position in time",
    "WanVACE": "Wan VACE: control branches",
    "WanAnimate": "Wan Animate: branches for motion and faces",
}
_NAMES = {  # patterns of tensor names
    r"(txt_in\.individual_token_refiner|context_embedder\.token_refiner)\.": "HunyuanVideo",
    r"double_blocks\.\d+\.": "HunyuanVideo or Flux",
    r"(t5_yproj|t5_y_embedder)\.|blocks\.\d+\.attn\.qkv_x\.": "Mochi",
    r"(audio_patchify_proj|audio_adaln_single)\.|transformer_blocks\.\d+\.audio_": "LTX-2",
    r"patch_embed\.text_proj\.": "CogVideoX",
    r"joint_blocks\.\d+\.": "Stable Diffusion 3",
    r"transformer_blocks\.\d+\.attn\.add_q_proj\.": "a joint-attention model (Mochi, Flux, SD 3, Qwen-Image)",
    r"(input_blocks|down_blocks)\.\d+\.": "a U-Net or an autoencoder",
}


def check_no_adapter(names: Iterable[str], place: object, kind: type[StditError] = StditError) -> None:
    """Raises `kind` if all tensors are an adapter's (LoRA and its relatives)."""
    names = [name for name in names if not name.endswith((".alpha", "lora_te"))]
    if names and all(_ADAPTER.fullmatch(name) for name in names):
        raise kind(
            f"{place}: is an adapter (LoRA), not a model. Give it beside its model, `stdit sample --model FOLDER "
            f"--lora {Path(str(place)).name}`, or look at it by `stdit weights inspect`."
        )


def check_known(class_name: Any, names: Iterable[str], place: object) -> None:
    """Raises StditError if the class or the tensors are of a transformer that stdit does not run."""
    loaded = f"It loads {', '.join(titles('transformer'))}."
    if class_name is not None and class_name not in class_names("transformer"):
        what = next((what for start, what in _CLASSES.items() if str(class_name).startswith(start)), "")
        raise StditError(
            f"{place}: {class_name!r} is not a model that stdit loads{f' ({what})' if what else ''}. {loaded}"
        )
    for pattern, what in _NAMES.items():
        if found := next((name for name in names if re.match(pattern, name)), None):
            raise StditError(f"{place}: holds tensors of {what}, such as {found}, which stdit does not load. {loaded}")
