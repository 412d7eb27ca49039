"""`memento doctor`: what this machine has, against what the system was tested with. Imports none of the stack."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from memento.errors import UserError
from memento.preflight import check_vllm_version, machine_resources

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        level: a ``problem`` keeps a run from starting; a ``warning`` makes something slower, or less safe.
        found: what is there.
        fix: what to do about it; empty if nothing.
    """

    name: str
    level: Level
    found: str
    fix: str = ""


def diagnose() -> list[Check]:
    """All checks of this machine, in the order in which they are shown."""
    return [
        _python(),
        *_packages(),
        _vllm(),
        _torchvision(),
        _cores(),
        _memory(),
        _shared_memory(),
        _disk(),
        _namespaces(),
        _wandb(),
    ]


def pinned_versions() -> dict[str, str]:
    """Distribution -> version of the tested set: the exact pins of this package's own extras."""
    pins: dict[str, str] = {}
    for requirement in requires("memento-rl") or []:
        match = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?==([\w.+]+)", requirement)
        if match and "'dev'" not in requirement:
            pins[match[1]] = match[2]
    return pins


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _python() -> Check:
    found = f"{platform.python_version()} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Check("Python", "ok", found)
    return Check("Python", "warning", found, "3.11 and 3.12 are tested")


def _packages() -> list[Check]:
    checks = []
    for name, wanted in pinned_versions().items():
        if name.startswith("vllm"):
            continue
        found = _installed(name)
        if found is None:
            checks.append(Check(name, "problem", "not installed", f"pip install {name}=={wanted}"))
        elif found.split("+")[0] != wanted:
            checks.append(Check(name, "warning", found, f"tested: {wanted}"))
        else:
            checks.append(Check(name, "ok", found))
    return checks


def _vllm() -> Check:
    try:
        return Check("vLLM", "ok", check_vllm_version())
    except UserError as error:
        return Check("vLLM", "problem", "missing or outside the tested range", str(error))


def _torchvision() -> Check:
    torch, vision = _installed("torch") or "", _installed("torchvision") or ""
    if torch.endswith("+cpu") and vision and not vision.endswith("+cpu"):
        fix = "pip uninstall torchvision torchaudio torchcodec (CUDA builds break `import transformers` on CPU torch)"
        return Check("torchvision", "problem", f"{vision} beside torch {torch}", fix)
    return Check("torchvision", "ok", vision or "not installed, not needed")


def _cores() -> Check:
    there = machine_resources()
    usable = len(os.sched_getaffinity(0))
    found = f"{there['CPU']:.0f} CPU cores ({usable} usable), {there['GPU']:.0f} GPUs"
    if usable < 2:
        return Check("cores", "problem", found, "the quickstart needs two: one for the engine, one for the learner")
    return Check("cores", "ok", found)


def _memory() -> Check:
    amounts = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M))
    total, free = (int(amounts[name]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    found = f"{free:.1f} of {total:.1f} GiB free"
    if free < 6:
        return Check("memory", "warning", found, "the quickstart needs about 6 GiB")
    return Check("memory", "ok", found)


def _shared_memory() -> Check:
    if not os.access("/dev/shm", os.W_OK):
        return Check("/dev/shm", "problem", "cannot be written", "weights go to the engines through it; mount it")
    free = shutil.disk_usage("/dev/shm").free / 2**30
    if free < 1:
        return Check("/dev/shm", "warning", f"{free:.2f} GiB free", "in a container: --shm-size=8g")
    return Check("/dev/shm", "ok", f"{free:.1f} GiB free")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return Check("disk", "ok" if free > 5 else "warning", f"{free:.0f} GiB free here", "" if free > 5 else "make room")


def _namespaces() -> Check:
    try:
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--net", "true"], capture_output=True, timeout=10, check=False
        )
        works = done.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        works = False
    if works:
        return Check("user namespaces", "ok", "allowed: code rewards run isolated")
    return Check(
        "user namespaces", "warning", "not allowed here", "code rewards run in plain subprocesses, less isolated"
    )


def _wandb() -> Check:
    if _installed("wandb") is None:
        return Check("W&B", "warning", "not installed", "set tracking.mode=disabled")
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    key = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text(errors="ignore"))
    return Check("W&B", "ok", "key found" if key else "no key: offline runs only (the default)")
