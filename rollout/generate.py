"""Completions to a JSONL file, with no learner: what `memento generate` does.

The file is its own progress record: run the same command again and only the samples it lacks are generated. The seeds
depend on problem and sample index alone, so an interrupted run and an uninterrupted one hold the same samples.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from memento.config import FormatConfig, RolloutConfig
from memento.errors import UserError
from memento.problems import Problem
from memento.trajectory import (
    RolloutRequest,
    SamplingParams,
    Trajectory,
    append_jsonl,
    read_trajectories,
    sample_seed,
)

if TYPE_CHECKING:
    from rich.console import Console

    from memento.rollout.pool import RolloutPool

GROUPS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """How many samples a call generated, and how many were in the file already."""

    generated: int
    skipped: int
    tokens: int
    seconds: float


def generate_file(
    model: str,
    problems: Sequence[Problem],
    samples: int,
    out: str | Path,
    sampling: SamplingParams,
    *,
    rollout: RolloutConfig | None = None,
    format: FormatConfig | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> GenerateResult:
    """Start engines, generate `samples` completions of every problem into `out`, and end the engines.

    Args:
        model: Hugging Face folder or hub id.
        problems: what to complete.
        samples: completions of each.
        out: JSONL of `Trajectory`; samples that it holds already are skipped.
        sampling: temperature, top-p, top-k, length.
        rollout: the engines; ``rollout.evict`` false generates with full attention.
        format: how the delimiters are used.
        seed: of the whole file.
        console: where the progress bar goes; null for stderr.

    Raises:
        UserError: `out` holds something else or cannot be written, a prompt is too long, or the engines do not start.
    """
    from memento.rollout.pool import RolloutPool

    rollout, format = rollout or RolloutConfig(), format or FormatConfig()
    have = _already_there(Path(out), sampling, rollout.evict, seed)
    if all((problem.id, index) in have for problem in problems for index in range(samples)):
        return GenerateResult(0, len(problems) * samples, 0, 0.0)
    with RolloutPool(rollout, format, model) as pool:
        return generate_into(pool, problems, samples, out, sampling, evict=rollout.evict, seed=seed, console=console)


def generate_into(
    pool: RolloutPool,
    problems: Sequence[Problem],
    samples: int,
    out: str | Path,
    sampling: SamplingParams,
    *,
    evict: bool = True,
    seed: int = 0,
    console: Console | None = None,
) -> GenerateResult:
    """As `generate_file`, on engines that run already. Groups are written as they finish, in any order."""

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    out = Path(out)
    have = _already_there(out, sampling, evict, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    began, generated, tokens = time.perf_counter(), 0, 0
    work = [
        (problem, missing)
        for problem in problems
        if (missing := [index for index in range(samples) if (problem.id, index) not in have])
    ]
    skipped = len(problems) * samples - sum(len(missing) for _, missing in work)

    def one(problem: Problem, missing: list[int]) -> tuple[Trajectory, ...]:
        request = RolloutRequest(
            problem=problem, group_id=problem.id, group_size=samples, sampling=sampling, seed=seed, evict=evict
        )
        return pool.generate(request, missing)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    threads = ThreadPoolExecutor(min(GROUPS_AT_ONCE, max(len(work), 1)))
    try:
        with Progress(*columns, console=console or Console(stderr=True)) as progress:
            bar = progress.add_task("samples", total=len(problems) * samples, completed=skipped, rate="")
            running: set[Future[tuple[Trajectory, ...]]] = {threads.submit(one, *item) for item in work}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    group = future.result()
                    _append(group, out)
                    generated += len(group)
                    tokens += sum(len(trajectory.completion_ids) for trajectory in group)
                rate = tokens / (time.perf_counter() - began)
                progress.update(bar, completed=skipped + generated, rate=f"{rate:,.0f} tokens/s")
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
    return GenerateResult(generated, skipped, tokens, time.perf_counter() - began)


def _append(group: tuple[Trajectory, ...], out: Path) -> None:
    """Write a group, or stop: what is in the file stays, and a line that was torn is cut off by the next call."""
    try:
        append_jsonl(group, out)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror}. The samples in it are safe; make room, and run the same "
            "command again for the others."
        ) from error


def _already_there(out: Path, sampling: SamplingParams, evict: bool, seed: int) -> set[tuple[str, int]]:
    """(problem id, sample index) of what `out` holds.

    Raises:
        UserError: it holds something else than this command would write.
    """
    if not out.exists():
        return set()
    _drop_torn_line(out)
    have = set()
    for trajectory in read_trajectories(out):
        if (
            trajectory.temperature != sampling.temperature
            or trajectory.evict != evict
            or trajectory.seed != sample_seed(seed, trajectory.problem_id, trajectory.sample_index)
        ):
            raise UserError(
                f"{out} holds samples made with another seed, temperature or eviction setting (first: problem "
                f"{trajectory.problem_id!r}, sample {trajectory.sample_index}). Choose another --out, or the same "
                "settings."
            )
        have.add((trajectory.problem_id, trajectory.sample_index))
    return have


def _drop_torn_line(out: Path) -> None:
    """Cut off a last line without its newline: a process that was killed had not finished writing it."""
    data = out.read_bytes()
    end = data.rfind(b"\n") + 1
    if end == len(data):
        return
    try:
        Trajectory.model_validate_json(data[end:])
    except ValidationError:
        with out.open("r+b") as file:
            file.truncate(end)
    else:
        with out.open("ab") as file:
            file.write(b"\n")
