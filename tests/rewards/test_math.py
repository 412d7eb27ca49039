"""Mathematical equivalence through `score`, with the real math-verify in real worker processes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from memento.config import RewardsConfig
from memento.errors import UserError
from memento.problems import Problem
from memento.rewards import Scorer, check_golds
from memento.trajectory import Outcome


def problem(answer: str, kind: str = "math") -> Problem:
    return Problem.model_validate({"id": "p", "kind": kind, "prompt": "?", "answer": answer})


TRIPLES = [  # gold, equal, different
    ("30", "30", "31"),
    ("30", "030", "3"),
    ("1000", "1,000", "100"),
    ("0.5", r"\frac12", r"\frac13"),
    (r"\frac{3}{4}", "0.75", "0.74"),
    (r"\frac{1}{3}", "1/3", "0.33"),
    (r"1\frac{1}{2}", r"\frac32", r"\frac{11}{2}"),
    (r"-\frac{7}{2}", "-3.5", "3.5"),
    (r"\dfrac{1}{2}", r"\tfrac{1}{2}", r"\tfrac{2}{1}"),
    (r"50\%", "0.5", "0.05"),
    ("25%", r"25\%", r"52\%"),
    (r"\sqrt{8}", r"2\sqrt{2}", r"4\sqrt{2}"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt2}{2}", r"\sqrt2"),
    (r"2\pi", r"\pi \cdot 2", r"\pi^2"),
    ("2^{10}", "1024", "1023"),
    ("2^{2005}", r"2 \cdot 2^{2004}", "2^{2004}"),
    ("5!", "120", "24"),
    (r"2 \times 10^{3}", "2000", "20000"),
    (r"\{1,2,3\}", r"\{3, 2, 1\}", r"\{1,2\}"),
    ("1, 2", r"\{2, 1\}", "1, 3"),
    (r"\pm 2", "2, -2", "2"),
    ("(1,2)", "(1, 2)", "(2, 1)"),
    ("[0,1)", r"\left[0, 1\right)", "[0,1]"),
    (r"(-\infty, 3]", r"(-\infty,3]", r"(-\infty,3)"),
    (r"[0,1] \cup [2,3]", r"[2,3]\cup[0,1]", r"[0,1]\cup[2,4]"),
    (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}",
        r"\begin{pmatrix}1&2\\4&3\end{pmatrix}",
    ),
    ("x = 3", "3", "x = 4"),
    ("3", "x = 3", "x = -3"),
    ("y = 2x + 1", "y = 1 + 2x", "y = 2x - 1"),
    ("2x+4y-3=0", r"y=-\frac12 x+\frac34", r"y=\frac12 x+\frac34"),
    ("2x+3y-z=7", "z=2x+3y-7", "z=2x+3y+7"),
    (r"y=\pi x+1", r"y-1=\pi x", "y=3x+1"),
    ("f(x)=2x+1", "f(x)=1+2x", "f(x)=2x-1"),
    ("xy=1", "yx=1", "xy=2"),
    (r"\frac{x^2}{4}+\frac{y^2}{3}=1", "3x^2+4y^2=12", "4x^2+3y^2=12"),
    ("(x-1)^2=0", "x=1", "x=-1"),
    ("x > 2", "2 < x", "x < 2"),
    ("(x+1)^2", "x^2 + 2x + 1", "x^2 + 1"),
    (r"\sin^2 x + \cos^2 x", "1", "2"),
    ("3 + 4i", "4i + 3", "3 - 4i"),
    (r"10\text{ cm}", "10", "11"),
    (r"90^\circ", "90", "45"),
    (r"\$5", "5", "6"),
    (r"\boxed{7}", "7", "8"),
    ("$12$", "12", "21"),
    ("Evelyn", r"\text{Evelyn}", "Joanna"),
    (r"\text{east}", "East", "teas"),
    ("even", r"\text{even}", "odd"),
    ("B", r"\text{(B)}", "C"),
    ("(C)", "C", "(D)"),
]


@pytest.mark.parametrize(("gold", "equal", "different"), TRIPLES)
def test_triples(scorer: Scorer, gold: str, equal: str, different: str):
    scorer.check(problem(gold))
    right = scorer.score(problem(gold), f"So it is \\boxed{{{equal}}}.")
    assert (right.outcome, right.score) == (Outcome.CORRECT, 1.0), right
    wrong = scorer.score(problem(gold), f"So it is \\boxed{{{different}}}.")
    assert (wrong.outcome, wrong.score) == (Outcome.WRONG, 0.0), wrong


def test_unboxed_answers(scorer: Scorer):
    assert scorer.score(problem("3"), "The answer is 3 apples.").score == 1.0
    assert scorer.score(problem("1/2"), "Thus $x = \\frac{1}{2}$").score == 1.0
    assert scorer.score(problem("18"), "so 9 * 2 = 18").score == 1.0
    assert scorer.score(problem("18"), "#### 19").score == 0.0
    assert scorer.score(problem("34"), "Final Answer: The largest $n$ is 34. I hope it is correct.").score == 1.0
    assert scorer.score(problem("3"), "Final Answer: They met 3 hours ago.").score == 1.0
    assert scorer.score(problem("10/9"), r"-\frac{10}{9}").score == 0.0
    assert scorer.score(problem("10/9"), r"\frac{10}{9}").score == 1.0


def test_of_several_boxes_the_last_counts(scorer: Scorer):
    assert scorer.score(problem("2"), r"\boxed{1}, no, \boxed{2}").score == 1.0
    assert scorer.score(problem(r"\{1,2\}"), r"first \boxed{1}, then after all \boxed{2}").score == 0.0


def test_boxes_joined_by_and_are_one_answer(scorer: Scorer):
    for text in (
        r"\boxed{1} and \boxed{2}",
        r"$$\boxed{2},\quad \text{and} \quad \boxed{1}$$",
        r"\boxed{1}, \boxed{2}.",
    ):
        assert scorer.score(problem(r"\{1,2\}"), text).score == 1.0, text
        assert scorer.score(problem("2"), text).score == 0.0, "naming several answers is no way to be right"
    assert scorer.score(problem("2"), r"\boxed{2}, \boxed{2}").score == 1.0


def test_nothing_to_read_is_unparsable(scorer: Scorer):
    for completion in ("", "I do not know", "<think>3</think>", r"\boxed{\frac{1}}{", "\x00\ud800"):
        result = scorer.score(problem("3"), completion)
        assert result.score == 0.0 and result.outcome in (Outcome.UNPARSABLE, Outcome.WRONG), (completion, result)
    assert scorer.score(problem("3"), "I do not know").outcome is Outcome.UNPARSABLE
    assert scorer.score(problem("3"), r"\boxed{\frac{1}{}").outcome is not Outcome.CORRECT


def test_a_megabyte_in_the_box(scorer: Scorer):
    start = time.monotonic()
    result = scorer.score(problem("3"), "\\boxed{" + "9" * 1_000_000 + "}")
    assert result.outcome is Outcome.WRONG
    assert len(result.extracted or "") <= 1000
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("gold", ["?", r"\frac{", "$$ $$", r"\boxed{}", "{"])
def test_gold_that_parses_to_nothing_is_an_error_at_load(scorer: Scorer, gold: str):
    with pytest.raises(UserError, match="'p'"):
        scorer.check(problem(gold))
    result = scorer.score(problem(gold), r"\boxed{3}")
    assert (result.score, result.outcome) == (None, Outcome.VERIFIER_ERROR)


def test_check_golds_names_the_bad_one(scorer: Scorer):
    problems = [problem(str(n)).model_copy(update={"id": f"n{n}"}) for n in range(50)]
    check_golds(problems, scorer)
    with pytest.raises(UserError, match="'broken'"):
        check_golds([*problems, problem("?").model_copy(update={"id": "broken"})], scorer)


def test_choice(scorer: Scorer):
    gold = problem("B", "choice")
    for text in (
        r"\boxed{B}",
        r"\boxed{\text{(b)}}",
        "The answer is **B**.",
        "Answer: (B) Paris",
        "thus (B)",
        "so\n**B**",
    ):
        assert scorer.score(gold, text).outcome is Outcome.CORRECT, text
    for text in (r"\boxed{C}", "Answer: A", "(B) was tempting but (D)"):
        assert scorer.score(gold, text).outcome is Outcome.WRONG, text
    for text in ("", "a banana", r"\boxed{12}", "The answer is a matter of taste"):
        assert scorer.score(gold, text).outcome is Outcome.UNPARSABLE, text
    with pytest.raises(UserError, match="'p'"):
        scorer.check(problem("Paris", "choice"))


BOMBS = [r"9^{9^{9^9}}", r"(10^9)!", r"2^{2^{40}}"]


def test_bombs_time_out_in_seconds_and_the_next_job_is_served():
    scorer = Scorer(RewardsConfig(workers=2, timeout_s=2.0))
    try:
        scorer.score(problem("x"), r"\boxed{y}")  # a worker is warm
        start = time.monotonic()
        with ThreadPoolExecutor(4) as threads:
            results = list(threads.map(lambda bomb: scorer.score(problem("30"), f"\\boxed{{{bomb}}}"), BOMBS))
        assert time.monotonic() - start < 60
        assert [(result.outcome, result.score) for result in results] == [(Outcome.TIMEOUT, None)] * len(BOMBS)
        assert scorer.score(problem("x+1"), r"\boxed{1+x}").score == 1.0
        assert scorer.worker_counts.restarts == scorer.worker_counts.timeouts == len(BOMBS)
        long_sum = r"\boxed{\sum_{k=1}^{10^{9}} \frac{1}{k^2+k+1}}"  # whether in time depends on the machine
        assert scorer.score(problem("30"), long_sum).outcome in (Outcome.WRONG, Outcome.TIMEOUT)
    finally:
        scorer.close()
    assert scorer.worker_pids == []


def test_out_of_memory_is_no_verdict():
    # so little memory that importing leaves less than half free: every "not equal" becomes doubtful
    scorer = Scorer(RewardsConfig(workers=1, timeout_s=10, memory_limit_mib=200))
    try:
        result = scorer.score(problem("x"), r"\boxed{x+1}")
        assert result.score is None and result.outcome in (Outcome.TIMEOUT, Outcome.VERIFIER_ERROR)
    finally:
        scorer.close()


def test_from_many_threads(scorer: Scorer):
    """SIGALRM-based timeouts raise off the main thread; ours must not care."""
    jobs = [(problem(f"\\frac{{{n}}}{{7}}"), f"\\boxed{{{n}/7}}", n) for n in range(40)]
    results: dict[int, float | None] = {}

    def work(job: tuple[Problem, str, int]) -> None:
        results[job[2]] = scorer.score(job[0], job[1]).score

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: 1.0 for n in range(40)}
