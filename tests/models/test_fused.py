import pytest
import torch
from torch.nn import functional as F

from stdit.models import fused
from stdit.models.fused import gated_residual, level_sum, modulated_norm, rms_norm_rotary
from stdit.models.packing import LevelIndex
from stdit.models.positions import apply_rotary, rotary_table

LEVELS = {
    "one": [0] * 70,
    "runs": [1] * 33 + [0] * 40 + [2] * 35 + [0] * 32,
    "short": [0, 2, 1, 1, 0, 2, 2, 1, 0],
}


def inputs(name, rows, dtype=torch.float64, d=6):
    torch.manual_seed(0)
    index = LevelIndex.of(torch.tensor(LEVELS[name]))
    n, k = len(index.level_of), 3
    tokens = [torch.randn(n, d, dtype=dtype, requires_grad=True) for _ in range(rows)]
    wide = torch.promote_types(dtype, torch.float32)
    table = [torch.randn(k, d, dtype=wide, requires_grad=True) for _ in range(3 - rows)]
    return tokens, table, index


def heads(width, dtype=torch.float64):
    """Five tokens of two heads, a weight of `width` for their norm, and a table that turns them."""
    torch.manual_seed(0)
    x, weight = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((5, 24), (width,)))
    return x, weight, rotary_table(torch.randint(0, 50, (5, 3)), 12, dtype=dtype)


def assert_same(found, wanted, leaves, rtol=1e-11):
    """The outputs, and the gradients of a random sum of them."""
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    direction = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(y, leaves, direction) for y in (found, wanted))):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("chunk", [4096, 4])
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("norm", [F.layer_norm, F.rms_norm])
def test_modulated_norms_are_what_they_say(norm, name, chunk, monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", chunk)
    (x,), (shift, scale), index = inputs(name, 1)
    level = index.level_of
    wanted = norm(x, x.shape[1:], eps=1e-6) * (1 + scale[level]) + shift[level]
    found = modulated_norm(x, shift, scale, index, 1e-6, rms=norm is F.rms_norm)
    assert_same(found, wanted, (x, shift, scale))


@pytest.mark.parametrize("chunk", [4096, 4])
@pytest.mark.parametrize("name", LEVELS)
def test_gated_residual_is_what_it_says(name, chunk, monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", chunk)
    (x, y), (gate,), index = inputs(name, 2)
    wanted = x + y * gate[index.level_of]
    found = gated_residual(x, y, gate, index)
    assert_same(found, wanted, (x, y, gate), rtol=1e-12)


@pytest.mark.parametrize("name", ["short", "runs"])
def test_gradcheck_of_modulation(name):
    (x,), (shift, scale), index = inputs(name, 1, d=3)
    assert torch.autograd.gradcheck(lambda *t: modulated_norm(*t, index, 1e-6), (x, shift, scale))
    (x, y), (gate,), index = inputs(name, 2, d=2)
    assert torch.autograd.gradcheck(lambda *t: gated_residual(*t, index), (x, y, gate))


@pytest.mark.parametrize("each_turns", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("width", [24, 12])
def test_rms_norm_rotary_is_a_norm_then_a_turn(width, turned, each_turns):
    """A norm over all heads or over each, and one rotary table for all heads or one for each."""
    x, weight, table = heads(width)
    wanted = F.rms_norm(x.unflatten(1, (-1, width)), (width,), weight, 1e-6).view(5, 2, 12)
    cos, sin = (part.expand(5, 2, 6).clone() if each_turns else part for part in table) if turned else (None, None)
    wanted = (apply_rotary(wanted, cos, sin) if turned else wanted).flatten(1)
    assert_same(rms_norm_rotary(x, weight, cos, sin, 1e-6), wanted, (x, weight), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda *t: rms_norm_rotary(*t, cos, sin, 1e-6), (x, weight))


def test_complex_and_real_turns_agree(monkeypatch):
    x, weight, table = heads(24)
    fast = rms_norm_rotary(x, weight, *table, 1e-6)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rms_norm_rotary(x, weight, *table, 1e-6), fast, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", LEVELS)
def test_bf16_tokens_are_computed_in_fp32(name):
    (x,), (shift, scale), index = inputs(name, 1, torch.bfloat16)
    found = modulated_norm(x, shift, scale, index, 1e-6)
    wide = modulated_norm(x.float(), shift, scale, index, 1e-6)
    assert torch.equal(found, wide.bfloat16())
    (x, y), (gate,), _ = inputs(name, 2, torch.bfloat16)
    found = gated_residual(x, y, gate, index)
    assert torch.equal(found, gated_residual(x.float(), y.float(), gate, index).bfloat16())
    found.float().sum().backward()
    assert x.grad.dtype == y.grad.dtype == torch.bfloat16 and gate.grad.dtype == torch.float32
    turned = rms_norm_rotary(x, torch.ones(6, dtype=torch.bfloat16), None, None, 1e-6)
    assert torch.equal(turned, rms_norm_rotary(x.float(), torch.ones(6), None, None, 1e-6).bfloat16())


@pytest.mark.parametrize("name", ["runs", "short"])
def test_opcheck(name):
    (x,), (shift, scale), index = inputs(name, 1, torch.float32)
    parts = (index.level_of, index.run_bounds, index.run_levels)
    torch.library.opcheck(fused.NORM.compiled._opoverload, (x, shift, scale, 1e-6, False, *parts))
    (x, y), (gate,), _ = inputs(name, 2, torch.float32)
    torch.library.opcheck(fused.NORM.compiled._opoverload, (x, shift, scale, 1e-6, True, *parts))
    torch.library.opcheck(fused.RESIDUAL.compiled._opoverload, (x, y, gate, *parts))


def test_level_sum_is_a_sum_by_level():
    values, level = torch.randn(9, 4), torch.tensor(LEVELS["short"])
    wanted = torch.stack([values[level == k].sum(0) for k in range(4)])
    torch.testing.assert_close(level_sum(values, level, 4), wanted)
