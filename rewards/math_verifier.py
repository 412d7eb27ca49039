r"""Mathematical equivalence by math-verify, run in a killable worker (see `memento.rewards.workers`).

`score_math` runs in the caller's process and touches no SymPy; `compare` runs in the worker. The steps:

1. The last answer is extracted first (`memento.rewards.answers`): math-verify reads several ``\boxed`` as one set.
2. Equal as normalised strings: correct, no process needed.
3. A gold that is words or a choice letter is *only* compared as a string: to SymPy "east" is e*a*s*t and equals "teas".
4. Otherwise math-verify decides. What it cannot decide in time has no score: a timeout is not a wrong answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from memento.errors import UserError
from memento.problems import Problem
from memento.rewards.answers import Answer, AnswerSource, find_answer, last_boxed
from memento.rewards.choice import letter_of
from memento.rewards.workers import Message, Status, WorkerPool
from memento.trajectory import Outcome, RewardResult

if TYPE_CHECKING:
    from sympy import Basic

HANDLER = "memento.rewards.math_verifier:compare"

MAX_EXPRESSION_CHARS = 4000
"""Longer answers are compared as strings only. Gold and answer of this size fit into one pipe buffer (64 KiB)."""

EXTRACTED_CHARS = 1000
"""How much of an answer the record keeps."""


def score_math(problem: Problem, completion: str, pool: WorkerPool) -> RewardResult:
    """Verify the final answer of a completion against ``problem.answer``.

    Returns:
        CORRECT (1), WRONG or UNPARSABLE (0), TIMEOUT or VERIFIER_ERROR (no score).
    """
    answer = find_answer(completion)
    if answer is None:
        return _verdict(Outcome.UNPARSABLE, None, "no answer found")
    gold = gold_text(problem)
    if normalise(gold) == normalise(answer.text):
        return _verdict(Outcome.CORRECT, answer)
    if is_words(gold):
        same = letter_of(gold) is not None and letter_of(gold) == letter_of(answer.text)
        return _verdict(Outcome.CORRECT if same else Outcome.WRONG, answer)
    if len(gold) > MAX_EXPRESSION_CHARS or len(answer.text) > MAX_EXPRESSION_CHARS:
        return _verdict(Outcome.WRONG, answer, f"longer than {MAX_EXPRESSION_CHARS} characters: compared as a string")

    reply = pool.call({"gold": gold, "answer": answer.text, "boxed": answer.source is AnswerSource.BOXED})
    if reply.status is Status.DONE:
        if not reply.value["gold_parsed"]:
            return _no_verdict(Outcome.VERIFIER_ERROR, answer, _unreadable_gold(problem))
        if reply.value["equal"]:
            return _verdict(Outcome.CORRECT, answer)
        if not reply.value["answer_parsed"]:
            return _verdict(Outcome.UNPARSABLE, answer, "the answer is not an expression that can be read")
        return _verdict(Outcome.WRONG, answer)
    if reply.status in (Status.TIMEOUT, Status.OUT_OF_MEMORY):
        return _no_verdict(Outcome.TIMEOUT, answer, reply.detail)
    return _no_verdict(Outcome.VERIFIER_ERROR, answer, reply.detail)


def check_math_gold(problem: Problem, pool: WorkerPool) -> None:
    """Fail on a gold that no answer could ever match.

    Raises:
        UserError: naming the problem: the gold parses to nothing, or does not verify in time or at all.
    """
    gold = gold_text(problem)
    if is_words(gold) or _PLAIN_NUMBER.fullmatch(gold):
        return
    if len(gold) > MAX_EXPRESSION_CHARS:
        raise UserError(f"problem {problem.id!r}: the answer is longer than {MAX_EXPRESSION_CHARS} characters.")
    reply = pool.call({"gold": gold, "answer": gold, "boxed": True})
    if reply.status is not Status.DONE:
        raise UserError(f"problem {problem.id!r}: the answer {gold!r} cannot be verified ({reply.detail}).")
    if not reply.value["gold_parsed"]:
        raise UserError(_unreadable_gold(problem))


def _unreadable_gold(problem: Problem) -> str:
    return (
        f"problem {problem.id!r}: the answer {problem.answer!r} reads neither as mathematics nor as words, so no "
        "completion could ever be right. Write it as LaTeX or plain text, or use kind 'choice' for a letter."
    )


_PLAIN_NUMBER = re.compile(r"-?\d{1,15}(\.\d{1,15})?")
_DOLLARS = re.compile(r"^\$+(.*?)\$+$", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[ ,;:!]|\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|~")
_WORDS = re.compile(r"[^\W\d_][^\W\d_]*(?:[ ',.-]+[^\W\d_]+)*\.?")
_FORMULA_WORDS = re.compile(
    r"arc(cos|sin|tan)|cosh?|cot|csc|det|dim|exp|gcd|inf|infinity|lcm|lim|ln|log|max|min|mod|pi|sec|sinh?|sqrt|tanh?"
    r"|theta|alpha|beta|gamma|delta|lambda|sigma|omega"
)


def gold_text(problem: Problem) -> str:
    r"""The gold without ``\boxed{}`` and dollar signs around it."""
    text = (problem.answer or "").strip()
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    dollars = _DOLLARS.match(text)
    return dollars[1].strip() if dollars else text


def normalise(text: str) -> str:
    r"""For string comparison: no spaces, ``\left``, ``\text{}``, dollars or final stop; ``\dfrac`` is ``\frac``."""
    text = _SPACING.sub("", _TEXT.sub(r"\1", text))
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\%", "%").replace("$", "")
    text = re.sub(r"\s+", "", text).rstrip(".")
    return text.casefold() if text.isalpha() else text


def is_words(gold: str) -> bool:
    """Whether a gold is language ("Evelyn", "even", a choice letter A-J) and not a formula ("xy", "sin x")."""
    if letter_of(gold) is not None:
        return True
    plain = _TEXT.sub(r" \1 ", gold).strip()
    if plain == gold.strip() and "\\" in gold:
        return False
    if not _WORDS.fullmatch(plain):
        return False
    words = re.findall(r"[^\W\d_]+", plain.lower())
    return any(len(word) >= 3 for word in words) and not any(_FORMULA_WORDS.fullmatch(word) for word in words)


def _verdict(outcome: Outcome, answer: Answer | None, detail: str = "") -> RewardResult:
    score = float(outcome is Outcome.CORRECT)
    return RewardResult(
        score=score,
        outcome=outcome,
        parts={"math": score},
        extracted=answer.text[:EXTRACTED_CHARS] if answer else None,
        detail=detail,
        metadata={"answer_source": answer.source.value} if answer else {},
    )


def _no_verdict(outcome: Outcome, answer: Answer, detail: str) -> RewardResult:
    return RewardResult(
        score=None,
        outcome=outcome,
        extracted=answer.text[:EXTRACTED_CHARS],
        detail=detail,
        metadata={"answer_source": answer.source.value},
    )


# ---- in the worker -----------------------------------------------------------------------------------------------


def compare(gold: str, answer: str, boxed: bool) -> Message:
    """Whether `answer` equals `gold`. May hang, exhaust memory or kill the process: only for a worker.

    Args:
        boxed: the answer stood in a box and is read as one formula; otherwise as text around a formula or number.
    """
    parse, verify = _math_verify()
    golds = parse(f"\\boxed{{{gold}}}")
    if not golds:
        return {"gold_parsed": False, "answer_parsed": False, "equal": False}
    answers = parse(f"\\boxed{{{answer}}}")
    if not boxed and not answers:
        answers = parse(answer)
    equal = bool(answers) and verify(golds, answers)
    if not equal:
        _refuse_a_verdict_for_lack_of_memory()
    return {"gold_parsed": True, "answer_parsed": bool(answers), "equal": equal}


def warm_up() -> None:
    """Import SymPy and build the LaTeX parser's tables: a second or more that must not count against a first job."""
    compare("x+1", "1+x", True)


@cache
def _math_verify() -> tuple[Callable[[str], list[Basic]], Callable[[Sequence[Any], Sequence[Any]], bool]]:
    import logging

    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that our deadlines are not its own
    targets = [math_verify.LatexExtractionConfig(boxed_match_priority=0), math_verify.ExprExtractionConfig()]

    def parse(text: str) -> list[Basic]:
        # no_fallback: only what SymPy understood. Strings were compared before we came here.
        return math_verify.parse(text, targets, fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    def verify(gold: Sequence[Any], answer: Sequence[Any]) -> bool:
        return math_verify.verify(list(gold), list(answer), timeout_seconds=None)

    return parse, verify


def _refuse_a_verdict_for_lack_of_memory() -> None:
    """Raise MemoryError if this process came near its limit.

    SymPy and math-verify swallow the MemoryErrors of a huge power or factorial and then answer "not equal".
    """
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return
    with open("/proc/self/status") as status:
        peak_kib = next((int(line.split()[1]) for line in status if line.startswith("VmPeak:")), 0)
    if peak_kib << 10 > limit // 2:
        raise MemoryError
