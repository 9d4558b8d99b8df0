"""The loop from noise to latents: the network's input at each step, guidance, and the solver's steps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stdit.diffusion.guidance import Branch, Guide
from stdit.diffusion.solvers import Solver
from stdit.diffusion.tasks import frame_levels
from stdit.errors import StditError
from stdit.keyed import keyed_generator
from stdit.models.config import TransformerConfig
from stdit.models.packing import TextPack, pack_clips, pack_texts, unpack_clips
from stdit.models.transformer import Experts, STDiT
from stdit.sampling.known_frames import KnownFrames, known_level
from stdit.sampling.request import SampleRequest
from stdit.sampling.reuse import Reuse
from stdit.sampling.windows import Windows
from stdit.weights.families.record import PipelineKind


@dataclass(frozen=True)
class PackedClip:
    """A clip on its way through the network, in one pack with others of any shape and settings.

    request: of which it is a clip.
    index: its number, which keys its random numbers.
    noise: (1, C, T', H', W') fp32.
    init: latents like the noise that the clip starts from, partly noised; None: it starts from noise.
    first: the solver's step that the clip starts with.
    conditions: as `pack_clips` takes them.
    text, negative: (L, D); negative is None without guidance.
    solver, guide, reuse: new ones, of this clip alone.
    windows: in which the network sees it.
    """

    request: SampleRequest
    index: int
    noise: Tensor
    known: KnownFrames
    conditions: Mapping[str, Any]
    text: Tensor
    negative: Tensor | None
    solver: Solver
    guide: Guide
    reuse: Reuse
    windows: Windows
    init: Tensor | None = None
    first: int = 0

    @property
    def levels(self) -> list[float]:
        """Of its steps."""
        return self.solver.levels[self.first :]

    def start(self) -> Tensor:
        """The first sample."""
        if self.init is None:
            return self.solver.start(self.noise)
        return self.solver.begin(self.first, self.init, self.noise)

    def network_input(self, step: int, x: Tensor, known_noise: float) -> tuple[Tensor, Tensor | None]:
        """The clip (C, T', H', W') as the network sees it in a step, and its known tokens there: with so much noise."""
        tokens = self.known.tokens
        if tokens is not None and known_noise:
            generator = keyed_generator(self.request.seed, "known noise", self.index, step)
            tokens = tokens + known_noise * torch.randn(tokens.shape, generator=generator).to(tokens)
        return _with_known(self.solver.network_input(self.first + step, x)[0], tokens), tokens

    def after(self, step: int, output: Tensor, x: Tensor) -> Tensor:
        """The sample (1, C, T', H', W') after a step. output: guided, of x's shape."""
        draws = [keyed_generator(self.request.seed, "sample step", self.index, step)] if self.solver.draws else []
        return self.solver.step(self.first + step, output, x, draws)


@dataclass(frozen=True)
class Denoiser:
    """Samples clips that go through the network in one pack. Their solvers have equally many levels left.

    kind: of the family's pipeline.
    text_padding: as `pack_texts` takes it.
    """

    transformer: STDiT | Experts
    kind: PipelineKind
    text_padding: int
    clips: Sequence[PackedClip]
    _texts: dict[Any, TextPack] = field(default_factory=dict, init=False, repr=False)  # packed, by whose they are

    def denoise(self, report: Callable[[int], None]) -> list[Tensor | StditError]:
        """Each clip's normalised latents (C, T', H', W') fp32, or an error if they became infinite or NaN.

        report: is called with the number of steps done.
        """
        samples = [clip.start() for clip in self.clips]
        tokens: list[Tensor | None] = []
        failures: dict[int, StditError] = {}
        report(0)
        for step in range(len(self.clips[0].levels)):
            levels = [clip.levels[step] for clip in self.clips]
            seen = [
                clip.network_input(step, x, self.kind.known_noise * t**2)
                for clip, x, t in zip(self.clips, samples, levels)
            ]
            tokens = [known for _, known in seen]
            outputs = self._outputs_of_step(step, [x for x, _ in seen], levels)
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

    def _outputs_of_step(self, step: int, x: list[Tensor], levels: Sequence[float]) -> list[Tensor]:
        """The network's outputs (1, C, T', H', W') fp32 for clips x at their noise levels, without variances, guided:
        predicted where `Reuse` does, and the others from one run of the network."""
        wanted: dict[int, tuple[Branch, ...]] = {}
        found: dict[int, Tensor] = {}
        for number, (clip, t) in enumerate(zip(self.clips, levels)):
            branches = clip.guide.branches(step, t)
            kind = (branches, self._is_low(t))
            predicted = clip.reuse.predict(step, len(clip.levels), t, x[number], kind)
            if predicted is None:
                wanted[number] = branches
            else:
                found[number] = predicted
        for number, output in self._guided(wanted, x, levels).items():
            self.clips[number].reuse.note(levels[number], x[number], output)
            found[number] = output
        return [found[number] for number in range(len(self.clips))]

    def _guided(
        self, wanted: Mapping[int, Sequence[Branch]], x: list[Tensor], levels: Sequence[float]
    ) -> dict[int, Tensor]:
        """The guided outputs of some of the clips. wanted: the branches of each.

        Each branch is a segment of the pack, but for branches without some of the blocks, which are a pack of their
        own.
        """
        both: tuple[Branch, ...] = ("text", "negative")
        order = [(number, branch) for branch in both for number, of in wanted.items() if branch in of]
        outputs = self._outputs(order, x, levels)
        by_layers: dict[tuple[int, ...], list[tuple[int, Branch]]] = {}
        for number, of in wanted.items():
            if "skipped" in of:
                layers = self.clips[number].guide.options.skip_layers
                by_layers.setdefault(layers, []).append((number, "skipped"))
        for layers, alike in by_layers.items():
            outputs |= self._outputs(alike, x, levels, layers)
        guided = {}
        for number, of in wanted.items():
            clip, given = self.clips[number], {branch: outputs[number, branch] for branch in of}
            scale = clip.request.scales[self._is_low(levels[number])]
            still = torch.zeros_like(clip.noise)
            guided[number] = clip.guide.combine(**given, scale=scale) if given else still
        return guided

    def _outputs(
        self, order: Sequence[tuple[int, Branch]], x: list[Tensor], levels: Sequence[float], skip: Collection[int] = ()
    ) -> dict[tuple[int, Branch], Tensor]:
        """The network's outputs for branches of clips, in one pack. Each window of a clip is a segment."""
        if not order:
            return {}
        patch, more = self.transformer.config.patch, {"skip": skip} if skip else {}
        parts = [(key, *span) for key in order for span in self.clips[key[0]].windows.spans]
        seen, levels_of, conditions = [], [], []
        for (number, _), start, stop in parts:
            clip = self.clips[number]
            seen.append(x[number][:, start:stop])
            level = _levels(clip.known, x[number].shape[1], levels[number], self.transformer.config)
            levels_of.append(level[start // patch[0] : stop // patch[0]] if level.ndim else level)
            conditions.append(
                {
                    name: value[:, start:stop] if name == "image" and value is not None else value
                    for name, value in clip.conditions.items()
                }
            )
        pack = pack_clips(seen, levels_of, patch, conditions)
        unpacked = unpack_clips(self.transformer(pack, self._text(parts), **more), pack, patch)
        by_branch: dict[tuple[int, Branch], list[Tensor]] = {key: [] for key in order}
        for (key, _, _), one in zip(parts, unpacked):
            by_branch[key].append(one[: self.clips[key[0]].noise.shape[1]].float())
        return {key: self.clips[key[0]].windows.mix(outputs)[None] for key, outputs in by_branch.items()}

    def _text(self, parts: Sequence[tuple[tuple[int, Branch], int, int]]) -> TextPack:
        """The texts of segments, packed once for all steps that have the same ones."""
        key = tuple((number, branch == "negative") for (number, branch), _, _ in parts)
        if key not in self._texts:
            texts = [self.clips[number].negative if negative else self.clips[number].text for number, negative in key]
            self._texts[key] = pack_texts([text for text in texts if text is not None], self.text_padding)
        return self._texts[key]

    def _is_low(self, level: float) -> bool:
        """Whether the low-noise expert of two has a level."""
        transformer = self.transformer
        return isinstance(transformer, Experts) and transformer.at(level) is transformer.low


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
