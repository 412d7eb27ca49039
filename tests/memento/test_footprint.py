"""What `memento show` reckons with: sizes against published ones, formulas against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from memento.config import RlConfig, load_config
from memento.footprint import GIB, GPUS, KNOWN, Architecture, learner_memory, learner_seconds, plan_lines, pool_bytes

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "rl"
PRODUCTION = {
    "qwen3_8b": "Qwen/Qwen3-8B",
    "qwen3_32b": "Qwen/Qwen3-32B",
    "phi4": "microsoft/Phi-4-reasoning",
    "olmo3_7b": "allenai/Olmo-3-7B-Think",
    "qwen3_0.6b": "Qwen/Qwen3-0.6B",
}


def read(name: str, *overrides: str) -> RlConfig:
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    assert isinstance(config, RlConfig)
    return config


@pytest.mark.parametrize(
    ("name", "billions", "kv_kib"),
    [
        ("Qwen/Qwen3-0.6B", 0.596, 112),
        ("Qwen/Qwen3-8B", 8.19, 144),
        ("Qwen/Qwen3-32B", 32.76, 256),
        ("microsoft/Phi-4-reasoning", 14.66, 200),
        ("allenai/Olmo-3-7B-Think", 7.30, 512),
    ],
)
def test_sizes_of_known_models(name: str, billions: float, kv_kib: int) -> None:
    model = KNOWN[name]
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.002)
    assert model.kv_bytes(1, 2) == kv_kib * 1024


def test_parameters_are_those_of_the_model_itself(tmp_path: Path) -> None:
    from safetensors import safe_open

    from memento.preflight import read_model_config
    from memento.tiny import write_tiny_model

    folder = write_tiny_model(tmp_path, seed=0)
    model = Architecture.of(read_model_config(folder))
    assert model is not None and model.tied
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    matrices = sum(shape[0] * shape[1] for shape in tensors.values() if len(shape) == 2)
    assert model.parameters == matrices  # norms, 0.4 % at this size, are left out


def test_a_sliding_layer_holds_its_window_at_most() -> None:
    model = Architecture(4, 8, 1, 1, 8, 16, 10, sliding_layers=3, window=100)
    assert model.kv_bytes(50, 2) == 4 * 50 * 2 * 8 * 2
    assert model.kv_bytes(1000, 2) == (1000 + 3 * 100) * 2 * 8 * 2


def test_what_it_cannot_reckon_it_says() -> None:
    assert Architecture.of({"model_type": "odd"}) is None
    assert Architecture.of({"num_experts": 8, "hidden_size": 4}) is None
    assert any("unknown until" in line for line in plan_lines(read("quickstart", "model=not-made-yet/hf")))


def test_learner_memory_by_hand() -> None:
    # One layer of width 2, no vocabulary to speak of: P = 2 x 1 x 2 + (2 x 2 x (1 + 1) x 2 + 3 x 2 x 4) = 4 + 40 = 44.
    model = Architecture(1, 2, 1, 1, 2, 4, 1)
    assert model.parameters == 44
    small = ["rollout.max_model_len=10", "sampling.max_tokens=5", "learner.micro_batch_tokens=10", "problems.path=p"]

    def memory(*overrides: str):
        return learner_memory(read("qwen3_8b", *small, *overrides), model)

    three = memory("learner.zero_stage=3", "learner.ranks=4")
    assert (three.weights, three.gradients, three.optimizer) == (2 * 44 / 4, 4 * 44 / 4, 12 * 44 / 4)
    assert three.reference == 2 * 44  # whole on every rank
    one = memory("learner.zero_stage=1", "learner.ranks=4", "algorithm.kl_coef=0")
    assert (one.weights, one.gradients, one.optimizer, one.reference) == (88, 6 * 44, 12 * 44 / 4, 0)
    host = memory("learner.offload_optimizer=true", "learner.offload_reference=true")
    assert host.host == 12 * 44 / 4 + 88 and host.optimizer == host.reference == 0
    # Activations of 10 tokens: a layer's input, and it whole: 8 x 2 + 3 x 4 + 2 x (1 + 2) x 2 = 40 values a token.
    assert three.activations == 10 * 2 * (2 + 40)
    assert memory("learner.gradient_checkpointing=false").activations == 10 * 2 * 40
    assert three.logits == 3 * 10 * 1 * 4


def test_times_follow_the_passes() -> None:
    model, gpu = KNOWN["Qwen/Qwen3-8B"], GPUS["H100"]
    base = ["algorithm.kl_coef=0", "learner.gradient_checkpointing=false"]
    plain = learner_seconds(read("qwen3_8b", *base), model, gpu, 1e6)
    assert plain == pytest.approx(6 * model.parameters * 1e6 / (4 * 989e12 * 0.4))
    assert learner_seconds(read("qwen3_8b", *base, "learner.minibatches=2"), model, gpu, 1e6) == pytest.approx(
        plain * 7 / 6
    )
    assert learner_seconds(read("qwen3_8b"), model, gpu, 1e6) == pytest.approx(plain * 10 / 6)


@pytest.mark.parametrize(("name", "like"), PRODUCTION.items())
def test_production_configs_fit_their_machines(name: str, like: str) -> None:
    config, gpu = read(name), GPUS["H100"]
    text = "\n".join(plan_lines(config, like, "H100"))
    assert "more than 90 %" not in text and "no room" not in text, text
    assert learner_memory(config, KNOWN[like]).device < 0.9 * 80 * GIB
    assert pool_bytes(config, KNOWN[like], gpu) > KNOWN[like].kv_bytes(config.sampling.max_tokens, 2)
    assert "tokens/s" in text and f"--like {like}" in (CONFIGS / f"{name}.yaml").read_text()
    assert config.sampling.max_tokens < (config.rollout.max_model_len or 0)
    assert config.format.evict_delimiters is (name == "phi4")


def test_the_papers_run_is_the_papers() -> None:
    config = read("qwen3_8b")
    assert (config.groups_per_step, config.group_size, config.steps) == (240, 8, 350)
    algorithm, learner = config.algorithm, config.learner
    assert (algorithm.loss, algorithm.clip_low, algorithm.clip_high, algorithm.kl_coef) == ("cispo", 0.2, 0.2, 0.001)
    assert (algorithm.advantage_std, algorithm.aggregation) == ("batch", "group")
    assert (learner.lr, learner.warmup_steps, learner.max_grad_norm) == (1e-6, 10, 1.0)
    assert (config.sampling.temperature, config.sampling.max_tokens, config.format.max_block_tokens) == (
        1.0,
        31_744,
        7000,
    )
    assert (config.eval.interval, config.eval.temperature, config.eval.top_p, config.eval.top_k) == (25, 0.6, 0.95, 20)


def test_too_much_is_said() -> None:
    text = "\n".join(plan_lines(read("qwen3_32b", "learner.ranks=2"), "Qwen/Qwen3-32B", "H100"))
    assert "more than 90 % of 80 GiB" in text
    text = "\n".join(plan_lines(read("qwen3_32b", "rollout.tensor_parallel_size=1"), "Qwen/Qwen3-32B", "A100"))
    assert "raise rollout.tensor_parallel_size" in text
