"""Prompts and known frames in, frames out; and the model folder that this is loaded from and saved to.

A model folder is in the layout of diffusers' WanPipeline: what is saved here opens there, with the same result for the
same noise, and a folder saved there opens here. `stdit.json` beside it holds what diffusers has no place for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stdit.diffusion.guidance import guide, needs_unconditional
from stdit.diffusion.solvers import (
    Solver,
    make_solver,
    named_config,
    read_scheduler,
    static_shift,
    write_scheduler,
)
from stdit.diffusion.tasks import frame_levels
from stdit.diffusion.timesteps import shift_by_tokens
from stdit.errors import StditError, nearest_name
from stdit.files import publish_text
from stdit.keyed import keyed_generator
from stdit.models.packing import TextPack, pack_clips, pack_texts, unpack_clips
from stdit.models.transformer import STDiT
from stdit.shapes import LatentShape, VideoShape
from stdit.text.encoders import TextEncoder, load_text_encoder
from stdit.vae.autoencoder import CausalVAE
from stdit.weights.adapters import merge
from stdit.weights.families.configs import DIFFUSERS_VERSION
from stdit.weights.files import read_json
from stdit.weights.io import load_transformer, load_vae, save_transformer, save_vae
from stdit.weights.lora_files import read_adapter

FORMAT = 1  # of stdit.json
Known = Mapping[str, Any]  # {"image": (H, W, 3)} or {"video": (T, H, W, 3)}, uint8


@dataclass(frozen=True)
class ModelSettings:
    """What a model folder says beyond its weights, in stdit.json: the defaults of sampling.

    fps: frames a second it was trained at. shapes: what it was trained at, WIDTHxHEIGHTxFRAMES; the first is the
    default. text_padding: positions that texts are padded to; None: as the transformer's config says. shift_tokens: a
    clip of so many tokens is sampled with the scheduler's static shift, one of n with √(n / shift_tokens) times as
    much, as it was trained; None: all with the static one, as diffusers does.
    """

    fps: float = 16.0
    shapes: tuple[str, ...] = ("832x480x81",)
    text_padding: int | None = None
    shift_tokens: int | None = None

    @classmethod
    def read(cls, folder: str | Path) -> ModelSettings:
        """From a model folder; Wan's where it has no stdit.json."""
        path = Path(folder) / "stdit.json"
        if not path.is_file():
            return cls()
        found = read_json(path)
        if found.pop("format", None) != FORMAT:
            raise StditError(f"{path}: its format is not {FORMAT}, the one this version of stdit reads.")
        for key in found:
            if key not in cls.__dataclass_fields__:
                raise StditError(f"{path}: unknown key {key!r}.{nearest_name(key, cls.__dataclass_fields__)}")
        found["shapes"] = tuple(found.get("shapes", cls.shapes))
        if not found["shapes"]:
            raise StditError(f"{path}: shapes is empty.")
        tokens = found.get("shift_tokens")
        if tokens is not None and not (type(tokens) is int and tokens > 0):
            raise StditError(f"{path}: shift_tokens is {tokens!r}; it must be a positive integer or null.")
        return cls(**found)

    def write(self, folder: str | Path) -> None:
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"
        publish_text(Path(folder) / "stdit.json", text)

    @property
    def shape(self) -> VideoShape:
        """The default shape."""
        return VideoShape.parse(self.shapes[0])


