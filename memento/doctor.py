"""`memento doctor`: what a machine has, against what the system was tested with and what a run asks for.

    memento doctor                               this machine
    memento doctor configs/rl/qwen3_8b.yaml      and whether that run would find its model, problems and folder here
    ray job submit --working-dir . -- memento doctor configs/rl/qwen3_8b.yaml --cluster     every machine of a cluster

`diagnose` imports none of the stack; `diagnose_cluster` runs it on every node, through Ray.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from memento.config import Config, RlConfig
from memento.errors import UserError
from memento.preflight import check_model, check_resources, check_vllm_version, machine_resources

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


COMMUNICATION = ("NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_NCCL_")
"""Environment variables that must agree on all machines of a run begin with these."""

PORTS = {6379: "Ray's head", 8265: "Ray's dashboard and job server", 8000: "`memento serve`"}

NODE_TIMEOUT_S = 120
"""A node that has not answered by then is reported as one that does not."""


def diagnose(config: Config | None = None) -> list[Check]:
    """All checks of this machine, in the order they are shown; with `config` also what that run needs of it."""
    return [
        _python(),
        *_packages(),
        _vllm(),
        _torchvision(),
        _cores(),
        *_gpus(),
        _communication(),
        _memory(),
        _shared_memory(),
        _disk(),
        _ports(),
        _sandbox(),
        _wandb(config),
        *(_needs(config) if config is not None else []),
    ]


def diagnose_cluster(config: Config | None = None) -> dict[str, list[Check]]:
    """`diagnose` on every machine of the cluster this process was launched on, and what must agree between them.

    Returns:
        Checks by machine, and under ``cluster`` those of all together.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from memento.cluster import connect, node_resources

    connect()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    ask: Any = ray.remote(_report)
    pending = {
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})": ask.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(config)
        for node in nodes
    }
    found: dict[str, list[Check]] = {}
    variables: dict[str, dict[str, str]] = {}
    for name, reference in pending.items():
        try:
            found[name], variables[name] = ray.get(reference, timeout=NODE_TIMEOUT_S)
        except RayError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            fix = "is this package there? `ray job submit --working-dir .` brings it along"
            found[name] = [Check("this machine", "problem", f"does not answer: {reason}", fix)]
    together = [Check("machines", "ok", f"{len(nodes)}"), _agreement(variables)]
    if isinstance(config, RlConfig):
        together.append(_fits(config, node_resources()))
    found["cluster"] = together
    return found


def _report(config: Config | None) -> tuple[list[Check], dict[str, str]]:
    return diagnose(config), communication_variables()


def communication_variables() -> dict[str, str]:
    """The environment variables of this process that steer collectives between machines."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(COMMUNICATION)}


def _agreement(variables: dict[str, dict[str, str]]) -> Check:
    names = sorted({name for of in variables.values() for name in of})
    differ = [name for name in names if len({of.get(name) for of in variables.values()}) > 1]
    if differ:
        shown = "; ".join(f"{n}: " + ", ".join(str(of.get(n, "unset")) for of in variables.values()) for n in differ)
        fix = "set them alike everywhere, e.g. as env_vars of the runtime environment: collectives hang otherwise"
        return Check("NCCL variables, between machines", "problem", f"differ: {shown}", fix)
    return Check("NCCL variables, between machines", "ok", f"agree ({len(names)} set)")


def _fits(config: RlConfig, nodes: list[dict[str, float]]) -> Check:
    try:
        plan = check_resources(config, nodes)
    except UserError as error:
        return Check("resources of the run", "problem", str(error), "see `memento show CONFIG`")
    return Check("resources of the run", "ok", f"{plan.cpus:g} CPU and {plan.gpus:g} GPU find their place")


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


def _sandbox() -> Check:
    """The strongest level of isolation that code rewards can have here, found by making such a sandbox."""
    from memento.rewards.sandbox import Sandbox

    try:
        sandbox = Sandbox("namespaces")
    except UserError as error:
        return Check("code sandbox", "warning", "only level subprocess, which contains no attacks", str(error))
    try:
        return Check("code sandbox", "ok", sandbox.description)
    finally:
        sandbox.close()


def _wandb(config: Config | None) -> Check:
    online = config is not None and config.tracking.mode == "online"
    if _installed("wandb") is None:
        return Check("W&B", "problem" if online else "warning", "not installed", "set tracking.mode=disabled")
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    key = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text(errors="ignore"))
    if online and not key:
        return Check("W&B", "problem", "no key, and tracking.mode is online", "`wandb login`, or set WANDB_API_KEY")
    return Check("W&B", "ok", "key found" if key else "no key: offline runs only (the default)")


def _gpus() -> list[Check]:
    """Model, memory and driver of each GPU, as the driver names them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        if machine_resources()["GPU"]:
            return [
                Check("GPUs", "problem", "nvidia-smi does not answer", "is the driver loaded, and in the container?")
            ]
        return []
    checks = []
    for number, line in enumerate(done.stdout.splitlines()):
        name, total, used, driver = (part.strip() for part in line.split(","))
        found = f"{name}, {int(total) / 1024:.0f} GiB, driver {driver}"
        busy = int(used) > 0.05 * int(total)
        checks.append(
            Check(f"GPU {number}", "warning", f"{found}, {int(used) / 1024:.1f} GiB in use", "another process is on it")
            if busy
            else Check(f"GPU {number}", "ok", found)
        )
    return checks


