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
from stdit.models.packing import TextPack, pack_clips, unpack_clips
from stdit.models.transformer import Experts, STDiT
from stdit.sampling.known_frames import KnownFrames, known_level
from stdit.sampling.request import SampleRequest
from stdit.weights.families.record import PipelineKind


@dataclass(frozen=True)
class Denoiser:
    """Samples clips of a request that go through the network in one pack.

    kind: of the family's pipeline.
    noise: (B, C, T', H', W') fp32.
    known, conditions: of each clip; conditions as `pack_inputs` takes them.
    text: of the B clips, followed by B negative ones under guidance.
    indices: of the clips in the request's batch, which key their random numbers.
    """

    transformer: STDiT | Experts
    kind: PipelineKind
    request: SampleRequest
    noise: Tensor
    known: Sequence[KnownFrames]
    conditions: Sequence[Mapping[str, Any]]
    text: TextPack
    indices: Sequence[int]

    def denoise(self, solver: Solver, report: Callable[[int], None]) -> list[Tensor | StditError]:
        """Each clip's normalised latents (C, T', H', W') fp32, or an error if they became infinite or NaN.

        report: is called with the number of steps done.
        """
        seed = self.request.seed
        x = solver.start(self.noise)
        failures: dict[int, StditError] = {}
        report(0)
        for index, t in enumerate(solver.levels):
            tokens = self._known_tokens(self.kind.known_noise * t**2, index)
            output = self._guided_output(_with_known(solver.network_input(index, x), tokens), t)
            keys = self.indices if solver.draws else ()
            x = solver.step(index, output, x, [keyed_generator(seed, "sample step", key, index) for key in keys])
            for clip, finite in enumerate(torch.isfinite(x).flatten(1).all(1).tolist()):
                if not finite and clip not in failures:
                    failures[clip] = _not_finite(index + 1, t, self.transformer.dtype)
            if len(failures) == len(x):
                break
            report(index + 1)
        finished = _with_known(solver.finish(x), tokens)  # decoded with the known tokens of the last step
        return [failures.get(clip, latents) for clip, latents in enumerate(finished)]

    def _guided_output(self, x: list[Tensor], t: float) -> Tensor:
        """The network's output for clips x at noise level t, without variances: (B, C, T', H', W') fp32."""
        transformer, config = self.transformer, self.transformer.config
        levels = [_levels(known, clip.shape[1], t, config) for known, clip in zip(self.known, x)]
        copies = 2 if self.request.guided else 1  # under guidance, two segments of one pack for each clip
        pack = pack_clips(x * copies, levels * copies, config.patch, [*self.conditions] * copies)
        output = torch.stack(unpack_clips(transformer(pack, self.text), pack, config.patch))
        output = output[:, : self.noise.shape[1]].float()
        if not self.request.guided:
            return output
        high, low = self.request.scales
        is_low = isinstance(transformer, Experts) and transformer.at(t) is transformer.low
        conditional, unconditional = output.chunk(2)
        return guide(conditional, unconditional, low if is_low else high, self.kind.guides_beyond)

    def _known_tokens(self, noise: float, step: int) -> list[Tensor | None]:
        """The known tokens of each clip as the network sees them in a step: with so much noise."""
        tokens = [known.tokens for known in self.known]
        if not noise:
            return tokens
        generators = [keyed_generator(self.request.seed, "known noise", index, step) for index in self.indices]
        return [
            None if clean is None else clean + noise * torch.randn(clean.shape, generator=generator).to(clean)
            for clean, generator in zip(tokens, generators)
        ]


def _levels(known: KnownFrames, frames: int, t: float, config: TransformerConfig) -> Tensor:
    """The noise level of a clip, or those of its patch frames if some are known."""
    level = torch.tensor(t, dtype=torch.float64)
    if known.tokens is None:
        return level
    is_known = torch.arange(frames) < known.tokens.shape[1]
    return frame_levels(is_known, level, config.patch[0]).clamp_min(known_level(config))


def _with_known(x: Tensor, tokens: Sequence[Tensor | None]) -> list[Tensor]:
    """The clips of a batch, each with its known tokens in their place."""
    return [
        clip if known is None else torch.cat([known, clip[:, known.shape[1] :]], dim=1)
        for clip, known in zip(x, tokens)
    ]


def _not_finite(step: int, t: float, dtype: torch.dtype) -> StditError:
    if dtype == torch.float16:
        cause = "float16 overflows in many models: try --dtype bfloat16 (in Python dtype=torch.bfloat16)."
    else:
        cause = "Is guidance, shift or a LoRA's weight too large, or has the training diverged?"
    name = str(dtype).removeprefix("torch.")
    return StditError(f"latents are not finite at step {step} (noise level {t:.4g}, {name}). {cause}")
