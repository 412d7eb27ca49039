r"""Finds the final answer in a completion: what the model *said*, before anybody asks whether it is right.

Order, first hit wins: the last ``\boxed{...}``; a "final answer" phrase (``The answer is ...``, ``Answer: ...``,
``#### ...``); the whole text where it is nothing but a formula; the last formula or number near the end. Everything
here is linear in the length of the text, so a completion of a megabyte takes milliseconds, and no regular expression
backtracks over more than one line.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

from memento.boxed import last_boxed

THINK_END = "</think>"

LAST_EXPRESSION_WINDOW_CHARS = 4000
"""The last-expression fallback reads only the end: a number 100 KB before the end is no answer."""

PHRASE_ANSWER_CHARS = 500
"""An answer announced by a phrase is on the same line and not longer than this."""


class AnswerSource(StrEnum):
    """How the answer was found."""

    BOXED = "boxed"
    PHRASE = "phrase"
    LAST_EXPRESSION = "last_expression"


class Answer(NamedTuple):
    """A final answer as the completion spells it (`text`, without the box or the phrase)."""

    text: str
    source: AnswerSource


def visible_answer_text(completion: str) -> str:
    """The part after the last ``</think>``; all of it if the completion never closes its thinking."""
    return completion.rpartition(THINK_END)[2]


def find_answer(completion: str) -> Answer | None:
    """The final answer of a completion, or None where there is nothing that reads as one."""
    text = visible_answer_text(completion)
    boxed = last_boxed(text)
    if boxed is not None:
        return Answer(boxed, AnswerSource.BOXED)
    phrase = last_announced(text)
    if phrase is not None:
        return Answer(phrase, AnswerSource.PHRASE)
    expression = only_expression(text) or last_expression(text)
    if expression is not None:
        return Answer(expression, AnswerSource.LAST_EXPRESSION)
    return None


_ANNOUNCED = re.compile(
    r"""
    \#\#\#\#[ \t]*                                                             # GSM8K
    | (?i:\b(?:final[ \t]+)?answer\b) [ \t*_]* (?:[:=]|(?i:\bis\b)[ \t*_]*:?) [ \t]*
    """,
    re.VERBOSE,
)
_MATH_SPAN = re.compile(
    r"\$\$(?P<a>[^$]{1,4000})\$\$|\$(?P<b>(?:\\\$|[^$\n]){1,2000})\$"
    r"|\\\((?P<c>(?:[^\\]|\\(?!\))){1,2000})\\\)|\\\[(?P<d>(?:[^\\]|\\(?!\])){1,4000})\\\]"
)
_SENTENCE_END = re.compile(r"\.(?=\s|$)|[;!?](?=\s|$)")


def last_announced(text: str) -> str | None:
    """What follows the last phrase such as "the final answer is", up to the end of its sentence."""
    for match in reversed(list(_ANNOUNCED.finditer(text))):
        answer = _clean_announced(_first_line(text, match.end()))
        if answer:
            return answer
    return None


def _first_line(text: str, start: int) -> str:
    """The line at `start`; where that is empty (``Answer:`` above a displayed formula), the next one that is not."""
    window = text[start : start + PHRASE_ANSWER_CHARS].lstrip(" \t*_:\n")
    if window.startswith(("$$", "\\[")):
        return window
    return window.split("\n", 1)[0]


def _clean_announced(line: str) -> str:
    line = line.strip().strip("*_` ").strip()
    span = _MATH_SPAN.match(line)
    if span:
        return _span_content(span)
    end = _SENTENCE_END.search(line)
    if end:
        line = line[: end.start()]
    said = re.split(r"\b(?:is|are|equals)\b", line)[-1].strip(" :*_`")  # "the largest $n$ is 34"
    for part in dict.fromkeys((said, line)):
        inner = _MATH_SPAN.search(part)  # "answer is the number $3$"
        if inner:
            return _span_content(inner)
        numbers = [m.group().strip() for m in _NUMBER.finditer(part) if m.group().strip()]
        if len(numbers) == 1 and len(_WORD.findall(part)) >= 3:  # "they met 3 hours ago"
            return numbers[0]
        if part is said and part and not _WORD.search(part):
            return part.rstrip(".,; ")
    return line.strip().strip("*_` ").rstrip(".,;")


def _span_content(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None).strip()


_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[ ]?/[ ]?\d+)?(?:[eE][-+]?\d+)?(?:[ ]?\\?%)?"
)


_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
ONLY_EXPRESSION_CHARS = 200


def only_expression(text: str) -> str | None:
    r"""The text itself, if it is one line of mathematics without a word of language: ``\frac{10}{9}``, ``x = 3``."""
    line = text.strip()
    if not line or len(line) > ONLY_EXPRESSION_CHARS or "\n" in line or "$" in line or _WORD.search(line):
        return None
    if not re.search(r"\d|[=+*/^\\]", line):
        return None
    return line.rstrip(".,;").strip() or None


def last_expression(text: str) -> str | None:
    r"""The last ``$...$``, ``\(...\)``, ``\[...\]`` or number in the final characters of the text."""
    tail = text[-LAST_EXPRESSION_WINDOW_CHARS:]
    best: tuple[int, str] | None = None
    for match in _MATH_SPAN.finditer(tail):
        if _span_content(match):
            best = (match.end(), _span_content(match))
    for match in _NUMBER.finditer(tail):
        if match.group().strip() and (best is None or match.start() >= best[0]):
            best = (match.end(), match.group().strip())
    return best[1] if best else None