def _communication() -> Check:
    variables = communication_variables()
    if variables.get("NCCL_CUMEM_ENABLE") == "0":
        fix = "vLLM sets it for its own processes; set it for all or for none, otherwise a weight sync may hang"
        return Check("NCCL variables", "warning", "NCCL_CUMEM_ENABLE=0", fix)
    return Check("NCCL variables", "ok", ", ".join(f"{n}={v}" for n, v in variables.items()) or "none set")


def _ports() -> Check:
    taken = [port for port in PORTS if _taken(port)]
    if not taken:
        return Check("ports", "ok", f"{', '.join(map(str, PORTS))} are free")
    found = ", ".join(f"{port} ({PORTS[port]})" for port in taken) + " in use"
    inside_cluster = bool(os.environ.get("RAY_ADDRESS"))
    if inside_cluster and set(taken) <= {6379, 8265}:
        return Check("ports", "ok", f"{found}, by this cluster")
    return Check("ports", "warning", found, "fine if that is yours; otherwise choose others (`--port`)")


def _taken(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("0.0.0.0", port))
        except OSError:
            return True
    return False


def _needs(config: Config) -> list[Check]:
    """What a run reads and writes, seen from this machine."""
    checks = []
    if config.model is not None:
        checks.append(_model(str(config.model)))
    if isinstance(config, RlConfig):
        sources = {
            "problems": config.problems.path,
            "eval.problems": config.eval.problems and config.eval.problems.path,
        }
    else:
        sources = {"data": config.data}
    for key, source in sources.items():
        # A bare name is a known set or an id of the hub; those are looked at when they are loaded.
        if source is not None and (Path(source).suffix or Path(source).exists()):
            checks.append(_readable(key, Path(source)))
    checks.append(_writable("out", Path(config.out)))
    return checks


def _model(model: str) -> Check:
    try:
        folder = check_model(model)
    except UserError as error:
        fix = "on a cluster: a folder that every machine sees, at one path"
        return Check("model", "problem", str(error).removeprefix("model: "), fix)
    if folder is not None:
        return Check("model", "ok", str(folder))
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return Check("model", "ok", f"{model}, in the cache of this machine")
    try:
        HfApi().model_info(model, timeout=10)
    except Exception as error:  # whatever stands between here and the hub, the finding is the same
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "download it once to a shared folder and name that, or give the machines HF_TOKEN and a network"
        return Check("model", "problem", f"{model} cannot be reached: {reason}", fix)
    return Check("model", "ok", f"{model}, on the hub")


def _readable(key: str, path: Path) -> Check:
    if path.exists() and os.access(path, os.R_OK):
        return Check(key, "ok", str(path))
    found = f"{path} {'cannot be read' if path.exists() else 'is not there'}"
    return Check(key, "problem", found, f"absolute path on shared storage? it was looked for from {Path.cwd()}")


def _writable(key: str, path: Path) -> Check:
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        return Check(key, "problem", f"{place} cannot be written", "choose another with out=...")
    free = shutil.disk_usage(place).free / 2**30
    if free < 1:
        return Check(key, "problem", f"{place} has {free:.2f} GiB free", "make room, or choose another with out=...")
    return Check(key, "ok", f"{path}, {free:.0f} GiB free there")
