import pytest
import torch
from torch.nn import functional as F

from stdit.errors import StditError
from stdit.models.operators import Recompute
from stdit.models.packing import TextPack, pack_clips, pack_texts, unpack_clips
from stdit.models.transformer import (
    PRESETS,
    STDiT,
    TransformerConfig,
    cost_coefficients,
    count_parameters,
    transformer_flops,
)

SMALL = TransformerConfig(
    dim=48, heads=4, layers=2, ffn_dim=80, in_channels=5, out_channels=3, text_dim=20, frequency_dim=32, text_padding=16
)
TO_DIFFUSERS = {  # substring replacements in this order; the head's table first
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    ".modulation": ".scale_shift_table",
    "self_attn": "attn1",
    "cross_attn": "attn2",
    ".q.": ".to_q.",
    ".k.": ".to_k.",
    ".v.": ".to_v.",
    ".o.": ".to_out.0.",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
}


def random_model(config=SMALL, dtype=torch.float64, **settings):
    """A model with random weights and biases, in norms and tables too."""
    torch.manual_seed(0)
    model = STDiT(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    for name, value in settings.items():
        setattr(model, name, value)
    return model.to(dtype)


def diffusers_name(name):
    for ours, theirs in TO_DIFFUSERS.items():
        name = name.replace(ours, theirs)
    return name


def diffusers_model(config, **changes):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=config.patch,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.frequency_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.layers,
        cross_attn_norm=config.cross_norm == "affine",
        eps=config.eps,
    )


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


# A mixture of shapes, text lengths, and noise levels per clip, per frame and per token.


def mixture(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()

    clips = [normal(5, *shape) for shape in [(1, 4, 4), (3, 2, 6), (1, 4, 4), (2, 4, 2), (1, 8, 10)]]
    per_token = torch.tensor([0.25, 0.5, 0.25, 1.0], dtype=dtype)
    levels = [0.5, [0.0, 0.5, 0.5], 0.125, per_token, 1.0]
    texts = [normal(length, 20) for length in (3, 16, 3, 1, 7)]
    return clips, [torch.as_tensor(level, dtype=dtype) for level in levels], texts


@pytest.mark.parametrize("padding", [0, 16])
@pytest.mark.parametrize("recompute", ["none", "attention"])
def test_a_pack_equals_each_clip_alone(padding, recompute):
    model = random_model(recompute=Recompute.of(recompute))
    clips, levels, texts = mixture()
    directions = [torch.randn(3, *clip.shape[1:], dtype=clip.dtype) for clip in clips]
    wanted = [*clips, *texts, *model.parameters()]

    def run(numbers):
        pack = pack_clips([clips[i] for i in numbers], [levels[i] for i in numbers], SMALL.patch)
        text = pack_texts([texts[i] for i in numbers], padding)
        return unpack_clips(model(pack, text), pack, SMALL.patch)

    together = run(range(5))
    loss = sum((out * d).sum() for out, d in zip(together, directions))
    grads = torch.autograd.grad(loss, wanted)
    alone = [run([i])[0] for i in range(5)]
    loss = sum((out * d).sum() for out, d in zip(alone, directions))
    for a, b in zip(together, alone):
        assert relative(a, b) < 1e-12
    for a, b in zip(grads, torch.autograd.grad(loss, wanted)):
        assert relative(a, b) < 1e-12


def test_one_padding_token_equals_explicit_zero_padding():
    model = random_model()
    clips, levels, texts = mixture()
    pack = pack_clips(clips, levels, SMALL.patch)
    explicit = pack_texts([F.pad(text, (0, 0, 0, 16 - len(text))) for text in texts], 0)
    assert len(explicit.tokens) == 5 * 16
    outs = [model(pack, text) for text in (pack_texts(texts, 16), explicit)]
    assert relative(*outs) < 1e-12
    grads = [torch.autograd.grad(out.sin().sum(), [*texts, *model.parameters()]) for out in outs]
    assert max(relative(a, b) for a, b in zip(*grads)) < 1e-11


@pytest.mark.parametrize(
    ("per", "cross_norm"), [("clip", "affine"), ("frame", "affine"), ("token", "affine"), ("clip", "none")]
)
def test_equals_diffusers_with_every_weight_random(per, cross_norm):
    config = TransformerConfig(**{**SMALL.__dict__, "cross_norm": cross_norm})
    ours, theirs = random_model(config, torch.float32), diffusers_model(config)
    state = {diffusers_name(name): tensor for name, tensor in ours.state_dict().items()}
    state["patch_embedding.weight"] = state["patch_embedding.weight"].view_as(theirs.patch_embedding.weight)
    theirs.load_state_dict(state, strict=True)
    latents, text = torch.randn(2, 5, 3, 4, 6), torch.randn(2, 9, 20)
    t = torch.rand({"clip": (2,), "frame": (2, 3), "token": (2, 18)}[per])
    timestep = 1000 * (t.repeat_interleave(6, dim=1) if per == "frame" else t)
    found = ours.predict(latents, t, text)
    wanted = theirs(latents, timestep, text, return_dict=False)[0]
    assert relative(found, wanted) < 1e-5
    direction = torch.randn_like(wanted)
    (found * direction).sum().backward()
    (wanted * direction).sum().backward()
    grads = {diffusers_name(name): parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert relative(grads[name].view_as(parameter), parameter.grad) < 1e-4, name


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_diffusers_to_the_last_digit(name):
    config = PRESETS[name]
    with torch.device("meta"):
        ours, theirs = STDiT(config), diffusers_model(config)
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == count_parameters(config) == sum(parameter.numel() for parameter in theirs.parameters())
    assert {diffusers_name(n): p.numel() for n, p in ours.named_parameters()} == {
        n: p.numel() for n, p in theirs.named_parameters()
    }
    assert {"toy": 2.25, "1.3B": 1419, "5B": 5000, "14B": 14288}.get(name, count / 1e6) == pytest.approx(
        count / 1e6, rel=0.02
    )


def test_predict_drops_masked_text():
    model = random_model()
    latents, text = torch.randn(2, 5, 1, 4, 4).double(), torch.randn(2, 6, 20).double()
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    found = model.predict(latents, t, text, mask)
    first = model.predict(latents[:1], t[:1], text[:1, [0, 2, 3]])
    second = model.predict(latents[1:], t[1:], text[1:])
    assert relative(found, torch.cat([first, second])) < 1e-12


def test_predict_needs_no_padding_and_is_exact_at_any_shape():
    model = random_model(TransformerConfig(**{**SMALL.__dict__, "patch": (1, 1, 1), "qk_norm": "none"}))
    latents = torch.randn(1, 5, 3, 5, 7, dtype=torch.float64)
    out = model.predict(latents, torch.tensor([0.3]), torch.randn(1, 1, 20).double())
    assert out.shape == (1, 3, 3, 5, 7) and out.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float32, 1e-5)])
