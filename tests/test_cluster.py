"""A Ray cluster of two nodes, two raylets on this machine: jobs are submitted, stopped and resumed as on a real one.

Each node has one CPU, so that engine and learner cannot lie on the same one.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from memento.run import read_metrics
from memento.tiny import write_tiny_model

REPOSITORY = Path(__file__).resolve().parent.parent
RAY = str(Path(sys.executable).with_name("ray"))
CONFIG = "configs/rl/small.yaml"

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_node(*arguments: str, folder: Path, stack: ExitStack) -> subprocess.Popen[bytes]:
    """One node, which ends with the stack. `--block` takes its processes with it."""
    log = stack.enter_context((folder / f"{secrets.token_hex(2)}.log").open("wb"))
    command = [RAY, "start", "--block", "--num-cpus=1", "--disable-usage-stats", *arguments]
    node = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def end() -> None:
        node.terminate()
        try:
            node.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)

    stack.callback(end)
    return node


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the job server of a cluster of two nodes."""
    before = dict(os.environ)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}
    os.environ.pop("RAY_ADDRESS", None)
    logs = tmp_path_factory.mktemp("nodes")
    port, dashboard, client = (free_port() for _ in range(3))

    def agent() -> list[str]:
        return [f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-agent-grpc-port={free_port()}"]

    # Ray's sockets need short paths. Two nodes need two: each unpacks the job's files there anew, whoever runs in them.
    first, second = (Path("/tmp") / f"r{secrets.token_hex(3)}" for _ in range(2))
    with ExitStack() as stack:
        head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        start_node(*head, *agent(), f"--temp-dir={first}", folder=logs, stack=stack)
        deadline = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", dashboard)) != 0:
            assert time.monotonic() < deadline, "".join(f.read_text() for f in logs.iterdir())
            time.sleep(0.5)
        start_node(f"--address=127.0.0.1:{port}", *agent(), f"--temp-dir={second}", folder=logs, stack=stack)
        status = [RAY, "status", f"--address=127.0.0.1:{port}"]
        while "/2.0 CPU" not in (shown := subprocess.run(status, capture_output=True, text=True, check=False)).stdout:
            assert time.monotonic() < deadline + 120, shown.stdout + shown.stderr
            time.sleep(2)
        yield f"http://127.0.0.1:{dashboard}"
    os.environ.clear()
    os.environ |= before


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), seed=0)


def ray(*arguments: str, address: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", arguments[0], "--address", address, *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=timeout, check=False)


def submit(address: str, *arguments: str, program: list[str]) -> subprocess.CompletedProcess[str]:
    """`ray job submit`; again while the agent of the node is not there yet."""
    environment = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}})
    for _ in range(60):
        options = ["--working-dir", ".", "--runtime-env-json", environment, *arguments]
        done = ray("submit", *options, "--", *program, address=address)
        if "No available agent" not in done.stderr + done.stdout:
            return done
        time.sleep(2)
    raise AssertionError("the node's agent did not come up")


def training(model: Path, out: Path, *more: str) -> list[str]:
    small = ["sampling.max_tokens=48", "groups_per_step=4", "group_size=4", "eval.problems=null"]
    placed = ["rollout.engines=1", "rollout.cpus=1", "rollout.kv_cache_mib=64", "learner.cpus=1"]
    program = [sys.executable, "-m", "memento.rl.train", CONFIG, f"model={model}", f"out={out}", *small, *placed]
    return [*program, *more, "--resume"]


