"""LPIPS, a perceptual distance (Zhang et al. 2018; richzhang/PerceptualSimilarity, version 0.1, VGG16).

By hand: it compares clips, has gradients, downloads nothing and reads its files strictly. The `lpips` package does not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.files import unpickled
from stdit.vae.clips import to_frames

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels of VGG16's convolutions
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS' ScalingLayer, for colours in [−1, 1]
SMALLEST = 2 ** (len(WIDTHS) - 1)  # pixels per side: four poolings halve it
WANTED = (
    "It takes two files, or one with both: torchvision's VGG16 (vgg16-397923af.pth, tensors features.0.weight …) and "
    "LPIPS' heads (vgg.pth of lpips/weights/v0.1 in richzhang/PerceptualSimilarity, tensors lin0.model.1.weight …). "
    ".safetensors files with the same names work, too."
)


@dataclass
class LpipsConfig:
    """Settings of the LPIPS term.

    path: the folder or file with LPIPS' weights, see `Lpips`.
    weight: of the term; that of the L1 is 1.
    trust_pickle: also open .pth files, as torchvision and LPIPS publish them (tensors only).
    """

    path: str = ""
    weight: PositiveFloat = 1.0
    trust_pickle: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise StditError("path is not set: the folder or file with LPIPS' weights.")


class Lpips(nn.Module):
    """LPIPS by VGG16, frozen. Raises StditError for a tensor that is missing, misshaped or there twice.

    path: a folder, a file or several files that hold torchvision's VGG16 and LPIPS' heads; None: no weights, on the
        meta device. Tensors by other names, such as VGG16's classifier, are ignored.
    trust_pickle: also read .pth files (tensors only), besides .safetensors.
    """

    def __init__(
        self, path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None, trust_pickle: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends = []  # for each size, the index behind its last activation in `features`
        c = 3
        with torch.device("meta"):
            for widths in WIDTHS:
                layers += [nn.MaxPool2d(2)] if layers else []
                for width in widths:
                    layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU(inplace=True)]
                    c = width
                self.ends.append(len(layers))
            self.features = nn.Sequential(*layers)  # numbered as torchvision's
            self.heads = nn.ParameterList(torch.empty(1, widths[-1], 1, 1) for widths in WIDTHS)
        if path is not None:
            self._read(path, trust_pickle)
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [−1, 1] each -> (B,): LPIPS of each pair of frames, then the mean over frames."""
        if a.shape != b.shape or a.ndim != 5 or a.shape[1] != 3 or min(a.shape[3:]) < SMALLEST:
            raise StditError(
                f"LPIPS compares clips of the same shape (B, 3, T, H, W) of at least {SMALLEST}x{SMALLEST} pixels, not "
                f"{tuple(a.shape)} with {tuple(b.shape)}."
            )
        frames = torch.cat([to_frames(a), to_frames(b)]).to(self.heads[0])  # (2·B·T, 3, H, W)
        x = (frames - frames.new_tensor(SHIFT).view(3, 1, 1)) / frames.new_tensor(SCALE).view(3, 1, 1)
        total = torch.zeros((), device=a.device)
        for start, end, head in zip((0, *self.ends), self.ends, self.heads):
            x = self.features[start:end](x)  # (2·B·T, C, H', W')
            # if all channels are 0, the gradient of vector_norm is 0; that of √Σx² is NaN
            unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)
            difference = torch.sub(*unit.chunk(2)).square()  # (B·T, C, H', W')
            total = total + F.conv2d(difference, head).float().mean((1, 2, 3))
        return total.view(a.shape[0], a.shape[2]).mean(1)

    def _read(self, path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], trust_pickle: bool) -> None:
        wanted = {name: name for name in self.state_dict() if name.startswith("features.")}
        wanted |= {f"lin{i}.model.1.weight": f"heads.{i}" for i in range(len(WIDTHS))}
        places = [path] if isinstance(path, str | os.PathLike) else path
        found: dict[str, Tensor] = {}
        source: dict[str, Path] = {}
        for file in [file for place in places for file in _files(Path(place).expanduser())]:
            for name, tensor in _tensors(file, trust_pickle).items():
                if name not in wanted:
                    continue
                if name in found:
                    raise StditError(f"LPIPS: {source[name]} and {file} both hold {name}. Name the files to read.")
                shape = self.state_dict()[wanted[name]].shape
                if tensor.shape != shape:
                    raise StditError(f"LPIPS: {file}: {name} is {tuple(tensor.shape)}, not {tuple(shape)}. {WANTED}")
                found[name], source[name] = tensor.float(), file
        if missing := [name for name in wanted if name not in found]:
            raise StditError(f"LPIPS: {', '.join(map(str, places))}: no {missing[0]} there. {WANTED}")
        self.load_state_dict({wanted[name]: tensor for name, tensor in found.items()}, assign=True)


def _files(place: Path) -> list[Path]:
    if place.is_dir():
        return sorted(file for file in place.iterdir() if file.suffix in (".safetensors", ".pth"))
    if not place.is_file():
        raise StditError(f"LPIPS: {place}: no such file or folder. {WANTED}")
    return [place]


def _tensors(file: Path, trust_pickle: bool) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file.suffix != ".safetensors" and not trust_pickle:
        raise StditError(
            f"LPIPS: {file}: is a pickle, which can run code when it is opened. If you trust its source, allow it: "
            "--trust-pickle, objective.vae.lpips.trust_pickle=true, or trust_pickle=True. Only tensors are read."
        )
    try:
        found = load_file(file) if file.suffix == ".safetensors" else unpickled(file)
    except SafetensorError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise StditError(f"LPIPS: {file} is damaged, or is no dictionary of tensors alone. {WANTED}")
    return found