class Pipeline:
    """A model folder in memory: a transformer, a VAE, a text encoder and a scheduler's config."""

    def __init__(
        self,
        transformer: STDiT,
        vae: CausalVAE,
        text_encoder: TextEncoder,
        scheduler: Mapping[str, Any],
        settings: ModelSettings | None = None,
    ) -> None:
        config = transformer.config
        z = vae.config.z_dim
        if config.out_channels not in (z, 2 * z) or config.in_channels != z:
            raise StditError(
                f"the transformer takes {config.in_channels} and gives {config.out_channels} channels, "
                f"the VAE's latents have {z}."
            )
        if config.text_dim != text_encoder.dim:
            raise StditError(
                f"the transformer takes texts of width {config.text_dim}, the text encoder gives {text_encoder.dim}."
            )
        self.transformer, self.vae, self.text_encoder = transformer, vae, text_encoder
        self.scheduler = dict(scheduler)
        self.settings = settings or ModelSettings()

    @property
    def text_padding(self) -> int:
        """Positions that texts are zero-padded to; 0 for none."""
        padding = self.settings.text_padding
        return self.transformer.config.text_padding if padding is None else padding

    @property
    def multiple(self) -> tuple[int, int]:
        """(width, height) are multiples of these."""
        (_, h, w), (_, ph, pw) = self.vae.config.stride, self.transformer.config.patch
        return w * pw, h * ph

    @property
    def device(self) -> torch.device:
        return self.transformer.patch_embedding.weight.device

    def to(self, device: str | torch.device) -> Pipeline:
        for module in (self.transformer, self.vae, self.text_encoder):
            module.to(device)
        return self

    # ---- sampling ----

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        fps: float | None = None,
        steps: int = 30,
        guidance: float = 5.0,
        negative_prompt: str = "",
        seed: int = 0,
        noise: Tensor | None = None,
        known: Known | Sequence[Known | None] | None = None,
        solver: str | Mapping[str, Any] | None = None,
        *,
        shift: float | None = None,
        tokens_per_pack: int = 65_536,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray | list[np.ndarray]:
        """Frames for a prompt, uint8 (T, H, W, 3), or a list of such for a list of prompts.

        size: (width, height) and frames; by default those of the first shape the model was trained at. fps: the rate
        the frames are meant for; Wan's block knows none, so only the model's own (or None) is accepted. guidance:
        classifier-free, on above 1. noise: (1 or prompts, C, T', H', W') in place of the seed's. known: frames given
        as condition, {"image": the first frame} or {"video": the first 1+k·stride frames}, one for all prompts or
        one each. solver: None for the folder's own, a name (see `named_config`), or a diffusers scheduler's config.
        shift: in place of the folder's (see `ModelSettings`). tokens_per_pack: the most video tokens in one forward
        (never less than a clip). progress: called with (steps done, steps in all).
        """
        if fps is not None and fps != self.settings.fps:
            raise StditError(
                f"fps {fps:g}: this model makes clips of {self.settings.fps:g} frames a second, and knows no others. "
                "Leave fps out, and play the frames at the rate you like."
            )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        latents = self.sample_latents(
            prompts, size, frames, steps, guidance, negative_prompt, seed, noise, known, solver,
            shift=shift, tokens_per_pack=tokens_per_pack, progress=progress,
        )  # fmt: skip
        clips = [self.decode(one) for one in latents]
        return clips[0] if isinstance(prompt, str) else clips

    @torch.no_grad()
    def sample_latents(
        self,
        prompts: Sequence[str],
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        steps: int = 30,
        guidance: float = 5.0,
        negative_prompt: str = "",
        seed: int = 0,
        noise: Tensor | None = None,
        known: Known | Sequence[Known | None] | None = None,
        solver: str | Mapping[str, Any] | None = None,
        *,
        shift: float | None = None,
        tokens_per_pack: int = 65_536,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor]:
        """As the call, but gives each clip's normalised latents (C, T', H', W') fp32 as soon as its pack is done."""
        if not prompts:
            raise StditError("there is no prompt.")
        shape = self.shape(size, frames)
        grid = shape.grid(self.vae.config.stride, self.transformer.config.patch)
        latent = shape.latent(self.vae.config.stride)
        noises = self._noise(len(prompts), latent, seed, noise)
        given = self._encode_known(known, len(prompts), shape)
        guided = needs_unconditional(guidance)
        texts = self.encode_texts([*prompts, negative_prompt] if guided else prompts)
        negative = [texts.pop()] if guided else []

        together = max(1, tokens_per_pack // (grid.tokens * (1 + len(negative))))
        parts = [slice(start, start + together) for start in range(0, len(prompts), together)]
        for number, part in enumerate(parts):
            count = len(texts[part])
            text = pack_texts([*texts[part], *negative * count], self.text_padding)
            steps_done = number * steps

            def report(index: int, done: int = steps_done) -> None:
                if progress is not None:
                    progress(done + index, len(parts) * steps)

            chosen = self._solver(solver, steps, shift, shape)

            def fresh(step: int, part: slice = part) -> Tensor:
                drawn = [
                    torch.randn(noises.shape[1:], generator=keyed_generator(seed, "sample step", index, step))
                    for index in range(len(prompts))[part]
                ]
                return torch.stack(drawn).to(self.device)

            yield from self._denoise(noises[part], given[part], text, chosen, guidance, report, fresh)

    def _denoise(
        self,
        noise: Tensor,
        known: Sequence[Tensor | None],
        text: TextPack,
        solver: Solver,
        guidance: float,
        report: Callable[[int], None],
        fresh: Callable[[int], Tensor],
    ) -> list[Tensor]:
        """noise: (clips, C, T', H', W') fp32. known: (C, k, H', W') of each, or None. text: of the clips, and where
        guidance asks for it as many negative ones after them: two segments of one pack for each clip. fresh: the noise
        of a step, for solvers that draw."""
        patch = self.transformer.config.patch
        copies = len(text.segments.lengths) // len(noise)
        masks = [torch.arange(noise.shape[2]) < (0 if one is None else one.shape[1]) for one in known]

        def impose(x: Tensor) -> Tensor:
            x = x.clone()
            for clip, one in zip(x, known):
                if one is not None:
                    clip[:, : one.shape[1]] = one
            return x

        x = solver.start(noise)
        report(0)
        for index, t in enumerate(solver.levels):
            level = torch.tensor(t, dtype=torch.float64)
            levels = [frame_levels(mask, level, patch[0]) if mask.any() else level for mask in masks]
            pack = pack_clips([*impose(solver.network_input(index, x))] * copies, levels * copies, patch)
            pack.levels = solver.path.network_levels(pack.levels)
            output = torch.stack(unpack_clips(self.transformer(pack, text), pack, patch)).float()
            output = output[:, : noise.shape[1]]  # what follows is a learned variance
            if copies == 2:
                output = guide(output[: len(x)], output[len(x) :], guidance)
            x = solver.step(index, output, x, fresh(index) if solver.draws else None)
            report(index + 1)
        return [*impose(solver.finish(x))]

    def decode(self, latents: Tensor) -> np.ndarray:
        """Normalised latents (C, T', H', W') of a clip to frames, uint8 (T, H, W, 3), rounded as diffusers does."""
        return np.concatenate(list(self.decode_stream(latents)))

    def decode_stream(self, latents: Tensor) -> Iterator[np.ndarray]:
        """As `decode`, but gives the frames (t, H, W, 3) of each chunk as soon as it is decoded."""
        for video in self.vae.decode_stream(latents.to(next(self.vae.parameters()))):  # (3, t, H, W)
            frames = (video * 0.5 + 0.5).clamp(0, 1).float().permute(1, 2, 3, 0)
            yield (frames * 255).round().to(torch.uint8).cpu().numpy()

    def shape(self, size: tuple[int, int] | None = None, frames: int | None = None) -> VideoShape:
        """The shape to sample, defaults filled in. Raises where strides and patch do not divide it."""
        default = self.settings.shape
        width, height = size or (default.width, default.height)
        shape = VideoShape(default.frames if frames is None else frames, height, width)
        if shape.frames < 1:
            raise StditError(f"frames must be at least 1, not {frames}.")
        shape.grid(self.vae.config.stride, self.transformer.config.patch)
        return shape

    def _noise(self, count: int, latent: LatentShape, seed: int, noise: Tensor | None) -> Tensor:
        wanted = (self.vae.config.z_dim, latent.frames, latent.height, latent.width)
        if noise is None:
            drawn = [torch.randn(wanted, generator=keyed_generator(seed, "sample", index)) for index in range(count)]
            return torch.stack(drawn).to(self.device)
        if tuple(noise.shape) not in {(1, *wanted), (count, *wanted)}:
            raise StditError(f"noise has shape {tuple(noise.shape)}; this size and length need {(count, *wanted)}.")
        return noise.to(self.device, torch.float32).expand(count, -1, -1, -1, -1)

    def encode_texts(self, texts: Sequence[str]) -> list[Tensor]:
        """(L, D) each; equal texts are encoded once."""
        distinct = list(dict.fromkeys(texts))
        before = self.text_encoder.max_length
        if self.text_padding:
            self.text_encoder.max_length = self.text_padding
        try:
            encoded = dict(zip(distinct, self.text_encoder.encode(distinct)))
        finally:
            self.text_encoder.max_length = before
        return [encoded[text].to(self.device) for text in texts]

    def _encode_known(
        self, known: Known | Sequence[Known | None] | None, count: int, shape: VideoShape
    ) -> list[Tensor | None]:
        """Known frames to their own latents (C, k, H', W'), those of each of `count` clips: encoded alone, so that they
        know nothing of the rest."""
        if known is None or isinstance(known, Mapping):
            return [None if known is None else self._encode_frames(known, shape)] * count
        if len(known) != count:
            raise StditError(f"{len(known)} known for {count} prompts: give one for all, or one each.")
        return [None if one is None else self._encode_frames(one, shape) for one in known]

    def _encode_frames(self, known: Known, shape: VideoShape) -> Tensor:
        if set(known) not in ({"image"}, {"video"}):
            raise StditError(f'known must be {{"image": (H, W, 3)}} or {{"video": (T, H, W, 3)}}, not {sorted(known)}.')
        name, frames = next(iter(known.items()))
        frames = torch.as_tensor(np.asarray(frames))
        frames = frames[None] if name == "image" and frames.ndim == 3 else frames
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise StditError(
                f"known {name} must be uint8 frames (T, H, W, 3), not {frames.dtype} {tuple(frames.shape)}."
            )
        found = VideoShape(frames.shape[0], frames.shape[1], frames.shape[2])
        if (found.width, found.height) != (shape.width, shape.height):
            raise StditError(
                f"known {name} is {found.width}x{found.height}, the clip {shape.width}x{shape.height}: scale it first."
            )
        if found.latent(self.vae.config.stride).frames >= shape.latent(self.vae.config.stride).frames:
            raise StditError(
                f"known {name} has {found.frames} frames, the clip {shape.frames}: nothing is left to generate."
            )
        weight = next(self.vae.parameters())
        video = frames.permute(3, 0, 1, 2)[None].to(weight) / 127.5 - 1  # (1, 3, T, H, W)
        return self.vae.encode(video)[0].to(self.device, torch.float32)

    def _solver(
        self, solver: str | Mapping[str, Any] | None, steps: int, shift: float | None, shape: VideoShape
    ) -> Solver:
        """For clips of this shape. A scheduler's config that is given is taken as it is."""
        latent = shape.latent(self.vae.config.stride)
        if isinstance(solver, Mapping):
            return make_solver(solver, steps, shift, shape=shape, latent=latent)
        if shift is None and self.settings.shift_tokens is not None:
            tokens = latent.grid(self.transformer.config.patch).tokens
            shift = static_shift(self.scheduler) * shift_by_tokens(tokens, self.settings.shift_tokens)
        config = named_config(solver, self.scheduler) if solver else self.scheduler
        return make_solver(config, steps, shift, shape=shape, latent=latent)

    # ---- the model folder ----

    def add_loras(self, loras: Sequence[tuple[str | Path, float]]) -> None:
        """Merges LoRA files, each with its weight, into the transformer: all of them or, on an error, none.

        In fp32, rounded once to the transformer's dtype. To be rid of them, load the folder again.
        """
        read = [(read_adapter(path, self.transformer.config), weight) for path, weight in loras]
        merge(self.transformer, read)

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Pipeline:
        """From a model folder. dtype: of the transformer and the text encoder; None keeps the stored ones."""
        folder = Path(folder)
        path = folder / "model_index.json"
        if not path.is_file():
            raise StditError(f"{folder} is not a model folder: it has no model_index.json.")
        index = read_json(path)
        if index.get("_class_name") != "WanPipeline":
            raise StditError(f"{path}: a {index.get('_class_name')} is not supported; WanPipeline is.")
        if index.get("boundary_ratio") is not None or any(index.get("transformer_2") or ()):
            raise StditError(f"{path}: models of two transformers (Wan2.2-A14B) are not supported.")
        settings = ModelSettings.read(folder)
        pipeline = cls(
            load_transformer(folder, dtype=dtype, device=device).eval(),
            load_vae(folder, device=device).eval(),
            load_text_encoder(folder, dtype=dtype, device=device),
            read_scheduler(folder / "scheduler"),
            settings,
        )
        return pipeline

    def save(self, folder: str | Path) -> None:
        """Writes a model folder that diffusers' WanPipeline and `Pipeline.load` open."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_transformer(self.transformer, folder / "transformer")
        save_vae(self.vae, folder / "vae")
        self.text_encoder.save(folder / "text_encoder", folder / "tokenizer")
        write_scheduler(self.scheduler, folder / "scheduler")
        replace(self.settings, text_padding=self.text_padding).write(folder)
        index = {
            "_class_name": "WanPipeline",
            "_diffusers_version": DIFFUSERS_VERSION,
            "boundary_ratio": None,
            "expand_timesteps": False,
            "scheduler": ["diffusers", self.scheduler["_class_name"]],
            "text_encoder": ["transformers", type(self.text_encoder.encoder).__name__],
            "tokenizer": ["transformers", self.text_encoder.tokenizer_class],
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "transformer_2": [None, None],
            "vae": ["diffusers", "AutoencoderKLWan"],
        }
        publish_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
