"""Solvers: from noise to clip, as the scheduler of a model folder says (base.py shows how one is driven)."""

# ruff: noqa: F401

from stdit.diffusion.solvers.base import Solver
from stdit.diffusion.solvers.euler import dynamic_shift
from stdit.diffusion.solvers.schedulers import (
    FLOWS_BY_OPTION,
    NAMES,
    SCHEDULERS,
    check_levels,
    euler_config,
    make_solver,
    named_config,
    path_of,
    read_scheduler,
    static_shift,
    unipc_config,
    with_static_shift,
    write_scheduler,
)
from stdit.diffusion.solvers.unipc import UniPC
