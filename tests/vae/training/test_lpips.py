"""LPIPS against its formula on torchvision's own VGG16, with random weights: the released ones cannot be shipped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from stdit.errors import StditError
from stdit.vae.training.lpips import Lpips

torchvision = pytest.importorskip("torchvision", reason="torchvision is the reference: pip install 'stdit[dev]'")


@pytest.fixture(scope="module")
def features() -> nn.Sequential:
    """torchvision's features, without its classifier, which would be 500 MB."""
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"]).requires_grad_(False).eval()
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            layer.bias.normal_(std=0.1)
    return layers


@pytest.fixture(scope="module")
def heads() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}


@pytest.fixture(scope="module")
def folder(features, heads, tmp_path_factory) -> Path:
    """As the two are downloaded."""
    folder = tmp_path_factory.mktemp("lpips")
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save(state | {"classifier.6.bias": torch.zeros(10)}, folder / "vgg16-397923af.pth")
    torch.save(heads, folder / "vgg.pth")
    return folder


def reference(features: nn.Sequential, heads: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The formula, of two pictures (3, H, W)."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    xs = [((picture - shift[:, None, None]) / scale[:, None, None])[None] for picture in (a, b)]
    total = torch.zeros(())
    for i, (start, stop) in enumerate(((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))):  # relu1_2, … relu5_3
        xs = [features[start:stop](x) for x in xs]
        left, right = (x / ((x**2).sum(1, keepdim=True).sqrt() + 1e-10) for x in xs)
        total = total + ((left - right) ** 2 * heads[f"lin{i}.model.1.weight"]).sum(1).mean()
    return total


def clips() -> tuple[Tensor, Tensor]:
    a = torch.rand(2, 3, 2, 33, 18, generator=torch.Generator().manual_seed(2)) * 2 - 1
    b = (a + 0.3 * torch.randn(a.shape, generator=torch.Generator().manual_seed(3))).clamp(-1, 1)
    return a, b


def test_it_is_the_formula_on_torchvisions_features(folder, features, heads):
    a, b = clips()
    wanted = [
        torch.stack([reference(features, heads, a[i, :, t], b[i, :, t]) for t in range(2)]).mean() for i in range(2)
    ]
    assert_close(Lpips(folder, True)(a, b), torch.stack(wanted), rtol=1e-5, atol=1e-6)


def test_files_of_any_kind_and_the_gradient(folder, heads, tmp_path):
    save_file(heads, tmp_path / "heads.safetensors")
    lpips = Lpips([folder / "vgg16-397923af.pth", tmp_path / "heads.safetensors"], True)
    a, b = clips()
    assert torch.equal(lpips(a, b), Lpips(folder, True)(a, b))
    assert lpips(a, a).tolist() == [0, 0]
    assert not any(p.requires_grad for p in lpips.parameters())
    a = torch.zeros_like(a).requires_grad_()  # of one colour: features that are all 0, where a norm has no gradient
    lpips(a, b).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all() and a.grad.abs().max() > 0


def test_what_is_wrong_is_said(folder, features, heads, tmp_path):
    with pytest.raises(StditError, match=r"vgg\.pth: no features\.0\.weight there.*vgg16-397923af\.pth"):
        Lpips(folder / "vgg.pth", True)
    with pytest.raises(StditError, match=r"no lin0\.model\.1\.weight there.*PerceptualSimilarity"):
        Lpips(folder / "vgg16-397923af.pth", True)
    with pytest.raises(StditError, match="no such file or folder"):
        Lpips(tmp_path / "none")
    save_file(heads, tmp_path / "a.safetensors")
    with pytest.raises(StditError, match="both hold lin0"):
        Lpips([folder, tmp_path], True)
    save_file({"lin0.model.1.weight": torch.zeros(1, 63, 1, 1)}, tmp_path / "a.safetensors")
    with pytest.raises(StditError, match=r"\(1, 63, 1, 1\), not \(1, 64, 1, 1\)"):
        Lpips(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(StditError, match=r"a\.safetensors is damaged"):
        Lpips(tmp_path)
    torch.save(features, tmp_path / "whole.pth")  # a module, not its tensors
    (tmp_path / "cut.pth").write_bytes((folder / "vgg.pth").read_bytes()[:-200])
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("whole.pth", "cut.pth", "empty.pth"):
        with pytest.raises(
            StditError, match=rf"{name} is damaged, or is no dictionary of tensors.*vgg16-397923af"
        ) as error:
            Lpips(tmp_path / name, True)
        assert not re.search("weights_only|[Pp]ickle|trust|torch.load", str(error.value))
    a, b = clips()
    with pytest.raises(StditError, match="at least 16x16"):
        Lpips(folder, True)(a[..., :15], b[..., :15])


def test_pickles_are_opened_only_if_asked(folder):
    with pytest.raises(
        StditError, match=r"vgg.*\.pth: is a pickle.*--trust-pickle, objective\.vae\.lpips\.trust_pickle=true"
    ):
        Lpips(folder)
