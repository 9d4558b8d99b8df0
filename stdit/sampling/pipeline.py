"""Prompts and known frames to frames: samples every family's transformer as its diffusers pipeline does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stdit.diffusion.guidance import PLAIN, GuidanceOptions, Guide, check_skipped
from stdit.diffusion.noise_levels import shift_by_tokens
from stdit.diffusion.solvers import Solver, make_solver, named_config, path_of, static_shift
from stdit.errors import StditError
from stdit.keyed import keyed_generator
from stdit.machine import require_memory
from stdit.models.transformer import Experts
from stdit.pixels import to_pixels, to_video
from stdit.sampling.denoising import Denoiser, PackedClip
from stdit.sampling.known_frames import IMAGE_FPS, KnownFrames, KnownFramesEncoder, KnownPixels
from stdit.sampling.model_folder import FolderSettings, ModelFolder
from stdit.sampling.request import SampleRequest
from stdit.sampling.reuse import Reuse
from stdit.sampling.windows import Windows
from stdit.shapes import LatentShape, VideoShape
from stdit.weights.families import guided_by_null_text, pipelines
from stdit.weights.families.record import PipelineKind

__all__ = ["FolderSettings", "Pipeline", "SampleRequest"]


@dataclass(eq=False, repr=False)
class Pipeline(ModelFolder):
    """A model folder in memory, with the parts of `ModelFolder`, that samples frames."""

    def __post_init__(self) -> None:
        config, z = self.transformer.config, self.vae.config.z_dim
        if config.out_channels not in (z, 2 * z) or config.latent_channels != z:
            raise StditError(
                f"the transformer takes {config.latent_channels} and gives {config.out_channels} channels, "
                f"the VAE's latents have {z}."
            )
        if config.text_dim != self.text_encoder.dim:
            raise StditError(
                f"the transformer takes texts of width {config.text_dim}, the text encoder gives "
                f"{self.text_encoder.dim}."
            )
        self.index = self.index or {"_class_name": self.scheduler.get("_pipeline", "WanPipeline")}
        self._kind = pipelines().get(self.index["_class_name"], PipelineKind(self.settings.fps))
        self.known_frames = KnownFramesEncoder(config, self.vae, self.image_encoder)

    @property
    def multiple(self) -> tuple[int, int]:
        """What width and height must be multiples of."""
        (_, h, w), (_, ph, pw) = self.vae.config.stride, self.transformer.config.patch
        return w * pw, h * ph

    @property
    def knows_fps(self) -> bool:
        """Whether fps is an input of the transformer."""
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
        *,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        fps: float | None = None,
        steps: int = 30,
        guidance: float = 5.0,
        guidance_2: float | None = None,
        guidance_options: GuidanceOptions = PLAIN,
        negative_prompt: str = "",
        seed: int = 0,
        indices: Sequence[int] | None = None,
        noise: Tensor | None = None,
        init: np.ndarray | Sequence[np.ndarray | None] | None = None,
        strength: float = 0.8,
        known: KnownPixels | Sequence[KnownPixels | None] | None = None,
        solver: str | Mapping[str, Any] | None = None,
        shift: float | None = None,
        levels: Sequence[float] | None = None,
        reuse: float = 0.0,
        window: int | None = None,
        tokens_per_pack: int = 65_536,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray | list[np.ndarray]:
        """Frames for a prompt, uint8 (T, H, W, 3), or a list of them for a list of prompts.

        The options are explained at `SampleRequest`. A model that does not know fps takes only its own, or None.
        progress is called with (steps done, steps in all).
        """
        request = SampleRequest(
            [prompt] if isinstance(prompt, str) else list(prompt), size=size, frames=frames, fps=fps, steps=steps,
            guidance=guidance, guidance_2=guidance_2, guidance_options=guidance_options,
            negative_prompt=negative_prompt, seed=seed, indices=indices, noise=noise, init=init,
            strength=strength, known=known, solver=solver,
            shift=shift, levels=levels, reuse=reuse, window=window,
            tokens_per_pack=tokens_per_pack,
        )  # fmt: skip
        if request.fps not in (None, self.settings.fps) and not self.knows_fps:
            raise StditError(
                f"fps {request.fps:g}: this model makes clips of {self.settings.fps:g} frames per second, and knows no "
                "others. Leave fps out, and play the frames at the rate you like."
            )
        clips = [self.decode(latents) for latents in self.sample_latents(request, progress)]
        return clips[0] if isinstance(prompt, str) else clips

    def sample_latents(
        self, request: SampleRequest, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[Tensor]:
        """Gives each clip's normalised latents (C, T', H', W') fp32 as soon as its pack is done."""
        for clip in self.sample_clips(request, progress):
            if isinstance(clip, StditError):
                raise clip
            yield clip

    def sample_clips(
        self, request: SampleRequest, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[Tensor | StditError]:
        """As `sample_latents`, but gives an error in place of a clip whose latents are not finite, and goes on."""
        return self.sample_together([request], progress)

    @torch.no_grad()
    def sample_together(
        self, requests: Sequence[SampleRequest], progress: Callable[[int, int], None] | None = None
    ) -> Iterator[Tensor | StditError]:
        """As `sample_clips`, for several requests: clips of different shapes and settings share packs.

        Gives the clips of the first request, then those of the second, and so on. Neighbours share a pack if their
        solvers take equally many steps; with two experts, if their noise levels are equal. The smallest
        `tokens_per_pack` holds for all.
        """
        for request in requests:  # mistakes in any are errors before the texts are encoded
            self._check(request)
        clips = [clip for request in requests for clip in self._clips(request)]
        packs = self._packs(clips, min(request.tokens_per_pack for request in requests))
        total, before = sum(len(pack[0].levels) for pack in packs), 0
        for pack in packs:

            def report(steps: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + steps, total)

            yield from Denoiser(self.transformer, self._kind, self.text_padding, pack).denoise(report)
            before += len(pack[0].levels)

    def _check(self, request: SampleRequest) -> None:
        if request.guidance_2 is not None and not isinstance(self.transformer, Experts):
            raise StditError(
                f"guidance_2 {request.guidance_2:g}: is for the second of two experts; this model has one."
            )
        options, config = request.guidance_options, self.transformer.config
        check_skipped(
            options.skip_layers, config.layers * (2 if config.attention.startswith("spatial_temporal") else 1)
        )
        steps = request.steps if request.levels is None else len(request.levels)
        if request.is_changed and int(steps * request.strength) < 1:
            raise StditError(f"strength {request.strength:g} of {steps} steps is none: raise one of them.")
        if options.zero_steps and path_of(self.scheduler).name != "flow":
            raise StditError(f"guidance zero_steps {options.zero_steps}: only a flow can stand still; leave it out.")
        shape = self.shape(request.size, request.frames)
        latent = shape.latent(self.vae.config.stride)
        self._check_memory(shape, latent, self._tokens(request), len(request.prompts))
        self._solver(request, shape)

    def _tokens(self, request: SampleRequest) -> int:
        """The video tokens of one clip in a pack."""
        shape, patch = self.shape(request.size, request.frames), self.transformer.config.patch
        tokens = shape.grid(self.vae.config.stride, patch).tokens
        windows = self._windows(request, shape)
        return tokens * sum(stop - start for start, stop in windows.spans) // windows.frames * (1 + request.guided)

    def _windows(self, request: SampleRequest, shape: VideoShape) -> Windows:
        stride, patch = self.vae.config.stride, self.transformer.config.patch
        frames = shape.latent(stride).frames
        if request.window is None or request.window >= shape.frames:
            return Windows(frames, frames, patch[0])
        seen = self.shape(request.size, request.window).latent(stride).frames
        if seen < 2 * patch[0]:
            raise StditError(f"window {request.window}: it must be long enough that two overlap; take more frames.")
        return Windows(frames, seen, patch[0])

    def _clips(self, request: SampleRequest) -> list[PackedClip]:
        shape = self.shape(request.size, request.frames)
        noise = self._noise(request, shape.latent(self.vae.config.stride))
        texts = self.encode_texts(request.prompts)
        negatives: Sequence[Tensor | None] = [None] * len(texts)
        if request.guided:
            negatives = self._negatives(request.negative_prompt, texts)
        each = zip(request.clip_indices, self._known(request, shape), self._init(request, shape), texts, negatives)
        found = []
        for number, (index, known, init, text, negative) in enumerate(each):
            conditions = self.conditions(known, shape, request.fps or self.settings.fps)
            guide = Guide(request.guidance_options, request.guided, self._kind.guides_beyond)
            solver, first = self._solver(request, shape), 0
            if init is not None:
                steps = request.steps if request.levels is None else len(request.levels)
                first = (steps - int(steps * request.strength)) * solver.per_step
            found.append(
                PackedClip(
                    request, index, noise[number : number + 1], known, conditions, text, negative, solver, guide,
                    Reuse(request.reuse), self._windows(request, shape), init, first,
                )
            )  # fmt: skip
        return found

    def _init(self, request: SampleRequest, shape: VideoShape) -> list[Tensor | None]:
        """The latents (1, C, T', H', W') that each clip starts from; those that several clips share are encoded
        once."""
        size = (shape.frames, shape.height, shape.width, 3)
        encoded: dict[int, Tensor] = {}
        for video in request.init_of_clips:
            if video is None or id(video) in encoded:
                continue
            frames = torch.as_tensor(video)
            if frames.dtype != torch.uint8 or tuple(frames.shape) != size:
                raise StditError(f"init must be uint8 {size}, not {frames.dtype} {tuple(frames.shape)}.")
            latents = self.vae.encode(to_video(frames)[None].to(next(self.vae.parameters())))
            encoded[id(video)] = latents.float().to(self.device)
        return [None if video is None else encoded[id(video)] for video in request.init_of_clips]

    def _packs(self, clips: Sequence[PackedClip], most: int) -> list[list[PackedClip]]:
        """Neighbours that fit in `most` tokens and can take their steps together."""
        packs: list[list[PackedClip]] = []
        room = 0
        for clip in clips:
            tokens = self._tokens(clip.request)
            if not packs or tokens > room or not self._in_step(packs[-1][0], clip):
                packs.append([])
                room = most
            packs[-1].append(clip)
            room -= tokens
        return packs

    def _in_step(self, one: PackedClip, other: PackedClip) -> bool:
        """Whether two clips can take their steps in one pack."""
        if isinstance(self.transformer, Experts):
            return one.levels == other.levels
        return len(one.levels) == len(other.levels)

    def shape(self, size: tuple[int, int] | None = None, frames: int | None = None) -> VideoShape:
        """The shape to sample, defaults filled in. Raises StditError if strides and patch do not divide it."""
        default = self.settings.shape
        width, height = size or (default.width, default.height)
        shape = VideoShape(default.frames if frames is None else frames, height, width)
        if shape.frames < 1:
            raise StditError(f"frames must be at least 1, not {frames}.")
        if shape.frames > 1 and self.transformer.config.attention == "spatial":
            raise StditError(f"{shape.frames} frames: these weights make pictures, one frame each.")
        shape.grid(self.vae.config.stride, self.transformer.config.patch)
        return shape

    def _check_memory(self, shape: VideoShape, latent: LatentShape, tokens: int, clips: int) -> None:
        """Raises StditError if even the least does not fit: the noise; x, q, k, v and MLP of one block; a frame."""
        config = self.transformer.config
        noise = 2 * 4 * clips * self.vae.config.z_dim * math.prod(latent.sizes)
        block = 2 * tokens * (4 * config.dim + config.ffn_dim)  # bytes in bf16, the least
        frame = 2 * 3 * 4 * shape.height * shape.width
        what = f"{shape} (width x height x frames)" + (f" for {clips} clips" if clips > 1 else "")
        require_memory(noise + max(block, frame), self.device, what, "Choose a smaller size or fewer frames.")

    def _solver(self, request: SampleRequest, shape: VideoShape) -> Solver:
        """A new solver. The folder's shift by token count does not touch a config that the request brings."""
        solver, shift = request.solver, request.shift
        if isinstance(solver, Mapping):
            config: Mapping[str, Any] = solver
        else:
            config = named_config(solver, self.scheduler) if solver else self.scheduler
            if shift is None and request.levels is None and self.settings.shift_tokens is not None:
                tokens = shape.grid(self.vae.config.stride, self.transformer.config.patch).tokens
                shift = static_shift(self.scheduler) * shift_by_tokens(tokens, self.settings.shift_tokens)
        steps, latent = (
            request.steps if request.levels is None else len(request.levels),
            shape.latent(self.vae.config.stride),
        )
        return make_solver(config, steps, shift, levels=request.levels, shape=shape, latent=latent)

    def _noise(self, request: SampleRequest, latent: LatentShape) -> Tensor:
        """The first noise (clips, C, T', H', W'), fp32."""
        noise, indices = request.noise, request.clip_indices
        shape = (self.vae.config.z_dim, *latent.sizes)
        if noise is None:
            generators = (keyed_generator(request.seed, "sample", index) for index in indices)
            return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)
        if tuple(noise.shape) not in {(1, *shape), (len(indices), *shape)}:
            raise StditError(
                f"noise has shape {tuple(noise.shape)}; this size and length need {(len(indices), *shape)}."
            )
        return noise.to(self.device, torch.float32).expand(len(indices), -1, -1, -1, -1)

    def _known(self, request: SampleRequest, shape: VideoShape) -> list[KnownFrames]:
        """The known frames of each clip; those that several clips share are encoded once."""
        distinct = {id(known): known for known in request.known_of_clips}
        encoded = {key: self.known_frames.encode(known, shape).to(self.device) for key, known in distinct.items()}
        return [encoded[id(known)] for known in request.known_of_clips]

    def conditions(self, known: KnownFrames, shape: VideoShape, fps: float) -> dict[str, Any]:
        """A clip's conditions, as `pack_clips` takes them."""
        found = {
            "fps": IMAGE_FPS if shape.is_image else fps,
            "size": (shape.width, shape.height),
            "image": known.image,
            "image_text": known.image_text,
        }
        return {name: found[name] for name in self.transformer.config.conditions}

    def encode_texts(self, texts: Sequence[str], at_least: int = 0) -> list[Tensor]:
        """Embeddings (L, D); equal texts are encoded once. at_least: see `TextEncoder.forward`."""
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
        """The embeddings of the negative prompt, one for each text."""
        if not negative_prompt and guided_by_null_text(self.transformer.config):
            return [self.transformer.get_buffer("null_text")[: len(text)] for text in texts]
        if not self._kind.negative_follows:
            return self.encode_texts([negative_prompt]) * len(texts)
        (negative,) = self.encode_texts([negative_prompt], max(map(len, texts)))
        return [negative[: len(text)] for text in texts]

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
