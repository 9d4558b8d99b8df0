"""OpenMP's idle threads: how long they spin before they sleep.

A training step has thousands of small parallel regions. By default, the threads that finish first spin for milliseconds
until the others arrive. On a busy machine they thus take the core that the others wait for, and a step becomes 5 to 12
times slower. With a short spin they sleep instead (benchmarks/busy.py measures both).
"""

from __future__ import annotations

import os

SHORT_SPIN = {"GOMP_SPINCOUNT": "3000"}  # of libgomp, as in torch's wheels for Linux; other OpenMP runtimes ignore it
VARIABLES = ("OMP_WAIT_POLICY", *SHORT_SPIN)


def shorten_spin() -> None:
    """Sets a short spin unless the user has set any of VARIABLES. OpenMP reads them once, when torch is imported."""
    if not any(name in os.environ for name in VARIABLES):
        os.environ.update(SHORT_SPIN)


def spin_settings() -> str:
    """The variables in force, for a log line, such as "GOMP_SPINCOUNT=2000"; '' for OpenMP's default."""
    return ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
