"""`memento annotate`: many traces through all five steps, resumable, with a report.

    DIR/journal.jsonl      every answer of the endpoint, as it arrives
    DIR/annotated.jsonl    one line a finished trace (`Annotation`), as it finishes
    DIR/failed.jsonl       one line a trace that could not be annotated, with the reason
    DIR/default.jsonl      OpenMementos `default`: problem, response, domain, source, difficulty
    DIR/full.jsonl         OpenMementos `full`: that, and sentences, blocks, block_summaries
    DIR/report.json        `memento.sft.annotate.quality`

The first three are append-only. Run again, finished and failed traces are skipped and remembered answers are not asked
for again; what a kill can cost is the requests that were in flight. The last three are written at the end, from them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memento.errors import UserError
from memento.format import BLOCK_END, BLOCK_START, DELIMITERS, SUMMARY_END, SUMMARY_START
from memento.problems import Record
from memento.sft.annotate.endpoint import BudgetSpent, Endpoint, EndpointSettings, NoAnswer, Usage
from memento.sft.annotate.journal import Journal, append_line, read_lines
from memento.sft.annotate.mementos import MementoSettings, Round, best, write_memento
from memento.sft.annotate.quality import QualityReport, report
from memento.sft.annotate.scoring import WINDOWS, gather, score_boundaries
from memento.sft.annotate.segmentation import MIN_BLOCK_TOKENS, VARIANCE_WEIGHT, segment
from memento.sft.annotate.sentences import split_units
from memento.sft.rows import Row, split_thinking

TokenCounter = Callable[[str], int]


class Annotation(Record):
    """One annotated trace.

    Attributes:
        id: a hash of problem and response: the same trace has the same id in every run.
        sentences: the units; their concatenation is the reasoning.
        scores: of each boundary.
        blocks: inclusive (first, last) sentence indices.
        objective: of the segmentation.
        rounds: for each block its mementos and verdicts, in order.
        sentence_tokens: tokens of each unit.
        memento_tokens: of each block's best memento.
        answer: what stood after the reasoning.
    """

    id: str
    problem: str
    domain: str = ""
    source: str = ""
    difficulty: str | int | float | None = None
    sentences: tuple[str, ...]
    scores: tuple[float, ...]
    blocks: tuple[tuple[int, int], ...]
    objective: float
    rounds: tuple[tuple[Round, ...], ...]
    sentence_tokens: tuple[int, ...]
    memento_tokens: tuple[int, ...]
    answer: str

    @property
    def mementos(self) -> list[str]:
        """The best memento of each block."""
        return [best(rounds).memento for rounds in self.rounds]

    def block_text(self, index: int) -> str:
        """The text of a block."""
        first, last = self.blocks[index]
        return "".join(self.sentences[first : last + 1])

    @property
    def response(self) -> str:
        """The assistant turn in memento format."""
        lines = [
            f"{BLOCK_START}{self.block_text(i).strip()}{BLOCK_END}{SUMMARY_START}{memento}{SUMMARY_END}"
            for i, memento in enumerate(self.mementos)
        ]
        return "\n".join(["<think>", *lines, "</think>", self.answer.strip()])

    def default_row(self) -> dict[str, Any]:
        """The row of OpenMementos' `default` subset."""
        return {
            "problem": self.problem,
            "response": self.response,
            "domain": self.domain,
            "source": self.source,
            "difficulty": self.difficulty,
        }

    def full_row(self) -> dict[str, Any]:
        """The row of OpenMementos' `full` subset."""
        return self.default_row() | {
            "sentences": list(self.sentences),
            "blocks": [list(block) for block in self.blocks],
            "block_summaries": self.mementos,
        }


@dataclass(frozen=True, slots=True)
class AnnotationSettings:
    """What is done with each trace.

    Attributes:
        windows: boundaries in a request, a pass each.
        min_block_tokens, variance_weight: of the segmentation.
        mementos: see `MementoSettings`.
        require_pass: a trace with a memento below `MementoSettings.accept` fails instead of being kept.
        traces_in_flight: traces worked on at once.
    """

    windows: tuple[int, ...] = WINDOWS
    min_block_tokens: int = MIN_BLOCK_TOKENS
    variance_weight: float = VARIANCE_WEIGHT
    mementos: MementoSettings = field(default_factory=MementoSettings)
    require_pass: bool = False
    traces_in_flight: int = 16


