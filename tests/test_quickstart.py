"""The real pipeline on short problems: every phase as a user runs it, its files, its export, its cluster job.

One run of `memento quickstart --size small` (a few minutes on two cores) is shared by all tests of this file;
MEMENTO_QUICKSTART names the folder of a finished one to look at that instead.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from memento.config import RlConfig
from memento.format import parse
from memento.generation import generate
from memento.metrics import missing, undocumented
from memento.run import load_run_config, read_metrics
from memento.tracking import TABLE, TRACE
from memento.trajectory import ScoredGroup, read_trajectories

REPOSITORY = Path(__file__).parent.parent
MEMENTO = [sys.executable, "-m", "memento.cli"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, **options)  # type: ignore[call-overload]


def overrides(quickstart: Path, out: Path) -> list[str]:
    """A short RL run from the quickstart's stage-2 model."""
    return [
        f"out={out}",
        f"model={quickstart / 'stage2' / 'hf'}",
        "steps=2",
        "groups_per_step=4",
        "group_size=4",
        "eval.problems=null",
        "algorithm.mismatch_kl_limit=0.01",
    ]


def test_the_table_has_every_number_and_rl_gains(quickstart: Path) -> None:
    results = json.loads((quickstart / "results.json").read_text())
    accuracy = results["accuracy"]
    assert set(accuracy) == {"stage1_full", "stage1_evicted", "stage2_evicted", "rl_evicted", "control_full"}
    assert all(0 <= value <= 1 for value in accuracy.values())
    # Three standard errors at this many problems: not a matter of luck.
    error = math.sqrt(0.25 / results["problems"])
    assert accuracy["rl_evicted"] - accuracy["stage2_evicted"] > 3 * math.sqrt(2) * error
    assert results["kv"]["peak_ratio"] > 1.1 and results["kv"]["area_ratio"] > 1.1
    assert {"total", "stage1", "stage2", "control", "rl", "eval"} <= set(results["seconds"])
    assert results["mismatch_kl"]["max"] < 1e-6
    assert "<svg" in (quickstart / "report.html").read_text()


