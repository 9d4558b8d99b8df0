"""Starting weights: the distributions of torch's and transformers' own initialisations, and each part drawn alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from stdit.keyed.weights import StartingWeights
from stdit.models.blocks import Block, Head
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.text.small import small_umt5, starting_weights
from stdit.vae.autoencoder import START_LOGVAR, CausalVAE
from stdit.vae.config import VaeConfig
from stdit.vae.layers import AttentionBlock, Downsample, ResidualBlock, Upsample
from stdit.vae.training.discriminator import Discriminator, DiscriminatorConfig
from stdit.weights.families import families

SMALL = TransformerConfig(dim=96, heads=2, layers=2, ffn_dim=192, text_dim=40, frequency_dim=64)
VAE = VaeConfig(base_dim=16, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(False, True), z_dim=4)
JUDGE = DiscriminatorConfig(dim=16, layers=3)


def small_configs() -> list[TransformerConfig]:
    """Which together have every parameter of every family."""
    compressing = {"compressed": (1,), "compression": 2, "attention": "spatial", "rotary": "none"}
    return [
        SMALL,
        replace(SMALL, **compressing),
        *(one for family in families("transformer") for one in family.samples()),
    ]


def vae_as_before(config: VaeConfig) -> CausalVAE:
    """With weights drawn by torch.nn.init, one after another, as the docstring of `starting_weights` says."""
    vae = CausalVAE(config, 0)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.get_parameter("bias"))
        for module in vae.modules():
            if isinstance(module, ResidualBlock):
                module.residual[6].get_parameter("weight").mul_(0.3)
            elif isinstance(module, AttentionBlock):
                module.proj.weight.zero_()
            elif isinstance(module, Downsample | Upsample) and module.time_conv is not None:
                weight = module.time_conv.weight.mul_(0.1)
                for half in weight.split(weight.shape[1]):
                    half[:, :, 2, 0, 0] += torch.eye(weight.shape[1])
        vae.decoder.head[2].get_parameter("weight").mul_(0.3)
        vae.conv1.weight[config.z_dim :].zero_()
        vae.conv1.get_parameter("bias")[config.z_dim :].fill_(START_LOGVAR)
    return vae


def transformer_as_before(config: TransformerConfig) -> STDiT:
    """With weights drawn by torch.nn.init, one after another; the rest as their modules make them."""
    model = STDiT(config, 0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Block | Head) and module.modulation is not None:
            nn.init.normal_(module.modulation, std=config.dim**-0.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.25)  # the mean of 2×2 tokens
            nn.init.zeros_(module.get_parameter("bias"))
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            module.reset_parameters()
    nn.init.zeros_(model.head.head.weight)
    return model


def discriminator_as_before() -> Discriminator:
    judge = Discriminator(JUDGE, 0)
    for module in judge.modules():
        if isinstance(module, nn.Conv3d | nn.Linear | nn.GroupNorm):
            module.reset_parameters()
    return judge


def text_encoder_as_before() -> UMT5EncoderModel:
    return UMT5EncoderModel(small_umt5(50, 48, 2, 4).config)


def assert_alike(one: Tensor, other: Tensor, name: str) -> None:
    """Constants in the same places, all else of the same distribution."""
    one, other = one.detach().double().flatten(), other.detach().double().flatten()
    if one.numel() == 1:  # which says nothing of a distribution
        return
    if one.unique().numel() == 1 or other.unique().numel() == 1:
        assert torch.equal(one, other), name
    else:
        assert scipy.stats.ks_2samp(one.numpy(), other.numpy()).pvalue > 1e-5, name
        assert one.var() / other.var() == pytest.approx(1, abs=12 / one.numel() ** 0.5), name


@pytest.mark.parametrize("what", ["transformer", "compressing transformer", "vae", "discriminator", "text encoder"])
def test_distributions_are_those_of_torchs_initialisation(what: str) -> None:
    torch.manual_seed(0)
    plain, compressing = small_configs()[:2]
    ours, theirs = {
        "transformer": lambda: (STDiT(plain, 1), transformer_as_before(plain)),
        "compressing transformer": lambda: (STDiT(compressing, 1), transformer_as_before(compressing)),
        "vae": lambda: (CausalVAE(VAE, 1), vae_as_before(VAE)),
        "discriminator": lambda: (Discriminator(JUDGE, 1), discriminator_as_before()),
        "text encoder": lambda: (small_umt5(50, 48, 2, 4), text_encoder_as_before()),
    }[what]()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_alike(parameter, expected[name], name)


def test_a_vaes_time_passes_through_and_its_log_variance_is_a_constant() -> None:
    """Where the constants are, which distributions do not say."""
    vae, before = CausalVAE(VAE, 1), vae_as_before(VAE)
    assert torch.equal(vae.conv1.weight[4:], before.conv1.weight[4:]) and vae.conv1.weight[:4].all()
    assert torch.equal(vae.conv1.bias, before.conv1.bias)
    times = [name for name, _ in vae.named_parameters() if name.endswith("time_conv.weight")]
    assert len(times) == 2
    for name in times:
        weight = vae.get_parameter(name).detach()
        passed = torch.cat([torch.eye(weight.shape[1])] * (len(weight) // weight.shape[1]))
        assert (weight[:, :, :, 0, 0] - torch.stack([0 * passed, 0 * passed, passed], 2)).abs().max() < 0.1


@pytest.mark.parametrize("number", range(len(small_configs())))
def test_on_the_meta_device_and_filled_later_they_are_the_same(number: int) -> None:
    """Of every family; and nothing depends on torch's generators."""
    config = small_configs()[number]
    torch.manual_seed(number)
    state = torch.get_rng_state()
    with torch.device("meta"):
        model = STDiT(config)
    assert torch.equal(state, torch.get_rng_state())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.initialise(7)
    direct = STDiT(config, seed=7).state_dict()
    assert all(torch.equal(tensor, direct.pop(name)) for name, tensor in model.state_dict().items()) and not direct


