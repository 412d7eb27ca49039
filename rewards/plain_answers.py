r"""Answers that are written plainly, compared exactly and at once: numbers, tuples and sets of them, 3\pi, 2\sqrt{3}.

Most gold answers of GSM8K, AIME and MATH are of this kind, and a verifier that imports SymPy for "12" wastes its time.
`same_plainly` gives a verdict only where both answers read in one way; everything else is left to math-verify, with
which it agrees wherever both give one (tests/rewards/test_math.py).
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_GROUP = r"(?:,?[ ]?\\![ ]?|,|\{,\}|,?\\,|[ ]|\\[ ])"  # between thousands
_NUMBER = re.compile(
    rf"(?:(?P<whole>\d{{1,3}}(?:{_GROUP}\d{{3}})+|\d{{1,40}})?(?P<decimals>\.\d{{1,40}})?)(?:/(?P<under>\d{{1,40}}))?"
)
_FRACTION = re.compile(
    r"(?P<mixed>\d{1,15}(?=[ ]?\\|[ ]))?[ ]?"
    r"(?:\\[dtc]?frac[ ]?(?:\{(?P<over>-?\d{1,40})\}|(?P<o>\d))[ ]?(?:\{(?P<under>-?\d{1,40})\}|(?P<u>\d))"
    r"|(?P<a>\d{1,40})/(?P<b>\d{1,40}))"
)


_PARENTHESES = re.compile(r"(?:\\left\s*\(\s*([^()]*?)\s*\\right\s*\))|(?:\(\s*([^()]*?)\s*\))")


class Number(NamedTuple):
    """A number as it is written. `exact` says that no decimal point was used, so it is not rounded."""

    value: Fraction
    exact: bool


def as_number(text: str) -> Number | None:
    r"""A number written plainly: ``-3``, ``1,234``, ``\$5``, ``.5``, ``3/4``, ``\frac34``, ``1 \frac{1}{2}``, ``(-7)``.

    Anything else, and anything that could be read in two ways (``0,5``, ``1,22``, ``3\%``), gives None.
    """
    plain = text.strip().removesuffix(".").strip()
    negative = plain[:1] in ("-", "−")
    plain = plain[negative or plain[:1] == "+" :].lstrip().removeprefix("\\$").removeprefix("$").lstrip()
    if (inside := _PARENTHESES.fullmatch(plain)) and (number := as_number(inside[1] or inside[2] or "")):
        return number._replace(value=-number.value if negative else number.value)
    match, value, exact = _FRACTION.fullmatch(plain), None, True
    if match:
        over, under = (int(match[x] or match[y] or match[z]) for x, y, z in (("over", "o", "a"), ("under", "u", "b")))
        if match["mixed"] is None:
            value = Fraction(over, under) if under else None
        elif 0 < over < under:  # 1 3/2 is no mixed number
            value = int(match["mixed"]) + Fraction(over, under)
    elif (match := _NUMBER.fullmatch(plain)) and (match["whole"] or match["decimals"]):
        exact = match["decimals"] is None
        value = Fraction(re.sub(r"\D", "", match["whole"] or "0") + (match["decimals"] or ""))
        if match["under"] is not None:
            value = value / int(match["under"]) if int(match["under"]) else None
    return None if value is None else Number(-value if negative else value, exact)


def same_number(gold: Number, answer: Number) -> bool:
    """Whether two numbers are equal; a decimal may be rounded in its sixth place, as math-verify has it.

    So 0.333333 is 1/3. But the difference must also be small against the numbers: 0.0000001 is not 0.0000002.
    """
    if gold.value == answer.value:
        return True
    if gold.exact and answer.exact:
        return False
    difference = abs(gold.value - answer.value)
    return difference < Fraction(1, 10**6) and difference <= max(abs(gold.value), abs(answer.value)) / 500_000


_BASED = re.compile(r"\s*([0-9A-F]+)_(?:\{\s*)?(\d+)\s*\}?\s*")
"""A number in another base than ten: ``204_5``."""

_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")

_LABEL = re.compile(r"([A-Za-z])\s*=\s*(.+)", re.DOTALL)
_PERCENT = re.compile(r"(.+?)\s*\\?%")
_BRACKETS = re.compile(r"(?:\\left\s*)?(\(|\[|\\\{)(.*?)(?:\\right\s*)?(\)|\]|\\\})", re.DOTALL)
_PI = re.compile(r"(?P<sign>[-+]?)\s*(?P<over>\d{1,9})?\s*(?:\\cdot|\\times|\*)?\s*\\pi(?:\s*/\s*(?P<under>\d{1,9}))?")
_PI_FRACTION = re.compile(r"(?P<sign>[-+]?)\s*\\[dt]?frac\{\s*(?P<over>\d{0,9})\s*\\pi\s*\}\{(?P<under>\d{1,9})\}")
_FRACTION_PI = re.compile(r"(?P<sign>[-+]?)\s*\\[dt]?frac\{(?P<over>\d{1,9})\}\{(?P<under>\d{1,9})\}\s*\\pi")
_ROOT = re.compile(
    r"(?P<sign>[-+]?)\s*(?P<factor>\d{1,9})?\s*(?:\\cdot)?\s*\\sqrt\s*(?:\{(?P<under>\d{1,12})\}|(?P<digit>\d))"
)


def same_plainly(gold: str, answer: str) -> bool | None:
    """Whether two answers are equal, where both are written plainly; None where it takes more than that."""
    gold, answer = gold.strip(), answer.strip().removesuffix(".").rstrip()
    based = _BASED.fullmatch(gold)
    if based:  # SymPy would drop the base
        said = _BASED.fullmatch(answer)
        return based.groups() == said.groups() if said else based[1] == answer
    gold_label, answer_label = _LABEL.fullmatch(gold), _LABEL.fullmatch(answer)
    if gold_label and answer_label and gold_label[1] != answer_label[1]:
        return None
    gold = gold_label[2].strip() if gold_label else gold  # x = 3 is 3
    answer = answer_label[2].strip() if answer_label else answer
    percents = _PERCENT.fullmatch(gold), _PERCENT.fullmatch(answer)
    if percents[0] and percents[1]:
        gold, answer = percents[0][1], percents[1][1]
    for compare in (_same_number, _same_pi, _same_root, _same_entries):
        verdict = compare(gold, answer)
        if verdict is not None:
            return verdict
    return None


def _same_number(gold: str, answer: str) -> bool | None:
    gold_number, answer_number = as_number(gold), as_number(answer)
    if gold_number is not None and not gold_number.exact and _DECIMAL_COMMA.fullmatch(answer):
        answer_number = as_number(answer.replace(",", "."))  # 2,74 for 2.74: no list is meant
    if gold_number is None or answer_number is None:
        return None
    return same_number(gold_number, answer_number)


def _same_pi(gold: str, answer: str) -> bool | None:
    sides = [_times_pi(text) for text in (gold, answer)]
    return None if None in sides else sides[0] == sides[1]


def _times_pi(text: str) -> Fraction | None:
    r"""By what pi is multiplied: 3/2 for ``3\pi/2``."""
    match = _PI.fullmatch(text) or _PI_FRACTION.fullmatch(text) or _FRACTION_PI.fullmatch(text)
    if not match or (match["under"] is not None and int(match["under"]) == 0):
        return None
    return Fraction(int(f"{match['sign']}1") * int(match["over"] or 1), int(match["under"] or 1))


def _same_root(gold: str, answer: str) -> bool | None:
    sides = [_signed_square(text) for text in (gold, answer)]
    return None if None in sides else sides[0] == sides[1]


def _signed_square(text: str) -> Fraction | None:
    r"""The square of ``a\sqrt{b}`` or of an exact number, with the number's own sign."""
    match = _ROOT.fullmatch(text)
    if match:
        under = int(match["under"] or match["digit"])
        return Fraction(int(f"{match['sign']}1") * int(match["factor"] or 1) ** 2 * under)
    number = as_number(text)
    return number.value * abs(number.value) if number is not None and number.exact else None


def _same_entries(gold: str, answer: str) -> bool | None:
    """Tuples and intervals by place, with their brackets; sets in any order."""
    inside = [_BRACKETS.fullmatch(text) for text in (gold, answer)]
    if inside[0] is None or inside[1] is None:
        return None
    brackets = [(match[1], match[3]) for match in inside if match]
    entries = [[as_number(entry) for entry in match[2].split(",")] for match in inside if match]
    if any(number is None for side in entries for number in side) or max(map(len, entries)) < 2:
        return None
    golds, answers = ([number for number in side if number is not None] for side in entries)
    curly = [pair == ("\\{", "\\}") for pair in brackets]
    if curly == [True, True]:
        found = [any(same_number(g, a) for a in answers) for g in golds]
        return all(found) and all(any(same_number(g, a) for g in golds) for a in answers)
    if any(curly) or "\\{" in brackets[0] + brackets[1] or "\\}" in brackets[0] + brackets[1]:
        return None
    if brackets[0] != brackets[1] or len(golds) != len(answers):
        return False
    return all(same_number(g, a) for g, a in zip(golds, answers, strict=True))
