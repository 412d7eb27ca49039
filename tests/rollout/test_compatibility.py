"""What KV eviction does not support is refused by name, before a single token is generated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memento.errors import UserError
from memento.format import MementoFormat
from memento.rollout import eviction_args
from memento.rollout.compatibility import (
    SCHEDULER_HOOKS,
    Unsupported,
    check_attention_spec,
    check_config,
    check_hooks,
    check_runner,
    check_version,
    check_vllm,
)
from memento.rollout.options import EvictionOptions

vllm = pytest.importorskip("vllm")

FMT = MementoFormat(1, 2, 3, 4, evict_delimiters=False, max_block_tokens=64)


@pytest.fixture(scope="module")
def config_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A real vLLM configuration of a tiny Qwen3; no engine is started."""
    from transformers import Qwen3Config
    from vllm import EngineArgs

    folder = str(tmp_path_factory.mktemp("qwen3"))
    model = Qwen3Config(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32)
    model.architectures = ["Qwen3ForCausalLM"]
    model.save_pretrained(folder)

    def config(**changes: Any) -> Any:
        settings = eviction_args(FMT) | changes
        return EngineArgs(folder, skip_tokenizer_init=True, enforce_eager=True, **settings).create_engine_config()

    return config


def test_the_installed_vllm_has_every_hook():
    from vllm.v1.worker.cpu.model_runner import CPUModelRunner as CPURunnerV2
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as CPURunnerV1

    check_vllm()
    check_runner(CPURunnerV1, v2=False)
    check_runner(CPURunnerV2, v2=True)
    with pytest.raises(Unsupported, match=r"not vllm\.v1\.worker\.cpu_model_runner\.CPUModelRunner"):
        check_runner(CPURunnerV1, v2=True)


def test_a_supported_configuration_passes_and_carries_the_options(config_of):
    config = config_of(additional_config=eviction_args(FMT, max_resident_tokens=512)["additional_config"])
    check_config(config)
    assert EvictionOptions.of(config) == EvictionOptions(FMT, max_resident_tokens=512)
    assert config.cache_config.enable_prefix_caching


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"kv_cache_dtype": "fp8"}, "KV cache dtype fp8 on CPU"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler vllm.v1.core.sched"),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "worker vllm.v1.worker.cpu_worker"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
    ],
)
def test_unsupported_features_are_named(config_of, changes, name):
    if "speculative_config" in changes:
        changes = changes | {"logits_processors": None}
    with pytest.raises(Unsupported, match=name):
        check_config(config_of(**changes))


def test_runner_scheduling_and_restart_go_together_or_are_refused_with_the_way_out(config_of, monkeypatch):
    vllm.envs.disable_envs_cache()  # an engine of another test may have made vLLM remember its variables
    config, restart = config_of(), config_of(additional_config=eviction_args(FMT, restart=True)["additional_config"])
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    check_config(config)
    with pytest.raises(Unsupported, match=r"restart mode with the V2 model runner .VLLM_USE_V2_MODEL_RUNNER=0"):
        check_config(restart)
    for either in (config, restart):
        either.scheduler_config.async_scheduling = True
    check_config(config)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(Unsupported, match=r"asynchronous scheduling with the V1 model runner .async_scheduling=False"):
        check_config(config)
    with pytest.raises(Unsupported, match="restart mode with asynchronous scheduling"):
        check_config(restart)


def test_a_v2_runner_that_takes_no_logits_processors_is_refused(config_of, monkeypatch):
    """As that of vLLM 0.29 and 0.30: the block cap could not act."""
    vllm.envs.disable_envs_cache()
    config = config_of()
    monkeypatch.setattr("memento.rollout.compatibility.find_spec", lambda name: None)
    check_config(config)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(Unsupported, match=r"V2 model runner of vLLM before 0\.31.*VLLM_USE_V2_MODEL_RUNNER=0"):
        check_config(config)


def test_every_other_feature_is_refused_by_name(config_of):
    """Those that a machine without GPUs cannot even configure: the checks read the finished configuration."""
    config = config_of()
    config.parallel_config.decode_context_parallel_size = 2
    config.parallel_config.enable_dbo = True
    config.kv_transfer_config = config.ec_transfer_config = object()
    with pytest.raises(Unsupported) as refused:
        check_config(config)
    for name in ("decode context parallelism", "dual-batch overlap", "KV connectors", "encoder connectors"):
        assert name in str(refused.value)


def test_an_engine_that_was_not_configured_to_evict_says_so(config_of):
    with pytest.raises(UserError, match=r"eviction_args\(fmt\)"):
        EvictionOptions.of(config_of(additional_config={}))


@pytest.mark.parametrize(
    ("version", "works"), [("0.28.1", False), ("0.29.0", True), ("0.32.0+cpu", True), ("0.33", False)]
)
def test_versions(version, works):
    if works:
        check_version(version)
    else:
        with pytest.raises(Unsupported, match=r">= 0\.29, < 0\.33 \(tested: 0\.32\.0\)"):
            check_version(version)
    with pytest.raises(Unsupported, match="no version number"):
        check_version("dev")


def test_a_renamed_hook_is_noticed():
    class Renamed:
        def schedule(self, throttle: bool) -> None: ...

    with pytest.raises(Unsupported, match=r"Renamed\.schedule without parameter throttle_prefills"):
        check_hooks(Renamed, {"schedule": SCHEDULER_HOOKS["schedule"]})
    with pytest.raises(Unsupported, match=r"Renamed\.add_request is gone"):
        check_hooks(Renamed, {"add_request": ("request",)})


def test_only_full_attention_and_sliding_windows():
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, MambaSpec, SlidingWindowSpec

    shape: dict[str, Any] = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    check_attention_spec("layers.0", FullAttentionSpec(**shape))
    check_attention_spec("layers.1", SlidingWindowSpec(**shape, sliding_window=64))
    with pytest.raises(Unsupported, match=r"layers\.2 is MambaSpec"):
        check_attention_spec("layers.2", MambaSpec(shapes=((2, 2),), dtypes=(torch.float32,), block_size=32))
    with pytest.raises(Unsupported, match=r"layers\.3 is ChunkedLocalAttentionSpec"):
        check_attention_spec("layers.3", ChunkedLocalAttentionSpec(**shape, attention_chunk_size=64))
    with pytest.raises(Unsupported, match=r"chunked local attention of layers\.4"):
        check_attention_spec("layers.4", FullAttentionSpec(**shape, attention_chunk_size=64))
    with pytest.raises(Unsupported, match=r"non-causal attention of layers\.5"):
        check_attention_spec("layers.5", FullAttentionSpec(**shape, non_causal=True))


def test_options_are_checked():
    with pytest.raises(UserError, match="max_resident_tokens"):
        eviction_args(FMT, max_resident_tokens=0)
    args = eviction_args(FMT, logits_processors=["a:B"], additional_config={"x": 1})
    assert args["logits_processors"] == ["a:B", "memento.rollout.block_cap:BlockCap"], "nobody may undo the cap"
    assert args["additional_config"]["x"] == 1


def test_the_rollout_package_costs_no_vllm():
    import subprocess
    import sys

    code = "import sys; from memento.rollout import eviction_args, eviction_stats; print('vllm' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "False"
