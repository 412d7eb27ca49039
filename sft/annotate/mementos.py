"""One memento a block: written by a language model, judged by one, and rewritten with the judge's feedback.

The judge gives 0 to 10 points (formulas 3, values 2, methods 2, validation 1, faithful 1, result first 1); a memento is
accepted from 8 on, after at most two rounds of feedback (MEMENTO, arXiv 2604.09852, section on data: 28 % pass at once,
92 % with feedback).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memento.format import DELIMITERS
from memento.problems import Record
from memento.sft.annotate.endpoint import Endpoint, Malformed
from memento.sft.annotate.messages import read_object, render, strip_thinking

POINTS = {"formulas": 3, "values": 2, "methods": 2, "validation": 1, "faithful": 1, "result": 1}
"""What the judge looks at, and the most points for each."""
TARGET = (0.15, 0.25)
"""Length of a memento over that of its block."""


class Round(Record):
    """One memento and its verdict.

    Attributes:
        memento: the text.
        score: 0 to 10.
        feedback: what the judge wants changed.
    """

    memento: str
    score: float
    feedback: str


@dataclass(frozen=True, slots=True)
class MementoSettings:
    """How mementos are made.

    Attributes:
        accept: score from which a memento is taken as it is.
        rounds: of feedback, at most.
    """

    accept: float = 8.0
    rounds: int = 2


async def write_memento(
    endpoint: Endpoint, problem: str, block: str, number: int, blocks: int, settings: MementoSettings
) -> tuple[Round, ...]:
    """All rounds for one block, the first included; the best of them is the memento.

    Raises:
        NoAnswer: writer or judge gave nothing usable.
    """
    words = len(block.split())
    shared = {
        "problem": problem.strip(),
        "block": block.strip(),
        "number": number,
        "blocks": blocks,
        "low": max(1, round(TARGET[0] * words)),
        "high": max(4, round(TARGET[1] * words)),
    }
    memento = await endpoint.ask("memento", *render("memento", **shared), read=_read_memento)
    done = [await _judge(endpoint, shared, memento)]
    while done[-1].score < settings.accept and len(done) <= settings.rounds:
        last = done[-1]
        asked = render(
            "revise", **shared, memento=last.memento, score=last.score, feedback=last.feedback or "be more complete"
        )
        memento = await endpoint.ask("revision", *asked, read=_read_memento)
        done.append(await _judge(endpoint, shared, memento))
    return tuple(done)


def best(rounds: tuple[Round, ...]) -> Round:
    """The round with the highest score, the later of equal ones."""
    return max(reversed(rounds), key=lambda r: r.score)


async def _judge(endpoint: Endpoint, shared: dict[str, Any], memento: str) -> Round:
    def read(text: str) -> Round:
        verdict = read_object(text)
        score = 0.0
        for name, most in POINTS.items():
            points = verdict.get(name)
            if not isinstance(points, int | float) or isinstance(points, bool) or not 0 <= points <= most:
                raise Malformed(f"{name} must be a number from 0 to {most}, got {points!r}")
            score += points
        feedback = verdict.get("feedback", "")
        if not isinstance(feedback, str):
            raise Malformed("feedback must be text")
        return Round(memento=memento, score=score, feedback=feedback)

    judged = {name: shared[name] for name in ("problem", "block")}
    return await endpoint.ask("judge", *render("judge", **judged, memento=memento), read=read)


def _read_memento(text: str) -> str:
    memento = strip_thinking(text).removeprefix("<memento>").removesuffix("</memento>").strip()
    if not memento:
        raise Malformed("an empty memento")
    if any(token in memento for token in DELIMITERS) or "<think>" in memento:
        raise Malformed("a delimiter or <think> inside the memento")
    return memento
