"""Key maps: both directions, bit for bit, and errors that name what is wrong."""

from __future__ import annotations

import pytest
import torch

from stdit.errors import StditError
from stdit.weights.keymap import Flatten, KeyMap, Rule, Take, Unflatten, half_split_heads, output_order

SHAPES = {
    "blocks.0.q.weight": (6, 3),
    "blocks.0.k.weight": (6, 3),
    "blocks.10.q.weight": (6, 3),
    "blocks.10.k.weight": (6, 3),
    "blocks.0.attn.q.bias": (8,),
    "blocks.0.attn.k.bias": (4,),
    "kv.weight": (10, 2),
    "patch.weight": (5, 8),
    "turned.weight": (2, 3, 4),
    "rows.weight": (8, 2),
    "head.anything.at.all": (1,),
}
KEYMAP = KeyMap(
    Rule("blocks.{i}.{p:q|k}.{leaf}", "layers.{i}.to_{p}.{leaf}"),
    Rule(("blocks.{i}.attn.q.{leaf}", "blocks.{i}.attn.k.{leaf}"), "layers.{i}.qk.{leaf}"),
    Rule("kv.{leaf}", ("k.{leaf}", "v.{leaf}")),
    Rule("patch.weight", "patch.weight", Unflatten(1, (2, 1, 2, 2))),
    Rule("turned.weight", "turned.weight", Take((2, 0, 1), 1), Unflatten(2, (2, 2))),
    Rule("rows.weight", "rows.weight", half_split_heads(2, 4)),
    Rule("head.{rest}", "out.{rest}"),
    ignored=("rope.{rest}",),
)


@pytest.fixture
def native() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def test_renames_fusions_splits_and_moves_invert_bit_for_bit(native):
    table = KEYMAP.table(SHAPES)
    foreign = dict(table.to_foreign(native.__getitem__))
    assert {name: tuple(t.shape) for name, t in foreign.items()} == table.foreign_shapes
    assert torch.equal(foreign["layers.10.to_k.weight"], native["blocks.10.k.weight"])
    assert torch.equal(foreign["layers.0.qk.bias"][8:], native["blocks.0.attn.k.bias"])
    assert torch.equal(foreign["v.weight"], native["kv.weight"][5:])
    assert foreign["patch.weight"][3, 1, 0, 1, 0] == native["patch.weight"][3, 6]
    assert foreign["turned.weight"].shape == (2, 3, 2, 2)
    assert torch.equal(foreign["rows.weight"][:4], native["rows.weight"][[0, 2, 1, 3]])
    back = dict(table.to_native(foreign.__getitem__))
    assert back.keys() == native.keys() and all(torch.equal(back[name], native[name]) for name in native)
    one = table.native_reader(foreign.__getitem__)
    assert all(torch.equal(one(name), native[name]) for name in native)


def test_every_foreign_tensor_is_read_once(native):
    table = KEYMAP.table(SHAPES)
    foreign, reads = dict(table.to_foreign(native.__getitem__)), []
    list(table.to_native(lambda name: reads.append(name) or foreign[name]))
    assert sorted(reads) == sorted(foreign)


def test_a_check_names_every_kind_of_difference_and_the_file():
    table = KEYMAP.table(SHAPES)
    good = table.foreign_shapes
    table.check(good | {"rope.freqs": (3,)}, "good.safetensors")
    bad = {name: shape for name, shape in good.items() if name != "k.weight"}
    bad |= {"kk.weight": (5, 2), "patch.weight": (5, 8)}
    with pytest.raises(StditError) as error:
        table.check(bad, "folder/bad.safetensors")
    message = str(error.value)
    for part in ("folder/bad.safetensors", "missing: k.weight.", "Is it 'kk.weight'?", "unexpected: kk.weight."):
        assert part in message
    assert "patch.weight is (5, 8), should be (5, 2, 1, 2, 2)" in message


def test_long_lists_of_names_are_cut_and_counted():
    table = KeyMap(Rule("{rest}", "{rest}")).table({f"t{i}": (1,) for i in range(50)})
    with pytest.raises(StditError, match="t7 and 42 more"):
        table.check({}, "empty.safetensors")


def test_mistakes_in_a_map_are_found_before_any_weights():
    with pytest.raises(AssertionError, match="no rule for our tensor b"):
        KeyMap(Rule("a", "a")).table({"a": (1,), "b": (1,)})
    with pytest.raises(AssertionError, match="two rules"):
        KeyMap(Rule("a", "x"), Rule("b", "x")).table({"a": (1,), "b": (1,)})
    with pytest.raises(AssertionError, match="has no"):
        KeyMap(Rule(("a", "b"), "x")).table({"a": (1,)})


@pytest.mark.parametrize(
    ("transform", "shape"),
    [(Take((2, 0, 1), 1), (5, 3, 4)), (Unflatten(2, (2, 2)), (5, 3, 2, 2)), (Flatten(1, (3, 4)), (5, 12))],
)
def test_each_transform_inverts(transform, shape):
    x = torch.randn(5, 3, 4)
    there = transform.to_foreign(x)
    assert tuple(there.shape) == shape and torch.equal(transform.to_native(there), x)


@pytest.mark.parametrize("order", ["thwc", "cthw", "hwtc"])
def test_output_rows_are_permuted_as_their_axes(order):
    x = torch.randn(2 * 3 * 1 * 5, 4)
    wanted = x.view(2, 3, 1, 5, 4).permute(*("thwc".index(axis) for axis in order), 4).reshape(-1, 4)
    assert torch.equal(output_order((2, 3, 1), 5, order).to_foreign(x), wanted)