def test_doctor_looks_at_both_nodes(cluster: str, model: Path, tmp_path: Path) -> None:
    run = [CONFIG, f"model={model}", f"out={tmp_path / 'run'}", "rollout.engines=1", "rollout.cpus=1"]
    program = [sys.executable, "-m", "memento.cli", "doctor", *run, "--cluster"]
    done = submit(cluster, program=program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("/dev/shm") == 2 and "2 CPU and 0 GPU find their place" in done.stdout
    assert "NCCL variables, between machines" in done.stdout


def test_a_job_runs_stops_and_resumes_on_two_nodes(cluster: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    identity = f"run-{secrets.token_hex(3)}"
    started = submit(cluster, "--submission-id", identity, "--no-wait", program=training(model, out, "steps=500"))
    assert started.returncode == 0, started.stdout + started.stderr
    deadline = time.monotonic() + 600
    while not ((out / "metrics.jsonl").is_file() and len(read_metrics(out)) >= 2):
        status = ray("status", identity, address=cluster).stdout
        assert "failed" not in status.lower() and time.monotonic() < deadline, ray(
            "logs", identity, address=cluster
        ).stdout
        time.sleep(1)
    stopped = ray("stop", identity, address=cluster)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "was stopped" in ray("status", identity, address=cluster).stdout
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "stopped", summary
    reached = int(read_metrics(out)[-1]["step"] or 0)
    assert list((out / "checkpoints").glob("step-*")), "it wrote a checkpoint before it ended"
    logs = ray("logs", identity, address=cluster)
    assert logs.returncode == 0 and "step 1/500" in logs.stdout and "go on with" in logs.stdout, (
        logs.stdout + logs.stderr
    )

    resumed = submit(cluster, program=training(model, out, f"steps={reached + 2}"))
    assert resumed.returncode == 0, resumed.stdout[-4000:] + resumed.stderr[-2000:]
    assert f"step {reached + 2}/{reached + 2}" in resumed.stdout, "the driver's lines arrive"
    steps = [row["step"] for row in read_metrics(out)]
    assert steps == list(range(1, reached + 3)), "no step is lost, none is there twice"
    assert (out / "hf" / "model.safetensors").is_file()
    assert "asked for" in resumed.stdout and "there, on 2 machines" in resumed.stdout
    for said in (logs.stdout, resumed.stdout):
        assert "weights go by broadcast" in said and "go by file" not in said, said
    assert not (out / "weights").exists()


def test_the_exit_code_and_the_reason_of_a_failure_arrive(cluster: str, model: Path, tmp_path: Path) -> None:
    program = training(model, tmp_path / "run", "learner.lrr=1")
    done = submit(cluster, program=program)
    assert done.returncode != 0 and "did you mean `learner.lr`" in done.stdout
    too_much = submit(cluster, program=training(model, tmp_path / "run", "rollout.cpus=2"))
    assert too_much.returncode != 0 and "asks for 3 CPU cores and 2 are there" in too_much.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(3600)
def test_the_quickstart_runs_stops_and_resumes_on_two_nodes(cluster: str, tmp_path: Path) -> None:
    """Stopped once in an SFT stage and once in RL; the third job goes on to the end."""
    out = tmp_path / "quickstart"
    program = [sys.executable, "-m", "memento.cli", "quickstart", "--size", "small", "--out", str(out)]

    def stop_in(phase: str, lines: int, *more: str) -> None:
        identity = f"{phase}-{secrets.token_hex(3)}"
        started = submit(cluster, "--submission-id", identity, "--no-wait", program=[*program, *more])
        assert started.returncode == 0, started.stdout + started.stderr
        deadline = time.monotonic() + 1200
        metrics = out / phase / "metrics.jsonl"
        while not (metrics.is_file() and metrics.read_text().count("\n") >= lines):
            status = ray("status", identity, address=cluster).stdout
            assert "failed" not in status.lower() and "succeeded" not in status.lower(), ray(
                "logs", identity, address=cluster
            ).stdout
            assert time.monotonic() < deadline
            time.sleep(2)
        stopped = ray("stop", identity, address=cluster)
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        assert "was stopped" in ray("status", identity, address=cluster).stdout
        assert json.loads((out / phase / "summary.json").read_text())["status"] == "stopped"
        assert list((out / phase / "checkpoints").glob("*")), "it wrote a checkpoint before it ended"
        assert not (out / "results.json").exists()

    stop_in("stage1", 4)
    reached = len(read_metrics(out / "stage1"))
    stop_in("rl", 2, "--resume")
    assert len(read_metrics(out / "stage1")) > reached

    finished = submit(cluster, program=[*program, "--resume"])
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    assert "SFT stage 2, memento attention: done before" in finished.stdout
    assert "step 6/6" in finished.stdout and "there, on 2 machines" in finished.stdout, "the driver's lines arrive"
    for phase in ("stage1", "stage2", "rl"):
        steps = [int(row["step"] or 0) for row in read_metrics(out / phase)]
        assert steps == sorted(set(steps)), f"{phase}: a step is there twice"
    results = json.loads((out / "results.json").read_text())
    assert set(results["accuracy"]) == {"stage1_full", "stage1_evicted", "stage2_evicted", "rl_evicted", "control_full"}
    assert (out / "rl" / "hf" / "model.safetensors").is_file() and (out / "report.html").is_file()

    refused = submit(cluster, program=program)
    assert refused.returncode != 0 and "is not empty" in refused.stdout
