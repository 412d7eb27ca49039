"""The arithmetic family: right answers, disjoint splits, traces in the exact memento format."""

from __future__ import annotations

import re
from random import Random

import pytest

from memento.arithmetic import (
    CAREFUL,
    SPLITS,
    SloppyTeacher,
    make_problems,
    make_traces,
    plain_trace,
    worked_trace,
)
from memento.errors import UserError
from memento.problems import Problem

BLOCK = re.compile(r"<\|block_start\|>([^<]+)<\|block_end\|><\|summary_start\|>([^<]+)<\|summary_end\|>")


def test_problems_are_a_function_of_the_seed_and_a_prefix_of_longer_lists() -> None:
    assert make_problems(50, 3) == make_problems(50, 3) == make_problems(80, 3)[:50]
    assert make_problems(50, 3) != make_problems(50, 4)


def test_the_answer_is_the_sum_in_the_prompt() -> None:
    for problem in make_problems(100, 0):
        match = re.search(r"[\d+]{5,}", problem.prompt)
        assert match
        terms = [int(term) for term in match[0].split("+")]
        assert 5 <= len(terms) <= 7
        assert all(10 <= term <= 99 for term in terms)
        assert problem.answer == str(sum(terms) % 100)


def test_seeds_are_disjoint() -> None:
    def sums(seed: int) -> set[str]:
        return {str(problem.metadata["terms"]) for problem in make_problems(200, seed, terms=(2, 2))}

    assert not sums(0) & sums(1)
    assert sums(0) & sums(SPLITS), "only the seed modulo SPLITS keeps short sums apart"
    ids = [problem.id for seed in range(3) for problem in make_problems(20, seed)]
    assert len(set(ids)) == len(ids)
    trained = {str(problem.metadata["terms"]) for problem, _ in make_traces(500, 5, terms=(2, 2))}
    assert not trained & sums(0)


def test_too_many_short_sums_are_refused() -> None:
    with pytest.raises(UserError, match="there are not 1000 different sums of 2-2 terms"):
        make_problems(1000, 0, terms=(2, 2))


def test_a_careful_trace_word_for_word() -> None:
    problem = Problem.model_validate(
        {"id": "p", "kind": "math", "prompt": "?", "answer": "6", "metadata": {"terms": [47, 83, 76], "digits": 2}}
    )
    assert worked_trace(problem, Random(0), CAREFUL) == (
        "<think>\n"
        "<|block_start|>47+83: ones 7+3+0=10 write 0 carry 1, tens 4+8+1=13 write 3 carry 1, total 30<|block_end|>"
        "<|summary_start|>+83=30<|summary_end|>\n"
        "<|block_start|>30+76: ones 0+6+0=6 write 6 carry 0, tens 3+7+0=10 write 0 carry 1, total 06<|block_end|>"
        "<|summary_start|>+76=06<|summary_end|>\n"
        "</think>\n"
        "\\boxed{6}"
    )


def test_a_careful_teacher_is_always_right_and_the_sloppy_one_in_some_of_its_traces() -> None:
    careful = make_traces(100, 0, teacher=CAREFUL)
    assert all(trace.endswith(f"\\boxed{{{problem.answer}}}") for problem, trace in careful)
    sloppy = make_traces(1000, 0)
    right = sum(trace.endswith(f"\\boxed{{{problem.answer}}}") for problem, trace in sloppy) / 1000
    assert 0.36 < right < 0.50


def test_each_habit_of_the_teacher_shows() -> None:
    problem = make_problems(1, 0)[0]

    def mementos(**habit: float) -> list[tuple[str, str]]:
        teacher = SloppyTeacher(**{"forget_carry": 0, "in_head": 0, "terse_memento": 0, "double_block": 0} | habit)
        return BLOCK.findall(worked_trace(problem, Random(0), teacher))

    count = len(mementos())
    assert all(re.fullmatch(r"\+\d\d=\d", memento) for _, memento in mementos(terse_memento=1))
    assert len(mementos(double_block=1)) == (count + 1) // 2
    assert all("ones" not in block for block, _ in mementos(in_head=1))
    assert all(" carry 1" not in block for block, _ in mementos(forget_carry=1))
    with pytest.raises(ValueError, match="in_head is a probability"):
        SloppyTeacher(in_head=2)


def test_the_plain_trace_is_the_same_work_without_blocks() -> None:
    for problem in make_problems(20, 0):
        worked = worked_trace(problem, Random(7), SloppyTeacher())
        plain = plain_trace(problem, Random(7), SloppyTeacher())
        lines = "\n".join(block for block, _ in BLOCK.findall(worked))
        assert plain == f"<think>\n{lines}\n</think>\n" + worked.rsplit("\n", 1)[1]
    sources = [(p.id, p.prompt) for p, _ in make_traces(20, 1)]
    assert sources == [(p.id, p.prompt) for p, _ in make_traces(20, 1, blocks=False)]


def test_other_problems_are_refused() -> None:
    problem = Problem.model_validate({"id": "x", "kind": "math", "prompt": "1+1?", "answer": "2"})
    with pytest.raises(ValueError, match="problem x is no sum chain"):
        worked_trace(problem, Random(0), CAREFUL)
