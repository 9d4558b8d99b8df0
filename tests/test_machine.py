"""Commands set how long OpenMP's idle threads spin: before torch is imported, and never over a user's own setting."""

from __future__ import annotations

import subprocess
import sys

import pytest

from stdit.machine import SHORT_SPIN, VARIABLES, shorten_spin, spin_settings


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)


def test_a_command_sets_it_before_torch_is_imported():
    code = (
        "import os, sys; from stdit.cli.main import run_command; "
        "run_command(lambda: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules), [], 'x')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.split() == [SHORT_SPIN["GOMP_SPINCOUNT"], "False"]


@pytest.mark.parametrize("name", VARIABLES)
def test_the_users_own_setting_wins(name, monkeypatch):
    monkeypatch.setenv(name, "7")
    shorten_spin()
    assert spin_settings() == f"{name}=7"


def test_the_log_names_what_is_set(monkeypatch):
    assert spin_settings() == ""
    shorten_spin()
    assert spin_settings() == f"GOMP_SPINCOUNT={SHORT_SPIN['GOMP_SPINCOUNT']}"
