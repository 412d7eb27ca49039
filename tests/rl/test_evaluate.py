"""The evaluation metrics, with numbers computed by hand, and the run over pools."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memento.config import FormatConfig, RewardsConfig
from memento.errors import UserError
from memento.format import MementoFormat, evictions
from memento.problems import Problem, ProblemKind
from memento.rewards.format_terms import TraceShape
from memento.rl.evaluate import (
    EvalResult,
    EvalSettings,
    GroupFile,
    WrongWeights,
    avg_at_k,
    block_stats,
    evaluate,
    kv_stats,
    maj_at_k,
    mean_over_problems,
    pass_at_k,
    problems_digest,
    reported_ks,
    result_table,
    summarise,
    weights_digest,
)
from memento.trajectory import (
    Eviction,
    FinishReason,
    Outcome,
    RewardResult,
    RolloutRequest,
    SamplingParams,
    ScoredGroup,
    Trajectory,
    VersionSpan,
    sample_seed,
)

B, E, S, Z = 1, 2, 3, 4
FMT = MementoFormat(B, E, S, Z, evict_delimiters=False)
SAMPLING = SamplingParams(temperature=1.0, max_tokens=64)


def problem(name: str) -> Problem:
    return Problem(id=name, kind=ProblemKind.MATH, prompt="1+1?", answer="2")


def trajectory(
    completion: list[int], *, prompt: tuple[int, ...] = (9, 9), evict: bool = True, **more: object
) -> Trajectory:
    ids = (*prompt, *completion)
    events = evictions(ids, FMT, len(prompt)) if evict else []
    return Trajectory.model_validate(
        {
            "problem_id": "p",
            "group_id": "g",
            "sample_index": 0,
            "prompt_ids": prompt,
            "completion_ids": tuple(completion),
            "rollout_logprobs": (-0.5,) * len(completion),
            "text": "",
            "finish_reason": FinishReason.STOP,
            "weight_versions": (VersionSpan(0, len(completion), 3),),
            "evictions": [Eviction(*e) for e in events],
            "peak_kv_tokens": 10,
            "peak_kv_pages": 1,
            "kv_area_tokens": 100,
            "seed": 1,
            "temperature": 1.0,
            "evict": evict,
            "seconds": 0.1,
            **more,
        }
    )


def reward(outcome: Outcome, extracted: str | None = None) -> RewardResult:
    score = None if outcome is Outcome.VERIFIER_ERROR else float(outcome is Outcome.CORRECT)
    return RewardResult(score=score, outcome=outcome, extracted=extracted)


TRACE = [B, 7, 7, 7, 7, E, S, 8, Z, B, 7, 7, E, S, 8, 8, Z, 5]
"""Two blocks of 4 and 2 tokens with mementos of 1 and 2, then one token of answer."""


# ------------------------------------------------------------------ accuracy


def test_mean_over_samples_then_problems() -> None:
    # 1/2 and 1/1: the mean over problems is 0.75, the mean over all samples would be 2/3.
    estimate = avg_at_k([[True, False], [True], []])
    assert estimate.mean == pytest.approx(0.75)
    assert estimate.problems == 2
    assert estimate.stderr == pytest.approx(statistics.stdev([0.5, 1.0]) / math.sqrt(2))


def test_one_problem_has_no_standard_error_and_none_has_no_mean() -> None:
    assert mean_over_problems([0.5]).stderr is None
    with pytest.raises(ValueError, match="no problem has a scored sample"):
        avg_at_k([[], []])


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_mean_over_all_subsets(case: tuple[int, int, int]) -> None:
    n, right, k = case
    subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_pass_at_k_refuses_more_draws_than_samples() -> None:
    with pytest.raises(ValueError, match="pass@k"):
        pass_at_k(2, 1, 3)


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        (["7", "7", "8"], [True, True, False], 1.0),
        (["7", "8", "8"], [True, False, False], 0.0),
        (["7", "8"], [True, False], 0.5),
        (["7", "8", "9"], [True, False, False], 1 / 3),
        (["1/2", "0.5", "3", "3"], [True, True, False, False], 0.5),  # two spellings, one answer
        ([None, None, "7"], [False, False, True], 1.0),  # what was not answered does not vote
        ([None, None], [False, False], 0.0),
        (["8 ", "8"], [False, False], 0.0),
    ],
)
def test_majority_with_uniform_ties(answers: list[str | None], right: list[bool], expected: float) -> None:
    assert maj_at_k(answers, right) == pytest.approx(expected)


def test_reported_ks() -> None:
    assert reported_ks(1) == [1]
    assert reported_ks(6) == [1, 2, 4, 6]
    assert reported_ks(8) == [1, 2, 4, 8]


# ------------------------------------------------------------------ traces


def test_kv_of_a_worked_trace() -> None:
    # 20 tokens. Resident: 1..11, then 4 tokens leave: 8..15, then 2 leave: 14. Peak is 15 of 20, reached at the end of
    # the second memento.
    stats = kv_stats([trajectory(TRACE)], FMT)
    assert (stats.peak_tokens, stats.peak_tokens_full) == (15, 20)
    area_full = sum(range(3, 21))
    assert stats.area_tokens_full == area_full
    assert stats.area_tokens == area_full - 4 * 9 - 2 * 1
    assert stats.peak_ratio == pytest.approx(20 / 15)
    assert stats.area_ratio == pytest.approx(area_full / stats.area_tokens)
    assert stats.measured_peak_tokens == 10


def test_full_attention_costs_full_attention() -> None:
    stats = kv_stats([trajectory(TRACE, evict=False)], FMT)
    assert stats.peak_ratio == stats.area_ratio == 1.0


def test_blocks() -> None:
    cut = trajectory([B, 7, 7], finish_reason=FinishReason.LENGTH, forced=())
    capped = trajectory(TRACE, forced=(5, 6, 12))
    stats = block_stats([trajectory(TRACE), cut, capped], FMT)
    assert stats.blocks_per_trace == pytest.approx(4 / 3)
    assert (stats.block_tokens, stats.longest_block_tokens, stats.memento_tokens) == (3, 4, 1.5)
    assert stats.compression == pytest.approx(2.0)
    assert stats.truncation_rate == pytest.approx(1 / 3)
    assert stats.malformed_rate == 0  # cut by the limit, not malformed
    assert block_stats([trajectory([B, 7, 7]), trajectory([E, 5]), trajectory(TRACE)], FMT).malformed_rate == 2 / 3
    assert stats.forced_blocks_per_trace == pytest.approx(2 / 3)


def test_no_blocks_have_no_lengths() -> None:
    stats = block_stats([trajectory([5, 5, 5])], FMT)
    assert (stats.block_tokens, stats.memento_tokens, stats.compression) == (None, None, None)


# ------------------------------------------------------------------ the whole result


def group(name: str, *outcomes: Outcome) -> ScoredGroup:
    rewards = tuple(reward(o, "2" if o is Outcome.CORRECT else "3") for o in outcomes)
    return ScoredGroup(problem=problem(name), trajectories=(trajectory(TRACE),) * len(rewards), rewards=rewards)


def test_a_verifier_failure_is_left_out_and_counted() -> None:
    result = summarise(
        [
            group("a", Outcome.CORRECT, Outcome.VERIFIER_ERROR),
            group("b", Outcome.WRONG, Outcome.CORRECT),
            group("c", Outcome.VERIFIER_ERROR, Outcome.VERIFIER_ERROR),
        ],
        FMT,
        samples=2,
        sampling=SAMPLING,
        seed=0,
    )
    assert result.accuracy.mean == pytest.approx(0.75)
    assert result.accuracy.problems == 2
    assert result.excluded == 3
    assert result.pass_at_k[1] == result.accuracy
    assert result.pass_at_k[2].problems == 1  # only b has two scored samples
    assert result.maj_at_k.mean == pytest.approx((1.0 + 0.5) / 2)
    assert result.outcomes == {"correct": 2, "verifier_error": 3, "wrong": 1}
    assert result.weight_versions == (3,)
    assert EvalResult.model_validate_json(result.model_dump_json()) == result
    metrics = result.metrics()
    assert metrics["eval/accuracy"] == pytest.approx(0.75)
    assert metrics["eval/pass_at_2"] == 1.0
    assert all(isinstance(value, float) for value in metrics.values())
    assert result_table(result).row_count > 8


def test_what_has_no_value_has_no_metric() -> None:
    only = ScoredGroup(problem=problem("a"), trajectories=(trajectory([5]),), rewards=(reward(Outcome.WRONG, "3"),))
    metrics = summarise([only], FMT, samples=1, sampling=SAMPLING, seed=0).metrics()
    assert "eval/compression" not in metrics
    assert "eval/accuracy_stderr" not in metrics


class RecordedPool:
    """Gives traces that depend on the request alone, as the engines do."""

    def __init__(self, fails_on: str = "") -> None:
        self.requests: list[RolloutRequest] = []
        self.fails_on = fails_on

    def generate(self, request: RolloutRequest) -> tuple[Trajectory, ...]:
        self.requests.append(request)
        if request.problem.id == self.fails_on:
            raise RuntimeError("engine 0 died")
        made = []
        for index in range(request.group_size):
            seed = sample_seed(request.seed, request.group_id, index)
            answer = str(random.Random(seed).choice([2, 3]))
            made.append(
                trajectory(
                    TRACE, evict=request.evict, seed=seed, sample_index=index, text=answer, group_id=request.group_id
                )
            )
        return tuple(made)


class ExactMatch:
    def score(
        self, problem: Problem, completions: Sequence[str], shapes: Sequence[TraceShape] | None = None
    ) -> list[RewardResult]:
        assert shapes is not None and [s.block_tokens for s in shapes] == [(4, 2)] * len(completions)
        return [reward(Outcome.CORRECT if c == problem.answer else Outcome.WRONG, c) for c in completions]


def run(**changes: object) -> tuple[EvalResult, list[ScoredGroup]]:
    arguments: dict[str, object] = {"fmt": FMT, "samples": 4, "seed": 7, "group_prefix": "eval/0"} | changes
    problems = [problem(f"p{i}") for i in range(20)]
    return evaluate(RecordedPool(), ExactMatch(), problems, SAMPLING, **arguments)  # pyright: ignore[reportArgumentType]


def test_groups_come_back_in_order_whatever_the_concurrency() -> None:
    seen: list[str] = []
    result, groups = run(progress=lambda group: seen.append(group.problem.id))
    again, same = run(concurrency=1)
    assert [g.problem.id for g in groups] == [f"p{i}" for i in range(20)]
    assert sorted(seen) == sorted(g.problem.id for g in groups)
    assert groups == same
    assert result.accuracy == again.accuracy
    assert 0.2 < result.accuracy.mean < 0.8
    assert groups[3].trajectories[0].group_id == "eval/0/p3"


def test_another_prefix_draws_other_samples() -> None:
    assert [g.rewards for g in run(group_prefix="eval/1")[1]] != [g.rewards for g in run()[1]]


def test_full_attention_is_asked_of_the_engine() -> None:
    result, groups = run(evict=False)
    assert not any(t.evict for g in groups for t in g.trajectories)
    assert (result.evict, result.kv.peak_ratio) == (False, 1.0)


def test_an_engine_error_ends_the_evaluation() -> None:
    problems = [problem(f"p{i}") for i in range(50)]
    pool = RecordedPool(fails_on="p3")
    with pytest.raises(RuntimeError, match="engine 0 died"):
        evaluate(pool, ExactMatch(), problems, SAMPLING, fmt=FMT, samples=1, seed=0, concurrency=1)


def test_no_problems_is_bad_input() -> None:
    with pytest.raises(UserError, match="no problems"):
        evaluate(RecordedPool(), ExactMatch(), [], SAMPLING, fmt=FMT, samples=1, seed=0)


# ------------------------------------------------------------------ pinned, and resumed


def test_samples_of_other_weights_are_refused() -> None:
    assert run(weight_version=3)[0].weight_versions == (3,)
    with pytest.raises(WrongWeights, match=r"weights \[3\], not 4"):
        run(weight_version=4)


def test_what_was_evaluated_before_is_not_generated_again() -> None:
    whole, groups = run()
    pool = RecordedPool()
    problems = [problem(f"p{i}") for i in range(20)]
    done = {group.problem.id: group for group in groups[:15]}
    seen: list[str] = []
    result, again = evaluate(
        pool,
        ExactMatch(),
        problems,
        SAMPLING,
        fmt=FMT,
        samples=4,
        seed=7,
        group_prefix="eval/0",
        done=done,
        progress=lambda group: seen.append(group.problem.id),
    )
    assert sorted(r.problem.id for r in pool.requests) == sorted(seen) == sorted(f"p{i}" for i in range(15, 20))
    assert again == groups
    assert result.model_copy(update={"seconds": 0.0}) == whole.model_copy(update={"seconds": 0.0})


def test_what_is_finished_is_kept_when_an_engine_dies() -> None:
    kept: list[str] = []
    with pytest.raises(RuntimeError, match="engine 0 died"):
        evaluate(
            RecordedPool(fails_on="p3"),
            ExactMatch(),
            [problem(f"p{i}") for i in range(50)],
            SAMPLING,
            fmt=FMT,
            samples=1,
            seed=0,
            concurrency=1,
            progress=lambda group: kept.append(group.problem.id),
        )
    assert {"p0", "p1", "p2"} <= set(kept) and "p3" not in kept


def settings(**changes: object) -> EvalSettings:
    values: dict[str, object] = {
        "model": "m",
        "weights": "",
        "problems": problems_digest([problem("a")]),
        "samples": 4,
        "sampling": SAMPLING,
        "seed": 7,
        "evict": True,
        "restart": False,
        "format": FormatConfig(),
        "rewards": RewardsConfig(),
    }
    return EvalSettings.model_validate(values | changes)


def test_groups_survive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    _, groups = run()
    file = GroupFile(tmp_path / "deep" / "groups.jsonl", settings())
    assert file.read() == {}
    for one in groups[:3]:
        file.append(one)
    whole = file.path.read_bytes()
    file.path.write_bytes(whole + groups[3].model_dump_json().encode()[:200])
    again = GroupFile(file.path, settings())
    assert list(again.read().values()) == groups[:3]
    assert file.path.read_bytes() == whole, "half a line is dropped"
    again.append(groups[3])
    assert list(again.read()) == ["p0", "p1", "p2", "p3"]
    again.remove()
    assert list(file.path.parent.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"weights": "0123"},
        {"samples": 8},
        {"evict": False},
        {"sampling": SamplingParams(temperature=0.5, max_tokens=64)},
        {"problems": problems_digest([problem("b")])},
        {"format": FormatConfig(keep_last_n=1)},
        {"rewards": RewardsConfig(timeout_s=1)},
    ],
)
def test_another_evaluation_is_refused_by_name(change: dict[str, object], tmp_path: Path) -> None:
    file = GroupFile(tmp_path / "groups.jsonl", settings())
    file.append(run()[1][0])
    before = file.path.read_bytes()
    with pytest.raises(UserError, match=f"{next(iter(change))} differ"):
        GroupFile(file.path, settings(**change)).read()
    assert file.path.read_bytes() == before


def test_a_file_of_something_else_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text("mine\n")
    with pytest.raises(UserError, match="not overwritten"):
        GroupFile(path, settings()).read()
    assert path.read_text() == "mine\n"


def test_the_digest_of_weights_changes_with_them(tmp_path: Path) -> None:
    assert weights_digest("some/hub-id") == weights_digest(tmp_path) == ""
    (tmp_path / "model.safetensors").write_bytes(bytes(300_000))
    first = weights_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(299_999) + b"\x01")
    assert len(first) == 16 and weights_digest(tmp_path) not in ("", first)


def test_parts_and_wrong_answers_however_spelled() -> None:
    rewards = (
        RewardResult(score=1.1, outcome=Outcome.CORRECT, extracted="2", parts={"math": 1.0, "well_formed": 1.0}),
        RewardResult(score=0.0, outcome=Outcome.WRONG, extracted=r"\dfrac{1}{2}", parts={"math": 0.0}),
        RewardResult(score=0.0, outcome=Outcome.WRONG, extracted=r"\frac{1}{2} ", parts={"math": 0.0}),
    )
    scored = ScoredGroup(problem=problem("a"), trajectories=(trajectory(TRACE),) * 3, rewards=rewards)
    result = summarise([scored], FMT, samples=3, sampling=SAMPLING, seed=0)
    assert result.parts == {"math": pytest.approx(1 / 3), "well_formed": 1.0}
    assert result.maj_at_k.mean == 0.0, "two spellings of one wrong answer outvote the right one"
    assert result.metrics()["eval/part/math"] == pytest.approx(1 / 3)
