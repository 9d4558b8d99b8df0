import math

import pytest
import torch

from stdit.models.positions import apply_rotary, grid_positions, network_time, rotary_axes, rotary_table, sinusoids
from stdit.shapes import TokenGrid


def test_grid_positions_run_over_columns_first():
    wanted = [(t, h, w) for t in range(2) for h in range(3) for w in range(4)]
    assert grid_positions(TokenGrid(2, 3, 4)).tolist() == [list(p) for p in wanted]


@pytest.mark.parametrize(
    ("head_dim", "axes"), [(128, (44, 42, 42)), (64, (24, 20, 20)), (12, (4, 4, 4)), (2, (2, 0, 0))]
)
def test_axes_split_as_wans(head_dim, axes):
    assert rotary_axes(head_dim) == axes


def test_rotary_is_a_complex_product_per_axis():
    head_dim, theta = 20, 100.0
    positions = torch.tensor([[3, 0, 7], [0, 5, 2]])
    x = torch.randn(2, 3, head_dim, dtype=torch.float64)
    frequencies, axis_of = [], []
    for axis, size in enumerate(rotary_axes(head_dim)):
        frequencies += [theta ** (-2 * i / size) for i in range(size // 2)]
        axis_of += [axis] * (size // 2)
    angle = positions[:, axis_of] * torch.tensor(frequencies, dtype=torch.float64)
    wanted = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)[:, None]
    cos, sin = rotary_table(positions, head_dim, theta, torch.float64)
    torch.testing.assert_close(
        apply_rotary(x, cos, sin), torch.view_as_real(wanted).flatten(-2), rtol=1e-13, atol=1e-13
    )


def test_scores_depend_on_differences_of_positions_only():
    q, k = torch.randn(2, 1, 1, 24, dtype=torch.float64)

    def score(p, o):
        a = apply_rotary(q, *rotary_table(torch.tensor([p]), 24, dtype=torch.float64))
        b = apply_rotary(k, *rotary_table(torch.tensor([o]), 24, dtype=torch.float64))
        return (a * b).sum().item()

    assert math.isclose(score((5, 2, 9), (1, 1, 3)), score((104, 3, 16), (100, 2, 10)), rel_tol=1e-11)


def test_far_positions_are_computed_in_fp64():
    cos, _ = rotary_table(torch.tensor([[100_000, 0, 0]]), 4)
    assert cos.dtype == torch.float32
    assert abs(cos[0, 0, 0].item() - math.cos(100_000)) < 1e-7


def test_the_network_is_told_a_thousand_t_or_log_sigma_as_cosines_then_sines():
    t = torch.tensor([0.437, 1.0], dtype=torch.float64)
    found = sinusoids(network_time(t), 8)
    for row, time in zip(found.tolist(), (437.0, 1000.0)):
        angles = [time * 10000 ** (-i / 4) for i in range(4)]
        assert row == pytest.approx([math.cos(a) for a in angles] + [math.sin(a) for a in angles], abs=1e-10)
    assert found.dtype == torch.float64
    sigma = torch.tensor([0.0, 0.0005, 0.002, 80.0], dtype=torch.float64)
    wanted = [math.log(max(one, 0.001)) / 4 for one in sigma.tolist()]
    assert network_time(sigma / (sigma + 1), "log_sigma").tolist() == pytest.approx(wanted, rel=1e-12)
