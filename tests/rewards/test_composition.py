"""Rewards of several terms: sums, gates, format terms, custom functions with every way to misbehave."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError

from memento.config import RewardsConfig, RewardTermConfig
from memento.errors import UserError
from memento.format import MementoFormat
from memento.problems import Problem
from memento.rewards import Scorer, check_terms
from memento.rewards.composition import Term, compose, custom_result
from memento.rewards.format_terms import TraceShape, length_score, trace_shape, well_formed
from memento.rewards.workers import Reply, Status
from memento.trajectory import FinishReason, Outcome, RewardResult, Trajectory, VersionSpan

HALF = Problem.model_validate({"id": "half", "kind": "math", "prompt": "?", "answer": "1/2"})
GOOD = TraceShape((40, 42), (6, 8), anomalies=0, left_open=False)
B, E, S, Z = 1, 2, 3, 4
FMT = MementoFormat(B, E, S, Z, evict_delimiters=False)


def term(**keys: object) -> RewardTermConfig:
    return RewardTermConfig.model_validate(keys)


def verdict(score: float | None, outcome: Outcome = Outcome.CORRECT, **keys: object) -> RewardResult:
    return RewardResult.model_validate({"score": score, "outcome": outcome, **keys})


def test_a_weighted_sum_keeps_the_verdict_and_names_its_parts():
    terms = [
        Term(term(kind="verifier"), verdict(1.0, parts={"code": 1.0, "tests_passed": 1.0}, extracted="x")),
        Term(term(kind="well_formed", weight=0.1), verdict(0.5)),
        Term(term(kind="custom", name="brief", function="m:f", weight=-0.2), verdict(3.0, Outcome.WRONG)),
    ]
    result = compose(terms)
    assert result.score == pytest.approx(1.0 + 0.05 - 0.6)
    assert (result.outcome, result.extracted) == (Outcome.CORRECT, "x")
    assert result.parts == {"code": 1.0, "tests_passed": 1.0, "verifier": 1.0, "well_formed": 0.5, "brief": 3.0}


def test_part_of_a_verdict_in_place_of_its_score():
    partial = verdict(0.0, Outcome.WRONG, parts={"code": 0.0, "tests_passed": 0.75})
    chosen = term(kind="verifier", part="tests_passed", weight=2.0)
    assert compose([Term(chosen, partial)]).score == 1.5
    assert compose([Term(chosen, verdict(1.0, parts={"math": 1.0}))]).score == 2.0, "a math result has no such part"
    assert compose([Term(chosen, partial)]).outcome is Outcome.WRONG


def test_a_shut_gate_takes_everything():
    def total(well: float) -> RewardResult:
        gate = Term(term(kind="well_formed", weight=0.5, gate=0.8), verdict(well))
        return compose([Term(term(kind="verifier"), verdict(1.0)), gate])

    assert total(0.8).score == pytest.approx(1.4)
    assert (total(0.79).score, total(0.79).metadata) == (0.0, {"gated_by": "well_formed"})
    assert total(0.79).outcome is Outcome.CORRECT, "accuracy is what the verifier says"


def test_one_term_without_a_score_leaves_the_sample_without_one():
    failed = verdict(None, Outcome.VERIFIER_ERROR, detail="it died")
    result = compose(
        [
            Term(term(kind="verifier"), verdict(1.0)),
            Term(term(kind="custom", function="m:f", weight=0.0), failed),
        ]
    )
    assert (result.score, result.outcome, result.detail) == (None, Outcome.VERIFIER_ERROR, "custom: it died")
    assert result.parts == {"verifier": 1.0}


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([{"kind": "well_formed"}], "does not tell right from wrong"),
        ([{"kind": "verifier"}, {"kind": "verifier", "name": "b"}], "one verifier"),
        ([{"kind": "verifier"}, {"kind": "well_formed", "name": "verifier"}], "called verifier"),
        ([{"kind": "custom"}], "function"),
        ([{"kind": "custom", "function": "no colon"}], "function"),
        ([{"kind": "verifier", "function": "m:f"}], "function"),
        ([{"kind": "verifier"}, {"kind": "memento_length"}], "`low` or `high`"),
        ([{"kind": "verifier", "low": 3}], "memento_length and block_length"),
        ([{"kind": "verifier"}, {"kind": "block_length", "low": 30, "high": 20}], "more than high"),
        ([{"kind": "verifier"}, {"kind": "well_formed", "part": "x"}], "`part`"),
        ([{"kind": "verifier"}, {"kind": "well_formed", "wieght": 1}], "wieght"),
    ],
)
def test_contradictions_are_refused(terms: list[dict[str, object]], message: str):
    with pytest.raises(ValidationError, match=message):
        RewardsConfig.model_validate({"terms": terms})


# ---- format terms


def test_lengths_slope_on_both_sides():
    assert length_score([10, 15, 20], 10, 20) == 1.0
    assert length_score([5], 10, 20) == 0.5
    assert length_score([40], 10, 20) == 0.5
    assert length_score([400], None, 200) == 0.5
    assert length_score([10, 40], 10, 20) == 0.75
    assert length_score([], 10, 20) == 0.0


def test_well_formed_counts_faults():
    assert well_formed(GOOD) == 1.0
    assert well_formed(GOOD._replace(anomalies=1)) == pytest.approx(2 / 3)
    assert well_formed(GOOD._replace(left_open=True, anomalies=1)) == 0.5
    assert well_formed(TraceShape((), (), 0, False)) == 0.0


def trajectory(completion: list[int], finish: FinishReason = FinishReason.STOP) -> Trajectory:
    values = {
        "problem_id": "p",
        "group_id": "g",
        "sample_index": 0,
        "prompt_ids": (9, B),  # a delimiter in the prompt is no block
        "completion_ids": tuple(completion),
        "rollout_logprobs": (-1.0,) * len(completion),
        "text": "",
        "finish_reason": finish,
        "weight_versions": (VersionSpan(0, len(completion), 0),),
        "peak_kv_tokens": 1,
        "peak_kv_pages": 1,
        "kv_area_tokens": 1,
        "seed": 0,
        "temperature": 1.0,
        "seconds": 0.0,
    }
    return Trajectory.model_validate(values)


def test_the_shape_of_a_trace_comes_from_its_tokens():
    trace = [B, 7, 7, 7, E, S, 8, Z, B, 7, E, S, 8, 8, Z, 5]
    assert trace_shape(trajectory(trace), FMT) == TraceShape((3, 1), (1, 2), 0, False)
    assert trace_shape(trajectory([*trace, B, 7]), FMT) == TraceShape((3, 1), (1, 2), 0, True)
    cut = trajectory([*trace, B, 7], FinishReason.LENGTH)
    assert trace_shape(cut, FMT).left_open is False, "cut by the length limit"
    assert trace_shape(trajectory([E, *trace]), FMT).anomalies == 1


def test_format_terms_through_the_scorer():
    terms = [
        {"kind": "verifier"},
        {"kind": "well_formed", "weight": 0.1, "gate": 0.5},
        {"kind": "memento_length", "name": "terse", "weight": 0.2, "high": 4},
        {"kind": "block_length", "weight": 0.3, "low": 41, "high": 82},
    ]
    scorer = Scorer(RewardsConfig.model_validate({"terms": terms}))
    result = scorer.score(HALF, r"\boxed{0.5}", GOOD)
    terse, blocks = (4 / 6 + 4 / 8) / 2, (40 / 41 + 1) / 2
    assert result.score == pytest.approx(1 + 0.1 + 0.2 * terse + 0.3 * blocks)
    assert result.parts == pytest.approx(
        {"math": 1.0, "verifier": 1.0, "well_formed": 1.0, "terse": terse, "block_length": blocks}
    )
    assert scorer.score(HALF, r"\boxed{0.5}", TraceShape((), (), 2, False)).score == 0.0
    with pytest.raises(UserError, match="well_formed reads blocks"):
        scorer.score(HALF, r"\boxed{0.5}")
    scorer.close()


# ---- custom functions


@pytest.mark.parametrize(
    ("value", "score", "outcome"),
    [
        (1, 1.0, Outcome.CORRECT),
        (0.25, 0.25, Outcome.WRONG),
        (True, 1.0, Outcome.CORRECT),
        ({"score": 0.5, "outcome": "unparsable", "detail": "half"}, 0.5, Outcome.UNPARSABLE),
        ({"score": 2, "parts": {"a": 1}}, 2.0, Outcome.CORRECT),
        ({"score": None, "detail": "cannot tell"}, None, Outcome.VERIFIER_ERROR),
        ({"score": 1, "outcome": "verifier_error"}, None, Outcome.VERIFIER_ERROR),
        ({"score": 1, "outcome": "splendid"}, None, Outcome.VERIFIER_ERROR),
        ({"score": 1, "parts": {"a": "b"}}, None, Outcome.VERIFIER_ERROR),
        ({"score": float("nan")}, None, Outcome.VERIFIER_ERROR),
        ({"points": 1}, None, Outcome.VERIFIER_ERROR),
        (float("inf"), None, Outcome.VERIFIER_ERROR),
        ("1.0", None, Outcome.VERIFIER_ERROR),
        ([1], None, Outcome.VERIFIER_ERROR),
        (None, None, Outcome.VERIFIER_ERROR),
    ],
)
def test_what_a_custom_function_may_return(value: object, score: float | None, outcome: Outcome):
    result = custom_result(term(kind="custom", function="m:f"), Reply(Status.DONE, value))
    assert (result.score, result.outcome) == (score, outcome)
    assert outcome is not Outcome.VERIFIER_ERROR or result.detail


CUSTOM = """
import os, signal, sys, time

