"""The table of how near every family is to its reference, printed after the tests that measure it."""

from __future__ import annotations


def pytest_terminal_summary(terminalreporter) -> None:
    rows: dict[tuple[str, str], tuple[float, float, int]] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "errors":
                family, dialect, output, gradient = value
                old = rows.get((family, dialect), (0.0, 0.0, 0))
                rows[family, dialect] = (max(old[0], output), max(old[1], gradient), old[2] + 1)
    if rows:
        terminalreporter.section("largest relative errors against the references")
        terminalreporter.write_line(f"{'family':18}{'dialect':12}{'configs':>8}{'outputs':>10}{'gradients':>11}")
    for (family, dialect), (output, gradient, configs) in rows.items():
        terminalreporter.write_line(f"{family:18}{dialect:12}{configs:8}{output:10.1e}{gradient:11.1e}")
