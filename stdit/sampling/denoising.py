"""The loop from noise to latents: the network's input at each step, guidance, and the solver's steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stdit.diffusion.guidance import guide
from stdit.diffusion.solvers import Solver
from stdit.diffusion.tasks import frame_levels
from stdit.errors import StditError
from stdit.keyed import keyed_generator
from stdit.models.config import TransformerConfig
from stdit.models.packing import TextPack, pack_clips, pack_texts, unpack_clips
from stdit.models.transformer import Experts, STDiT
from stdit.sampling.known_frames import KnownFrames, known_level
from stdit.sampling.request import SampleRequest
from stdit.weights.families.record import PipelineKind


@dataclass(frozen=True)
class PackedClip:
    """A clip on its way through the network, in one pack with others of any shape and settings.

    request: of which it is a clip.
    index: its number, which keys its random numbers.
    noise: (1, C, T', H', W') fp32.
    conditions: as `pack_clips` takes them.
    text, negative: (L, D); negative is None without guidance.
    solver: a new one, of this clip alone.
    """

    request: SampleRequest
    index: int
    noise: Tensor
    known: KnownFrames
    conditions: Mapping[str, Any]
    text: Tensor
    negative: Tensor | None
    solver: Solver

    def network_input(self, step: int, x: Tensor, known_noise: float) -> tuple[Tensor, Tensor | None]:
        """The clip (C, T', H', W') as the network sees it in a step, and its known tokens there: with so much noise."""
        tokens = self.known.tokens
        if tokens is not None and known_noise:
            generator = keyed_generator(self.request.seed, "known noise", self.index, step)
            tokens = tokens + known_noise * torch.randn(tokens.shape, generator=generator).to(tokens)
        return _with_known(self.solver.network_input(step, x)[0], tokens), tokens

    def after(self, step: int, output: Tensor, x: Tensor) -> Tensor:
        """The sample (1, C, T', H', W') after a step. output: guided, of x's shape."""
        draws = [keyed_generator(self.request.seed, "sample step", self.index, step)] if self.solver.draws else []
        return self.solver.step(step, output, x, draws)


@dataclass(frozen=True)
class Denoiser:
    """Samples clips that go through the network in one pack. Their solvers have equally many levels.

    kind: of the family's pipeline.
    text_padding: as `pack_texts` takes it.
    """

    transformer: STDiT | Experts
    kind: PipelineKind
    text_padding: int
    clips: Sequence[PackedClip]

    def denoise(self, report: Callable[[int], None]) -> list[Tensor | StditError]:
        """Each clip's normalised latents (C, T', H', W') fp32, or an error if they became infinite or NaN.

        report: is called with the number of steps done.
        """
        guided = [clip.negative for clip in self.clips if clip.negative is not None]
        text = pack_texts([*(clip.text for clip in self.clips), *guided], self.text_padding)
        samples = [clip.solver.start(clip.noise) for clip in self.clips]
        tokens: list[Tensor | None] = []
        failures: dict[int, StditError] = {}
        report(0)
        for step in range(len(self.clips[0].solver.levels)):
            levels = [clip.solver.levels[step] for clip in self.clips]
            seen = [
                clip.network_input(step, x, self.kind.known_noise * t**2)
                for clip, x, t in zip(self.clips, samples, levels)
            ]
            tokens = [known for _, known in seen]
            outputs = self._guided_outputs([x for x, _ in seen], levels, text)
            samples = [clip.after(step, *both) for clip, *both in zip(self.clips, outputs, samples)]
            finite = torch.stack([torch.isfinite(x).all() for x in samples]).tolist()  # one wait for a GPU
            for number, (is_finite, t) in enumerate(zip(finite, levels)):
                if not is_finite and number not in failures:
                    failures[number] = _not_finite(step + 1, t, self.transformer.dtype)
            if len(failures) == len(samples):
                break
            report(step + 1)
        finished = [  # decoded with the known tokens of the last step
            _with_known(clip.solver.finish(x)[0], known) for clip, x, known in zip(self.clips, samples, tokens)
        ]
        return [failures.get(number, latents) for number, latents in enumerate(finished)]

    def _guided_outputs(self, x: list[Tensor], levels: Sequence[float], text: TextPack) -> list[Tensor]:
        """The network's outputs (1, C, T', H', W') fp32 for clips x at their noise levels, without variances.

        A clip under guidance is two segments of the pack.
        """
        transformer, config = self.transformer, self.transformer.config
        guided = [number for number, clip in enumerate(self.clips) if clip.negative is not None]
        order = [*range(len(x)), *guided]
        of_clips = [_levels(clip.known, one.shape[1], t, config) for clip, one, t in zip(self.clips, x, levels)]
        conditions = [self.clips[number].conditions for number in order]
        pack = pack_clips([x[n] for n in order], [of_clips[n] for n in order], config.patch, conditions)
        unpacked = [
            one[None, : self.clips[number].noise.shape[1]].float()
            for number, one in zip(order, unpack_clips(transformer(pack, text), pack, config.patch))
        ]
        outputs = unpacked[: len(x)]
        for number, unconditional in zip(guided, unpacked[len(x) :]):
            high, low = self.clips[number].request.scales
            is_low = isinstance(transformer, Experts) and transformer.at(levels[number]) is transformer.low
            scale = low if is_low else high
            outputs[number] = guide(outputs[number], unconditional, scale, self.kind.guides_beyond)
        return outputs


def _levels(known: KnownFrames, frames: int, t: float, config: TransformerConfig) -> Tensor:
    """The noise level of a clip, or those of its patch frames if some are known."""
    level = torch.tensor(t, dtype=torch.float64)
    if known.tokens is None:
        return level
    is_known = torch.arange(frames) < known.tokens.shape[1]
    return frame_levels(is_known, level, config.patch[0]).clamp_min(known_level(config))


def _with_known(clip: Tensor, known: Tensor | None) -> Tensor:
    """A clip (C, T', H', W') with its known tokens in their place."""
    return clip if known is None else torch.cat([known, clip[:, known.shape[1] :]], dim=1)


def _not_finite(step: int, t: float, dtype: torch.dtype) -> StditError:
    if dtype == torch.float16:
        cause = "float16 overflows in many models: try --dtype bfloat16 (in Python dtype=torch.bfloat16)."
    else:
        cause = "Is guidance, shift or a LoRA's weight too large, or has the training diverged?"
    name = str(dtype).removeprefix("torch.")
    return StditError(f"latents are not finite at step {step} (noise level {t:.4g}, {name}). {cause}")
