"""Solvers: from noise to clip, as the scheduler of a model folder says (base.py shows how one is driven)."""

from stdit.diffusion.solvers.base import Solver
from stdit.diffusion.solvers.euler import Euler, dynamic_shift
from stdit.diffusion.solvers.folders import (
    euler_config,
    named_config,
    read_scheduler,
    static_shift,
    unipc_config,
    with_static_shift,
    write_scheduler,
)
from stdit.diffusion.solvers.schedulers import check_scheduler, make_solver, path_of
from stdit.diffusion.solvers.unipc import UniPC

__all__ = [
    "Euler",
    "Solver",
    "UniPC",
    "check_scheduler",
    "dynamic_shift",
    "euler_config",
    "make_solver",
    "named_config",
    "path_of",
    "read_scheduler",
    "static_shift",
    "unipc_config",
    "with_static_shift",
    "write_scheduler",
]
