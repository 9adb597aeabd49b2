"""Shared by all tests: the command line as a user runs it, and where recordings are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared" / "kvm-traces"

# A shell starts background jobs with SIGINT ignored, and children inherit that: the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("fast", max_examples=50, deadline=None)
settings.register_profile("slow", max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("TDPMMU_SLOW"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: TDPMMU_SLOW=1 runs it"))


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str


Cli = Callable[..., Ran]


@pytest.fixture
def cli() -> Cli:
    """Run `tdpmmu ARGUMENTS...` in a process of its own, and never accept a traceback."""

    def call(*arguments: object, stdin: bytes = b"", timeout: float = 60, cwd: Path | None = None) -> Ran:
        command = [sys.executable, "-m", "tdpmmu", *map(str, arguments)]
        done = subprocess.run(
            command, input=stdin, capture_output=True, timeout=timeout, check=False, cwd=cwd
        )
        ran = Ran(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert "Traceback" not in ran.err, ran.err
        assert "Traceback" not in ran.out, ran.out
        return ran

    return call


def recordings() -> list[Path]:
    """The recordings that the repository carries, smallest first."""
    return sorted(DATA.glob("*/*/trace.txt.gz"), key=lambda path: (path.stat().st_size, path))


def shared_recordings() -> list[Path]:
    """The recordings beside the clone, where there are any."""
    return sorted(SHARED.glob("*/*/trace.txt.gz"))


def as_id(path: Path) -> str:
    return f"{path.parent.parent.name}/{path.parent.name}"
