"""What an engine refuses, without an engine: missing log-probabilities, and work before it has its weights."""

from __future__ import annotations

import asyncio
import math
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memento.config import FormatConfig, RolloutConfig
from memento.errors import UserError
from memento.format import MementoFormat
from memento.problems import Problem, ProblemKind
from memento.rollout.engine import EngineInfo, RolloutEngine, RolloutFault, StaleEngine, _Model, sampled_logprobs
from memento.rollout.pool import Progress
from memento.rollout.weights import WeightUpdate
from memento.trajectory import RolloutRequest, SamplingParams

REQUEST = RolloutRequest(
    problem=Problem(id="p", kind=ProblemKind.MATH, prompt="1+1?", answer="2"),
    group_id="0/p",
    group_size=2,
    sampling=SamplingParams(temperature=1.0, max_tokens=4),
    seed=0,
)


def test_an_engine_that_was_not_started_takes_no_work():
    # This is what a restarted actor looks like: it must not answer with the weights of the model folder.
    engine = RolloutEngine(RolloutConfig(), "model", FormatConfig(), index=3)
    info = asyncio.run(engine.info())
    assert (info.index, info.version, info.stage) == (3, None, "not started")
    with pytest.raises(StaleEngine, match="engine 3 holds weights None, 0 are current"):
        asyncio.run(engine.generate(REQUEST))
    with pytest.raises(StaleEngine):
        asyncio.run(engine.update_weights(WeightUpdate(version=1, path=Path("w"), bytes=1, checksum="", seconds=0)))


def flat(*pairs: tuple[int, float]):
    flat_logprobs = pytest.importorskip("vllm.logprobs").FlatLogprobs()
    for token, logprob in pairs:
        flat_logprobs.append_fast([token], [logprob], iter([1]), [None])
    return flat_logprobs


def test_a_logprob_for_every_token():
    assert sampled_logprobs(flat((5, -0.5), (6, -1.5)), [5, 6], "p") == (-0.5, -1.5)


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        (None, "2 tokens but 0 log-probabilities"),
        ([(5, -0.5)], "2 tokens but 1 log-probabilities"),
        ([(5, -0.5), (7, -0.5)], "belong to other tokens"),
        ([(5, -0.5), (6, math.nan)], "completion token 1 is nan"),
        ([(5, -math.inf), (6, -0.5)], "completion token 0 is -inf"),
    ],
)
def test_a_logprob_that_is_missing_is_an_error_and_never_a_number(logprobs, message):
    with pytest.raises(RolloutFault, match=message):
        sampled_logprobs(None if logprobs is None else flat(*logprobs), [5, 6], "p")


def test_a_request_that_the_engine_refused_names_the_reason():
    pytest.importorskip("vllm")
    refused = SimpleNamespace(finish_reason="error", stop_reason="the prompt needs 40 KV pages, a request may hold 30")
    output: Any = SimpleNamespace(outputs=[refused])
    model = _Model(
        tokenizer=None, fmt=MementoFormat(1, 2, 3, 4, evict_delimiters=False), stop_ids=(0,), max_model_len=8
    )
    engine = RolloutEngine(RolloutConfig(), "model", FormatConfig(), index=0)
    with pytest.raises(UserError, match="0/p, sample 1: the engine refused the request: the prompt needs 40 KV pages"):
        engine._trajectory(REQUEST, 1, output, [5], 0.0, model)


def engine_info(**changes: Any) -> EngineInfo:
    fields: dict[str, Any] = dict.fromkeys(("index", "completions", "tokens", "preemptions", "evictions", "pid"), 0)
    fields |= {"version": 3, "stage": "ready", "active": 4, "steps": 7, "busy_s": 0.0, "start_s": 0.0, "update_s": {}}
    return EngineInfo(**fields | {"failure": None, "node": "n"} | changes)


def test_an_engine_hangs_when_it_has_work_and_makes_no_step():
    progress = Progress()
    assert progress.stalled_s(engine_info(steps=7), 100.0) == 0
    assert progress.stalled_s(engine_info(steps=7), 130.0) == 30  # work, and no step
    assert progress.stalled_s(None, 150.0) == 50  # and no answer either
    assert progress.stalled_s(engine_info(steps=8), 160.0) == 0
    assert progress.stalled_s(engine_info(steps=8, active=0), 300.0) == 0  # nothing to do
    assert progress.stalled_s(engine_info(steps=8, stage="update 4: load"), 400.0) == 0  # it has its own deadline
    assert progress.stalled_s(engine_info(steps=8), 410.0) == 10
    assert Progress().stalled_s(None, 5.0) == 0, "the clock of an engine starts with the first look"


def test_requests_cross_processes():
    assert pickle.loads(pickle.dumps(REQUEST)) == REQUEST


def test_the_actor_class_is_light_to_import():
    # Its process sets the environment first and only then may torch and vLLM be there.
    code = (
        "import sys, memento.rollout.engine, memento.rollout.pool;"
        "print([m for m in ('torch', 'vllm', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
