r"""Sum chains: a problem family with worked memento traces, so that the whole pipeline runs with no download.

A problem, ``What is the remainder when 47+83+12 is divided by 100?``, is worked one term a block, digit by digit in
words, and each block's memento records the term and the running value::

    <think>
    <|block_start|>47+83: ones 7+3+0=10 write 0 carry 1, tens 4+8+1=13 write 3 carry 1, total 30<|block_end|>
    <|summary_start|>+83=30<|summary_end|>
    <|block_start|>30+12: ...<|block_end|><|summary_start|>+12=42<|summary_end|>
    </think>
    \boxed{42}

(block and memento stand on one line.) The traces come from a **sloppy teacher** who is right less than half of the
time, so that reinforcement learning has something to gain. Now and then the teacher's memento keeps only the last digit
of the running value: its text no longer holds what the next block needs, its KV, computed while the block was visible,
still does. This module needs the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from memento.errors import UserError
from memento.format import BLOCK_END, BLOCK_START, SUMMARY_END, SUMMARY_START
from memento.problems import Problem, ProblemKind

SPLITS = 31
"""Problems fall into this many disjoint classes; a seed draws from class ``seed % SPLITS`` only."""

PHRASINGS = (
    "What is the remainder when {sum} is divided by {modulus}?",
    "Compute {sum} modulo {modulus}.",
    "Find the value of ({sum}) mod {modulus}.",
)
COLUMNS = ("ones", "tens", "hundreds", "thousands")


@dataclass(frozen=True, slots=True)
class SloppyTeacher:
    """How often the teacher does what, as probabilities.

    Attributes:
        forget_carry: writes carry 0 where it is 1 (each time there is one).
        in_head: an addition without its digits written out; the total is right.
        terse_memento: a memento that keeps only the last digit of the running value.
        double_block: a block of two additions with one memento.
    """

    forget_carry: float = 0.35
    in_head: float = 0.02
    terse_memento: float = 0.2
    double_block: float = 0.06

    def __post_init__(self) -> None:
        for name in ("forget_carry", "in_head", "terse_memento", "double_block"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, got {getattr(self, name)}")


CAREFUL = SloppyTeacher(forget_carry=0.0, in_head=0.0, terse_memento=0.0, double_block=0.0)
"""Never errs: for tests, and for seeing what the format alone costs."""


def make_problems(n: int, seed: int, terms: tuple[int, int] = (5, 7), digits: int = 2) -> list[Problem]:
    """`n` different problems. The same arguments give the same problems, and the first `m` of `n` are those of ``n=m``.

    Problems of two seeds that differ modulo `SPLITS` (31) have no sum in common, so a held-out set is simply another
    seed.

    Args:
        n: how many.
        seed: which.
        terms: smallest and largest number of terms.
        digits: of each term; the modulus is ``10 ** digits``.

    Returns:
        `Problem`s with ids ``sum-<seed>-<index>``; ``metadata`` holds ``terms`` and ``digits``.

    Raises:
        UserError: there are not that many different problems.
    """
    if not 1 <= digits <= len(COLUMNS) or not 2 <= terms[0] <= terms[1]:
        raise ValueError(f"need 1-{len(COLUMNS)} digits and 2 or more terms in order, got {digits} and {terms}")
    rng, problems, seen = Random(f"problems/{seed}"), [], set()
    for _ in range(20 * n + 100):
        if len(problems) == n:
            return problems
        chain = _draw_terms(rng, seed, terms, digits)
        if chain not in seen:
            seen.add(chain)
            problems.append(_problem(f"sum-{seed}-{len(problems)}", chain, digits, rng.choice(PHRASINGS)))
    raise UserError(
        f"there are not {n} different sums of {terms[0]}-{terms[1]} terms with {digits} digits in one seed's share "
        f"(1/{SPLITS}); ask for fewer problems, or for longer sums."
    )


def make_traces(
    n: int,
    seed: int,
    terms: tuple[int, int] = (5, 7),
    digits: int = 2,
    teacher: SloppyTeacher | None = None,
    *,
    blocks: bool = True,
) -> list[tuple[Problem, str]]:
    """`n` problems with one worked trace each, for SFT. Problems may repeat (there are few short sums).

    Args:
        n, seed, terms, digits: as for `make_problems`, and from the same share of all sums.
        teacher: `SloppyTeacher()` by default.
        blocks: True for `worked_trace`, False for `plain_trace`; the source is the same.
    """
    rng, write = Random(f"traces/{seed}/{terms}"), worked_trace if blocks else plain_trace
    examples = []
    for index in range(n):
        chain = _draw_terms(rng, seed, terms, digits)
        problem = _problem(f"trace-{seed}-{index}", chain, digits, rng.choice(PHRASINGS))
        examples.append((problem, write(problem, rng, teacher or SloppyTeacher())))
    return examples


def worked_trace(problem: Problem, rng: Random, teacher: SloppyTeacher) -> str:
    """The assistant turn for a problem of this family, in blocks and mementos. The answer is what the trace arrived at.

    Raises:
        ValueError: the problem is not of this family.
    """
    solution, answer = _solve(problem, rng, teacher)
    lines = [f"{BLOCK_START}{block}{BLOCK_END}{SUMMARY_START}{memento}{SUMMARY_END}" for block, memento in solution]
    return _turn(lines, answer)


def plain_trace(problem: Problem, rng: Random, teacher: SloppyTeacher) -> str:
    """The same trace (for an `rng` in the same state) without blocks and mementos: for the SFT-only control."""
    solution, answer = _solve(problem, rng, teacher)
    return _turn([block for block, _ in solution], answer)


def _turn(lines: list[str], answer: int) -> str:
    return "\n".join(["<think>", *lines, "</think>", f"\\boxed{{{answer}}}"])


def _draw_terms(rng: Random, seed: int, terms: tuple[int, int], digits: int) -> tuple[int, ...]:
    """Terms of a sum of class ``seed % SPLITS``, uniform in length and then among the sums of that length."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    count = rng.randint(*terms)
    while True:
        chain = tuple(rng.randint(low, high) for _ in range(count))
        # A polynomial in a base that is a unit modulo 31 and no power of ten: says nothing about the answer.
        if sum(term * pow(12, place, SPLITS) for place, term in enumerate(chain)) % SPLITS == seed % SPLITS:
            return chain


