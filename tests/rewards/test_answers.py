"""Extraction: what the model said, whatever it looks like."""

import time

import pytest

from memento.rewards.answers import AnswerSource, find_answer, last_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{3}", "3"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed { 5 }", "5"),
        (r"\fbox{5}", "5"),
        (r"so \boxed 12.", "12"),
        (r"\boxed{4} and, cut off, \boxed{12", "4"),
        (r"\boxed{4} \boxed{}", "4"),
        (r"} stray { \boxed{9} }", "9"),
        (r"a line break \\\boxed{9}", "9"),
        (r"\boxed{12", None),
        ("no box", None),
    ],
)
def test_last_box(text: str, answer: str | None):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer", "source"),
    [
        ("The answer is 42.", "42", AnswerSource.PHRASE),
        ("The final answer is: $x = 3$. I hope it is correct.", "x = 3", AnswerSource.PHRASE),
        ("**Answer:** 12", "12", AnswerSource.PHRASE),
        ("**Final Answer**: 1.5", "1.5", AnswerSource.PHRASE),
        ("Answer:\n$$\\frac{1}{2}$$", r"\frac{1}{2}", AnswerSource.PHRASE),
        ("work 1+1=2\n#### 1,234", "1,234", AnswerSource.PHRASE),
        ("The answer is 3.5. Bye.", "3.5", AnswerSource.PHRASE),
        ("Answer: 3\nNo wait. Answer: 4", "4", AnswerSource.PHRASE),
        ("The answer is 4, thus \\boxed{5}", "5", AnswerSource.BOXED),
        ("we get $a = 1$ and then $b = 2$", "b = 2", AnswerSource.LAST_EXPRESSION),
        ("we get 17 apples", "17", AnswerSource.LAST_EXPRESSION),
        ("it rose by -3.5%", "-3.5%", AnswerSource.LAST_EXPRESSION),
        ("about 3/4 of them", "3/4", AnswerSource.LAST_EXPRESSION),
        ("hence \\(2\\pi\\)", r"2\pi", AnswerSource.LAST_EXPRESSION),
    ],
)
def test_sources_in_order(text: str, answer: str, source: AnswerSource):
    assert find_answer(text) == (answer, source)


def test_only_after_thinking():
    assert find_answer(r"<think>\boxed{1}</think>The answer is 2") == ("2", AnswerSource.PHRASE)
    assert find_answer(r"<think>\boxed{1}</think>") is None
    assert find_answer(r"<think>it is \boxed{1}") == ("1", AnswerSource.BOXED)  # cut off while thinking
    assert find_answer("") is None
    assert find_answer("words only") is None


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 150_000,
        "{" * 1_000_000,
        "}" * 1_000_000,
        "answer is " * 100_000,
        "answer: $" * 110_000,
        "$" * 1_000_000,
        "\\$" * 500_000,
        "\\boxed{1} and " * 70_000,
        "answer is is " * 80_000,
        "\\(" * 500_000,
        "7" * 1_000_000,
        "1," * 500_000,
        "a1 " * 330_000 + r"\boxed{5}",
        "```python\n" * 100_000,
        "\\\\" * 500_000,
        "\x00\ud800" * 300_000,
        " " * 1_000_000,
        "answer" + " " * 1_000_000,
    ],
    ids=range(18),
)
def test_a_megabyte_of_anything_is_read_in_linear_time(text: str):
    start = time.process_time()
    find_answer(text)
    assert time.process_time() - start < 3.0


def test_last_box_at_the_end_of_a_megabyte():
    assert find_answer("x = 1 " * 170_000 + r"\boxed{\text{ok}}") == (r"\text{ok}", AnswerSource.BOXED)
