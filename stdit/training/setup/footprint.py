"""Estimates memory per rank by running the objective on the meta device."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stdit.data.load.loader import Example
from stdit.data.plan.split import PlanItem
from stdit.errors import StditError, error_context
from stdit.files import part_folder
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.shapes import VideoShape
from stdit.training.config import RunConfig, VaeSettings
from stdit.training.engine.engine import PRECISIONS
from stdit.training.engine.zero import zero_stage
from stdit.training.objectives.conditions import Conditions
from stdit.training.objectives.flow import FlowObjective
from stdit.training.objectives.protocol import Objective, StepKey
from stdit.training.objectives.vae import VaeObjective
from stdit.training.setup.initial_weights import (
    check_export,
    check_vae,
    select_trainable,
)
from stdit.training.setup.lora import add_lora
from stdit.training.setup.resolve import ResolvedConfig
from stdit.vae.autoencoder import preset
from stdit.vae.training.lpips import Lpips
from stdit.weights.families import on_meta
from stdit.weights.image_vae import image_vae_config
from stdit.weights.io import vae_on_meta
from stdit.weights.tensor_files import open_safetensors

NOWHERE = torch.device("meta")
CLIPS = 4  # clips per pack that is measured
CAPTION_TOKENS = 128  # assumed per caption
IMAGE_TOKENS = 257  # of CLIP's image encoder (Wan's image-to-video)


class _Text:
    """Stands for a text encoder: captions of CAPTION_TOKENS tokens, or as many as fit."""

    def __init__(self, dim: int, padding: int) -> None:
        self.dim, self.length = dim, min(CAPTION_TOKENS, padding or CAPTION_TOKENS)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [[0] * self.length for _ in texts]

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        return [torch.zeros(self.length, self.dim) for _ in texts]


class _Images:
    def __init__(self, dim: int, positions: int) -> None:
        self.dim, self.length = dim, positions // 2 or IMAGE_TOKENS  # positions: of a first and a last image

    def encode(self, frames: Sequence[Tensor]) -> list[Tensor]:
        return [torch.zeros(self.length, self.dim) for _ in frames]


def build_on_meta(config: ResolvedConfig) -> Objective:
    """The objective of the training with its models on the meta device: no weights, but all sizes and costs."""
    if config.vae.path is not None:
        check_vae(config.vae.path)
    vae, dtype = _vae(config.vae), PRECISIONS[config.run.precision]
    with NOWHERE:
        if config.objective.kind == "vae":
            lpips = Lpips(None) if config.objective.vae.lpips else None
            return VaeObjective(config.objective, lambda: vae, lpips, device=NOWHERE, dtype=dtype)
        settings = config.model
        if config.initial is not None:
            found = config.initial.config
            model = STDiT(found.inflated() if settings.inflate else found)
            select_trainable(model, settings)
            if settings.lora is not None:
                add_lora(model, settings.lora, config.run.seed)
        else:
            follow = {"in_channels": vae.config.z_dim, "out_channels": vae.config.z_dim}
            follow |= {"text_dim": config.text.trained.dim} if config.text.trained else {}
            model = STDiT(TransformerConfig.preset(settings.preset or "toy", **(settings.overrides | follow)))
    check_export(settings, model.config)
    model.checkpoint_blocks = settings.checkpoint_blocks
    images = _Images(model.config.image_text_dim, model.config.image_text_positions)
    return FlowObjective(
        config.objective,
        model,
        vae,
        _Text(model.config.text_dim, config.text.padding or 0),  # type: ignore[arg-type]
        train_text=False,
        text_padding=config.text.padding or 0,
        conditions=Conditions(model.config, vae, config.data.fps, images),
        device=NOWHERE,
        dtype=dtype,
    )


def _vae(settings: VaeSettings) -> Any:
    with error_context("vae.path"):
        if settings.inflate:
            return on_meta(image_vae_config(settings.path or "", settings.overrides.get("temporal_downsample")))
        if settings.path:
            return vae_on_meta(settings.path)
    with error_context("vae"):
        return on_meta(preset(settings.preset or "toy", **settings.overrides))


@dataclass(frozen=True)
class Footprint:
    """Bytes on a rank, without a text encoder that trains along and without the memory of the device's libraries.

    weights: in the precision of the run.
    gradients: in fp32.
    state: masters, moments and the moving average.
    encoders: the VAE and a frozen text encoder, or LPIPS.
    activations: the peak of forward and backward of the fullest pack.
    """

    weights: int
    gradients: int
    state: int
    encoders: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def footprint(
    config: ResolvedConfig, objective: Objective, shape: VideoShape, tokens: int, ranks: int, trained: int | None = None
) -> Footprint:
    """Estimates the memory of a rank.

    objective: from `build_on_meta`; it is modified.
    shape: of the clips in the fullest pack, the largest one.
    tokens: of the fullest pack.
    trained: number of parameters that train, if it is not that of the objective's module.
    """
    parameters = list(objective.module.parameters()) * (2 if config.model.expert == "both" else 1)
    theirs = sum(p.numel() for p in parameters if p.requires_grad)
    frozen, trained = sum(p.numel() for p in parameters) - theirs, trained or theirs
    moved = trained + (sum(p.numel() for p in objective.critic.module.parameters()) if objective.critic else 0)
    stage, size = zero_stage(config.parallel.deepspeed), PRECISIONS[config.run.precision].itemsize
    masters, average = size < 4, config.optimizer.ema.decay > 0
    encoders = 0
    if isinstance(objective, FlowObjective):
        encoders = sum(4 * p.numel() for p in objective.vae.parameters()) + _text_bytes(config, size)
    elif isinstance(objective, VaeObjective) and objective.lpips is not None:
        encoders = sum(4 * p.numel() for p in objective.lpips.parameters())
    return Footprint(
        weights=(moved + frozen) * size // (ranks if stage == 3 else 1),
        gradients=moved * 4 // (ranks if stage >= 2 else 1),
        state=(moved * (4 * masters + 8) + trained * 4 * average) // (ranks if stage >= 1 else 1),
        encoders=encoders,
        activations=activations(config, objective, shape, tokens),
    )


def activations(config: RunConfig, objective: Objective, shape: VideoShape, tokens: int) -> int:
    """The peak of encoding, forward and backward of a pack, in bytes, beyond weights and gradients.

    Runs them on meta tensors, which have sizes and no data, for up to CLIPS clips with two and with three blocks. More
    tokens are taken in proportion; each further block adds as much as the third did.
    """
    if not isinstance(objective, FlowObjective) or (layers := objective.model_config.layers) < 4:
        return max(_activations(config, objective, shape, tokens))
    model = objective.module.transformer
    held = {name: blocks for name, blocks in model.named_children() if isinstance(blocks, nn.ModuleList)}
    found = []
    for count in (2, 3):
        for name, blocks in held.items():
            setattr(model, name, blocks[:count])
        found.append(_activations(config, objective, shape, tokens))
    for name, blocks in held.items():
        setattr(model, name, blocks)
    (encoding, two), (_, three) = found
    return max(encoding, two + (layers - 2) * (three - two))


def _activations(config: RunConfig, objective: Objective, shape: VideoShape, tokens: int) -> tuple[int, int]:
    """The peak of encoding, and the peak of forward and backward."""
    each = objective.tokens(shape)
    count = min(max(1, tokens // each), CLIPS)
    critic = objective.critic
    modules = [objective.module, *([critic.module] if critic else [])]
    frozen = [objective.vae, getattr(objective, "lpips", None)]  # of which views are no activations either
    for module in modules:
        module.to(PRECISIONS[config.run.precision]).train()
        for p in module.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(_drop_gradient)  # it goes to the engine's, which is counted
    examples, items = [], []
    for number in range(count):
        frames = torch.empty(shape.frames, shape.height, shape.width, 3, dtype=torch.uint8, device=NOWHERE)
        latents = None
        if isinstance(objective, FlowObjective) and config.data.cache is not None:
            size = shape.latent(objective.vae.config.stride).sizes
            latents = torch.empty(objective.model_config.latent_channels, *size, device=NOWHERE)
        examples.append(Example(str(number), number, 0, 0, shape, 1.0, "", frames, latents))
        items.append(PlanItem(number, 0, 0, each, 1, number))
    there = [tensor for one in (*modules, *filter(None, frozen)) for tensor in (*one.parameters(), *one.buffers())]
    with _Peak([*there, *(e.frames for e in examples)]) as peak:
        batch = objective.prepare(examples, items, StepKey(0, 0, 0, count, critic.start if critic else 0))
        encoding, peak.most = peak.most, peak.live
        for module in modules:
            module(batch).backward()
    encoding, training = (round(most * tokens / (count * each)) for most in (encoding, peak.most))
    return encoding, training


class _Peak(TorchDispatchMode):
    """Tracks the bytes of live storages that operators allocate on the meta device."""

    def __init__(self, known: Sequence[Any]) -> None:
        super().__init__()
        self.live = self.most = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device == NOWHERE:
                self._note(value.untyped_storage())
        self.most = max(self.most, self.live)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _text_bytes(config: ResolvedConfig, size: int) -> int:
    """Bytes of the frozen text encoder in the precision of the run, from the headers of its files."""
    if config.text.path is None:
        return 0
    folder = part_folder(config.text.path, "text_encoder")
    if not folder.is_dir():
        raise StditError(f"text.path: {folder}: no such folder.")
    headers = (open_safetensors(path).entries for path in folder.glob("*.safetensors"))
    return size * sum(math.prod(entry.shape) for entries in headers for entry in entries.values())
