"""Recomputed blocks against the same blocks without: gradients to the bit, and what they keep by closed forms."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from stdit.models.config import TransformerConfig
from stdit.models.operators import Recompute
from stdit.models.packing import TextPack, TokenPack, pack_clips, pack_texts
from stdit.models.routing import Routing
from stdit.models.transformer import STDiT
from stdit.training.config import LoraConfig
from stdit.training.setup.lora import add_lora

WAN = TransformerConfig(
    dim=48, heads=4, layers=5, ffn_dim=80, in_channels=5, out_channels=3, text_dim=20, frequency_dim=32, text_padding=16
)
COSMOS = replace(
    WAN, frequency_dim=48, bias=False, qk_norm="per_head", cross_norm="modulated", modulation="low_rank",
    modulation_rank=8, position="learned", position_max=(8, 8, 8), network_time="log_sigma", rotary="axes_ntk",
    blank_channels=1,
)  # fmt: skip
COMPRESSED = replace(
    WAN, attention="spatial", rotary="none", position="space", position_base=4, compression=2, compressed=(1, 2)
)
IN_TIME = replace(WAN, attention="spatial_temporal", rotary="none", position="space_time", position_base=4, layers=3)
CONFIGS = {
    "wan": WAN,
    "wan image": replace(WAN, in_channels=8, image_channels=3, image_text_dim=12),
    "cosmos": COSMOS,
    "keys compressed": COMPRESSED,
    "blocks over time": IN_TIME,
}
KINDS = ("all", 2, 3, "attention")


def random_model(config: TransformerConfig, dtype: torch.dtype = torch.float32) -> STDiT:
    torch.manual_seed(0)
    model = STDiT(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return model.to(dtype)


def inputs_of(config: TransformerConfig, dtype: torch.dtype = torch.float32) -> tuple[TokenPack, TextPack]:
    """A pack of three shapes, with a level per clip and a level per frame."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shapes = [(1, 4, 4), (3, 4, 8), (2, 8, 4)]
    clips = [normal(config.in_channels - config.image_channels, *shape) for shape in shapes]
    given: list[dict[str, Any]] = [{} for _ in shapes]
    if config.image_channels:
        given = [{"image": normal(config.image_channels, *shape)} for shape in shapes]
    if config.image_text_dim:
        given = [one | {"image_text": normal(7, config.image_text_dim)} for one in given]
    levels = [torch.tensor(0.5), torch.tensor([0.0, 0.25, 0.25]), torch.tensor(0.75)]
    pack = pack_clips(clips, levels, config.patch, given).to("cpu", dtype)
    return pack, pack_texts([normal(n, config.text_dim) for n in (3, 16, 5)], 16).to("cpu", dtype)


def gradients(model: STDiT, pack: TokenPack, text: TextPack, routing: Routing | None = None) -> dict[str, Tensor]:
    tokens = pack.tokens.detach().requires_grad_()
    out = model(replace(pack, tokens=tokens), text, routing)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad} | {"tokens": tokens}
    found = torch.autograd.grad((out * direction).sum(), list(trained.values()))
    return dict(zip(trained, found)) | {"out": out.detach()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_same_bits(name: str, dtype: torch.dtype) -> None:
    model = random_model(CONFIGS[name], dtype)
    pack, text = inputs_of(model.config, dtype)
    wanted = gradients(model, pack, text)
    assert all(bool(gradient.any()) for gradient in wanted.values())
    for kind in KINDS:
        model.recompute = Recompute.of(kind)
        found = gradients(model, pack, text)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), kind


def test_adapters_and_routed_tokens_have_the_same_gradients() -> None:
    model = random_model(WAN)
    add_lora(model, LoraConfig(rank=3), seed=0)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    pack, text = inputs_of(WAN)
    stays = torch.arange(len(pack.tokens)) % 3 > 0
    for routing in (None, Routing.of(pack, stays, range(1, 4))):
        model.recompute = Recompute()
        wanted = gradients(model, pack, text, routing)
        assert len(wanted) == 2 + 2 * 5 * 10  # A and B of ten layers a block
        for kind in KINDS:
            model.recompute = Recompute.of(kind)
            found = gradients(model, pack, text, routing)
            assert all(torch.equal(found[name], wanted[name]) for name in wanted), kind


def test_a_graph_may_be_run_backward_twice() -> None:
    model = random_model(WAN)
    model.recompute = Recompute.of("attention")
    loss = model(*inputs_of(WAN)).square().sum()
    first, second = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "calls"), [("none", 10), ("all", 20), (2, 16), ("attention", 15)])
def test_kept_attention_is_not_computed_again(kind: Any, calls: int) -> None:
    """Of five blocks, each with a self-attention and a cross-attention, every one a single dense call."""
    model = random_model(WAN)
    pack = pack_clips([torch.randn(5, 2, 4, 4)], [torch.tensor(0.5)], WAN.patch)
    text = pack_texts([torch.randn(3, WAN.text_dim)], 0)
    model.recompute = Recompute.of(kind)
    with Calls() as seen:
        model(pack, text).sum().backward()
    assert seen.count["aten._scaled_dot_product_flash_attention_for_cpu.default"] == calls
    assert seen.count["aten._scaled_dot_product_flash_attention_for_cpu_backward.default"] == 10


def kept_bytes(kind: Any, layers: int) -> int:
    """What torch's CPU allocator has handed out and not got back when a forward ends."""
    model = random_model(replace(WAN, layers=layers))
    pack, text = inputs_of(WAN)
    model.recompute = Recompute.of(kind)
    model(pack, text)  # what is made once and kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        out = model(pack, text)
    assert out.requires_grad
    return sum(event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")


def test_a_block_keeps_its_input_and_perhaps_its_attention() -> None:
    tokens = len(inputs_of(WAN)[0].tokens)
    block = 4 * tokens * WAN.dim  # bytes of a tensor (N, D)

    def each(kind: Any, more: int = 1) -> int:
        return kept_bytes(kind, 3 + more) - kept_bytes(kind, 3)

    assert each("all") == block
    assert each("attention") == 2 * block + 4 * tokens * WAN.heads  # attention's output and log-sum-exp
    assert each("none") > 10 * block
    assert each(2, more=2) == each("none") + block
    assert each(3, more=3) == 2 * each("none") + block
