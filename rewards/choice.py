"""Multiple choice: the letter a completion settles on, compared as a letter."""

from __future__ import annotations

import re

from memento.problems import Problem
from memento.rewards.answers import AnswerSource, find_answer, visible_answer_text
from memento.trajectory import Outcome, RewardResult

_WRAPPERS = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mathit|rm|bf)\b\s*|[{}$*_`~]|\\[ ,;!()\[\]]")
_LETTER = re.compile(r"\(([A-Ja-j])\)|([A-Ja-j])(?=\s*(?:$|[).:,]))")
_STANDALONE = re.compile(r"(?<![A-Za-z0-9])\(([A-J])\)|^[\s*]*([A-J])[\s*.]*$", re.MULTILINE)


def letter_of(answer: str) -> str | None:
    r"""``B``, ``(b)``, ``\text{B}``, ``**B.** Paris``, ``option B: 12`` -> ``"B"``; anything else -> None."""
    text = _WRAPPERS.sub(" ", answer).strip()
    text = re.sub(r"^(?i:option|choice|answer)\b[\s:]*(?:is\b)?\s*", "", text)
    match = _LETTER.match(text)
    return (match[1] or match[2]).upper() if match else None


def find_letter(completion: str) -> str | None:
    """The chosen letter: from the box, the announcing phrase, or the last letter that stands alone."""
    answer = find_answer(completion)
    if answer is not None and answer.source is not AnswerSource.LAST_EXPRESSION:
        letter = letter_of(answer.text)
        if letter is not None or answer.source is AnswerSource.BOXED:
            return letter
    letters = _STANDALONE.findall(visible_answer_text(completion)[-4000:])
    return (letters[-1][0] or letters[-1][1]) if letters else None


def score_choice(problem: Problem, completion: str) -> RewardResult:
    """1 for the right letter, 0 for another or none. Pure: no process, no clock."""
    gold = letter_of(problem.answer or "")
    if gold is None:
        detail = f"the answer of problem {problem.id!r} is not a choice letter: {problem.answer!r}"
        return RewardResult(score=None, outcome=Outcome.VERIFIER_ERROR, detail=detail)
    letter = find_letter(completion)
    if letter is None:
        return RewardResult(
            score=0.0, outcome=Outcome.UNPARSABLE, parts={"choice": 0.0}, detail="no choice letter found"
        )
    right = letter == gold
    return RewardResult(
        score=float(right),
        outcome=Outcome.CORRECT if right else Outcome.WRONG,
        parts={"choice": float(right)},
        extracted=letter,
    )
