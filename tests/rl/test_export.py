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


RANK = """
import sys
from pathlib import Path
import torch
from memento.rl.learner import CHECKPOINT_FOLDER
from memento.rl.learner_rank import LearnerRank
from memento.run import load_run_config

run, folder, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
rank = LearnerRank(load_run_config(run), 0, "cpu")
rank.start("127.0.0.1", port)
target = folder / CHECKPOINT_FOLDER
target.mkdir(parents=True)
rank.save(str(target))
rank.save_hf(str(run / "expected"))
# The learner's own log-probabilities of a row in which nothing is evicted.
ids = torch.arange(9, 57)[None]
position = torch.arange(ids.shape[1])[None]
never = torch.full_like(ids, 2**62)
with torch.no_grad():
    logprobs, _ = rank.engine(
        input_ids=ids, position_ids=position, visible_until=never, document=torch.zeros_like(ids)
    )
torch.save({"ids": ids, "logprobs": logprobs}, run / "logprobs.pt")
"""


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Path, dict[str, Any]], Path]:
    """A run folder with a checkpoint that a real learner rank wrote, and what it exported and computed itself."""

    def make(model: Path, learner: dict[str, Any]) -> Path:
        run = tmp_path / "run"
        make_run(run, model, hf=False, learner=learner)

        class Saver:
            def save(self, folder: str | Path) -> None:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 0))
                    port = str(probe.getsockname()[1])
                command = [sys.executable, "-c", RANK, str(run), str(folder), port]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
                assert done.returncode == 0, done.stderr

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


@pytest.mark.long
@pytest.mark.parametrize(("family", "zero_stage"), zip(FAMILIES, (0, 1, 2, 3), strict=True))
def test_each_familys_export_computes_what_the_learner_does(
    tmp_path: Path, saved: Callable[..., Path], family: str, zero_stage: int
) -> None:
    """Through stock transformers, fp32; one family for each ZeRO stage."""
    from transformers import AutoModelForCausalLM

    twin = write_tiny_model(tmp_path / "twin", seed=1, family=family)
    run = saved(twin, {"zero_stage": zero_stage, "dtype": "float32"})
    exported: Any = AutoModelForCausalLM.from_pretrained(export_run(run, tmp_path / "out"), dtype=torch.float32)
    learner = torch.load(run / "logprobs.pt")
    ids = learner["ids"]
    with torch.no_grad():
        logprobs = exported(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(logprobs, learner["logprobs"][1:], atol=1e-6, rtol=0), (
        (logprobs - learner["logprobs"][1:]).abs().max()
    )
    torch.testing.assert_close(load_all(tmp_path / "out"), load_all(twin), rtol=0, atol=0)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
