"""Prompt and known frames in, frames out: every family's transformer, sampled as diffusers' pipeline of it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stdit.diffusion.guidance import guide, needs_unconditional
from stdit.diffusion.noise_levels import shift_by_tokens
from stdit.diffusion.solvers import Solver, make_solver, named_config, static_shift
from stdit.diffusion.tasks import frame_levels
from stdit.errors import StditError
from stdit.keyed import keyed_generator
from stdit.memory import require_memory
from stdit.models.experts import Experts
from stdit.models.packing import TextPack, pack_inputs, pack_texts, unpack_clips
from stdit.models.transformer import STDiT
from stdit.pixels import to_pixels
from stdit.sampling.known_frames import IMAGE_FPS, KnownFrames, KnownFramesEncoder, KnownPixels, known_level
from stdit.sampling.model_folder import FolderSettings, ModelParts, add_loras, load_parts, save_parts
from stdit.shapes import LatentShape, VideoShape
from stdit.text.encoders import TextEncoder
from stdit.text.images import ImageEncoder
from stdit.vae.families.open_sora import AnyVAE
from stdit.weights.families import guided_by_null_text, pipelines
from stdit.weights.families.record import PipelineKind

__all__ = ["FolderSettings", "Pipeline"]


@dataclass(frozen=True)
class Request:
    """What is the same for all clips of a call. guidance: of the high expert (or the only one), and of the low one."""

    shape: VideoShape
    fps: float
    steps: int
    guidance: tuple[float, float]
    seed: int
    solver: str | Mapping[str, Any] | None
    shift: float | None


class Pipeline:
    """A model folder in memory: a transformer, a VAE, a text encoder and a scheduler's config.

    image_encoder: for weights that see its tokens (Wan 2.1 I2V). index: model_index.json of the folder; its
    `_class_name` is the diffusers pipeline that this one does the same as; else the one that the scheduler is for.
    """

    def __init__(
        self,
        transformer: STDiT | Experts,
        vae: AnyVAE,
        text_encoder: TextEncoder,
        scheduler: Mapping[str, Any],
        settings: FolderSettings | None = None,
        image_encoder: ImageEncoder | None = None,
        index: Mapping[str, Any] | None = None,
    ) -> None:
        config, z = transformer.config, vae.config.z_dim
        if config.out_channels not in (z, 2 * z) or config.latent_channels != z:
            raise StditError(
                f"the transformer takes {config.latent_channels} and gives {config.out_channels} channels, "
                f"the VAE's latents have {z}."
            )
        if config.text_dim != text_encoder.dim:
            raise StditError(
                f"the transformer takes texts of width {config.text_dim}, the text encoder gives {text_encoder.dim}."
            )
        self.transformer, self.vae, self.text_encoder = transformer, vae, text_encoder
        self.image_encoder, self.scheduler, self.settings = image_encoder, dict(scheduler), settings or FolderSettings()
        self.index = dict(index or {"_class_name": scheduler.get("_pipeline", "WanPipeline")})
        self._kind = pipelines().get(self.index["_class_name"], PipelineKind(self.settings.fps))
        self.known_frames = KnownFramesEncoder(config, vae, image_encoder)

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
    def knows_fps(self) -> bool:
        """Whether the transformer is told the frames a second."""
        return "fps" in self.transformer.config.conditions

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def to(self, device: str | torch.device) -> Pipeline:
        for module in (self.transformer, self.vae, self.text_encoder, self.image_encoder):
            if module is not None:
                module.to(device)
        return self

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
        known: KnownPixels | Sequence[KnownPixels | None] | None = None,
        solver: str | Mapping[str, Any] | None = None,
        *,
        guidance_2: float | None = None,
        shift: float | None = None,
        tokens_per_pack: int = 65_536,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray | list[np.ndarray]:
        """Frames for a prompt, uint8 (T, H, W, 3), or a list of such for a list of prompts.

        size: (width, height) and frames; by default those of the first shape the model was trained at. fps: the rate
        the frames are meant for; of models that do not know it only their own (or None) is accepted. guidance:
        classifier-free, on above 1, counted as the family's pipeline counts it; guidance_2: of the low-noise expert,
        where there are two. noise: (1 or prompts, C, T', H', W') in place of the seed's first. known: frames given as
        condition, {"image": the first frame} or {"video": the first 1+k·stride frames}, and for some weights with them
        {"last": the last frame}; one for all prompts or one each. solver: None for the folder's own, a short name such
        as "euler" or "unipc", or a diffusers scheduler's config. shift: in place of the folder's (`FolderSettings`).
        tokens_per_pack: the most video tokens in one forward (never less than a clip). progress: called with (steps
        done, steps in all).
        """
        if fps is not None and fps != self.settings.fps and not self.knows_fps:
            raise StditError(
                f"fps {fps:g}: this model makes clips of {self.settings.fps:g} frames a second, and knows no others. "
                "Leave fps out, and play the frames at the rate you like."
            )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        latents = self.sample_latents(
            prompts, size, frames, steps, guidance, negative_prompt, seed, noise, known, solver,
            fps=fps, guidance_2=guidance_2, shift=shift, tokens_per_pack=tokens_per_pack, progress=progress,
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
        known: KnownPixels | Sequence[KnownPixels | None] | None = None,
        solver: str | Mapping[str, Any] | None = None,
        *,
        fps: float | None = None,
        guidance_2: float | None = None,
        shift: float | None = None,
        indices: Sequence[int] | None = None,
        tokens_per_pack: int = 65_536,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor]:
        """As the call, but gives each clip's normalised latents (C, T', H', W') fp32 as soon as its pack is done."""
        clips = self.sample_clips(
            prompts, size, frames, steps, guidance, negative_prompt, seed, noise, known, solver, fps=fps,
            guidance_2=guidance_2, shift=shift, indices=indices, tokens_per_pack=tokens_per_pack, progress=progress,
        )  # fmt: skip
        for clip in clips:
            if isinstance(clip, StditError):
                raise clip
            yield clip

    @torch.no_grad()
    def sample_clips(
        self,
        prompts: Sequence[str],
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        steps: int = 30,
        guidance: float = 5.0,
        negative_prompt: str = "",
        seed: int = 0,
        noise: Tensor | None = None,
        known: KnownPixels | Sequence[KnownPixels | None] | None = None,
        solver: str | Mapping[str, Any] | None = None,
        *,
        fps: float | None = None,
        guidance_2: float | None = None,
        shift: float | None = None,
        indices: Sequence[int] | None = None,
        tokens_per_pack: int = 65_536,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor | StditError]:
        """As `sample_latents`, but a clip whose latents are not finite is an error in its place, and the others go on.

        indices: of each clip, its place in the batch whose noise it has; unset: 0, 1, … Clip n of a batch is made again
        alone with its prompt and `indices=[n]`, equal up to the rounding of another pack.
        """
        if not prompts:
            raise StditError("there is no prompt.")
        for name, value in (("guidance", guidance), ("guidance_2", guidance_2), ("shift", shift), ("fps", fps)):
            if value is not None and not math.isfinite(value):
                raise StditError(f"{name} is {value}; it must be a finite number.")
        numbers = range(len(prompts)) if indices is None else indices
        if len(numbers) != len(prompts):
            raise StditError(f"{len(numbers)} indices for {len(prompts)} prompts: give one each.")
        if guidance_2 is not None and not isinstance(self.transformer, Experts):
            raise StditError(f"guidance_2 {guidance_2:g}: is for the second of two experts; this model has one.")
        scales = (guidance, guidance if guidance_2 is None else guidance_2)
        guided = needs_unconditional(guidance)
        if needs_unconditional(scales[1]) and not guided:
            raise StditError(
                f"guidance {guidance:g} with guidance_2 {scales[1]:g}: guidance of 1 or less makes no unconditional "
                "prediction, for either expert (as in diffusers). Raise guidance above 1, or set guidance_2 to 1."
            )
        shape = self.shape(size, frames)
        grid = shape.grid(self.vae.config.stride, self.transformer.config.patch)
        latent = shape.latent(self.vae.config.stride)
        self._check_memory(shape, latent, grid.tokens * (1 + guided), len(prompts))
        request = Request(shape, fps or self.settings.fps, steps, scales, seed, solver, shift)
        self._solver(request)  # wrong steps, shifts and solvers are errors before the texts are encoded
        noises = self._noise(numbers, latent, seed, noise)
        given = self._given(known, len(prompts), shape)
        texts = self.encode_texts(prompts)
        negatives = self._negatives(negative_prompt, texts) if guided else []

        together = max(1, tokens_per_pack // (grid.tokens * (2 if negatives else 1)))
        parts = [range(start, min(start + together, len(prompts))) for start in range(0, len(prompts), together)]
        for number, part in enumerate(parts):
            clips = slice(part.start, part.stop)
            text = pack_texts([*texts[clips], *negatives[clips]], self.text_padding)
            steps_done = number * steps

            def report(index: int, done: int = steps_done) -> None:
                if progress is not None:
                    progress(done + index, len(parts) * steps)

            yield from self._denoise(noises[clips], given[clips], text, request, numbers[clips], report)

    def _check_memory(self, shape: VideoShape, latent: LatentShape, tokens: int, clips: int) -> None:
        """Raises where a clip certainly has no room: its noise; x, q, k, v and MLP of one block; a decoded frame."""
        config = self.transformer.config
        noise = 2 * 4 * clips * self.vae.config.z_dim * math.prod(latent.sizes)
        block = 2 * tokens * (4 * config.dim + config.ffn_dim)  # bytes in bf16, the least
        frame = 2 * 3 * 4 * shape.height * shape.width
        what = f"{shape} (width x height x frames)" + (f" for {clips} clips" if clips > 1 else "")
        require_memory(noise + max(block, frame), self.device, what, "Choose a smaller size or fewer frames.")

    def _denoise(
        self,
        noise: Tensor,
        given: Sequence[KnownFrames],
        text: TextPack,
        request: Request,
        numbers: Sequence[int],
        report: Callable[[int], None],
    ) -> list[Tensor | StditError]:
        """noise: (clips, C, T', H', W') fp32. text: of the clips, and where guidance asks for it as many negative ones
        after them: two segments of one pack for each clip. numbers: which clips of the call these are."""
        patch, z = self.transformer.config.patch, self.vae.config.z_dim
        copies = len(text.segments.lengths) // len(noise)
        masks = [torch.arange(noise.shape[2]) < (0 if one.tokens is None else one.tokens.shape[1]) for one in given]
        conditions = [self.conditions(one, request.shape, request.fps) for one in given] * copies
        solver = self._solver(request)

        def impose(x: Tensor, tokens: Sequence[Tensor | None]) -> list[Tensor]:
            return [
                clip if known is None else torch.cat([known, clip[:, known.shape[1] :]], dim=1)
                for clip, known in zip(x, tokens)
            ]

        tokens = [one.tokens for one in given]
        x = solver.start(noise)
        failed: dict[int, StditError] = {}
        report(0)
        for index, t in enumerate(solver.levels):
            level = torch.tensor(t, dtype=torch.float64)
            levels = [self._levels(mask, level) for mask in masks]
            tokens = self._known_tokens(given, request.seed, index, numbers, t)
            pack = pack_inputs(
                impose(solver.network_input(index, x), tokens) * copies, levels * copies, patch, conditions
            )
            output = torch.stack(unpack_clips(self.transformer(pack, text), pack, patch))[:, :z].float()
            if copies == 2:
                output = self._guided(output[: len(x)], output[len(x) :], request, t)
            keys = numbers if solver.draws else ()
            x = solver.step(
                index, output, x, [keyed_generator(request.seed, "sample step", key, index) for key in keys]
            )
            for clip, finite in enumerate(torch.isfinite(x).flatten(1).all(1).tolist()):
                if not finite and clip not in failed:
                    failed[clip] = self._not_finite(f"latents are not finite at step {index + 1}", t)
            if len(failed) == len(x):
                break
            report(index + 1)
        finished = impose(solver.finish(x), tokens)
        return [failed.get(clip, one) for clip, one in enumerate(finished)]

    def _not_finite(self, what: str, level: float) -> StditError:
        """The error for latents that became infinite or NaN, with the likely cause."""
        dtype = str(self.transformer.dtype).removeprefix("torch.")
        if self.transformer.dtype == torch.float16:
            cause = "float16 overflows in many models: try --dtype bfloat16 (in Python dtype=torch.bfloat16)."
        else:
            cause = "Is guidance, shift or a LoRA's weight too large, or has the training diverged?"
        return StditError(f"{what} (noise level {level:.4g}, {dtype}). {cause}")

    def _known_tokens(
        self, given: Sequence[KnownFrames], seed: int, step: int, numbers: Sequence[int], level: float
    ) -> list[Tensor | None]:
        """Of every clip, as the network sees them in a step; what they are in the last one is decoded."""
        amount = self._kind.known_noise * level**2
        tokens = [one.tokens for one in given]
        if not amount:
            return tokens
        generators = [keyed_generator(seed, "known noise", number, step) for number in numbers]
        return [
            None if known is None else known + amount * torch.randn(known.shape, generator=generator).to(known)
            for known, generator in zip(tokens, generators)
        ]

    def _levels(self, mask: Tensor, level: Tensor) -> Tensor:
        """Of a clip's patch frames, where some are known."""
        if not mask.any():
            return level
        return frame_levels(mask, level, self.transformer.config.patch[0]).clamp_min(
            known_level(self.transformer.config)
        )

    def _guided(self, conditional: Tensor, unconditional: Tensor, request: Request, level: float) -> Tensor:
        low = isinstance(self.transformer, Experts) and self.transformer.at(level) is self.transformer.low
        return guide(conditional, unconditional, request.guidance[low], self._kind.guides_beyond)

    def conditions(self, given: KnownFrames, shape: VideoShape, fps: float) -> dict[str, Any]:
        """Of one clip, for `pack_inputs`."""
        size = (shape.width, shape.height)
        fps = IMAGE_FPS if shape.is_image else fps
        found = {"fps": fps, "size": size, "image": given.image, "image_text": given.image_text}
        return {name: found[name] for name in self.transformer.config.conditions}

    def decode(self, latents: Tensor) -> np.ndarray:
        """Normalised latents (C, T', H', W') of a clip to frames, uint8 (T, H, W, 3), rounded as diffusers does."""
        return np.concatenate(list(self.decode_stream(latents)))

    @torch.no_grad()
    def decode_stream(self, latents: Tensor) -> Iterator[np.ndarray]:
        """As `decode`, but gives the frames (t, H, W, 3) of each chunk as soon as it is decoded."""
        for video in self.vae.decode_stream(latents.to(next(self.vae.parameters()))):  # (3, t, H, W)
            if not torch.isfinite(video).all():
                raise StditError("the VAE's frames are not finite: the latents are too large for it. Lower guidance?")
            yield to_pixels(video).cpu().numpy()

    def shape(self, size: tuple[int, int] | None = None, frames: int | None = None) -> VideoShape:
        """The shape to sample, defaults filled in. Raises where strides and patch do not divide it."""
        default = self.settings.shape
        width, height = size or (default.width, default.height)
        shape = VideoShape(default.frames if frames is None else frames, height, width)
        if shape.frames < 1:
            raise StditError(f"frames must be at least 1, not {frames}.")
        if shape.frames > 1 and self.transformer.config.attention == "spatial":
            raise StditError(f"{shape.frames} frames: these weights make pictures, one frame each.")
        shape.grid(self.vae.config.stride, self.transformer.config.patch)
        return shape

    def _noise(self, numbers: Sequence[int], latent: LatentShape, seed: int, noise: Tensor | None) -> Tensor:
        count = len(numbers)
        wanted = (self.vae.config.z_dim, latent.frames, latent.height, latent.width)
        if noise is None:
            drawn = [torch.randn(wanted, generator=keyed_generator(seed, "sample", number)) for number in numbers]
            return torch.stack(drawn).to(self.device)
        if tuple(noise.shape) not in {(1, *wanted), (count, *wanted)}:
            raise StditError(f"noise has shape {tuple(noise.shape)}; this size and length need {(count, *wanted)}.")
        return noise.to(self.device, torch.float32).expand(count, -1, -1, -1, -1)

    def encode_texts(self, texts: Sequence[str], at_least: int = 0) -> list[Tensor]:
        """(L, D) each; equal texts are encoded once. at_least: see `TextEncoder.forward`."""
        distinct = list(dict.fromkeys(texts))
        before = self.text_encoder.max_length
        if self.text_padding:
            self.text_encoder.max_length = self.text_padding
        try:
            encoded = dict(zip(distinct, self.text_encoder.encode(distinct, at_least)))
        finally:
            self.text_encoder.max_length = before
        for text, embedding in encoded.items():
            if not torch.isfinite(embedding).all():
                names = [name for name, one in self.text_encoder.named_parameters() if not torch.isfinite(one).all()]
                cause = f"Its weights are not, such as {names[0]}" if names else "Try --dtype bfloat16 or float32"
                raise StditError(f"the text encoder's output is not finite for {text[:60]!r}. {cause}.")
        return [encoded[text].to(self.device) for text in texts]

    def _negatives(self, negative_prompt: str, texts: Sequence[Tensor]) -> list[Tensor]:
        """The negative prompt beside each text."""
        if not negative_prompt and guided_by_null_text(self.transformer.config):
            return [self.transformer.get_buffer("null_text")[: len(text)] for text in texts]
        if not self._kind.negative_follows:
            return self.encode_texts([negative_prompt]) * len(texts)
        (negative,) = self.encode_texts([negative_prompt], max(map(len, texts)))
        return [negative[: len(text)] for text in texts]

    def _given(
        self, known: KnownPixels | Sequence[KnownPixels | None] | None, count: int, shape: VideoShape
    ) -> list[KnownFrames]:
        """The known frames of each of `count` clips."""
        if known is None or isinstance(known, Mapping):
            return [self.known_frames.encode(known, shape).to(self.device)] * count
        if len(known) != count:
            raise StditError(f"{len(known)} known for {count} prompts: give one for all, or one each.")
        return [self.known_frames.encode(one, shape).to(self.device) for one in known]

    def _solver(self, request: Request) -> Solver:
        """A scheduler's config that is given is taken as it is."""
        solver, shift, shape = request.solver, request.shift, request.shape
        if isinstance(solver, Mapping):
            config: Mapping[str, Any] = solver
        else:
            config = named_config(solver, self.scheduler) if solver else self.scheduler
            if shift is None and self.settings.shift_tokens is not None:
                tokens = shape.grid(self.vae.config.stride, self.transformer.config.patch).tokens
                shift = static_shift(self.scheduler) * shift_by_tokens(tokens, self.settings.shift_tokens)
        return make_solver(config, request.steps, shift, shape=shape, latent=shape.latent(self.vae.config.stride))

    def add_loras(
        self,
        loras: Sequence[tuple[str | Path, float]],
        loras_2: Sequence[tuple[str | Path, float]] = (),
        partly: bool = False,
    ) -> None:
        """Merges LoRA files, each with its weight, into the transformer: all of them or, on an error, none.

        Of two experts (Wan 2.2 A14B) `loras` go into the one for high noise, as diffusers' load_lora_weights puts them
        into `transformer`, and `loras_2` into the other; a model folder with an adapter for each goes into both.
        In fp32, rounded once to the transformer's dtype. To be rid of them, load the folder again.
        partly: leave out, with a warning, what is for layers that the transformer does not have; otherwise an error.
        """
        add_loras(self.transformer, loras, loras_2, partly)

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Pipeline:
        """From a model folder. dtype: of the transformer and the encoders; None keeps the stored ones."""
        return cls(**vars(load_parts(Path(folder), dtype, device)))

    def save(self, folder: str | Path) -> None:
        """Writes a model folder that diffusers' pipeline of the same class and `Pipeline.load` open."""
        parts = ModelParts(
            self.transformer, self.vae, self.text_encoder, self.scheduler,
            replace(self.settings, text_padding=self.text_padding), self.image_encoder, self.index,
        )  # fmt: skip
        save_parts(parts, Path(folder))
