"""Export: what is written loads in stock transformers; what cannot be exported is refused, and leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from memento.config import FormatConfig, RlConfig, dump_config
from memento.errors import UserError
from memento.rl.checkpoint import RunState, save_checkpoint
from memento.rl.export import (
    CARD,
    ExportError,
    check_model_folder,
    export_run,
    finish_folder,
    serve_flags,
    write_generation_config,
)
from memento.tiny import FAMILIES, write_tiny_model
from tests.rl.trace_logprobs import write_trace

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=0, hidden_size=32, layers=2)


@pytest.fixture
def tiny(model: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


def make_run(folder: Path, model: Path, *, hf: bool = True, **changes: Any) -> RlConfig:
    tree = {"out": folder, "model": model, "problems": {"arithmetic": {}}, "steps": 20} | changes
    config = RlConfig.model_validate(tree)
    folder.mkdir(parents=True)
    dump_config(config, folder / "config.yaml")
    rows = [{"step": 0, "eval/accuracy": 0.25}, {"step": 20, "eval/accuracy": 0.875, "kv/peak_ratio": 2.14}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if hf:
        shutil.copytree(model, folder / "hf")
    return config


def test_an_exported_run_loads_and_says_what_it_is(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_run(tmp_path / "run", model)
    out = export_run(tmp_path / "run", tmp_path / "models" / "mine")
    exported, original = AutoModelForCausalLM.from_pretrained(out), AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(20)[None]
    assert torch.equal(exported(ids).logits, original(ids).logits)
    assert AutoTokenizer.from_pretrained(out).chat_template
    card = (out / CARD).read_text()
    front, settings = yaml.safe_load(card.split("---")[1]), yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert front["library_name"] == "transformers"
    assert settings["steps"] == 20
    assert "| held-out accuracy | 0.875 | 20 |" in card
    assert "memento serve mine --port 8000" in card
    assert [f.name for f in out.parent.iterdir()] == ["mine"]  # nothing left aside


def test_dtype_and_shards_are_chosen(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_run(tmp_path / "run", model)
    out = export_run(tmp_path / "run", tmp_path / "half", dtype="bfloat16", shard_gb=2e-5)
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2 and (out / "model.safetensors.index.json").is_file()
    loaded = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    expected = load_file(model / "model.safetensors")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name].bfloat16()) for name in expected)
    assert AutoTokenizer.from_pretrained(out).chat_template and (out / CARD).is_file()
    ids = torch.arange(20)[None]
    exported = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)(ids).logits
    assert torch.equal(exported, AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)(ids).logits)
    with pytest.raises(UserError, match="--dtype: 'int4' is none of float32"):
        export_run(tmp_path / "run", tmp_path / "other", dtype="int4")


def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", model)

    def full(source: object, target: object) -> None:
        Path(str(target)).touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(UserError, match=r"disk of .* is full"):
        export_run(tmp_path / "run", tmp_path / "out" / "mine")
    assert list((tmp_path / "out").iterdir()) == []


EXPORT = """
mount -t tmpfs -o size=200k none "$1" || exit 77
"$2" -m memento.cli export "$3" --out "$1/models/mine" --dtype float32
code=$?
find "$1" -mindepth 1
exit $code
"""


@pytest.mark.long
def test_a_disk_that_is_really_full_leaves_nothing(model: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", model)
    (tmp_path / "small").mkdir()
    apart = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", EXPORT, "sh"]
    command = [*apart, str(tmp_path / "small"), sys.executable, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("no file system can be mounted here")
    assert done.returncode == 2 and "is full: make room" in done.stderr and "Traceback" not in done.stderr, done.stderr
    left = [line for line in done.stdout.splitlines() if line.startswith(str(tmp_path / "small"))]
    assert left == [str(tmp_path / "small" / "models")]


def test_the_trainer_can_finish_its_own_folder(model: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", model)
    checked = finish_folder(tmp_path / "run" / "hf", tmp_path / "run", step=20)
    assert checked.architecture == "Qwen3ForCausalLM"
    assert checked.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    stored = load_file(model / "model.safetensors")
    assert checked.parameters == sum(t.numel() for t in stored.values())
    assert (tmp_path / "run" / "hf" / CARD).is_file()


def test_every_end_token_ends_a_generation(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    ids = write_generation_config(tiny)
    assert ids == (config["eos_token_id"], 0)  # the tokenizer's first
    assert json.loads((tiny / "generation_config.json").read_text())["eos_token_id"] == list(ids)
    assert check_model_folder(tiny).eos_token_ids == ids


def test_a_missing_generation_config_is_made(tiny: Path) -> None:
    (tiny / "generation_config.json").unlink()
    assert write_generation_config(tiny) == check_model_folder(tiny).eos_token_ids


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.norm.weight"]


def rename(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.up.weight"] = weights.pop("model.layers.0.mlp.up_proj.weight")


def shrink(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"][:3].clone()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (drop, "model.norm.weight missing"),
        (rename, "model.layers.0.mlp.up.weight unknown"),
        (shrink, "model.norm.weight of another shape"),
    ],
)
def test_a_damaged_model_is_refused_and_leaves_nothing(
    model: Path, tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None], says: str
) -> None:
    make_run(tmp_path / "run", model)
    file = tmp_path / "run" / "hf" / "model.safetensors"
    weights = load_file(file)
    damage(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=says):
        export_run(tmp_path / "run", tmp_path / "out" / "mine")
    assert list((tmp_path / "out").iterdir()) == []


def test_untied_without_a_head_is_refused(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ExportError, match=r"lm_head\.weight missing"):
        check_model_folder(tiny)


def test_a_tokenizer_without_delimiters_is_refused(tiny: Path) -> None:
    text = (tiny / "tokenizer.json").read_text()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tiny / name).read_text()
        (tiny / name).write_text(text.replace("<|summary_end|>", "<|something|>"))
    with pytest.raises(UserError, match=r"<\|summary_end\|>"):
        check_model_folder(tiny)


def test_nothing_is_overwritten(model: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", model)
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="not empty"):
        export_run(tmp_path / "run", out)
    assert [f.name for f in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    assert (export_run(tmp_path / "run", out) / "config.json").is_file()  # an empty folder is fine


def test_bad_input_says_what_is_there(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        export_run(tmp_path, tmp_path / "out")
    make_run(tmp_path / "run", model, hf=False)
    with pytest.raises(UserError, match="neither a finished model"):
        export_run(tmp_path / "run", tmp_path / "out")
    (tmp_path / "run" / "checkpoints" / "step-000005").mkdir(parents=True)
    with pytest.raises(UserError, match="There are steps 5"):
        export_run(tmp_path / "run", tmp_path / "out", step=7)
    with pytest.raises(UserError, match="torn"):
        export_run(tmp_path / "run", tmp_path / "out", step=5)
    assert not (tmp_path / "out").exists()


def test_serve_flags() -> None:
    assert serve_flags(FormatConfig()) == ""
    phi = FormatConfig(evict_delimiters=True, keep_last_n=2, max_block_tokens=7000)
    assert serve_flags(phi) == " --evict-delimiters --keep-last-n 2 --max-block-tokens 7000"


def in_a_process_of_its_own(program: str, run: Path, *arguments: str | Path) -> dict[str, Any]:
    """What a program of `tests.rl.trace_logprobs` found."""
    command = [sys.executable, "-m", "tests.rl.trace_logprobs", program, str(run), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(run / f"{program}.pt")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """A run folder with a checkpoint that a real learner rank wrote after two steps, and what it exported itself."""

    def make(model: Path, learner: dict[str, Any], **changes: Any) -> Path:
        run = tmp_path / "run"
        make_run(run, model, hf=False, learner={"lr": 1e-3, "warmup_steps": 0} | learner, **changes)
        write_trace(run)

        class Saver:
            def save(self, folder: str | Path) -> None:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 0))
                    port = str(probe.getsockname()[1])
                in_a_process_of_its_own("learner", run, folder, port)

        save_checkpoint(run, RunState(step=10), Saver(), keep=1)
        return run

    return make


@pytest.mark.parametrize(("zero_stage", "dtype"), [(1, "bfloat16"), (3, "float32")])
def test_a_deepspeed_checkpoint_is_exported_without_its_run(
    model: Path, tmp_path: Path, saved: Callable[..., Path], zero_stage: int, dtype: str
) -> None:
    run = saved(model, {"zero_stage": zero_stage, "dtype": dtype})
    out = export_run(run, tmp_path / "out")
    exported, expected = load_file(out / "model.safetensors"), load_file(run / "expected" / "model.safetensors")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    assert {tensor.dtype for tensor in exported.values()} == {getattr(torch, dtype)}
    assert "10 RL steps" in (out / CARD).read_text()


LORA = {"rank": 4, "alpha": 8.0}
EVERY_STAGE = [(family, stage, None) for family in FAMILIES for stage in range(4)]
EVERY_STAGE += [(family, stage, LORA) for family in FAMILIES for stage in (1, 3)]
ENGINES = [(family, stage, LORA if stage % 2 else None) for stage, family in enumerate(FAMILIES)]


@pytest.fixture
def exported(tmp_path: Path, saved: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    """The run of a tiny twin that was trained, and its export."""

    def make(family: str, zero_stage: int, lora: dict[str, Any] | None) -> tuple[Path, Path]:
        twin = write_tiny_model(tmp_path / "twin", seed=1, family=family, hidden_size=128)  # heads of 32, for vLLM
        learner = {"zero_stage": zero_stage, "dtype": "float32", "lora": lora}
        run = saved(twin, learner, format={"evict_delimiters": family == "phi3"})
        out = export_run(run, tmp_path / "out")
        before, after = load_all(twin), load_all(out)
        assert before.keys() == after.keys()
        assert not all(torch.equal(before[name], after[name]) for name in before), "nothing was trained"
        return run, out

    return make


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-6) -> None:
    """To the tolerance; beyond -8, where one unit of fp32 in the last place is 9.5e-7 already, to one unit more."""
    for name in ("causal", "evicted"):
        if name in found:
            assert len(found[name]) == len(expected[name]) > 300
            gap = (found[name] - expected[name]).abs()
            print(f"{name}: {gap.max():.1e}")
            assert (gap <= tolerance + 1.2e-7 * (expected[name].abs() > 8) * expected[name].abs()).all(), (
                name,
                gap.max(),
            )


@pytest.mark.long
@pytest.mark.parametrize(("family", "zero_stage", "lora"), EVERY_STAGE)
def test_each_familys_export_computes_what_the_learner_does(
    exported: Callable[..., tuple[Path, Path]], family: str, zero_stage: int, lora: dict[str, Any] | None
) -> None:
    """Through transformers, with and without evicted blocks: every architecture, ZeRO stage, with and without LoRA."""
    run, out = exported(family, zero_stage, lora)
    learner = torch.load(run / "learner.pt")
    assert (learner["causal"] - learner["evicted"]).abs().max() > 0.01, "the two say the same, and show nothing"
    # A learner adds LoRA's product to that of the weight, an export multiplies by their sum: the last digits differ.
    tolerance = 1e-6 if lora is None else 2e-6
    assert_same(in_a_process_of_its_own("transformers", run, out), learner, tolerance)


@pytest.mark.long
@pytest.mark.parametrize(("family", "zero_stage", "lora"), ENGINES)
def test_each_familys_export_computes_in_vllm_what_the_learner_does(
    exported: Callable[..., tuple[Path, Path]], family: str, zero_stage: int, lora: dict[str, Any] | None
) -> None:
    """Through the evicting engine, the same engine with eviction off for a request, and stock vLLM."""
    run, out = exported(family, zero_stage, lora)
    learner = torch.load(run / "learner.pt")
    evicting = in_a_process_of_its_own("evicting", run, out)
    assert evicting["evictions"] >= 6 and evicting["evictions of the other"] == 0
    assert_same(evicting, learner)
    assert_same(in_a_process_of_its_own("stock", run, out), learner)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
