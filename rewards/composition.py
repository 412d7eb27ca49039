"""A reward made of several terms: a weighted sum, gates, and one metric a term.

    rewards:
      terms:
        - {kind: verifier}                                             # right or wrong, weight 1
        - {kind: well_formed, weight: 0.1}
        - {kind: memento_length, weight: 0.1, high: 200}
        - {kind: custom, name: polite, function: "my_rewards:polite", weight: 0.2, gate: 0.5}

Every term gives a `RewardResult`; `compose` puts them together and is a pure function. A term without a score (its
verifier timed out, died or raised) leaves the whole sample without a score: a failure is never a number, not even one
of several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import JsonValue

from memento.config import RewardTermConfig
from memento.errors import UserError
from memento.rewards.format_terms import TraceShape, length_score, well_formed
from memento.rewards.workers import Reply, Status
from memento.trajectory import Outcome, RewardResult

DETAIL_CHARS = 1000
"""How much of what a custom reward says is kept."""


class Term(NamedTuple):
    """One term of a sample's reward: how it counts, and what came of it."""

    config: RewardTermConfig
    result: RewardResult

    @property
    def score(self) -> float | None:
        """What is weighted and gated: the result's score, or the part of it that the config names, where it has it."""
        if self.result.score is None or self.config.part is None:
            return self.result.score
        return self.result.parts.get(self.config.part, self.result.score)


def compose(terms: Sequence[Term]) -> RewardResult:
    """One verdict from several: ``sum(weight * score)``, or 0 where a gate is shut.

    The outcome, the extracted answer and the detail are those of the verifier, or of the first custom term where there
    is no verifier: accuracy stays what it was, whatever is added to the reward. ``parts`` holds the score of every term
    by name beside the parts of its own result; ``metadata["gated_by"]`` names the gate that is shut.

    Returns:
        A result with a score; or, if any term has none, one without, with that term's outcome and reason.
    """
    judge = next(term for term in terms if term.config.judges).result
    parts = {name: value for term in terms for name, value in term.result.parts.items()}
    parts |= {term.config.label: score for term in terms if (score := term.score) is not None}
    failed = next((term for term in terms if term.score is None), None)
    if failed is not None:
        detail = f"{failed.config.label}: {failed.result.detail}"
        return judge.model_copy(
            update={"score": None, "outcome": failed.result.outcome, "parts": parts, "detail": detail}
        )
    scores = [(term.config, score) for term in terms if (score := term.score) is not None]
    shut = next((term.label for term, score in scores if term.gate is not None and score < term.gate), None)
    total = 0.0 if shut is not None else math.fsum(term.weight * score for term, score in scores)
    metadata: dict[str, JsonValue] = judge.metadata if shut is None else {**judge.metadata, "gated_by": shut}
    return judge.model_copy(update={"score": total, "parts": parts, "metadata": metadata})


def format_term(config: RewardTermConfig, shape: TraceShape | None) -> RewardResult:
    """The score of a format term. Its outcome says nothing and is never shown.

    Raises:
        UserError: the completion comes without its tokens, so there is no format to look at.
    """
    if shape is None:
        raise UserError(
            f"rewards.terms: {config.kind} reads blocks and mementos from token ids, and only text was given. Score "
            "trajectories, with the model's delimiters (memento score ... --model FOLDER), or leave the term out."
        )
    if config.kind == "well_formed":
        score = well_formed(shape)
    else:
        lengths = shape.memento_tokens if config.kind == "memento_length" else shape.block_tokens
        score = length_score(lengths, config.low, config.high)
    return RewardResult(score=score, outcome=Outcome.CORRECT)


def custom_result(config: RewardTermConfig, reply: Reply) -> RewardResult:
    """What a custom reward's worker answered, as a verdict.

    A number is a score; it is correct from 1 on, and wrong below. A mapping may say more: ``score`` (or null for "I
    cannot tell"), ``outcome``, ``detail``, ``extracted``, ``parts``. Anything else, a number that is not finite, an
    exception and a dead worker are verifier errors; a worker that passed its deadline is a timeout. None of these has
    a score.
    """
    if reply.status in (Status.TIMEOUT, Status.OUT_OF_MEMORY):
        return RewardResult(score=None, outcome=Outcome.TIMEOUT, detail=reply.detail[:DETAIL_CHARS])
    if reply.status is Status.ERROR:
        return _broken(reply.detail)
    said = reply.value
    if isinstance(said, bool | int | float):
        said = {"score": said}
    if not isinstance(said, dict) or not set(said) <= {"score", "outcome", "detail", "extracted", "parts"}:
        return _broken(
            f"{config.function} returned {str(reply.value)[:200]!r}; it must return a number, or a mapping of score, "
            "outcome, detail, extracted, parts"
        )
    score = said.get("score")
    if score is None:
        return _broken(str(said.get("detail") or f"{config.function} gave no score"))
    if not isinstance(score, int | float) or not math.isfinite(score):
        return _broken(f"{config.function} returned the score {score!r}, which is no finite number")
    try:
        return RewardResult.model_validate(
            {
                "score": float(score),
                "outcome": said.get("outcome", Outcome.CORRECT if score >= 1 else Outcome.WRONG),
                "parts": said.get("parts") or {},
                "extracted": said.get("extracted"),
                "detail": str(said.get("detail", ""))[:DETAIL_CHARS],
            }
        )
    except ValueError as error:
        return _broken(f"{config.function} returned a mapping that is no verdict: {error}")


def _broken(detail: str) -> RewardResult:
    return RewardResult(score=None, outcome=Outcome.VERIFIER_ERROR, detail=detail[:DETAIL_CHARS])