def _problem(problem_id: str, terms: tuple[int, ...], digits: int, phrasing: str) -> Problem:
    modulus = 10**digits
    return Problem(
        id=problem_id,
        kind=ProblemKind.MATH,
        prompt=phrasing.format(sum="+".join(map(str, terms)), modulus=modulus),
        answer=str(sum(terms) % modulus),
        source="arithmetic",
        metadata={"terms": list(terms), "digits": digits},
    )


def _solve(problem: Problem, rng: Random, teacher: SloppyTeacher) -> tuple[list[tuple[str, str]], int]:
    """((block, memento) texts in order, final value) as the teacher writes them."""
    terms, digits = problem.metadata.get("terms"), problem.metadata.get("digits")
    if not isinstance(terms, list) or not isinstance(digits, int):
        raise ValueError(f"problem {problem.id} is no sum chain: its metadata lacks `terms` or `digits`")
    value, *rest = (int(str(term)) for term in terms)
    solution = []
    while rest:
        count = 2 if len(rest) > 1 and rng.random() < teacher.double_block else 1
        texts = []
        for term in rest[:count]:
            text, value = _add(value, term, digits, rng, teacher)
            texts.append(text)
        kept = value % 10 if rng.random() < teacher.terse_memento else f"{value:0{digits}}"
        solution.append(("; ".join(texts), "".join(f"+{term}" for term in rest[:count]) + f"={kept}"))
        rest = rest[count:]
    return solution, value


def _add(value: int, term: int, digits: int, rng: Random, teacher: SloppyTeacher) -> tuple[str, int]:
    head = f"{value:0{digits}}+{term:0{digits}}: "
    if rng.random() < teacher.in_head:
        total = (value + term) % 10**digits
        return f"{head}total {total:0{digits}}", total
    total, carry, columns = 0, 0, []
    for place in range(digits):
        a, b = value // 10**place % 10, term // 10**place % 10
        column = a + b + carry
        carried = int(column > 9 and rng.random() >= teacher.forget_carry)
        columns.append(f"{COLUMNS[place]} {a}+{b}+{carry}={column} write {column % 10} carry {carried}")
        total, carry = total + column % 10 * 10**place, carried
    return f"{head}{', '.join(columns)}, total {total:0{digits}}", total