@pytest.mark.parametrize("make", [lambda: STDiT(SMALL, 3), lambda: CausalVAE(VAE, 3), lambda: Discriminator(JUDGE, 3)])
def test_any_part_of_any_parameter_can_be_drawn_alone(make) -> None:
    model = make()
    weights: StartingWeights = model.starting_weights(3)
    for name, parameter in model.named_parameters():
        flat, count = parameter.detach().flatten(), parameter.numel()
        for start, stop in ((0, count), (count // 3, count // 3 + 1), (count // 3, count - count // 7), (count, count)):
            assert torch.equal(weights.draw(name, start, stop), flat[start:stop]), (name, start, stop)


def test_without_a_seed_torchs_decides() -> None:
    def drawn(seed: int | None = None) -> Tensor:
        return STDiT(SMALL, seed).blocks[1].get_parameter("ffn.0.weight")

    torch.manual_seed(5)
    first, second = drawn(), drawn()
    torch.manual_seed(5)
    assert torch.equal(drawn(), first) and not torch.equal(first, second)
    assert torch.equal(drawn(4), drawn(4)) and not torch.equal(drawn(4), drawn(4 + 2**32))


def test_layers_start_independently() -> None:
    model = STDiT(SMALL, 0)
    ours = [p.detach().flatten() for name, p in model.named_parameters() if name.endswith("self_attn.q.weight")]
    assert abs(float(torch.corrcoef(torch.stack(ours))[0, 1])) < 5 / ours[0].numel() ** 0.5


def test_they_are_drawn_in_the_parameters_own_dtype() -> None:
    wide, narrow = STDiT(SMALL, 0), STDiT(SMALL, 1).bfloat16()
    narrow.initialise(0)
    for one, other in zip(wide.parameters(), narrow.parameters()):
        assert torch.equal(one.bfloat16(), other)


def test_a_text_encoder_is_keyed_by_name() -> None:
    model = small_umt5(50, 48, 2, 4, seed=2)
    weights = starting_weights(model, 2)
    assert weights.starts.keys() == dict(model.named_parameters()).keys()
    name = "encoder.block.1.layer.0.SelfAttention.k.weight"
    assert torch.equal(weights.draw(name, 50, 99), model.get_parameter(name).flatten()[50:99])