def test_narrow_weights(dtype, tolerance):
    wide = random_model(dtype=dtype).double()
    model = random_model(dtype=dtype)
    latents, text = torch.randn(2, 5, 2, 4, 4), torch.randn(2, 6, 20)
    t = torch.tensor([0.437, 0.9])
    found = model.predict(latents, t, text)
    assert found.dtype == torch.float32
    assert relative(found.double(), wide.predict(latents.double(), t, text.double())) < tolerance
    found.square().mean().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


def test_weights_may_be_stored_in_several_dtypes():
    model = random_model(dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name or "time_embedding" in name or "modulation" in name or "patch" in name:
            parameter.data = parameter.data.float()
    latents, text = torch.randn(1, 5, 2, 4, 4), torch.randn(1, 6, 20)
    found = model.predict(latents, torch.tensor([0.4]), text)
    assert relative(found, random_model(dtype=torch.float32).predict(latents, torch.tensor([0.4]), text)) < 0.05


def test_autocast_leaves_the_noise_level_alone():
    model = random_model(dtype=torch.float32)
    latents, text, t = torch.randn(1, 5, 2, 4, 4), torch.randn(1, 6, 20), torch.tensor([0.437])
    seen = []
    model.time_projection.register_forward_hook(lambda module, inputs, output: seen.append(output))
    plain = model.predict(latents, t, text)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model.predict(latents, t, text)
    assert torch.equal(*seen) and seen[1].dtype == torch.float32
    assert relative(cast, plain) < 0.05
    cast.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sise": 3}, "unknown condition 'sise'.*size"),
        ({"fps": 16}, "'fps'"),
        ({"latents": torch.zeros(2, 4, 1, 4, 4)}, r"wanted \(B, 5"),
        ({"text": torch.zeros(2, 3, 21)}, r"wanted \(2, L, 20\)"),
        ({"t": torch.zeros(3)}, r"t is \(3,\)"),
        ({"t": torch.full((2,), 437.0)}, "timesteps"),
        ({"t": torch.zeros(2, 5)}, r"\(5,\)"),
        ({"text_mask": torch.ones(2, 4)}, "text_mask"),
        ({"text_mask": torch.zeros(2, 3)}, "empty"),
    ],
)
def test_predict_names_what_is_wrong(arguments, message):
    usual = {"latents": torch.zeros(2, 5, 1, 4, 4), "t": torch.zeros(2), "text": torch.zeros(2, 3, 20)}
    with pytest.raises(StditError, match=message):
        STDiT(SMALL).predict(**{**usual, **arguments})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "not divisible by heads 5"),
        ({"dim": 12, "heads": 4}, "even"),
        ({"layers": 0}, "layers is 0"),
        ({"patch": (1, 2)}, "patch"),
        ({"frequency_dim": 31}, "even"),
        ({"text_padding": -1}, "text_padding is -1; it must be at least 0"),
        ({"norm": "rns"}, "norm is 'rns'. Did you mean 'rms'"),
        ({"qk_norm": True}, "qk_norm is True; it must be a text"),
        ({"modulation": "low_rank"}, "cross_norm 'modulated' goes with"),
        ({"modulation": "low_rank", "cross_norm": "modulated"}, "sinusoids of the width 48"),
        ({"position": "space"}, "position_base"),
        ({"position": "learned"}, "position_max"),
        ({"rotary": "inner"}, "rope_fps"),
        ({"attention": "spatial"}, "rotary 'none'"),
        ({"image_channels": 5}, "image_channels 5 of in_channels 5"),
        ({"text_embedding": "gelu"}, "text_width 0"),
    ],
)
def test_bad_configs_are_named(changes, message):
    with pytest.raises(StditError, match=message):
        TransformerConfig(**{**SMALL.__dict__, **changes})


