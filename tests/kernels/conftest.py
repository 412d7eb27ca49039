"""Triton's interpreter, for the kernels on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest


@pytest.fixture(scope="module")
def findings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the test's own module prints as JSON when it is run as a program, with Triton's interpreter.

    A process of its own: Triton looks at TRITON_INTERPRET when it is imported.
    """
    done = subprocess.run(
        [sys.executable, str(request.path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
