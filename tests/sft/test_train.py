"""SFT as its own process: the real TRL trainer under DeepSpeed on the tiny model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memento.arithmetic import make_problems
from memento.problems import save_problems
from memento.run import read_metrics

QUICK = {
    "kind": "sft",
    "stage": "stage1",
    "batch_size": 6,
    "micro_batch_tokens": 600,
    "max_length": 512,
    "optimizer": "muon",
    "lr": 4e-3,
    "warmup": 3,
    "schedule": "flat_linear",
    "dtype": "float32",
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "threads": 1,
    "seed": 3,
    "phases": [
        {"steps": 4, "problems": {"min_terms": 2, "max_terms": 3}},
        {"steps": 4, "problems": {"min_terms": 3, "max_terms": 4}},
    ],
    "tracking": {"mode": "disabled"},
}
TIMINGS = ("seconds/step",)


def command(folder: Path, out: Path, *overrides: str, resume: bool = False, **changes: Any) -> list[str]:
    file = folder / f"config-{len(list(folder.glob('config-*')))}.yaml"
    file.write_text(json.dumps(QUICK | changes))  # JSON is YAML
    flag = ["--resume"] if resume else []
    return [sys.executable, "-m", "memento.sft.train", str(file), f"out={out}", *overrides, *flag]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment())


def environment() -> dict[str, str]:
    outer = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR", "DS_ACCELERATOR"}
    return {k: v for k, v in os.environ.items() if k not in outer} | {"OMP_NUM_THREADS": "1"}


def numbers(out: Path) -> list[dict[str, float | None]]:
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_metrics(out)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    done = run(command(folder, folder / "run"))
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
def test_a_run_leaves_a_plain_folder_and_its_metrics(finished: Path) -> None:
    metrics = read_metrics(finished)
    assert [row["step"] for row in metrics] == list(range(1, 9))
    first, last = metrics[0]["train/loss"], metrics[-1]["train/loss"]
    assert first is not None and last is not None and last < first - 0.5
    assert {"loss/block", "loss/memento", "loss/delimiter", "loss/answer", "train/lr"} <= set(metrics[-1])
    model: Any
    tokenizer: Any
    model, tokenizer = (c.from_pretrained(finished / "hf") for c in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.use_cache is True
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert sorted(p.name for p in (finished / "hf").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.slow
def test_a_stopped_and_resumed_run_has_the_same_losses_to_the_last_digit(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with subprocess.Popen(command(tmp_path, out), env=environment(), stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if (out / "metrics.jsonl").is_file() and len(read_metrics(out)) >= 2:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.02)
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "--resume" in output
    stopped_at = len(read_metrics(out))
    assert stopped_at < 8
    assert not (out / "hf").exists()
    resumed = run(command(tmp_path, out, resume=True))
    assert resumed.returncode == 0, resumed.stderr
    assert [row["train/loss"] for row in numbers(out)] == [row["train/loss"] for row in numbers(finished)]
    weights = [AutoModelForCausalLM.from_pretrained(f / "hf").state_dict() for f in (out, finished)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


@pytest.mark.slow
def test_two_ranks_train_as_one(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = environment() | {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    arguments = command(tmp_path, out)
    ranks = [
        subprocess.Popen(
            arguments, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    for ours, theirs in zip(numbers(out), numbers(finished), strict=True):
        for name in ("train/loss", "loss/block", "loss/memento", "loss/delimiter", "loss/answer"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (ours["step"], name)
    weights = [AutoModelForCausalLM.from_pretrained(f / "hf").state_dict() for f in (out, finished)]
    assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


@pytest.mark.long
def test_the_best_checkpoint_by_rollouts_is_the_result(finished: Path, tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    save_problems(make_problems(4, 5, terms=(2, 2)), problems)
    engine = {"device": "cpu", "dtype": "float32", "kv_cache_mib": 64, "max_model_len": 256, "block_size": 32}
    evaluation = {"problems": str(problems), "interval": 1, "temperature": 1.0, "max_tokens": 40, "rollout": engine}
    phases = [{"steps": 2, "problems": {"min_terms": 2, "max_terms": 3}}]
    changes = {"stage": "stage2", "model": str(finished / "hf"), "phases": phases, "eval": evaluation}
    out = tmp_path / "run"
    done = run(command(tmp_path, out, checkpoint_steps=1, **changes))
    assert done.returncode == 0, done.stderr
    accuracies = [row["eval/accuracy"] for row in read_metrics(out)]
    assert len(accuracies) == 2 and all(a is not None and 0 <= a <= 1 for a in accuracies)
    best = json.loads((out / "best" / "result.json").read_text())
    assert best["accuracy"] == max(a for a in accuracies if a is not None)
    assert best["step"] == accuracies.index(best["accuracy"]) + 1, "the first of equal ones"
    assert (out / "hf" / "model.safetensors").is_file() and not (out / "candidate" / "hf" / "optimizer.pt").exists()
    assert [p.name for p in (out / "checkpoints").iterdir() if p.is_dir()] == ["checkpoint-2"]
    trained, start = (AutoModelForCausalLM.from_pretrained(f / "hf").state_dict() for f in (out, finished))
    assert any(not torch.equal(trained[name], start[name]) for name in start)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("stage2", {}),
        ("stage1", {"optimizer": "adamw", "zero_stage": 2, "dtype": "bfloat16", "gradient_checkpointing": True}),
    ],
)
def test_the_other_ways_to_train_start_from_that_model(
    finished: Path, tmp_path: Path, stage: str, changes: dict[str, Any]
) -> None:
    phases = [{"steps": 2, "problems": {"min_terms": 3, "max_terms": 4}}]
    model = str(finished / "hf")
    out = tmp_path / "run"
    done = run(command(tmp_path, out, stage=stage, model=model, phases=phases, **changes))
    assert done.returncode == 0, done.stderr
    first, last = read_metrics(out)[0]["train/loss"], read_metrics(finished)[-1]["train/loss"]
    assert first is not None and last is not None and abs(first - last) < 0.5, "it goes on where stage 1 ended"


@pytest.mark.slow
def test_bad_input_ends_with_one_paragraph_and_exit_code_2(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    cases = {
        "is not empty": command(tmp_path, finished),
        "muon needs zero_stage: 0": command(tmp_path, out, zero_stage=1),
        "there is no folder": command(tmp_path, out, model=str(tmp_path / "absent")),
        "unknown key `learning_rate`": command(tmp_path, out, "learning_rate=1"),
    }
    before = (finished / "metrics.jsonl").read_text()
    for message, arguments in cases.items():
        done = run(arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not out.exists()
    assert (finished / "metrics.jsonl").read_text() == before
