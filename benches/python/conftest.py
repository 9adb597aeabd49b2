"""The native side: ns an operation without Python, from the same host in the same run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def native(request: pytest.FixtureRequest) -> dict[str, Any] | None:
    """Return `tdpmmu.native/1`, of the program that TDPMMU_NATIVE names, else built by cargo; None when off."""
    if request.config.getoption("benchmark_disable") and not request.config.getoption("benchmark_enable"):
        return None
    program = os.environ.get("TDPMMU_NATIVE")
    if program is None and shutil.which("cargo") is None:
        pytest.skip("neither TDPMMU_NATIVE nor cargo: no native figure to compare with")
    command = (
        [program]
        if program
        else ["cargo", "run", "-q", "--release", "-p", "tdpmmu-benches", "--bin", "native"]
    )
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures
