"""Estimates the memory of a rank: the numbers it holds, and the activations of a step on the meta device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stdit.errors import StditError, error_context
from stdit.files import part_folder
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.shapes import VideoShape
from stdit.training.config import VaeSettings
from stdit.training.engine.engine import PRECISIONS
from stdit.training.engine.optimizer import kept_numbers, orthogonalised
from stdit.training.engine.zero import ZeroMemory, zero_memory
from stdit.training.objectives.conditions import Conditions
from stdit.training.objectives.flow import FlowObjective
from stdit.training.objectives.protocol import Objective
from stdit.training.objectives.vae import VaeObjective
from stdit.training.setup.activations import NOWHERE, MetaStep, frozen_networks
from stdit.training.setup.objective import check_vae, prepared
from stdit.training.setup.resolve import ResolvedConfig
from stdit.vae.autoencoder import preset
from stdit.vae.training.lpips import Lpips
from stdit.weights.families import on_meta
from stdit.weights.image_vae import image_vae_config
from stdit.weights.io import vae_on_meta
from stdit.weights.tensor_files import open_safetensors

CAPTION_TOKENS = 128  # assumed per caption, if as many fit
IMAGE_TOKENS = 257  # of CLIP's image encoder (Wan's image-to-video)


@dataclass
class _Encoder:
    """Stands for an encoder of texts or images that makes `length` tokens of each."""

    dim: int
    length: int

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [[0] * self.length for _ in texts]

    def encode(self, given: Sequence[Any]) -> list[Tensor]:
        return [torch.zeros(self.length, self.dim) for _ in given]


def build_on_meta(config: ResolvedConfig) -> Objective:
    """The objective of the training with its models on the meta device: no weights, but all sizes and costs."""
    if config.vae.path is not None:
        check_vae(config.vae.path)
    vae, dtype, settings = _vae(config.vae), PRECISIONS[config.run.precision], config.model
    with NOWHERE:
        if config.objective.kind == "vae":
            lpips = Lpips(None) if config.objective.vae.lpips else None
            return VaeObjective(config.objective, lambda: vae, lpips, device=NOWHERE, dtype=dtype)
        if config.initial is not None:
            wanted = config.initial.config.inflated() if settings.inflate else config.initial.config
        else:
            follow = {"in_channels": vae.config.z_dim, "out_channels": vae.config.z_dim}
            follow |= {"text_dim": config.text.trained.dim} if config.text.trained else {}
            wanted = TransformerConfig.preset(settings.preset or "toy", **(settings.overrides | follow))
        model = prepared(STDiT(wanted), config)
    padding, positions = config.text.padding or 0, wanted.image_text_positions  # of a first and a last image
    images = _Encoder(wanted.image_text_dim, positions // 2 or IMAGE_TOKENS)
    text = _Encoder(wanted.text_dim, min(CAPTION_TOKENS, padding or CAPTION_TOKENS))
    return FlowObjective(
        config.objective, model, vae, text, train_text=False, text_padding=padding,  # type: ignore[arg-type]
        conditions=Conditions(wanted, vae, config.data.fps, images), device=NOWHERE, dtype=dtype,
    )  # fmt: skip


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
    """Bytes on a rank's device, when a step has several micro-steps. What the device's libraries take is not in it."""

    weights: int  # in the precision of the run, frozen ones too
    gradients: int  # in fp32
    masters: int  # the fp32 weights that the optimizer updates, if they are not the weights themselves
    moments: int  # of the optimizer: AdamW's two, one of Muon's matrices, SGD's momentum
    average: int  # the moving average of the weights
    vae: int  # or LPIPS, if a VAE trains
    text_encoder: int  # a frozen one
    buffers: int  # of ZeRO: gradients that are being reduced, and the weights that stage 3 gathers
    activations: int  # the peak of forward and backward of the fullest pack

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class ModelSizes:
    """The numbers that training holds, before ranks share them."""

    trained: int
    frozen: int  # parameters of the module that do not train
    moments: int
    averaged: int
    vae: int  # or LPIPS; in fp32
    text_encoder: int  # a frozen one
    size: int  # bytes of a number in the precision of the run

    @classmethod
    def of(cls, config: ResolvedConfig, objective: Objective, trained_text: int = 0) -> ModelSizes:
        """objective: from `build_on_meta`. trained_text: parameters of a text encoder that trains along."""
        parameters = dict(objective.module.named_parameters())
        sizes = {name: p.numel() for name, p in parameters.items() if p.requires_grad}
        matrices = sum(n for name, n in sizes.items() if orthogonalised(name, parameters[name], config.optimizer))
        models = 2 if config.model.expert == "both" else 1
        mine, every = sum(sizes.values()), sum(p.numel() for p in parameters.values())
        averaged = models * mine + trained_text
        critic = _numbers(objective.critic.module) if objective.critic else 0
        trained, kept = averaged + critic, kept_numbers(config.optimizer)
        return cls(
            trained=trained,
            frozen=models * (every - mine),
            moments=round(kept.of_others * (averaged - models * matrices) + kept.of_matrices * models * matrices)
            + 2 * critic,
            averaged=averaged if config.optimizer.ema.decay > 0 else 0,
            vae=sum(map(_numbers, frozen_networks(objective))),
            text_encoder=_text_numbers(config),
            size=PRECISIONS[config.run.precision].itemsize,
        )

    def footprint(self, zero: ZeroMemory, ranks: int, activations: int) -> Footprint:
        """The memory of one of so many ranks. Sequence parallelism shares out the activations alone."""
        stage, size, trained = zero.stage, self.size, self.trained
        state = ranks if stage else 1  # ranks that share masters, moments and average
        on_device = 0 if zero.state_on_host else 1
        # in fp32 weights are their own masters, but stages 1 and 2 keep the flat part of a rank as well
        masters = trained if size < 4 or stage in (1, 2) else 0
        weights, buffers = (trained + self.frozen) * size, 0
        if stage == 3:
            gathered = min(trained + self.frozen, zero.live) * size
            weights = 0 if zero.weights_on_host else weights // ranks
            buffers = gathered if ranks > 1 or zero.weights_on_host else 0
        if zero.buckets and not (stage == 1 and size < 4):  # stage 1 in bf16 reduces its fp32 gradients in place
            buffers += zero.buckets * zero.bucket * size
        return Footprint(
            weights=weights,
            gradients=on_device * 4 * trained // (ranks if stage >= 2 else 1),
            masters=on_device * 4 * masters // state,
            moments=on_device * 4 * self.moments // state,
            average=on_device * 4 * self.averaged // state,
            vae=4 * self.vae,
            text_encoder=size * self.text_encoder,
            buffers=buffers,
            activations=activations,
        )


def footprint(
    config: ResolvedConfig, objective: Objective, shape: VideoShape, tokens: int, ranks: int, trained_text: int = 0
) -> Footprint:
    """Estimates the memory of a rank.

    objective: from `build_on_meta`; it is modified.
    shape: of the clips in the fullest pack, the largest one.
    tokens: of the fullest pack.
    trained_text: parameters of a text encoder that trains along.
    """
    peak = MetaStep(config, objective, shape, tokens).peak(group=config.parallel.sequence_parallel)
    sizes = ModelSizes.of(config, objective, trained_text)
    return sizes.footprint(zero_memory(config.parallel.deepspeed), ranks, peak)


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _text_numbers(config: ResolvedConfig) -> int:
    """The numbers in the frozen text encoder, from the headers of its files; 0 if a cache has the embeddings."""
    if config.text.path is None or config.objective.kind == "vae" or config.data.cache is not None:
        return 0
    folder = part_folder(config.text.path, "text_encoder")
    if not folder.is_dir():
        raise StditError(f"text.path: {folder}: no such folder.")
    headers = (open_safetensors(path).entries for path in folder.glob("*.safetensors"))
    return sum(math.prod(entry.shape) for entries in headers for entry in entries.values())
