"""The config tree: files, `base`, overrides, and errors that name the key."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml

from memento.config import (
    ConfigAdapter,
    RlConfig,
    SftConfig,
    dump_config,
    load_config,
    override_config,
    to_yaml,
)
from memento.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = {"kind": "rl", "out": "runs/x", "model": "m", "problems": {"path": "p.jsonl"}}


def write(folder: Path, tree: object, name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def load_rl(file: Path, *overrides: str) -> RlConfig:
    config = load_config(file, overrides)
    assert isinstance(config, RlConfig)
    return config


def test_overrides_reach_nested_keys_with_yaml_values(tmp_path: Path) -> None:
    config = load_rl(write(tmp_path, MINIMAL), "learner.lr=1e-4", "learner.betas=[0.9, 0.95]", "rollout.evict=false")
    assert config.learner.lr == 1e-4 and config.learner.betas == (0.9, 0.95) and config.rollout.evict is False
    assert config.steps == RlConfig.model_fields["steps"].default


def test_the_saved_tree_loads_back_to_the_same_config(tmp_path: Path) -> None:
    config = load_rl(write(tmp_path, MINIMAL), "steps=7", "format.max_block_tokens=64")
    dump_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert ConfigAdapter.validate_python(yaml.safe_load(to_yaml(config))) == config


def test_base_is_read_first_and_overridden(tmp_path: Path) -> None:
    write(tmp_path, {**MINIMAL, "steps": 5, "learner": {"lr": 1.0, "ranks": 2}}, "below.yaml")
    config = load_rl(write(tmp_path, {"base": "below.yaml", "learner": {"lr": 0.5}}))
    assert (config.steps, config.learner.lr, config.learner.ranks) == (5, 0.5, 2)


def test_a_base_that_points_back_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, {**MINIMAL, "base": "run.yaml"})
    with pytest.raises(UserError, match="points back"):
        load_config(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.lrr=1", r"unknown key `learner\.lrr` \(did you mean `learner\.lr`\?\)"),
        ("lerner.lr=1", r"unknown key `lerner` \(did you mean `learner`\?\)"),
        ("steps=0", r"`steps`: .*greater than 0"),
        ("steps=many", r"`steps`"),
        ("kind=ppo", "`kind` must be"),
        ("sampling.top_p=0.9", "full distribution"),
        ("learner.minibatches=7", "multiple of learner.minibatches"),
        ("steps", "not of the form"),
        ("--steps=4", "not of the form"),
        ("algorithm.loss=ppo", "`algorithm.loss`"),
        ("problems.arithmetic.min_terms=9", "`problems.arithmetic`: max_terms"),
    ],
)
def test_bad_overrides_name_the_key(tmp_path: Path, override: str, message: str) -> None:
    file = write(tmp_path, MINIMAL)
    with pytest.raises(UserError, match=message):
        load_config(file, [override])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("advantage_baseline=batch advantage_std=group", "Use advantage_std: batch"),
        ("aggregation_tokens=100", "read by aggregation: constant, not by group"),
        ("kl_in=reward", "kl_coef 0 penalises nothing"),
        ("sampler_correction=icepop", "icepop needs sampler_mask_range"),
        ("sampler_mask=geometric", "sampler_mask: geometric needs sampler_mask_range"),
        ("sampler_mask_range=[0.5,2]", "neither is on"),
        ("sampler_correction=icepop sampler_mask=sequence sampler_mask_range=[0.5,2]", "use one of the two"),
        ("sampler_mask=sequence sampler_mask_range=[1.1,2]", "must hold 1"),
        ("sampler_mask=sequence sampler_mask_range=[2,0.5]", "must hold 1"),
        ("overlong_buffer_tokens=40000", r"more than sampling\.max_tokens \(31744\)"),
    ],
)
def test_contradictions_in_the_algorithm_are_refused(tmp_path: Path, keys: str, message: str) -> None:
    file = write(tmp_path, MINIMAL)
    with pytest.raises(UserError, match=message):
        load_config(file, [f"algorithm.{key}" for key in keys.split()])


@pytest.mark.parametrize("key", ["advantage_std=group", "advantage_baseline=leave_one_out", "dynamic_sampling=true"])
def test_a_group_of_one_has_no_group_statistics(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match="group_size 1"):
        load_config(write(tmp_path, MINIMAL), ["group_size=1", f"algorithm.{key}"])


def test_missing_keys_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`problems` is missing"):
        load_config(write(tmp_path, {k: v for k, v in MINIMAL.items() if k != "problems"}))
    with pytest.raises(UserError, match=r"no config file at .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,")
    with pytest.raises(UserError, match=r"broken\.yaml is not YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="holds no keys"):
        load_config(tmp_path / "list.yaml")


def test_a_config_is_frozen(tmp_path: Path) -> None:
    config = load_rl(write(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3  # pyright: ignore[reportAttributeAccessIssue]  # the point of the test


def test_override_config_checks_as_load_does(tmp_path: Path) -> None:
    config = load_rl(write(tmp_path, MINIMAL))
    changed = override_config(config, ["rollout.engines=2"], "--set")
    assert isinstance(changed, RlConfig) and changed.rollout.engines == 2 and config.rollout.engines == 1
    with pytest.raises(UserError, match=r"--set: unknown key `rollout\.engine`"):
        override_config(config, ["rollout.engine=2"], "--set")


def test_sft_needs_data_or_generated_phases(tmp_path: Path) -> None:
    tree: dict[str, object] = {"kind": "sft", "stage": "stage1", "out": "o"}
    with pytest.raises(UserError, match="give `data`"):
        load_config(write(tmp_path, tree))
    tree["phases"] = [{"steps": 3, "problems": {"min_terms": 2, "max_terms": 3}}]
    config = load_config(write(tmp_path, tree))
    assert isinstance(config, SftConfig) and config.phases[0].steps == 3


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("[rs]*[lt]/*.yaml")), ids=lambda f: f.name)
def test_shipped_configs_load(file: Path) -> None:
    tree = yaml.safe_load(file.read_text())
    if isinstance(tree, dict) and ("kind" in tree or "base" in tree):
        load_config(file)
