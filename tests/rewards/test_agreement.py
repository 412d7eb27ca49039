"""Verdicts on answers as the public sets have them: 528 triples, GSM8K's form, every kind of garbage."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memento.config import ProblemsConfig
from memento.problems import Problem
from memento.rewards import Scorer
from memento.rewards.math_verifier import same_without_sympy
from memento.rewards.plain_answers import as_number, same_plainly
from memento.sources import load
from memento.trajectory import Outcome

HERE = Path(__file__).parent
TRIPLES = [json.loads(line) for line in (HERE / "triples.jsonl").read_text(encoding="utf-8").splitlines()]


def problem(answer: str, kind: str = "math") -> Problem:
    return Problem.model_validate({"id": "p", "kind": kind, "prompt": "?", "answer": answer})


def test_528_triples(scorer: Scorer) -> None:
    jobs = [(t["gold"], t[half], half) for t in TRIPLES for half in ("gold", "equivalent", "different")]
    assert len(TRIPLES) == len({t["gold"] for t in TRIPLES}) == 528
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda job: scorer.score(problem(job[0]), f"so \\boxed{{{job[1]}}}."), jobs))
    wrong = [
        (job, result.outcome)
        for job, result in zip(jobs, results, strict=True)
        if result.outcome is not (Outcome.WRONG if job[2] == "different" else Outcome.CORRECT)
    ]
    assert wrong == []


def test_a_plain_verdict_is_the_one_of_math_verify(scorer: Scorer) -> None:
    """Where an answer is settled without SymPy, a worker that is asked all the same says the same."""
    from memento.rewards.math_verifier import HANDLER
    from memento.rewards.workers import WorkerPool

    rng = random.Random(0)
    chosen = rng.sample([t for t in TRIPLES if t["kind"] not in ("words", "other", "mixed number")], 60)
    pairs = [(t["gold"], t[half]) for t in chosen for half in ("equivalent", "different")]
    settled = [(gold, answer, verdict) for gold, answer in pairs if (verdict := same_plainly(gold, answer)) is not None]
    assert len(settled) > 40
    workers = WorkerPool(HANDLER, workers=1, timeout_s=10, memory_limit_mib=2048)
    try:
        for gold, answer, verdict in settled:
            reply = workers.call({"gold": gold, "answer": answer, "boxed": True})
            assert reply.value["equal"] == verdict or "\\," in answer or " " in answer, (gold, answer, verdict, reply)
    finally:
        workers.close()


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("3/4", "0.75", True),
        ("1/3", "0.333333", True),
        ("1/3", "0.33", False),
        ("0.0000001", "0.0000002", False),
        ("1000.99", "1000,99", True),
        ("1.22", "1,22", True),
        ("1,22", "1.22", None),
        ("28%", "28", None),
        ("28\\%", "28 %", True),
        ("(1,2)", "[1,2]", False),
        ("(1,2)", "\\left( 1 , 2.0 \\right)", True),
        ("\\{1,2,2\\}", "\\{2,1\\}", True),
        ("x=3", "3", True),
        ("x=3", "y=3", None),
        ("\\sqrt{8}", "2\\sqrt{2}", True),
        ("-\\sqrt{2}", "\\sqrt{2}", False),
        ("3", "\\sqrt{9}", True),
        ("1.7320508", "\\sqrt{3}", None),
        ("\\frac{3\\pi}{2}", "1.5\\pi", None),
        ("\\frac{3\\pi}{2}", "3\\pi/2", True),
        ("1/0", "1/0", None),
        ("204_5", "204_{5}", True),
        ("204_5", "204_6", False),
        ("204_5", "204", True),
        ("4 4/9", "40/9", True),
        ("10,\\!080", "10080", True),
        ("111, \\! 111, \\! 111", "111, \\! 111", False),
        ("-\\frac{19}{8}", "\\left(\\frac{-19}{8}\\right)", True),
        ("\\frac{59}{6}", "\\frac{-59}{-6}", True),
        ("\\frac{12}{5}", "\\frac{12}{-5}", False),
        ("3", "-(-3)", True),
        ("3", "2(1)", None),
        ("3", "(1)(3)", None),
        ("east", "teas", None),
    ],
)
def test_what_is_settled_plainly(gold: str, answer: str, verdict: bool | None) -> None:
    assert same_plainly(gold, answer) is verdict


@given(st.text(alphabet="0123456789.,/-+%$\\ {}frac()[]_pisqrt", max_size=30), st.text(max_size=30))
def test_plain_comparison_never_raises(gold: str, answer: str) -> None:
    assert same_plainly(gold, answer) in (True, False, None)
    assert same_plainly(gold, gold) in (True, None)
    assert as_number(gold) is None or same_plainly(gold, gold) is True


def test_gsm8k_golds_verify_and_200_neighbours_do_not(scorer: Scorer, tmp_path: Path) -> None:
    rng = random.Random(0)
    golds = [
        str(rng.choice([rng.randint(0, 99), rng.randint(100, 9999), rng.randint(10**4, 10**7)])) for _ in range(200)
    ]
    golds[:6] = ["-3", "0", "0.5", "12.75", "1,000", "2,125,000"]
    rows = [
        {"question": f"Problem {n}?", "answer": f"Some <<1+1=2>>steps.\n#### {gold}"} for n, gold in enumerate(golds)
    ]
    file = tmp_path / "gsm8k.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load(ProblemsConfig(path=file, set="gsm8k")).problems
    assert [p.answer for p in loaded] == golds
    for task, row in zip(loaded, rows, strict=True):
        assert scorer.score(task, row["answer"]).outcome is Outcome.CORRECT
        assert scorer.score(task, f"The answer is {task.answer}.").outcome is Outcome.CORRECT
        number = as_number(task.answer or "")
        assert number is not None
        other = rng.choice([number.value + 1, number.value - 10, -number.value - 2, number.value * 10 + 1])
        assert scorer.score(task, f"#### {other}").outcome is Outcome.WRONG, (task.answer, other)


def test_garbage_has_an_outcome(scorer: Scorer) -> None:
    rng = random.Random(1)
    noise = ["".join(chr(rng.randint(0, 0x2FFF)) for _ in range(rng.randint(1, 300))) for _ in range(60)]
    noise += ["\x00" * 500, "\ud800\udfff" * 50, "\\boxed{" + "{" * 3000 + "}", "\\boxed{" + "\\frac{1}" * 400 + "}"]
    noise += [f"\\boxed{{{text}}}" for text in noise[:20]]
    for kind, gold in (("math", "\\frac{x}{2}"), ("math", "42"), ("choice", "B")):
        for text in noise:
            result = scorer.score(problem(gold, kind), text)
            assert result.outcome in (Outcome.WRONG, Outcome.UNPARSABLE, Outcome.TIMEOUT), (text, result)
            assert result.score in (0.0, None)


def test_one_megabyte_of_each_kind(scorer: Scorer) -> None:
    megabyte = 1 << 20
    texts = [
        "\\boxed{" + "1+" * (megabyte // 2) + "1}",
        "\\boxed{" * (megabyte // 7),
        "The answer is " + "x" * megabyte,
        "\\boxed{\\frac{1}{2}} and " * (megabyte // 24),
        "A " * (megabyte // 2) + "\\boxed{A}",
    ]
    for text in texts:
        assert scorer.score(problem("x+1"), text).outcome in (Outcome.WRONG, Outcome.UNPARSABLE)
    assert scorer.score(problem("A", "choice"), texts[-1]).outcome is Outcome.CORRECT


# ---- the command that reads the public files


@pytest.fixture(scope="module")
def agreement() -> ModuleType:
    file = HERE.parents[1] / "benchmarks" / "verifier_agreement.py"
    spec = importlib.util.spec_from_file_location("verifier_agreement", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["verifier_agreement"] = module
    spec.loader.exec_module(module)
    return module


def test_cases_are_read_from_somebody_elses_tests(agreement: ModuleType, tmp_path: Path, scorer: Scorer) -> None:
    (tmp_path / "test_theirs.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('gold,pred,expected', [('$1/2$', 'is $0.5$', 1), ('3', '4', 0), (f'{1}', '', 1)])\n"
        "def test_a(gold, pred, expected): ...\n"
        "@pytest.mark.parametrize('gold,pred,expected,precision', [('1', '2', 1, 3)])\n"
        "def test_b(gold, pred, expected, precision): ...\n"
    )
    cases = list(agreement.upstream_cases(tmp_path))
    assert [(c.gold, c.right) for c in cases] == [("$1/2$", True), ("3", False)], "what is computed is left out"
    assert [o for _, o in agreement.judge(cases, scorer)] == [Outcome.CORRECT, Outcome.WRONG]


@pytest.mark.parametrize(
    "gold", ["12", "1234", "\\frac{3}{4}", "(1,2)", "-2,1", "\\text{Evelyn}", "x^2+1", "3\\sqrt{2}"]
)
def test_triples_are_made_from_answers(agreement: ModuleType, gold: str, scorer: Scorer) -> None:
    triple = agreement.respell(gold)
    assert triple is not None and triple.equivalent != gold
    assert scorer.score(problem(gold), f"\\boxed{{{triple.equivalent}}}").outcome is Outcome.CORRECT
    assert scorer.score(problem(gold), f"\\boxed{{{triple.different}}}").outcome is Outcome.WRONG
    assert same_without_sympy(gold, triple.different) in (False, None)
