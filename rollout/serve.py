"""vLLM's own OpenAI-compatible server, started with eviction switched on."""

from __future__ import annotations

import argparse
import errno
import json
import os
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

from memento.errors import UserError
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


def check_port(flags: Sequence[str]) -> None:
    """Look at the address of a server before it loads its model for minutes.

    Args:
        flags: of `vllm serve`; ``--host`` and ``--port`` are read.

    Raises:
        UserError: another program listens there.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--uds")
    given, _ = parser.parse_known_args(list(flags))
    if given.uds is not None:
        return
    try:
        family, kind, _, _, address = socket.getaddrinfo(given.host or "0.0.0.0", given.port, type=socket.SOCK_STREAM)[
            0
        ]
    except socket.gaierror as error:
        raise UserError(f"--host: {given.host} is no address of this machine ({error.strerror}).") from error
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return  # vLLM says it better
            raise UserError(
                f"port {given.port} is in use by another program: take another one with --port, or end that program."
            ) from error


def serve(model: str, fmt: MementoFormat, flags: Sequence[str] = ()) -> NoReturn:
    """Become the server: signals, output and exit code are vLLM's."""
    check_port(flags)
    command = serve_command(model, fmt, flags)
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    sys.stdout.flush()
    os.execv(command[0], command)
