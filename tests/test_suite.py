"""What holds of the tests themselves."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from children import Child, finish_together

TESTS = Path(__file__).parent
WITH_A_LIMIT = {"run", "check_output", "check_call", "call"}


def test_every_child_process_has_a_time_limit() -> None:
    """By `subprocess.run(…, timeout=…)` or by `children.Child`, whose output no pipe can hold up."""
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if not isinstance(node.func.value, ast.Name) or node.func.value.id != "subprocess":
                continue
            where, name = f"{path.relative_to(TESTS)}, line {node.lineno}", node.func.attr
            assert name in WITH_A_LIMIT or path.name == "children.py", f"{where}: use children.Child"
            if name in WITH_A_LIMIT:
                assert any(word.arg == "timeout" for word in node.keywords), f"{where}: has no timeout"


def python(code: str) -> Child:
    return Child([sys.executable, "-u", "-c", code])


def test_a_child_that_fills_what_a_pipe_holds_ends() -> None:
    assert len(python("print('x' * 1_000_000)").finish()) == 1_000_001


def test_a_child_that_hangs_is_ended_and_what_it_said_is_shown() -> None:
    child = python("import time; print('so far'); time.sleep(3600)")
    while "so far" not in child.output:
        assert child.popen.poll() is None
    with pytest.raises(AssertionError, match=r"still running after 0.1 s:\nso far"):
        child.status(0.1)
    assert child.popen.poll() is not None


def test_those_that_wait_for_one_that_failed_are_ended() -> None:
    waits, fails = python("import time; time.sleep(3600)"), python("raise SystemExit('the reason')")
    with pytest.raises(AssertionError, match=r"child 1, exit status 1:\nthe reason"):
        finish_together([waits, fails])
    assert waits.popen.poll() is not None
