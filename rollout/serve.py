"""vLLM's own OpenAI-compatible server, started with eviction switched on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from memento.format import MementoFormat
from memento.rollout.plugin import eviction_args


def serve_command(model: str, fmt: MementoFormat, flags: Sequence[str] = ()) -> list[str]:
    """The command line of the server.

    Args:
        model: Hugging Face folder or hub id.
        fmt: what is evicted.
        flags: further flags of `vllm serve`, e.g. ``["--port", "8000"]``; they come last and so win.
    """
    options: list[str] = []
    for name, value in eviction_args(fmt).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            options += [f"--{flag}", *map(str, value)]
        elif isinstance(value, dict):
            options += [f"--{flag}", json.dumps(value)]
        else:
            options += [f"--{flag}", str(value)]
    # Not the `vllm` script: that of the CPU build asks for the version of a distribution called vllm, and fails.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options, *flags]


def serve(model: str, fmt: MementoFormat, flags: Sequence[str] = ()) -> NoReturn:
    """Become the server: signals, output and exit code are vLLM's."""
    command = serve_command(model, fmt, flags)
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    sys.stdout.flush()
    os.execv(command[0], command)
