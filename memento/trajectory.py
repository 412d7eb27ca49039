"""What a rollout leaves behind. Trajectories are data: frozen, picklable, one JSON line each.

`memento generate` writes them without a learner; training can read them back without an engine. Token ids are the
truth: nothing downstream ever tokenises text again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import Field, JsonValue, ValidationError, model_validator

from memento.errors import UserError
from memento.format import Eviction
from memento.problems import Problem, Record, explain


class FinishReason(StrEnum):
    """Why a completion ended. Truncation is read from here, never from a length."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class VersionSpan(NamedTuple):
    """Completion tokens ``[start, end)`` were sampled under weight version ``version``."""

    start: int
    end: int
    version: int


class SamplingParams(Record):
    """How one completion is sampled. `max_tokens` counts completion tokens."""

    temperature: float = Field(ge=0)
    max_tokens: int = Field(gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=-1, ge=-1)


class RolloutRequest(Record):
    """A group to generate: `group_size` completions of one problem.

    Attributes:
        group_id: unique in the run, e.g. ``"12/sum-17"`` (step / problem id).
        seed: the run's seed; every sample derives its own (see `sample_seed`).
        evict: False generates with plain full attention (for baselines).
    """

    problem: Problem
    group_id: str
    group_size: int = Field(gt=0)
    sampling: SamplingParams
    seed: int
    evict: bool = True


def sample_seed(seed: int, group_id: str, sample_index: int) -> int:
    """The seed of one sample: a function of run, group and index, never of the engine that happens to serve it.

    So n samples of a group differ, the same run twice is identical, and adding an engine changes nothing.
    """
    digest = hashlib.blake2b(f"{seed}/{group_id}/{sample_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # vLLM takes a signed 64-bit seed


class Trajectory(Record):
    """One sampled completion, with everything the learner and the metrics need.

    Attributes:
        prompt_ids: [P] token ids of the rendered prompt.
        completion_ids: [C] token ids as they left the sampler, the end token included.
        rollout_logprobs: [C] log-probability of each completion token under the processed (temperature-scaled)
            distribution it was sampled from. A forced token's is 0: the cap left no other choice.
        forced: positions in the completion that the block cap wrote; never sampled, so never in a loss.
        weight_versions: which weights sampled which tokens; spans cover [0, C) in order.
        evictions: evictions the engine really carried out, in absolute positions (prompt included).
        peak_kv_tokens, kv_area_tokens: peak, and sum over generated tokens, of the resident KV tokens.
        peak_kv_pages: most pages the request held at once.
        preemptions: how often the engine dropped and replayed it.
        seconds: from the request's arrival at its engine to its last token.
    """

    problem_id: str
    group_id: str
    sample_index: int = Field(ge=0)
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    forced: tuple[int, ...] = ()
    text: str
    finish_reason: FinishReason
    weight_versions: tuple[VersionSpan, ...]
    evictions: tuple[Eviction, ...] = ()
    evicted_tokens: int = 0
    peak_kv_tokens: int
    peak_kv_pages: int
    kv_area_tokens: int
    preemptions: int = 0
    seed: int
    temperature: float
    evict: bool = True
    engine: int = 0
    seconds: float

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.rollout_logprobs) != len(self.completion_ids):
            raise ValueError(
                f"{len(self.completion_ids)} completion tokens but {len(self.rollout_logprobs)} rollout_logprobs; "
                "a missing log-probability is an error, not 0.0"
            )
        return self

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and completion, [P + C]."""
        return self.prompt_ids + self.completion_ids

    @property
    def prompt_len(self) -> int:
        """P, the number of prompt tokens."""
        return len(self.prompt_ids)

    @property
    def truncated(self) -> bool:
        """Whether the completion hit a length limit."""
        return self.finish_reason is FinishReason.LENGTH

    @property
    def oldest_version(self) -> int:
        """The oldest weights that sampled any of its tokens."""
        return min(span.version for span in self.weight_versions)


class Outcome(StrEnum):
    """How a verification ended. Only the first three are verdicts about the completion."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    """The completion holds no answer that can be read."""
    TIMEOUT = "timeout"
    """The answer could not be verified in time. Scored 0 for code (the program is slow), excluded for math."""
    VERIFIER_ERROR = "verifier_error"
    """The verifier itself failed: no score exists, the sample is excluded and counted."""


class RewardResult(Record):
    """The verdict on one completion. `score` is None exactly when there is no verdict: a failure is never a number."""

    score: float | None
    outcome: Outcome
    parts: dict[str, float] = Field(default_factory=dict)
    """Score of each component (e.g. ``{"math": 1.0}`` or ``{"tests_passed": 0.5}``)."""
    extracted: str | None = None
    """The answer or program that was judged."""
    detail: str = ""
    """For people: first failing test, exception, reason of the exclusion."""
    seconds: float = 0.0
    metadata: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _no_number_for_a_failure(self) -> Self:
        if self.outcome is Outcome.VERIFIER_ERROR and self.score is not None:
            raise ValueError("a verifier error has no score")
        if self.outcome in (Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSABLE) and self.score is None:
            raise ValueError(f"outcome {self.outcome.value} needs a score")
        return self


class ScoredGroup(Record):
    """All completions of one problem with their rewards, in `sample_index` order."""

    problem: Problem
    trajectories: tuple[Trajectory, ...]
    rewards: tuple[RewardResult, ...]

    @model_validator(mode="after")
    def _not_ragged(self) -> Self:
        if not self.trajectories or len(self.trajectories) != len(self.rewards):
            raise ValueError(f"{len(self.trajectories)} trajectories but {len(self.rewards)} rewards in a group")
        return self

    @property
    def complete(self) -> bool:
        """Whether every sample has a score. Incomplete groups never reach the loss."""
        return all(reward.score is not None for reward in self.rewards)

    @property
    def scores(self) -> tuple[float, ...]:
        """[G] scores; raises ValueError if one is missing."""
        scores = tuple(reward.score for reward in self.rewards if reward.score is not None)
        if len(scores) != len(self.rewards):
            raise ValueError(f"group {self.trajectories[0].group_id} has a sample without a score")
        return scores


def append_jsonl(records: Iterable[Record], path: str | Path) -> None:
    """Append records to a JSONL file, one line each."""
    with Path(path).open("a", encoding="utf-8") as file:
        for record in records:
            file.write(record.model_dump_json() + "\n")


def read_scored(path: str | Path) -> Iterator[tuple[Trajectory, tuple[RewardResult, ...], int]]:
    """Trajectories of a JSONL file one by one, with the verdicts of their group and their place in it.

    Plain trajectories (`memento generate`) have no verdicts.

    Raises:
        UserError: no such file, or a line that is neither a trajectory nor a scored group (file and line number).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no trajectory file at {path}. A run's is rollouts.jsonl; `memento generate` writes others.")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                if '"trajectories"' in line:
                    group = ScoredGroup.model_validate_json(line)
                    for place, trajectory in enumerate(group.trajectories):
                        yield trajectory, group.rewards, place
                else:
                    yield Trajectory.model_validate_json(line), (), 0
            except ValidationError as error:
                raise UserError(f"{path}, line {number} is not a trajectory: {explain(error)}.") from error


def read_trajectories(path: str | Path) -> Iterator[Trajectory]:
    """The trajectories of `read_scored` alone."""
    return (trajectory for trajectory, _, _ in read_scored(path))