def polite(problem, completion):
    print("chatter on stdout is no reply")
    return {"score": float("please" in completion), "parts": {"characters": float(len(completion))},
            "extracted": problem["answer"]}

def misbehave(problem, completion):
    how = completion.split()[-1]
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(3600)
    if how == "raise":
        raise RuntimeError("no")
    if how == "exit":
        sys.exit(0)
    if how == "object":
        return object()
    return 1.0
"""


@pytest.fixture
def module(tmp_path: Path) -> str:
    (tmp_path / "my_rewards.py").write_text(CUSTOM)
    return str(tmp_path)


@pytest.fixture
def custom(module: str) -> Iterator[Scorer]:
    terms = [{"kind": "verifier"}, {"kind": "custom", "name": "polite", "function": "my_rewards:polite", "weight": 0.5}]
    scorer = Scorer(RewardsConfig.model_validate({"terms": terms}), search=[module])
    yield scorer
    scorer.close()


def test_a_custom_function_runs_in_its_own_worker(custom: Scorer):
    custom.check_terms()
    result = custom.score(HALF, r"please take \boxed{0.5}")
    assert (result.score, result.outcome) == (1.5, Outcome.CORRECT)
    assert result.parts == {"math": 1.0, "verifier": 1.0, "polite": 1.0, "characters": 23.0}
    assert custom.score(HALF, r"\boxed{7} please").score == 0.5
    assert len(custom.worker_pids) == 1, "plain numbers took no math worker, politeness took one"
    assert custom.score(HALF, "please " + "\x00é\ud800" * 300_000).score == 0.5, "more than a pipe holds, and no UTF-8"


def test_a_function_that_is_not_there_is_bad_input(module: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("my_rewards:rude", "no_such_module_at_all:f"):
        config = RewardsConfig.model_validate({"terms": [{"kind": "custom", "function": name}]})
        monkeypatch.syspath_prepend(module)
        with pytest.raises(UserError, match=name):
            check_terms(config)


def test_killed_hung_or_raising_at_random_no_sample_is_scored_zero_for_it(module: str):
    """2,000 samples that deserve 1, and a verifier that fails one in fifty in every way there is."""
    rng = random.Random(0)
    ways = ["die", "hang", "raise", "exit", "object"]
    samples = [rng.choice(ways) if rng.random() < 0.02 else "fine" for _ in range(2000)]
    planned = Counter(samples)
    config = {"kind": "custom", "function": "my_rewards:misbehave", "workers": 2, "timeout_s": 0.5}
    scorer = Scorer(RewardsConfig.model_validate({"terms": [config]}), search=[module])
    try:
        with ThreadPoolExecutor(4) as threads:
            results = list(threads.map(lambda how: scorer.score(HALF, f"do {how}"), samples))
    finally:
        scorer.close()
    for how, result in zip(samples, results, strict=True):
        if how == "fine":
            assert (result.score, result.outcome) == (1.0, Outcome.CORRECT), result
        else:
            expected = Outcome.TIMEOUT if how == "hang" else Outcome.VERIFIER_ERROR
            assert (result.score, result.outcome) == (None, expected), (how, result)
            assert result.detail
    counts = scorer.worker_counts
    assert all(planned[how] for how in ways)
    assert (counts.timeouts, counts.retries) == (planned["hang"], planned["die"]), "each death was tried once more"
    assert counts.restarts == planned["hang"] + 2 * planned["die"]
    assert scorer.worker_pids == []