def test_presets_by_name():
    assert TransformerConfig.preset("1.3B", layers=2).layers == 2
    with pytest.raises(StditError, match=r"'1.3b'.*1\.3B"):
        TransformerConfig.preset("1.3b")
    with pytest.raises(StditError, match=r"'layer'.*layers"):
        TransformerConfig.preset("toy", layer=2)


def test_a_new_model_predicts_zero_and_learns():
    torch.manual_seed(0)
    model = STDiT(SMALL)
    out = model.predict(torch.randn(1, 5, 1, 4, 4), torch.tensor([0.5]), torch.randn(1, 3, 20))
    assert out.abs().max() == 0
    (out - 1).square().mean().backward()
    assert model.head.head.weight.grad.abs().max() > 0


def test_clips_and_texts_must_be_as_many():
    pack = pack_clips([torch.zeros(5, 1, 4, 4)], [torch.tensor(0.5)], SMALL.patch)
    with pytest.raises(StditError, match="1 clips came with 2 texts"):
        STDiT(SMALL)(pack, pack_texts([torch.zeros(2, 20)] * 2, 0))


def test_flops_are_those_of_the_matrix_products():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config, latents, text = SMALL, torch.randn(2, 5, 3, 4, 6), torch.randn(2, 9, 20)
    # attention as plain matrix products: not every release of torch counts those of its CPU kernel
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        diffusers_model(config)(latents, torch.tensor([1.0, 500.0]), text)
    time = 2 * 2 * (config.frequency_dim * config.dim + 7 * config.dim**2)  # not counted: no tokens in it
    assert transformer_flops(config, [18, 18], [9, 9]) == counter.get_total_flops() - time
    linear, quadratic = cost_coefficients(config)
    assert isinstance(linear, int) and transformer_flops(config, [18], [0]) == 18 * linear + 18**2 * quadratic


def test_compiled_blocks_do_not_recompile_for_a_new_mix():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = random_model(dtype=torch.float32)
    model.blocks[0].compile(backend=counter, dynamic=True, fullgraph=True)
    compiled = []
    for shapes, lengths, levels in [  # the compiler takes sizes that are equal by chance for one at first
        ([(1, 4, 4), (2, 4, 6)], [3, 5], [0.1, 0.7]),
        ([(3, 2, 6), (1, 8, 4), (1, 4, 4)], [4, 9, 2], [0.3, 0.3, 0.9]),
        ([(2, 4, 4), (2, 4, 4), (1, 4, 4), (5, 2, 2)], [4, 4, 2, 7], [0.3, 0.2, 0.9, 0.9]),
        ([(1, 4, 4)] * 5, [3, 3, 3, 3, 3], [0.3, 0.2, 0.9, 0.8, 0.1]),
        ([(1, 2, 4), (2, 8, 8)], [3, 3], [0.3, 0.2]),
    ]:
        pack = pack_clips([torch.randn(5, *s) for s in shapes], [torch.tensor(t) for t in levels], SMALL.patch)
        text: TextPack = pack_texts([torch.randn(n, 20) for n in lengths], 16)
        found = model(pack, text)
        found.square().mean().backward()
        assert relative(found, random_model(dtype=torch.float32)(pack, text)) < 1e-5
        compiled.append(counter.frame_count)
    assert len(set(compiled[1:])) == 1
