"""Atomic units: nothing lost, code and math never cut, fragments joined."""

from __future__ import annotations

from random import Random

import pytest

from memento.arithmetic import make_traces
from memento.sft.annotate.sentences import LONGEST_JOINED_WORDS, protected_spans, split_units

PROSE = (
    "First we look at the sum of the terms. It is equal to 3.5 and not to 4. Is that the whole story here? "
    "Dr. Smith, e.g. in Fig. 3 of the book, says no! Let me now try another approach with primes."
)


def test_sentences_of_prose() -> None:
    assert [unit.strip() for unit in split_units(PROSE)] == [
        "First we look at the sum of the terms.",
        "It is equal to 3.5 and not to 4.",
        "Is that the whole story here?",
        "Dr. Smith, e.g. in Fig. 3 of the book, says no!",
        "Let me now try another approach with primes.",
    ]


@pytest.mark.parametrize(
    "inside",
    [
        "```python\nx = 1. \nprint(x). And so on to the end of it.\n\ny = 2\n```",
        "~~~\nNo end. Here it goes on and on. And on.\n~~~",
        "$$ a = b. \n c = d. $$",
        "\\[ a = b. \n\n c = d. \\]",
        "\\begin{align*} a &= b. \\\\ \n c &= d. \\end{align*}",
        "\\( x. y. z \\)",
        "$x = 1. y = 2. z = 3$",
    ],
)
def test_code_and_math_are_never_cut(inside: str) -> None:
    text = f"Some words come before the protected piece here.\n{inside}\nAnd then some more words follow after it."
    start = text.index(inside)
    ends, position = set(), 0
    for unit in split_units(text):
        position += len(unit)
        ends.add(position)
    assert not any(start < end < start + len(inside) for end in ends)
    assert any(
        a <= start + inside.index(inside.strip()[0]) and start + len(inside) <= b + 1 for a, b in protected_spans(text)
    )


def test_a_fence_that_never_closes_protects_the_rest() -> None:
    text = "These are some words in front of it.\n```\ncode one. Code two goes here. Code three goes there."
    assert len(split_units(text)) == 2


def test_money_is_no_math() -> None:
    units = split_units("It costs $5 in the first of the shops. It costs $7 in the second of the shops.")
    assert len(units) == 2


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("We now compute the following value:\nthe sum of all the terms is 12.", 1),
        ("Then we have that the value x =\n3 plus the rest of the terms.", 1),
        ("The sum of the two numbers is even. Therefore the product is also an even number.", 1),
        ("The sum of the two numbers is even. Wait, no. Another line of thought begins right here.", 2),
        ("$$ a = b $$\n$$ c = d $$\n$$ e = f $$\n", 1),
        ("1. The first case is easy to see here.\n2. The second case needs more work than that.", 2),
    ],
)
def test_fragments_are_joined(text: str, units: int) -> None:
    assert len(split_units(text)) == units


def test_continuations_do_not_swallow_a_whole_trace() -> None:
    text = "So we take the next number and add it to the sum. " * 100
    units = split_units(text)
    assert len(units) > 5
    assert max(len(u.split()) for u in units) < 2 * LONGEST_JOINED_WORDS


def test_nothing_is_lost_whatever_the_text() -> None:
    rng = Random(0)
    pieces = [
        "Word. ",
        "\n",
        "$x$",
        "$$y.$$",
        "```",
        "\n```py\n",
        "So ",
        "3.5",
        ": ",
        "= ",
        "e.g. ",
        "\\[",
        "\\]",
        "é! ",
        "  ",
        "1. ",
    ]
    for _ in range(300):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 40)))
        units = split_units(text)
        assert "".join(units) == (text if text.strip() else "")
        assert all(unit.strip() for unit in units)
    for _, trace in make_traces(20, 0):
        assert "".join(split_units(trace)) == trace


def test_a_long_text_takes_no_longer_than_it_should() -> None:
    text = PROSE * 2000 + "$" * 5000 + "```\n" * 501 + "\\[ " * 3000  # 400,000 characters, many of them never closed
    assert "".join(split_units(text)) == text
