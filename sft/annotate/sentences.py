"""Text to atomic units: the pieces between which a block may end.

Nothing is lost: ``"".join(split_units(text)) == text``. A unit is never cut inside a code block, display math or inline
math. Fragments that make no sense alone are joined to their neighbour (MEMENTO, arXiv 2604.09852, section on data):
what follows a colon or an equals sign, continuations (Therefore, Thus, So), fragments of under five words, and display
math after display math.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

FRAGMENT_WORDS = 5
"""Shorter units are joined to their neighbour."""
LONGEST_JOINED_WORDS = 150
"""A unit this long takes no continuation any more, so that a trace of nothing but "So ..." still has boundaries."""

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)", re.MULTILINE)
_MATH = re.compile(
    r"\$\$.+?\$\$"
    r"|\\\[.+?\\\]"
    r"|\\begin\{(?P<name>[a-zA-Z]+\*?)\}.+?\\end\{(?P=name)\}"
    r"|\\\(.{1,2000}?\\\)"
    r"|(?<![\\$\w])\$(?=\S)[^$\n]{1,500}?(?<=[^\s\\])\$(?![\d$])",
    re.DOTALL,
)
_END = re.compile(r"[.!?。！？]+[\"')\]}*_]*(?=\s)|\n")
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|cf|vs|eq|eqs|fig|figs|sec|thm|lem|prop|def|resp|approx|no|dr|mr|mrs|ms|prof|st)|\b[A-Z])\.$",
    re.IGNORECASE,
)
_INITIAL = re.compile(r"(?:^|\s)[A-Z]\.$")
_ENUMERATOR = re.compile(r"(?:^|\n)[ \t]*(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{1,4})\.$")
_CONTINUATION = re.compile(
    r"(?:therefore|thus|so|hence|consequently|accordingly|then|which|where|and|or|but then|that is|i\.e\.)\b",
    re.IGNORECASE,
)
_DISPLAY_MATH = re.compile(r"\s*(?:\$\$.*\$\$|\\\[.*\\\]|\\begin\{.*\\end\{[a-zA-Z]+\*?\})[\s.,;]*", re.DOTALL)


def split_units(text: str) -> list[str]:
    """The atomic units of a text, in order, each with the white space that follows it.

    Returns:
        Units whose concatenation is `text`; none for a text of white space only.
    """
    if not text.strip():
        return []
    return _join(_pieces(text))


def protected_spans(text: str) -> list[tuple[int, int]]:
    """Half-open spans of code blocks and math, in order, without overlap. A fence that never closes runs to the end."""
    spans: list[tuple[int, int]] = []
    fences = list(_FENCE.finditer(text))
    index = 0
    while index < len(fences):
        opening = fences[index]
        mark = opening.group(1)
        closing = next((f for f in fences[index + 1 :] if f.group(1).startswith(mark)), None)
        if closing is None:
            spans.append((opening.start(), len(text)))
            break
        line_end = text.find("\n", closing.end())
        spans.append((opening.start(), len(text) if line_end < 0 else line_end))
        index = fences.index(closing) + 1
    outside, position = [], 0
    for start, end in spans:
        outside.append((position, start))
        position = end
    outside.append((position, len(text)))
    for start, end in outside:
        spans += [(m.start(), m.end()) for m in _MATH.finditer(text, start, end)]
    return sorted(spans)


def _pieces(text: str) -> Iterator[str]:
    """Sentences and lines, before anything is joined."""
    protected = protected_spans(text)
    start, at = 0, 0
    for match in _END.finditer(text):
        end = match.end()
        if end <= start:
            continue
        while at < len(protected) and protected[at][1] <= match.start():
            at += 1
        if at < len(protected) and protected[at][0] <= match.start() < protected[at][1]:
            continue
        if match.group() != "\n" and _no_end(text[max(start, end - 24) : end]):
            continue
        while end < len(text) and text[end].isspace():
            end += 1
        if text[start:end].strip():
            yield text[start:end]
            start = end
    if start < len(text):
        yield text[start:]


def _no_end(tail: str) -> bool:
    """Whether the full stop at the end of `tail` belongs to an abbreviation, an initial or a list number."""
    return bool(_ABBREVIATION.search(tail) or _INITIAL.search(tail) or _ENUMERATOR.search(tail))


def _join(pieces: Iterator[str]) -> list[str]:
    units: list[str] = []
    for piece in pieces:
        if units and _belongs(units[-1], piece):
            units[-1] += piece
        else:
            units.append(piece)
    if len(units) > 1 and _words(units[0]) < FRAGMENT_WORDS:
        units[:2] = [units[0] + units[1]]
    return units


def _belongs(before: str, piece: str) -> bool:
    """Whether `piece` is joined to the unit before it."""
    if before.rstrip().endswith((":", "=")):
        return True
    if _DISPLAY_MATH.fullmatch(piece) and _DISPLAY_MATH.fullmatch(before):
        return True
    if _words(before) >= LONGEST_JOINED_WORDS:
        return False
    if _words(piece) < FRAGMENT_WORDS and not piece.lstrip().startswith(("```", "~~~")):
        return True
    return _words(before) < FRAGMENT_WORDS or _CONTINUATION.match(piece) is not None


def _words(text: str) -> int:
    return len(text.split())
