"""Eviction is exact for the other model families, too: tiny twins of Qwen2.5, Phi-3/4 and Olmo 3, random weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from memento.format import lowest_visible, visible_until
from tests.rollout.scripted import DELIMITERS_TOO as PHI
from tests.rollout.scripted import (
    FMT,
    VOCAB,
    Case,
    block,
    blocks,
    check,
    differences,
    make_engine,
    read_reference,
    run,
    save_model,
    words,
)

WINDOW = 40


def qwen25() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**_shape(), rms_norm_eps=1e-6)


def phi4() -> Any:
    from transformers import Phi3Config

    return Phi3Config(**_shape(), pad_token_id=0, eos_token_id=0, bos_token_id=0)


def olmo3() -> Any:
    """Three layers with a window for each with full attention, as in the real one."""
    from transformers import Olmo3Config

    layers = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    shape: dict[str, Any] = {**_shape(), "num_hidden_layers": 4}
    return Olmo3Config(**shape, layer_types=layers, sliding_window=WINDOW, pad_token_id=0, eos_token_id=0)


def _shape() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }


@pytest.fixture
def plain_olmo3() -> Iterator[None]:
    """Give transformers its Olmo 3 back: vLLM runs it through that very class, and decorates it in place for good.

    A process that has had such an engine could build no Olmo 3 of its own ("Current vLLM config is not set").
    """
    from transformers.models.olmo3.modeling_olmo3 import Olmo3Model

    bases, own = Olmo3Model.__bases__, dict(vars(Olmo3Model))
    yield
    Olmo3Model.__bases__ = bases
    for name in set(vars(Olmo3Model)) - set(own):
        delattr(Olmo3Model, name)
    for name in ("__init__", "__call__"):
        if name in own:
            setattr(Olmo3Model, name, own[name])


@pytest.mark.usefixtures("plain_olmo3")
@pytest.mark.parametrize(("config", "fmt"), [(qwen25, FMT), (phi4, PHI), (olmo3, FMT)])
def test_a_twin_is_exact(config: Callable[[], Any], fmt, tmp_path: Path):
    folder = save_model(tmp_path / "model", config())
    reference = read_reference(folder)
    llm = make_engine(folder, fmt, 20, options={"reserve_peaks": False}, max_num_batched_tokens=48, max_num_seqs=12)
    rng = random.Random(41)
    cases = [
        Case([*words(rng, 20, 90), *blocks(rng, i % 2, 20, 60)], [*blocks(rng, 2, 20, 60), 9, 9], choice)
        for i, choice in enumerate([{}, {}, {"keep_last_n": 1}, {"evict": False}] * 3)
    ]
    stats = check(llm, reference, cases, fmt)
    assert sum(s.preemptions for s in stats) > 5
    whole = [Case([*c.prompt, *(c.script or [])], [9, 9], c.settings, prompt_logprobs=True) for c in cases]
    check(llm, reference, whole, fmt)
    if config is olmo3:
        # A window that counts evicted tokens too is something else.
        case = Case(words(rng, 20, 20), [*blocks(rng, 2, 50, 60), *words(rng, 30, 30)])
        output = run(llm, [case])[0]
        limits = visible_until([*case.prompt, *(case.script or [])], fmt)
        assert differences(reference, case, output, limits) < 1e-4
        logical = _by_logical_distance(limits)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.rollout.scripted.lowest_visible", lambda *_: logical)
            assert differences(reference, case, output, limits, tally=False) > 0.01


def _by_logical_distance(limits: np.ndarray) -> np.ndarray:
    return np.maximum(np.arange(len(limits)) - WINDOW + 1, 0)


def test_the_window_counts_resident_keys():
    """Against a brute-force count of the keys that each query sees."""
    rng = random.Random(42)
    for _ in range(20):
        trace = [*words(rng, 1, 20), *blocks(rng, 3, 1, 30), *block(rng, 1, 9)[: rng.randrange(8)]]
        limits = visible_until(trace, FMT)
        window = rng.randint(1, 50)
        for query, lowest in enumerate(lowest_visible(limits, window).tolist()):
            seen = [k for k in range(query + 1) if query < limits[k]]
            assert lowest == seen[-window:][0]
    assert lowest_visible(visible_until([9] * 50, FMT), 8).tolist() == [max(0, q - 7) for q in range(50)]
    with pytest.raises(ValueError, match="at least 1"):
        lowest_visible(np.array([5]), 0)