@dataclass(slots=True)
class Outcome:
    """What `annotate_rows` did in this run."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    """Finished or failed in an earlier run."""
    repeated: int = 0
    """Rows that are the same trace as one before."""
    stopped: str = ""
    """Why it ended before the last row; empty if it did not."""
    usage: Usage = field(default_factory=Usage)
    quality: QualityReport | None = None


def trace_id(row: Row) -> str:
    """The name of a trace: a hash of its problem and response."""
    return hashlib.blake2b(f"{row.problem}\0{row.response}".encode(), digest_size=10).hexdigest()


def approximate_tokens(text: str) -> int:
    """Tokens of a text without a tokenizer: one for (up to) six letters of a word; digits and signs count alone."""
    count = 0
    for word in text.split():
        letters = sum(c.isalpha() for c in word)
        count += (letters + 5) // 6 + (len(word) - letters)
    return max(1, count)


async def annotate_trace(
    endpoint: Endpoint, row: Row, settings: AnnotationSettings, count_tokens: TokenCounter
) -> Annotation:
    """One trace through all steps.

    Raises:
        NoAnswer: the endpoint gave nothing usable for one of its requests, or the trace cannot be annotated.
    """
    reasoning, answer = split_thinking(row.response)
    if any(token in row.response for token in DELIMITERS):
        raise NoAnswer("the trace holds memento delimiters already")
    units = split_units(reasoning.strip())
    if not units:
        raise NoAnswer("the trace has no reasoning")
    tokens = [max(1, count_tokens(unit)) for unit in units]
    # A trace too short for two blocks needs no scores.
    cuttable = sum(tokens) >= 2 * settings.min_block_tokens and len(units) > 1
    scores = await score_boundaries(endpoint, units, settings.windows) if cuttable else [0.0] * (len(units) - 1)
    found = segment(scores, tokens, min_tokens=settings.min_block_tokens, weight=settings.variance_weight)
    texts = ["".join(units[first : last + 1]) for first, last in found.blocks]
    rounds = await gather(
        *(
            write_memento(endpoint, row.problem, text, i, len(texts), settings.mementos)
            for i, text in enumerate(texts, 1)
        )
    )
    worst = min(best(r).score for r in rounds)
    if settings.require_pass and worst < settings.mementos.accept:
        raise NoAnswer(f"a memento reached only {worst:g} of {settings.mementos.accept:g} points")
    return Annotation(
        id=trace_id(row),
        problem=row.problem,
        domain=row.domain,
        source=row.source,
        difficulty=row.difficulty,
        sentences=tuple(units),
        scores=tuple(scores),
        blocks=found.blocks,
        objective=found.objective,
        rounds=tuple(rounds),
        sentence_tokens=tuple(tokens),
        memento_tokens=tuple(max(1, count_tokens(best(r).memento)) for r in rounds),
        answer=answer,
    )


def annotate_rows(
    rows: Iterable[Row],
    out: Path,
    endpoint_settings: EndpointSettings,
    settings: AnnotationSettings | None = None,
    *,
    count_tokens: TokenCounter = approximate_tokens,
    progress: Callable[[str, Usage], None] = lambda _outcome, _usage: None,
) -> Outcome:
    """Annotate traces into a folder, going on where an earlier run stopped.

    Args:
        rows: the traces; read as they are needed.
        out: see the module.
        progress: called with ``done``, ``failed``, ``skipped`` or ``repeated`` for each trace.

    Returns:
        What was done. A spent budget and Ctrl-C end it early (`Outcome.stopped`), with everything saved.

    Raises:
        UserError: the endpoint refuses key or model; `out` belongs to a run with other settings.
    """
    chosen = settings or AnnotationSettings()
    out.mkdir(parents=True, exist_ok=True)
    _check_settings(out, endpoint_settings, chosen)
    outcome = Outcome()
    try:
        asyncio.run(_run(rows, out, endpoint_settings, chosen, count_tokens, progress, outcome))
    except BudgetSpent as error:
        outcome.stopped = str(error)
    except (KeyboardInterrupt, asyncio.CancelledError):
        outcome.stopped = "interrupted"
    finished = list(read_annotations(out / "annotated.jsonl"))
    failed = read_lines(out / "failed.jsonl")
    outcome.quality = report(finished, failed, outcome.usage, endpoint_settings, chosen.mementos.accept)
    write_rows(out / "default.jsonl", (a.default_row() for a in finished))
    write_rows(out / "full.jsonl", (a.full_row() for a in finished))
    (out / "report.json").write_text(outcome.quality.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return outcome


async def _run(
    rows: Iterable[Row],
    out: Path,
    endpoint_settings: EndpointSettings,
    settings: AnnotationSettings,
    count_tokens: TokenCounter,
    progress: Callable[[str, Usage], None],
    outcome: Outcome,
) -> None:
    journal = Journal(out / "journal.jsonl")
    earlier = {row["id"] for name in ("annotated.jsonl", "failed.jsonl") for row in read_lines(out / name)}
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    finished, failed = (os.open(out / name, flags, 0o644) for name in ("annotated.jsonl", "failed.jsonl"))
    endpoint = Endpoint(endpoint_settings, journal)
    outcome.usage = endpoint.usage
    seen: set[str] = set()

    def todo() -> Iterator[tuple[str, Row]]:
        for row in rows:
            name = trace_id(row)
            if name in seen or name in earlier:
                known = "repeated" if name in seen else "skipped"
                setattr(outcome, known, getattr(outcome, known) + 1)
                progress(known, endpoint.usage)
            else:
                yield name, row
            seen.add(name)

    queue = todo()

    async def work() -> None:
        for name, row in queue:  # workers share the iterator: nothing waits in it
            try:
                annotation = await annotate_trace(endpoint, row, settings, count_tokens)
            except NoAnswer as error:
                append_line(failed, {"id": name, "reason": str(error), "domain": row.domain, "problem": row.problem})
                outcome.failed += 1
                progress("failed", endpoint.usage)
            else:
                append_line(finished, annotation.model_dump(mode="json"))
                outcome.done += 1
                progress("done", endpoint.usage)

    try:
        await gather(*(work() for _ in range(settings.traces_in_flight)))
    finally:
        await endpoint.close()
        journal.close()
        os.close(finished)
        os.close(failed)


def read_annotations(path: Path) -> Iterator[Annotation]:
    """The finished traces of a folder's ``annotated.jsonl``."""
    return (Annotation.model_validate(row) for row in read_lines(path))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSONL aside, then give it its name."""
    aside = path.with_suffix(".tmp")
    with aside.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(aside, path)


def _check_settings(out: Path, endpoint: EndpointSettings, settings: AnnotationSettings) -> None:
    """Refuse to mix traces of different settings in one folder."""
    mine = {
        "model": endpoint.model,
        "temperature": endpoint.temperature,
        "windows": list(settings.windows),
        "min_block_tokens": settings.min_block_tokens,
        "variance_weight": settings.variance_weight,
        "accept": settings.mementos.accept,
        "rounds": settings.mementos.rounds,
        "require_pass": settings.require_pass,
    }
    file = out / "settings.json"
    if not file.is_file():
        file.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = [name for name in mine if before.get(name) != mine[name]]
    if changed:
        name = changed[0]
        raise UserError(
            f"{out} was made with {name} = {before.get(name)!r}, not {mine[name]!r}. Choose another --out, or the same "
            "settings to go on."
        )


def retry_failed(out: Path) -> int:
    """Forget the failed traces of a folder, so that the next run tries them again. Returns how many there were."""
    file = out / "failed.jsonl"
    count = len(read_lines(file))
    file.unlink(missing_ok=True)
    return count
