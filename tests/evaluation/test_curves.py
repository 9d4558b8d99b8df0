"""The curves of a report: all that was measured, and the numbers as they are."""

from __future__ import annotations

import re

import numpy as np

from stdit.evaluation.curves import RIGHT, Series, draw, panels


def corners(svg: bytes) -> list[np.ndarray]:
    """The lines of a picture with many corners, (corners, 2) each."""
    found = re.findall(r'<path d="M ([^"]*)"', svg.decode())
    lines = [np.array([pair.split()[-2:] for pair in line.split("L")], float) for line in found if line.count("L") > 20]
    assert lines
    return lines


def test_a_curve_has_the_data() -> None:
    values = np.linspace(2, 1, 100)
    for points in corners(draw("loss", [Series("training", dict(enumerate(values)), noisy=True)])):
        assert abs(np.corrcoef(points[:, 0], points[:, 1])[0, 1]) > 0.999


def test_several_curves_share_an_axis_and_are_named() -> None:
    low, high = (dict.fromkeys(range(30), value) for value in (1.0, 2.0))
    svg = draw("loss", [Series("training", low), Series("held-out", high, dots=True)])
    (first, second) = [points for points in corners(svg) if len(points) >= 30]
    assert first[0, 1] > second[0, 1]  # downwards in an SVG
    assert b"training" in svg and b"held-out" in svg


def test_everything_that_was_measured_has_a_panel() -> None:
    train = [{"step": step, "loss": 1.0, "lr": None, "grad_norm": 0.5} for step in (10, 20)]
    evals = [
        {"step": step, "loss": 1.5, "loss_by_level": {"0-0.5": 1.0, "0.5-1": None}, "toy": {"8x8x5": {"all": share}}}
        for step, share in ((20, 0.5), (10, 0.25))
    ]
    found = panels(train, evals)
    assert list(found) == ["loss", "held-out loss by noise level", f"{RIGHT}8x8x5", "gradient norm"]
    assert [one.label for one in found["loss"]] == ["training", "held-out"]
    assert [one.label for one in found["held-out loss by noise level"]] == ["0-0.5"]
    assert list(found[f"{RIGHT}8x8x5"][0].points.items()) == [(10, 0.25), (20, 0.5)]


def test_a_line_takes_two_points_a_dot_one() -> None:
    assert list(panels([{"step": 1, "loss": 1.0}], [{"step": 1, "psnr": 30.0}])) == ["PSNR in dB"]
    assert panels([], []) == {} and panels([], [{"step": 1, "toy": "odd", "loss_by_level": [1]}]) == {}
