"""Estimates memory per rank by running the objective on the meta device."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from stdit.training.engine.optimizer import orthogonalised
from stdit.training.engine.zero import zero_stage
from stdit.training.objectives.conditions import Conditions
from stdit.training.objectives.flow import FlowObjective
from stdit.training.objectives.protocol import Objective, StepKey
from stdit.training.objectives.vae import VaeObjective
from stdit.training.setup.objective import check_vae, prepared
from stdit.training.setup.resolve import ResolvedConfig
from stdit.vae.autoencoder import preset
from stdit.vae.training.lpips import Lpips
from stdit.weights.families import on_meta
from stdit.weights.image_vae import image_vae_config
from stdit.weights.io import vae_on_meta
from stdit.weights.tensor_files import open_safetensors

NOWHERE = torch.device("meta")
CLIPS = 4  # clips per pack that is measured
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
    """Bytes on a rank, without a text encoder that trains along and without the memory of the device's libraries."""

    weights: int  # in the precision of the run
    gradients: int  # in fp32
    state: int  # masters, moments (two, of Muon's matrices one) and the moving average
    encoders: int  # the VAE and a frozen text encoder, or LPIPS
    activations: int  # the peak of forward and backward of the fullest pack

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
    parameters = dict(objective.module.named_parameters())
    sizes = {name: p.numel() for name, p in parameters.items() if p.requires_grad}
    matrices = sum(n for name, n in sizes.items() if orthogonalised(name, parameters[name], config.optimizer))
    models = 2 if config.model.expert == "both" else 1
    frozen, theirs = models * (sum(p.numel() for p in parameters.values()) - sum(sizes.values())), sum(sizes.values())
    trained = trained or models * theirs
    moved = trained + (_numbers(objective.critic.module) if objective.critic else 0)
    moments = 2 * moved - trained * matrices // max(1, theirs)  # Muon keeps one of a matrix
    stage, size = zero_stage(config.parallel.deepspeed), PRECISIONS[config.run.precision].itemsize
    masters, average = size < 4, config.optimizer.ema.decay > 0
    return Footprint(
        weights=(moved + frozen) * size // (ranks if stage == 3 else 1),
        gradients=moved * 4 // (ranks if stage >= 2 else 1),
        state=4 * (moved * masters + moments + trained * average) // (ranks if stage >= 1 else 1),
        encoders=4 * sum(map(_numbers, _encoders(objective))) + _text_bytes(config, size),
        activations=activations(config, objective, shape, tokens),
    )


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _encoders(objective: Objective) -> list[nn.Module]:
    """The networks that run on the clips and do not train."""
    if isinstance(objective, VaeObjective):
        return [] if objective.lpips is None else [objective.lpips]
    return [objective.vae]


def _text_bytes(config: ResolvedConfig, size: int) -> int:
    """Bytes of the frozen text encoder in the precision of the run, from the headers of its files."""
    if config.text.path is None or config.objective.kind == "vae":
        return 0
    folder = part_folder(config.text.path, "text_encoder")
    if not folder.is_dir():
        raise StditError(f"text.path: {folder}: no such folder.")
    headers = (open_safetensors(path).entries for path in folder.glob("*.safetensors"))
    return size * sum(math.prod(entry.shape) for entries in headers for entry in entries.values())


def activations(config: RunConfig, objective: Objective, shape: VideoShape, tokens: int) -> int:
    """The peak of encoding, forward and backward of a pack, in bytes, beyond weights and gradients.

    Runs them on meta tensors, which have sizes and no data, for up to CLIPS clips with two blocks, and two that tokens
    skip. More tokens are taken in proportion; each further block of a kind adds as much as the third one. Ranks that
    share the pack each encode it whole, and run forward and backward on an equal share of its tokens.
    """
    if not isinstance(objective, FlowObjective):
        return max(_activations(config, objective, shape, tokens))
    skipped = len(objective.routed_blocks)
    whole = objective.model_config.layers - skipped
    few, few_skipped = min(whole, 2), min(skipped, 2)

    def peaks(whole: int, skipped: int) -> tuple[int, int]:
        with _fewer_blocks(objective, whole, skipped):
            return _activations(config, objective, shape, tokens)

    encoding, training = peaks(few, few_skipped)
    total = training
    if whole > few:
        total += (whole - few) * (peaks(few + 1, few_skipped)[1] - training)
    if skipped > few_skipped:
        total += (skipped - few_skipped) * (peaks(few, few_skipped + 1)[1] - training)
    return max(encoding, -(-total // config.parallel.sequence_parallel))


@contextmanager
def _fewer_blocks(objective: FlowObjective, whole: int, skipped: int) -> Iterator[None]:
    """Leaves the transformer so many blocks that all tokens run, and so many that routed tokens skip."""
    model, routed = objective.module.transformer, objective.routed_blocks
    held = {name: blocks for name, blocks in model.named_children() if isinstance(blocks, nn.ModuleList)}
    after = min(whole, objective.model_config.layers - routed.stop, 1) if routed else 0
    for name, blocks in held.items():
        setattr(model, name, blocks[: whole + skipped])
    objective.routed_blocks = range(whole - after, whole - after + skipped)
    try:
        yield
    finally:
        objective.routed_blocks = routed
        for name, blocks in held.items():
            setattr(model, name, blocks)


def _activations(config: RunConfig, objective: Objective, shape: VideoShape, tokens: int) -> tuple[int, int]:
    """The peak of encoding, and the peak of forward and backward."""
    each = objective.tokens(shape)
    count = min(max(1, tokens // each), CLIPS)
    critic = objective.critic
    modules = [objective.module, *([critic.module] if critic else [])]
    for module in modules:
        module.to(PRECISIONS[config.run.precision]).train()
        for p in module.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(_drop_gradient)  # it goes to the engine's, which is counted
    frames = torch.empty(count, shape.frames, shape.height, shape.width, 3, dtype=torch.uint8, device=NOWHERE)
    latents: Sequence[Tensor | None] = [None] * count
    if isinstance(objective, FlowObjective) and config.data.cache is not None:
        size = (objective.model_config.latent_channels, *shape.latent(objective.vae.config.stride).sizes)
        latents = [torch.empty(size, device=NOWHERE) for _ in range(count)]
    examples = [Example(str(n), n, 0, 0, shape, 1.0, "", frames[n], latents[n]) for n in range(count)]
    items = [PlanItem(n, 0, 0, each, 1, n) for n in range(count)]
    networks = [*modules, *_encoders(objective)]  # views of their tensors are no activations either
    there = [tensor for one in networks for tensor in (*one.parameters(), *one.buffers())]
    with _Peak([*there, frames]) as peak:
        batch = objective.prepare(examples, items, StepKey(0, 0, 0, count, critic.start if critic else 0))
        encoding, peak.most = peak.most, peak.live
        for module in modules:
            module(batch).backward()
    encoding, training = (round(most * tokens / (count * each)) for most in (encoding, peak.most))
    return encoding, training


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Peak(TorchDispatchMode):
    """Tracks the bytes of live storages that operators allocate on the meta device."""

    def __init__(self, known: Sequence[Tensor]) -> None:
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
