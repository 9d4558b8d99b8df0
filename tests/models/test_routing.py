"""Token routing, against a plain loop over single clips that calls the blocks one by one with boolean masks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stdit.errors import StditError
from stdit.models.blocks import BlockInputs
from stdit.models.config import TransformerConfig, cost_coefficients, transformer_flops
from stdit.models.operators import Recompute, RecomputeKind
from stdit.models.packing import LevelIndex, Segments, TextPack, TokenPack, pack_clips, pack_texts
from stdit.models.routing import Routing, check_routable
from stdit.models.transformer import STDiT

WAN = TransformerConfig(
    dim=48, heads=4, layers=5, ffn_dim=80, in_channels=5, out_channels=3, text_dim=20, frequency_dim=32, text_padding=16
)
LTX = replace(
    WAN, norm="rms", cross_norm="none", rotary="inner_causal", rope_scale=(20.0, 64.0, 64.0), rope_stride=(4, 8, 8),
    rope_fps=25.0,
)  # fmt: skip
COSMOS = replace(
    WAN, frequency_dim=48, bias=False, qk_norm="per_head", cross_norm="modulated", modulation="low_rank",
    modulation_rank=8, position="learned", position_max=(8, 8, 8), network_time="log_sigma", rotary="axes_ntk",
    blank_channels=1,
)  # fmt: skip
WAN_IMAGE = replace(WAN, in_channels=8, image_channels=3, image_text_dim=12)
CONFIGS = {"wan": WAN, "ltx": LTX, "cosmos": COSMOS, "wan image": WAN_IMAGE}
SHAPES = [(3, 4, 6), (1, 8, 4), (2, 4, 6), (1, 2, 2), (3, 4, 6)]
BLOCKS = range(1, 4)


def random_model(config: TransformerConfig, dtype: torch.dtype) -> STDiT:
    torch.manual_seed(0)
    model = STDiT(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return model.to(dtype)


def clips_of(config: TransformerConfig) -> tuple[list[TokenPack], list[TextPack], list[Tensor]]:
    """Single clips, some with a clean first frame, their texts, and which of their tokens stay."""
    torch.manual_seed(1)
    packs, texts, stays = [], [], []
    for number, shape in enumerate(SHAPES):
        level = torch.full((shape[0],), 0.2 + 0.15 * number, dtype=torch.float64)
        level[: shape[0] // 3] = 0  # of a known frame
        given = {
            "image": torch.randn(config.image_channels, *shape),
            "image_text": torch.randn(3 + number, config.image_text_dim),
        }
        conditions = [given] if config.image_channels else []
        packs.append(pack_clips([torch.randn(config.latent_channels, *shape)], [level], config.patch, conditions))
        texts.append(pack_texts([torch.randn(2 + number, config.text_dim)], 16))
        stay = torch.rand(len(packs[-1].tokens)) < 0.5
        stay[0] = True
        stays.append(stay)
    return packs, texts, stays


def joined(config: TransformerConfig) -> tuple[TokenPack, TextPack, Tensor]:
    """The same clips as one pack."""
    packs, texts, stays = clips_of(config)
    levels, level_of = torch.unique(torch.cat([pack.levels[pack.level_of] for pack in packs]), return_inverse=True)
    images = [pack.conditions.image_text for pack in packs]
    pack = TokenPack(
        tokens=torch.cat([pack.tokens for pack in packs]),
        levels=levels,
        level_index=LevelIndex.of(level_of),
        positions=torch.cat([pack.positions for pack in packs]),
        segments=Segments.of([len(pack.tokens) for pack in packs]),
        grids=tuple(pack.grids[0] for pack in packs),
    )
    if config.image_channels:
        pack.conditions.image_text = pack_texts([image.tokens for image in images if image is not None], 0)
    lengths = [text.segments.lengths[0] for text in texts]
    multiplicity = torch.cat([text.multiplicity for text in texts if text.multiplicity is not None])
    text = TextPack(torch.cat([text.tokens for text in texts]), multiplicity, Segments.of(lengths))
    return pack, text, torch.cat(stays)


def reference(model: STDiT, pack: TokenPack, text: TextPack, stay: Tensor) -> Tensor:
    """One clip through the blocks one by one; in those of BLOCKS only the tokens that stay are a clip of their own."""
    wide = torch.promote_types(model.dtype, torch.float32)
    x = model.patch_embedding(torch.nn.functional.pad(pack.tokens.to(model.dtype), (0, model.blank_features)))
    c, modulation, _ = model.embed_levels(pack, wide)
    y = model.text_embedding(text.tokens.to(model.dtype))
    for number, block in enumerate(model.blocks):
        here = stay if number in BLOCKS else torch.ones_like(stay)
        segments, levels = Segments.of([int(here.sum())]), LevelIndex.of(pack.level_of[here])
        part = replace(pack, tokens=pack.tokens[here], positions=pack.positions[here], segments=segments)
        inputs = BlockInputs(c, levels, *model.rotary(part, model.config, wide), segments, segments, text)
        inputs.image = model.img_emb(part, model.dtype)
        inputs.added = model.position.before_each_block(x[here], part)
        after = x.clone()
        after[here] = block(x[here], modulation, y, inputs)
        x = after
    return model.head(x, c, modulation, pack.level_index)


def routed(model: STDiT, pack: TokenPack, text: TextPack, stay: Tensor) -> Tensor:
    return model(pack, text, Routing.of(pack, stay, BLOCKS))


def gradients(model: STDiT, out: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(2)
    loss = (out * torch.randn(out.shape, dtype=torch.float64).to(out.dtype)).sum()
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().norm() / other.detach().norm())


@pytest.mark.parametrize("recompute", ["none", "attention"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_mixed_pack_is_the_plain_loop_over_clips(
    name: str, dtype: torch.dtype, close: float, recompute: RecomputeKind
) -> None:
    model = random_model(CONFIGS[name], dtype)
    pack, text, stay = joined(model.config)
    model.recompute = Recompute.of(recompute)
    found = routed(model, pack, text, stay)
    expected = torch.cat([reference(model, *clip) for clip in zip(*clips_of(model.config))])
    assert relative(found, expected) < close
    assert relative(found, model(pack, text)) > 1e-3  # something skipped
    wanted, ours = gradients(model, expected), gradients(model, found)
    whole = torch.cat([gradient.flatten() for gradient in wanted.values()])
    assert relative(torch.cat([gradient.flatten() for gradient in ours.values()]), whole) < close
    typical = float(whole.norm()) / math.sqrt(whole.numel())
    for name, gradient in wanted.items():  # a key's bias has a gradient of 0 but for rounding
        worst = 10 * close * max(float(gradient.norm()), typical)
        assert float((ours[name] - gradient).norm()) <= worst, name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pack_is_its_clips_alone(name: str) -> None:
    model = random_model(CONFIGS[name], torch.float64)
    together = routed(model, *joined(model.config))
    alone = torch.cat([routed(model, *clip) for clip in zip(*clips_of(model.config))])
    assert relative(together, alone) < 1e-12


@pytest.mark.parametrize("blocks", [range(0, 5), range(0, 1), range(4, 5)])
def test_all_tokens_staying_is_no_routing(blocks: range) -> None:
    model = random_model(WAN, torch.float32)
    pack, text, stay = joined(WAN)
    found = model(pack, text, Routing.of(pack, torch.ones_like(stay), blocks))
    assert torch.equal(found, model(pack, text))


def test_a_token_that_skips_every_block_sees_nothing_of_the_others() -> None:
    """It goes from the patch embedding to the head: what is left is a closed form."""
    model = random_model(WAN, torch.float64)
    pack, text, stay = joined(WAN)
    found = model(pack, text, Routing.of(pack, stay, range(5)))
    x = model.patch_embedding(pack.tokens.double())
    c, modulation, levels = model.embed_levels(pack, torch.float64)
    expected = model.head(x, c, modulation, levels)
    assert relative(found[~stay], expected[~stay]) < 1e-14 and relative(found[stay], expected[stay]) > 1e-2


def test_bf16_routes_as_fp32_does_to_rounding() -> None:
    pack, text, stay = joined(WAN)
    found = routed(random_model(WAN, torch.bfloat16), pack, text, stay)
    assert found.dtype == torch.bfloat16
    assert relative(found.float(), routed(random_model(WAN, torch.float32), pack, text, stay)) < 0.05


def test_compiled_blocks_do_not_recompile_for_routed_tokens() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = random_model(WAN, torch.float32)
    model.blocks[2].compile(backend=counter, dynamic=True, fullgraph=True)
    compiled = []
    for seed in range(4):
        pack, text, _ = joined(WAN)
        torch.manual_seed(seed)
        stay = torch.rand(len(pack.tokens)) < 0.4 + 0.15 * seed
        stay[pack.segments.host[:-1]] = True
        found = routed(model, pack, text, stay)
        found.square().mean().backward()
        assert relative(found, routed(random_model(WAN, torch.float32), pack, text, stay)) < 1e-5
        compiled.append(counter.frame_count)
    assert len(set(compiled[1:])) == 1


def test_flops_are_those_of_two_networks() -> None:
    """Blocks that tokens skip cost what they cost a network of only these blocks, on what stays."""
    clips, kept, texts = [24, 7], [12, 4], [5, 6]

    def plain(layers: int, counts: list[int]) -> int:
        return transformer_flops(replace(WAN, layers=layers), counts, texts)

    expected = plain(2, clips) + plain(4, kept) - plain(1, kept)
    assert transformer_flops(WAN, clips, texts, kept, routed_blocks=3) == expected
    linear, quadratic = cost_coefficients(WAN, share=0.5, routed_blocks=3)
    assert isinstance(linear, int) and isinstance(quadratic, int)
    assert transformer_flops(WAN, [24], [0], [12], routed_blocks=3) == 24 * linear + 24**2 * quadratic
    assert cost_coefficients(WAN, share=0.0, routed_blocks=3) == cost_coefficients(WAN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "spatial", "rotary": "none", "family": "pixart"}, r"attention 'spatial' \(pixart\)"),
        ({"attention": "spatial_temporal", "rotary": "time"}, "attention 'spatial_temporal'.*Leave routing out"),
        ({"level_condition": "size"}, "level_condition 'size'"),
    ],
)
def test_networks_whose_tokens_cannot_skip_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(StditError, match=message):
        check_routable(replace(WAN, **changes))
