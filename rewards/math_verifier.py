r"""Mathematical equivalence by math-verify, run in a killable worker (see `memento.rewards.workers`).

`MathVerifier` runs in the caller's process and touches no SymPy; `compare` runs in the worker. The steps:

1. The last answer is extracted first (`memento.rewards.answers`): math-verify reads several ``\boxed`` as one set.
2. Equal as normalised strings, or both written plainly (`memento.rewards.plain_answers`): settled, no process needed.
3. A gold that is words or a choice letter is *only* compared as a string: to SymPy "east" is e*a*s*t and equals "teas".
4. Otherwise math-verify decides. What it cannot decide in time has no score: a timeout is not a wrong answer.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from memento.boxed import last_boxed
from memento.errors import UserError
from memento.problems import Problem
from memento.rewards.answers import Answer, AnswerSource, find_answer
from memento.rewards.choice import letter_of
from memento.rewards.plain_answers import as_number, same_plainly
from memento.rewards.workers import Message, Reply, Status, WorkerPool
from memento.trajectory import Outcome, RewardResult

if TYPE_CHECKING:
    from sympy import Basic

HANDLER = "memento.rewards.math_verifier:compare"

MAX_EXPRESSION_CHARS = 4000
"""Longer answers are compared as strings only. Gold and answer of this size fit into one pipe buffer (64 KiB)."""

EXTRACTED_CHARS = 1000
"""How much of an answer the record keeps."""


class Comparison(NamedTuple):
    """What the worker says about a gold and an answer."""

    gold_parsed: bool
    answer_parsed: bool
    equal: bool


class MathVerifier:
    """Verifies answers in the workers of a pool, and remembers what it found.

    In a group many samples give the same answer, and comparison depends on the two texts alone: so it is asked once.
    Thread-safe. Only verdicts are remembered, never a timeout or an error.
    """

    def __init__(self, pool: WorkerPool, *, remember: int = 8192) -> None:
        self._pool = pool
        self._remember = remember
        self._known: OrderedDict[tuple[str, str, bool], Comparison] = OrderedDict()
        self._lock = threading.Lock()

    def score(self, problem: Problem, completion: str) -> RewardResult:
        """Verify the final answer of a completion against ``problem.answer``.

        Returns:
            CORRECT (1), WRONG or UNPARSABLE (0), TIMEOUT or VERIFIER_ERROR (no score).
        """
        answer = find_answer(completion)
        if answer is None:
            return _verdict(Outcome.UNPARSABLE, None, "no answer found")
        gold = gold_text(problem)
        same = same_without_sympy(gold, answer.text)
        if same is not None:
            return _verdict(Outcome.CORRECT if same else Outcome.WRONG, answer)
        if len(gold) > MAX_EXPRESSION_CHARS or len(answer.text) > MAX_EXPRESSION_CHARS:
            detail = f"longer than {MAX_EXPRESSION_CHARS} characters: compared as a string"
            return _verdict(Outcome.WRONG, answer, detail)
        found = self._compare(gold, answer.text, answer.source is AnswerSource.BOXED)
        if isinstance(found, Reply):
            timeout = found.status in (Status.TIMEOUT, Status.OUT_OF_MEMORY)
            return _no_verdict(Outcome.TIMEOUT if timeout else Outcome.VERIFIER_ERROR, answer, found.detail)
        if found.equal:
            return _verdict(Outcome.CORRECT, answer)
        if not found.gold_parsed:
            return _no_verdict(Outcome.VERIFIER_ERROR, answer, _unreadable_gold(problem))
        if not found.answer_parsed:
            return _verdict(Outcome.UNPARSABLE, answer, "the answer is not an expression that can be read")
        return _verdict(Outcome.WRONG, answer)

    def check(self, problem: Problem) -> None:
        """Fail on a gold that no answer could ever match.

        Raises:
            UserError: naming the problem: the gold parses to nothing, or does not verify against itself in time.
        """
        gold = gold_text(problem)
        if is_words(gold) or as_number(gold) is not None:
            return
        if len(gold) > MAX_EXPRESSION_CHARS:
            raise UserError(f"problem {problem.id!r}: the answer is longer than {MAX_EXPRESSION_CHARS} characters.")
        found = self._compare(gold, gold, True)
        if isinstance(found, Reply):
            raise UserError(f"problem {problem.id!r}: the answer {gold!r} cannot be verified ({found.detail}).")
        if not found.gold_parsed:
            raise UserError(_unreadable_gold(problem))

    def _compare(self, gold: str, answer: str, boxed: bool) -> Comparison | Reply:
        """The comparison, remembered or made; a Reply where there is none."""
        key = (gold, answer, boxed)
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
                return known
        reply = self._pool.call({"gold": gold, "answer": answer, "boxed": boxed})
        if reply.status is not Status.DONE:
            return reply
        found = Comparison(**reply.value)
        with self._lock:
            self._known[key] = found
            while len(self._known) > self._remember:
                self._known.popitem(last=False)
        return found


def _unreadable_gold(problem: Problem) -> str:
    return (
        f"problem {problem.id!r}: the answer {problem.answer!r} reads neither as mathematics nor as words, so only the "
        "very same string could ever be right. Write it as LaTeX or plain text, or use kind 'choice' for a letter."
    )


def same_without_sympy(gold: str, answer: str) -> bool | None:
    """Whether an answer is right, where strings or plain numbers settle it; None where it takes mathematics."""
    if normalise(gold) == normalise(answer):
        return True
    if is_words(gold):
        return letter_of(gold) is not None and letter_of(gold) == letter_of(answer)
    return same_plainly(gold, answer)


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
        return boxed.removesuffix(".").rstrip()
    dollars = _DOLLARS.match(text.removesuffix("."))
    return (dollars[1] if dollars else text).strip().removesuffix(".").rstrip()


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
    _, _, verify = _math_verify()
    golds = _parsed(gold)
    if not golds:
        return {"gold_parsed": False, "answer_parsed": False, "equal": False}
    answers = _parsed(answer)
    if not boxed and not answers and "\\" not in answer:
        answers = _found_in(answer)
    percent = "%" in gold + answer or "percent" in answer  # 28 % is 28 as well as 0.28 to math-verify
    equal = _same_equation(golds, answers)
    if equal is None:
        equal = bool(answers) and (percent or not _differ_at_a_point(golds, answers)) and verify(golds, answers)
    if not equal:
        _refuse_a_verdict_for_lack_of_memory()
    return {"gold_parsed": True, "answer_parsed": bool(answers), "equal": equal}


@lru_cache(maxsize=1024)
def _parsed(text: str) -> tuple[Basic, ...]:
    """A formula as SymPy reads it, as a whole or not at all.

    Of a formula it cannot read math-verify would take some number in it: 2 for ``\\frac \\pi4 + 2``. Remembered: a gold
    is compared with every sample of its group, and parsing is half of the work.
    """
    parse_formula, parse_text, _ = _math_verify()
    readable = _readable(text)
    if not readable:
        return ()
    return tuple(parse_formula(f"\\boxed{{{readable}}}") or (parse_text(readable) if _PLAIN.fullmatch(text) else ()))


def _found_in(prose: str) -> tuple[Basic, ...]:
    """The formula or number that stands in a piece of prose."""
    _, parse_text, _ = _math_verify()
    return tuple(parse_text(prose))


def _differ_at_a_point(golds: Sequence[Basic], answers: Sequence[Basic]) -> bool:
    """Whether two expressions are seen to be unequal by numbers put into them: most wrong answers, without `simplify`.

    Only a difference far beyond any rounding counts. Symbols alone may be words, and are left to math-verify.
    """
    from sympy import Expr, Float, Symbol

    if len(golds) != 1 or len(answers) != 1:
        return False
    gold, answer = golds[0], answers[0]
    if not isinstance(gold, Expr) or not isinstance(answer, Expr) or isinstance(gold, Symbol | Float):
        return False
    if isinstance(answer, Symbol | Float):
        return False
    names = sorted(gold.free_symbols | answer.free_symbols, key=str)
    for start in (0.37, 1.61):
        place: dict[Basic, Basic | float] = {name: start + 0.29 * number for number, name in enumerate(names)}
        try:
            left, right = complex(gold.evalf(15, subs=place)), complex(answer.evalf(15, subs=place))
            apart = abs(left - right) > 1e-3 * max(1.0, abs(left), abs(right))  # false for infinities and NaN
        except (TypeError, ValueError, ArithmeticError, AttributeError):
            return False  # no number there, or one too large
        if apart:
            return True
    return False


def _same_equation(golds: Sequence[Basic], answers: Sequence[Basic]) -> bool | None:
    """Whether two polynomial equations over the rationals have the same (complex) solutions; None for anything else.

    Exact: they do if their polynomials without repeated factors are multiples of each other (the Nullstellensatz).
    math-verify, which asks `simplify` and `solve`, takes fifty times as long.
    """
    from sympy import QQ, Eq, Expr, Poly
    from sympy.polys.polyerrors import BasePolynomialError

    sides = []
    for formulas in (golds, answers):
        if len(formulas) != 1 or not isinstance(formulas[0], Eq):
            return None
        left, right = formulas[0].lhs, formulas[0].rhs
        if not isinstance(left, Expr) or not isinstance(right, Expr):
            return None
        sides.append((left, right))
    try:
        differences = [left - right for left, right in sides]
        names = sorted(differences[0].free_symbols | differences[1].free_symbols, key=str)
        gold, answer = (Poly(difference, *names) for difference in differences)
    except (BasePolynomialError, TypeError):  # sin x = y, f(x) = x, 1 = 1, matrices
        return None
    for poly in (gold, answer):
        if not (poly.domain.is_ZZ or poly.domain.is_QQ) or not 1 <= poly.total_degree() <= MAX_DEGREE:
            return None
    gold, answer = (poly.set_domain(QQ).sqf_part().monic() for poly in (gold, answer))
    return gold == answer


MAX_DEGREE = 12
"""Of polynomial equations that are compared exactly."""

_PLAIN = re.compile(r"[\d\s.,+\-*/^()%]+")
"""Arithmetic that is no LaTeX: read as text where it does not parse as a formula."""

_UPRIGHT = re.compile(r"\\(?:mathrm|rm|operatorname)\{\s*([ei])\s*\}")
_SET_BUILDER = re.compile(r"\\mid\b|\\vert\b.*\\\}")
_TIMES_I = re.compile(r"(?<=\d)i(?![A-Za-z])")  # 3i: written so, i is just another variable to it
_THOUSANDS = re.compile(r"(?<=\d),?\\!\s?(?=\d{3})")
_BARE_FRACTION = re.compile(r"\\([dtc]?)frac\s*(\\pi(?![a-z])|[0-9A-Za-z])\s*(\\pi(?![a-z])|[0-9A-Za-z])")


def _readable(latex: str) -> str:
    r"""What the parser trips over, written otherwise: ``\mathrm{e}`` is e, ``\frac \pi4`` is ``\frac{\pi}{4}``.

    ``\{x \mid x > 2\}`` reads as 2 to it, so sets by a condition are not read at all, and give an empty text.
    """
    if _SET_BUILDER.search(latex):
        return ""
    latex = _THOUSANDS.sub("", _UPRIGHT.sub(r"{\1}", latex))
    latex = _TIMES_I.sub(" i", latex.replace("\\varnothing", "\\emptyset"))
    return _BARE_FRACTION.sub(r"\\\1frac{\2}{\3}", latex)


_WARM_UP = (
    ("\\frac{x+1}{2}", "\\frac12 (1+x)"),
    ("2\\sqrt{3}+\\pi", "\\pi+\\sqrt[3]{12}"),
    ("-\\left(\\frac{3}{4}\\right)^{2}", "-3^2 \\div 4^2"),
    ("\\sin^2 x\\cos 2x", "1-\\log_{2} x + e^{-x}"),
    ("y=2x+1", "2y-4x=2"),
    ("x^2+y^2=4", "\\frac{x^2}{4}-y^2=1"),
    ("(-\\infty,3]\\cup[5,\\infty)", "x\\in(1,2)"),
    ("\\{1,\\frac12\\}", "1,2,\\sqrt 3"),
    ("1<x\\le 2", "x\\geq -3"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1\\\\-2\\end{pmatrix}"),
    ("3\\pm 2i", "\\left(2,-\\frac{1}{3}\\right)"),
    ("5\\cdot 10^{3}\\text{ cm}^2", "90^\\circ"),
)
"""Formulas of every kind: the parser learns the grammar as it reads, and is slow on each kind until then."""


def warm_up() -> None:
    """Import SymPy and build the LaTeX parser's tables: a second or more that must not count against a first job."""
    for gold, answer in _WARM_UP:
        compare(gold, answer, True)


@cache
def _math_verify() -> tuple[
    Callable[[str], list[Basic]], Callable[[str], list[Basic]], Callable[[Sequence[Any], Sequence[Any]], bool]
]:
    """Its functions, without timeouts: parse what stands in a box, parse text, verify."""
    import logging

    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that our deadlines are not its own
    box = [math_verify.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    anything = [math_verify.LatexExtractionConfig(boxed_match_priority=0), math_verify.ExprExtractionConfig()]

    def parse(text: str, targets: Sequence[Any]) -> list[Basic]:
        # no_fallback: only what SymPy understood. Strings were compared before we came here.
        return math_verify.parse(text, targets, fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    def parse_formula(text: str) -> list[Basic]:
        return parse(text, box)

    def parse_text(text: str) -> list[Basic]:
        return parse(text, anything)

    def verify(gold: Sequence[Any], answer: Sequence[Any]) -> bool:
        return math_verify.verify(list(gold), list(answer), timeout_seconds=None)

    return parse_formula, parse_text, verify


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
