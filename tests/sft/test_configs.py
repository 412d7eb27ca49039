"""The shipped SFT configs: the paper's numbers, what they will take, and a run of each family on its tiny twin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import memento
from memento.arithmetic import make_traces
from memento.cli import app
from memento.config import SftConfig, load_config
from memento.errors import UserError
from memento.footprint import GIB, GPUS, KNOWN
from memento.run import read_metrics
from memento.sft_footprint import sft_plan_lines, stage_memory, stage_seconds
from memento.tiny import write_tiny_model

FOLDER = Path(memento.__file__).parent / "configs" / "sft"
FAMILIES = {
    "qwen3_8b": ("Qwen/Qwen3-8B", "qwen3"),
    "qwen3_32b": ("Qwen/Qwen3-32B", "qwen3"),
    "phi4": ("microsoft/Phi-4-reasoning", "phi3"),
    "olmo3_7b": ("allenai/Olmo-3-7B-Think", "olmo3"),
    "qwen2.5_7b": ("Qwen/Qwen2.5-7B", "qwen2"),
}
PAPER = [f.stem for f in sorted(FOLDER.glob("*.yaml")) if f.stem.split("_stage")[0].split("_control")[0] in FAMILIES]
SHARDING = {"qwen3_8b": 0, "qwen3_32b": 3, "phi4": 2, "olmo3_7b": 0, "qwen2.5_7b": 0}


def load(name: str, *overrides: str) -> SftConfig:
    config = load_config(FOLDER / f"{name}.yaml", overrides)
    assert isinstance(config, SftConfig)
    return config


@pytest.mark.parametrize("name", PAPER)
def test_the_hyperparameters_are_those_of_the_paper(name: str) -> None:
    config = load(name)
    assert (config.lr, config.betas, config.weight_decay, config.schedule) == (8e-5, (0.9, 0.999), 0.0, "cosine")
    assert (config.warmup, config.batch_size, config.max_grad_norm, config.seed) == (0.05, 512, 1.0, 42)
    assert (config.max_length, config.dtype, config.gradient_checkpointing) == (32_768, "bfloat16", True)
    family, stage = name.rsplit("_", 1)
    assert config.stage == stage
    assert config.epochs == (10 if stage == "control" else 5)
    assert config.zero_stage == SHARDING[family]
    assert config.format.evict_delimiters == (family == "phi4")
    lines = list(sft_plan_lines(config, like=FAMILIES[family][0], gpu_name="B200"))
    assert any(line.startswith("Memory, each rank:") for line in lines)
    assert any("B200: about" in line for line in lines)
    assert not any("fits into 90 % of: none" in line for line in lines), "some GPU of the table holds it"


def test_stage_2_begins_where_stage_1_ends() -> None:
    for family in FAMILIES:
        assert str(load(f"{family}_stage2").model) == str(load(f"{family}_stage1").out / "hf")
    assert str(load("qwen2.5_7b_stage1").model) == str(load("qwen2.5_7b_stage0").out / "hf")


def test_memory_and_time_by_hand() -> None:
    model, gpu = KNOWN["Qwen/Qwen3-8B"], GPUS["H100"]
    P = model.parameters
    whole, sharded = (
        stage_memory(load("qwen3_8b_stage1"), model),
        stage_memory(load("qwen3_8b_stage1", "zero_stage=3"), model),
    )
    assert (whole["weights"], whole["gradients"], whole["optimiser"]) == (2 * P, 2 * P, 12 * P)
    assert sum(sharded[name] for name in ("weights", "gradients", "optimiser")) == 16 * P / 8
    assert whole["logits"] == 3 * 1024 * 151_936 * 4
    assert 100 < sum(whole.values()) / GIB < 160
    plain = load("qwen3_8b_stage1", "gradient_checkpointing=false")
    dense = stage_seconds(plain, model, gpu, 1000, 13_000)
    attention = 12 * 4096 * 36 * 6500
    assert dense == pytest.approx((6 * P + attention) * 13e6 / (8 * 989e12 * 0.4))
    assert stage_seconds(load("qwen3_8b_stage1"), model, gpu, 1000, 13_000) == pytest.approx(dense * 4 / 3)
    assert stage_seconds(load("qwen3_8b_stage2"), model, gpu, 1000, 13_000) < dense * 4 / 3


def test_show_prints_the_plan() -> None:
    config = str(FOLDER / "phi4_stage2.yaml")
    shown = CliRunner().invoke(app, ["show", config, "--like", "microsoft/Phi-4-reasoning", "--gpu", "H100"])
    assert shown.exit_code == 0, shown.output
    assert "16 ranks, ZeRO-2" in shown.output and "Time on 16 x H100" in shown.output
    with pytest.raises(UserError, match="--gpu: H1000 is not known"):
        list(sft_plan_lines(load("phi4_stage2"), None, "H1000"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ("qwen3_32b_stage2", "phi4_stage2", "olmo3_7b_stage2", "qwen2.5_7b_stage0"),
        pytest.param(tuple(PAPER), marks=pytest.mark.long),
    ],
    ids=["families", "all"],
)
def test_each_family_runs_on_its_tiny_twin(names: tuple[str, ...], tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"problem": p.prompt, "response": t} for p, t in make_traces(8, 0, terms=(2, 4))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    twins = {t: write_tiny_model(tmp_path / t, 0, family=t, layers=4) for _, t in FAMILIES.values()}
    jobs = {name: next(f for n, (_, f) in FAMILIES.items() if name.startswith(n)) for name in names}
    pairs = [f"{FOLDER / name}.yaml={twins[family]}" for name, family in jobs.items()]
    outer = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"}
    environment = {k: v for k, v in os.environ.items() if k not in outer}
    command = [sys.executable, str(Path(__file__).parent / "dry_run.py"), str(data), str(tmp_path / "runs"), *pairs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in jobs:
        metrics = read_metrics(tmp_path / "runs" / name)
        assert len(metrics) == 2 and all(row["train/loss"] is not None for row in metrics), name
        assert (tmp_path / "runs" / name / "hf" / "model.safetensors").is_file(), name