def test_engine_and_learner_agree_on_every_sampled_token(quickstart: Path) -> None:
    rows = [row for row in read_metrics(quickstart / "rl") if "mismatch/kl_mean" in row]
    config = load_run_config(quickstart / "rl")
    assert isinstance(config, RlConfig)
    assert len(rows) == config.steps, "the mismatch is logged at every step"
    # Each step is 144 trajectories, about 20,000 tokens. Its worst one is a token of very low probability: a wrong mask
    # would show as 0.1 or more, rounding reaches 8e-5 in some steps.
    worst = sorted(float(row["mismatch/max_abs_logprob_diff"] or math.inf) for row in rows)
    assert worst[len(worst) // 2] < 1e-4 and worst[-1] < 5e-4, worst
    fmt = config.format.bind(tokenizer(quickstart / "rl" / "hf"))
    trajectories = list(read_trajectories(quickstart / "rl" / "rollouts.jsonl"))
    several = [t for t in trajectories if len(parse(t.token_ids, fmt, t.prompt_len).blocks) >= 2]
    assert len(several) >= 20
    assert all(t.evictions for t in several), "blocks really left the cache"


def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_the_export_is_a_plain_model(quickstart: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = quickstart / "rl" / "hf"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    card = (folder / "README.md").read_text()
    assert "memento" in card.lower() and "groups_per_step" in card
    trajectory = next(read_trajectories(quickstart / "eval" / "control_full_t1.0.jsonl"))
    ids = torch.tensor([trajectory.prompt_ids])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=400)
    text = tokenizer(folder).decode(answer[0, ids.shape[1] :])
    assert "<|block_start|>" in text and text.endswith("<|im_end|>"), text


def test_stock_vllm_loads_the_export(quickstart: Path) -> None:
    program = f"""
from vllm import LLM, SamplingParams
llm = LLM({str(quickstart / "rl" / "hf")!r}, enforce_eager=True, dtype="float32", kv_cache_memory_bytes=64 << 20,
          max_model_len=512)
print("TEXT", llm.chat([{{"role": "user", "content": "Compute 12+34 modulo 100."}}],
      SamplingParams(temperature=0, max_tokens=200, skip_special_tokens=False))[0].outputs[0].text)
"""
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = run([sys.executable, "-c", program], env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "<|block_start|>" in done.stdout and "boxed" in done.stdout


def test_every_metric_is_documented_and_every_documented_one_is_there(quickstart: Path, wandb_file: Any) -> None:
    rows = read_metrics(quickstart / "rl")
    assert undocumented({name for row in rows for name in row}) == []
    trained, evaluated = ([row for row in rows if name in row] for name in ("reward/mean", "eval/accuracy"))
    assert len(trained) > 1 and len(evaluated) > 1
    assert {tuple(missing(row, "step")) for row in trained} == {()}
    assert {tuple(missing(row, "eval")) for row in evaluated} == {()}
    for stage in ("stage1", "stage2", "control"):
        lines = read_metrics(quickstart / stage)
        assert undocumented({name for row in lines for name in row}) == []
        assert {tuple(missing(row, "sft")) for row in lines} == {()}, stage
    # The W&B run on the disk has the same lines: every number of metrics.jsonl, and nothing that is not described.
    lines = [
        line
        for file in sorted((quickstart / "rl" / "wandb").glob("*run-*/*.wandb"))
        for line in wandb_file.history(file)
    ]
    assert [line["step"] for line in lines] == [row["step"] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        numbers = {name: value for name, value in line.items() if not name.startswith("rollouts/")}
        assert numbers.keys() == row.keys()
        assert all(value is None or numbers[name] == pytest.approx(value) for name, value in row.items())
    assert any(TABLE in line and TRACE in line for line in lines)


def engine_settings(**more: object) -> list[str]:
    """Options of a command that starts an engine for the quickstart's models."""
    settings = {"max_model_len": 512, "block_size": 32, "kv_cache_mib": 64, "dtype": "float32", "device": "cpu"} | more
    return ["--max-tokens=400", *(f"--set=rollout.{name}={value}" for name, value in settings.items())]


@pytest.mark.long  # starts two engines
def test_commands_on_a_finished_model(quickstart: Path, tmp_path: Path) -> None:
    model, problems = quickstart / "rl" / "hf", quickstart / "eval" / "problems.jsonl"
    engine = ["--limit", "4", *engine_settings()]
    evaluated = [str(model), "--problems", str(problems), "--samples", "2", "--out", str(tmp_path / "result.json")]
    done = run([*MEMENTO, "evaluate", *evaluated, *engine], timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["problems"] == 4 and result["kv"]["peak_ratio"] > 1
    generated = [str(model), "--problems", str(problems), "--samples", "2", "--out", str(tmp_path / "rollouts.jsonl")]
    done = run([*MEMENTO, "generate", *generated, *engine], timeout=900)
    assert done.returncode == 0 and "8 trajectories" in done.stdout, done.stderr[-3000:]
    page = tmp_path / "trace.html"
    looked = run([*MEMENTO, "view", str(tmp_path / "rollouts.jsonl"), "--model", str(model), "--html", str(page)])
    assert looked.returncode == 0 and "data-trace" in page.read_text(), looked.stderr
    shutil.copytree(quickstart / "rl", tmp_path / "rl", ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    compared = run([*MEMENTO, "compare", str(quickstart / "rl"), str(tmp_path / "rl")])
    assert compared.returncode == 0 and "configurations are the same" in compared.stdout, compared.stderr
    reported = run([*MEMENTO, "report", str(tmp_path / "rl")])
    assert reported.returncode == 0 and (tmp_path / "rl" / "report.html").is_file(), reported.stderr
    problems_of = ["--problems", str(problems)]
    scored = run([*MEMENTO, "score", str(tmp_path / "rollouts.jsonl"), *problems_of])
    assert scored.returncode == 0 and "8 completions of 4 groups: mean score" in scored.stdout, scored.stderr
    folder = tmp_path / "models" / "mine"
    exported = run([*MEMENTO, "export", str(quickstart / "rl"), "--out", str(folder), "--dtype", "bfloat16"])
    assert exported.returncode == 0 and (folder / "model.safetensors").is_file(), exported.stderr
    again = run([*MEMENTO, "export", str(quickstart / "rl"), "--out", str(folder)])
    assert again.returncode == 2 and "not empty" in again.stderr
    pushed = run([*MEMENTO, "push", str(folder), "--to", "my-organisation/mine", "--dry-run"])
    assert pushed.returncode == 0 and "model.safetensors" in pushed.stdout, pushed.stderr
    shown = run([*MEMENTO, "show", str(quickstart / "rl")])
    assert shown.returncode == 0 and "groups_per_step" in shown.stdout, shown.stderr
    examined = run([*MEMENTO, "doctor", "configs/rl/quickstart.yaml", f"model={quickstart / 'stage2' / 'hf'}"])
    assert examined.returncode == 0 and re.search(r"ok +model +", examined.stdout), examined.stdout


@pytest.mark.long
def test_the_sft_command(tmp_path: Path) -> None:
    short = "phases=[{steps: 3, problems: {min_terms: 2, max_terms: 2}}]"
    stages = [
        ("small_stage1.yaml", f"out={tmp_path / 'stage1'}", "warmup=1"),
        ("small_stage2.yaml", f"out={tmp_path / 'stage2'}", f"model={tmp_path / 'stage1' / 'hf'}", "warmup=1"),
    ]
    for config, *settings in stages:
        done = run([*MEMENTO, "sft", f"configs/sft/{config}", *settings, short, "logging_steps=1"], timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "step 3/3" in done.stdout, done.stdout
    assert (tmp_path / "stage2" / "hf" / "model.safetensors").is_file()


@pytest.mark.long  # starts three engines
def test_the_three_ways_to_evaluate(quickstart: Path, tmp_path: Path) -> None:
    """With eviction, with full attention, and with what is kept computed again without the block."""
    model, problems = quickstart / "rl" / "hf", quickstart / "eval" / "problems.jsonl"
    common = [str(model), "--problems", str(problems), "--limit", "16", "--samples", "2", *engine_settings()]
    results: dict[str, Any] = {}
    for way in ("--evict", "--no-evict", "--restart"):
        out = tmp_path / f"{way}.json"
        done = run([*MEMENTO, "evaluate", *common, way, "--out", str(out)], timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        results[way] = result = json.loads(out.read_text())
        print(way, result["accuracy"], result["kv"])
        assert (result["evict"], result["restart"]) == (way != "--no-evict", way == "--restart")
        assert sum(result["outcomes"].values()) == 32 and result["excluded"] == 0
        assert result["kv"]["measured_peak_tokens"] == pytest.approx(result["kv"]["peak_tokens"], abs=1.0)
    assert results["--evict"]["accuracy"]["mean"] > 0.2
    assert results["--no-evict"]["kv"]["peak_ratio"] == results["--no-evict"]["kv"]["area_ratio"] == 1
    for way in ("--evict", "--restart"):
        assert min(results[way]["kv"]["peak_ratio"], results[way]["kv"]["area_ratio"]) > 1.1


@pytest.mark.long  # starts three engines
def test_an_evaluation_that_is_killed_goes_on_where_it_was(quickstart: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle and the same command again: no sample twice, the groups and the result of a whole run."""
    model, problems = quickstart / "rl" / "hf", quickstart / "eval" / "problems.jsonl"

    def command(name: str, *more: str) -> list[str]:
        common = [str(model), "--problems", str(problems), "--limit", "48", "--samples", "2", "--temperature", "1"]
        files = [f"--out={tmp_path / name}.json", f"--trajectories={tmp_path / name}.jsonl"]
        return [*MEMENTO, "evaluate", *common, *engine_settings(max_num_seqs=8), *files, *more]

    whole = run(command("whole"), timeout=600)
    assert whole.returncode == 0, whole.stderr[-3000:]

    file = tmp_path / "parts.jsonl"
    process = subprocess.Popen(command("parts"), cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 400
        while not (file.is_file() and file.read_bytes().count(b"\n") >= 16):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        started = below(process.pid)
    finally:
        process.kill()
        process.wait()
    before = file.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert 16 <= before.count(b"\n") < 48, "it was killed in the middle"
    assert started, "Ray and its actors"
    deadline = time.monotonic() + 90
    while left := {pid for pid in started if running(pid)}:
        assert time.monotonic() < deadline, {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left}
        time.sleep(0.5)

    refused = run(command("parts", "--seed", "1"), timeout=100)
    assert refused.returncode == 2 and "(seed differ)" in " ".join(refused.stderr.split()), refused.stderr
    again = run(command("parts"), timeout=600)
    assert again.returncode == 0, again.stderr[-3000:]
    assert file.read_bytes().startswith(before), "nothing of before is made again"
    sampled = {}
    for name in ("whole", "parts"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        groups = [ScoredGroup.model_validate_json(line) for line in lines]
        assert len({group.problem.id for group in groups}) == len(groups) == 48
        assert all([t.sample_index for t in group.trajectories] == [0, 1] for group in groups)
        sampled[name] = {
            group.problem.id: [
                (t.completion_ids, r.score) for t, r in zip(group.trajectories, group.rewards, strict=True)
            ]
            for group in groups
        }
    assert sampled["whole"] == sampled["parts"]
    results = [json.loads((tmp_path / f"{name}.json").read_text()) | {"seconds": 0} for name in ("whole", "parts")]
    assert results[0] == results[1]


def below(pid: int) -> set[int]:
    """The processes that a process started, those that they started, and so on."""
    parents = {
        int(stat.parent.name): parent for stat in Path("/proc").glob("[0-9]*/stat") if (parent := stat_of(stat)[1])
    }
    found: set[int] = set()
    new = {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found |= new
    return found


def running(pid: int) -> bool:
    return stat_of(Path(f"/proc/{pid}/stat"))[0] not in ("", "Z", "X")


def stat_of(file: Path) -> tuple[str, int]:
    """State and parent of a process; of one that is gone, nothing."""
    try:
        state, parent = file.read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "", 0
    return state, int(parent)


def test_transformers_deletes_the_same_kv_as_the_engine(quickstart: Path) -> None:
    """Greedy completions of the engine, once more in plain transformers with a cache that shrinks."""
    from transformers import AutoModelForCausalLM

    config = load_run_config(quickstart / "rl")
    assert isinstance(config, RlConfig)
    folder = quickstart / "rl" / "hf"
    fmt = config.format.bind(tokenizer(folder))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    compared = 0
    for trajectory in islice(read_trajectories(quickstart / "eval" / "rl_evicted_tgreedy.jsonl"), 3):
        ours = generate(model, trajectory.prompt_ids, fmt, max_new_tokens=len(trajectory.completion_ids))
        assert ours.completion_ids == trajectory.completion_ids
        assert ours.evictions == tuple(e for e in trajectory.evictions if e.boundary < len(trajectory.token_ids))
        compared += len(ours.evictions)
    assert compared > 3


def test_a_run_that_is_stopped_goes_on_where_it_was(quickstart: Path, tmp_path: Path) -> None:
    config = REPOSITORY / "configs" / "rl" / "small.yaml"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train = [sys.executable, "-m", "memento.rl.train", str(config)]
    done = run([*train, *overrides(quickstart, whole), "steps=3"], timeout=700)
    assert done.returncode == 0, done.stderr[-3000:]

    process = subprocess.Popen([*train, *overrides(quickstart, parts), "steps=3"], cwd=REPOSITORY)
    metrics = parts / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 1):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    assert metrics.read_text().count("\n") < 3, "it was stopped in the middle"

    refused = run([*train, *overrides(quickstart, parts), "steps=3"], timeout=100)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    resumed = run([*train, *overrides(quickstart, parts), "steps=3", "--resume"], timeout=700)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    # The same tokens. The losses differ in the last digits: which requests share an engine step depends on timing.
    sampled = [[t.completion_ids for t in read_trajectories(folder / "rollouts.jsonl")] for folder in (whole, parts)]
    assert sampled[0] == sampled[1]
    for name in ("train/loss", "reward/mean", "train/grad_norm"):
        before, after = ([float(row[name] or 0) for row in read_metrics(folder)] for folder in (whole, parts))
        assert after == pytest.approx(before, rel=1e-3, abs=1e-5), name


def test_rollouts_may_run_ahead_on_several_engines(quickstart: Path, tmp_path: Path) -> None:
    out = tmp_path / "ahead"
    ahead = ["steps=4", "max_lag=1", "rollout.engines=2", "rollout.cpus=0.5", "rollout.kv_cache_mib=64"]
    grpo = ["algorithm.loss=grpo", "algorithm.kl_coef=0.001", "algorithm.advantage_std=group"]
    config = REPOSITORY / "configs" / "rl" / "small.yaml"
    train = [sys.executable, "-m", "memento.rl.train", str(config)]
    done = run([*train, *overrides(quickstart, out), *ahead, *grpo], timeout=700)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all((row["lag/max"] or 0) <= 1 for row in rows)
    assert max(row["lag/max"] or 0 for row in rows) == 1, "some groups were sampled by the weights of the step before"
    assert all(row["train/kl_reference"] is not None for row in rows)
    # A straggler that other groups overtook for two steps is too old then: dropped and counted, never trained.
    assert all(row["groups/stale"] is not None for row in rows)
    engines = {trajectory.engine for trajectory in read_trajectories(out / "rollouts.jsonl")}
    assert engines == {0, 1}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray head of our own, with a dashboard for job submission."""
    for name, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ports = [free_port() for _ in range(5)]  # all of them: another Ray on this machine holds the defaults
    ray = str(Path(sys.executable).with_name("ray"))
    folder = Path("/tmp") / f"r{secrets.token_hex(3)}"  # Ray's sockets need a short path
    head = subprocess.Popen(
        [
            *(ray, "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"),
            *(f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"),
            *(f"--dashboard-agent-listen-port={ports[3]}", f"--dashboard-agent-grpc-port={ports[4]}"),
            f"--temp-dir={folder}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 90
        while socket.socket().connect_ex(("127.0.0.1", ports[1])) != 0:
            assert head.poll() is None, head.stdout.read() if head.stdout else ""
            assert time.monotonic() < deadline, "the dashboard did not come up"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{ports[1]}"
    finally:
        head.terminate()  # `--block` takes its raylet, GCS and dashboard with it
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_ray_job_submit_runs_the_same_program(quickstart: Path, cluster: str, tmp_path: Path) -> None:
    out = tmp_path / "job"
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", cluster, "--working-dir", "."]
    program = ["--", sys.executable, "-m", "memento.rl.train", "configs/rl/small.yaml", *overrides(quickstart, out)]
    done = run([*command, *program], timeout=700)
    for _ in range(30):
        if "No available agent" not in done.stderr:
            break
        time.sleep(2)  # the dashboard answers before the node's agent is there
        done = run([*command, *program], timeout=700)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"step 2/2", done.stdout), "the driver's progress lines arrive"
    assert len(read_metrics(out)) == 2
    assert (out / "hf" / "model.safetensors").is_file()
