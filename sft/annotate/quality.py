"""What became of the traces: pass rate by round, compression by domain, worst cases, tokens and cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from memento.problems import Record
from memento.sft.annotate.endpoint import EndpointSettings, Usage
from memento.sft.annotate.mementos import best

if TYPE_CHECKING:
    from rich.console import Group

    from memento.sft.annotate.pipeline import Annotation

WORST = 10


class DomainQuality(Record):
    """One domain, or all of them.

    Attributes:
        passed: share of blocks whose memento was accepted.
        blocks_per_trace, block_tokens, memento_tokens: means.
        compression: block tokens over memento tokens, of all blocks together.
        character_ratio: median over blocks of memento characters over block characters.
    """

    domain: str
    traces: int
    blocks: int
    passed: float
    blocks_per_trace: float
    block_tokens: float
    memento_tokens: float
    compression: float
    character_ratio: float


class WorstCase(Record):
    """A memento that a person should look at."""

    id: str
    block: int
    score: float
    rounds: int
    block_tokens: int
    memento_tokens: int
    feedback: str


class QualityReport(Record):
    """See the module.

    Attributes:
        pass_rate_by_round: share of all blocks accepted after 0, 1, 2, ... rounds of feedback. Empty without blocks.
        mean_score_by_round: mean score of the mementos that were judged in that round.
        score_histogram: how many boundaries have which mean score.
        failures: reason (its first words) -> traces.
        failed_attempts, malformed: of the endpoint in this run, by reason and by kind of request.
    """

    traces: int
    failed: int
    failures: dict[str, int]
    pass_rate_by_round: tuple[float, ...]
    mean_score_by_round: tuple[float, ...]
    domains: tuple[DomainQuality, ...]
    score_histogram: dict[str, int]
    worst: tuple[WorstCase, ...]
    answered: int
    remembered: int
    failed_attempts: dict[str, int]
    malformed: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    cost: float


def report(
    annotations: Sequence[Annotation],
    failed: Sequence[dict[str, Any]],
    usage: Usage,
    settings: EndpointSettings,
    accept: float,
) -> QualityReport:
    """The report on all traces of a folder. `usage` is that of this run, with the answers it took from the journal."""
    blocks = [(a, i) for a in annotations for i in range(len(a.blocks))]
    longest = max((len(a.rounds[i]) for a, i in blocks), default=0)
    accepted = [
        sum(any(r.score >= accept for r in a.rounds[i][: n + 1]) for a, i in blocks) / len(blocks)
        for n in range(longest)
    ]
    judged = [[a.rounds[i][n].score for a, i in blocks if len(a.rounds[i]) > n] for n in range(longest)]
    domains = sorted({a.domain for a in annotations})
    rows = [_domain(name or "(none)", [a for a in annotations if a.domain == name], accept) for name in domains]
    if len(rows) > 1:
        rows.append(_domain("all", annotations, accept))
    cases = sorted((_case(a, i) for a, i in blocks), key=lambda c: (c.score, -c.memento_tokens / c.block_tokens))
    return QualityReport(
        traces=len(annotations),
        failed=len(failed),
        failures=dict(Counter(f["reason"].split(":")[0] for f in failed).most_common()),
        pass_rate_by_round=tuple(accepted),
        mean_score_by_round=tuple(mean(scores) for scores in judged),
        domains=tuple(rows),
        score_histogram={f"{s:g}": n for s, n in sorted(Counter(s for a in annotations for s in a.scores).items())},
        worst=tuple(cases[:WORST]),
        answered=usage.answered,
        remembered=usage.remembered,
        failed_attempts=dict(usage.failures),
        malformed=dict(usage.malformed),
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cost=usage.cost(settings),
    )


def _sizes(annotation: Annotation, index: int) -> tuple[int, int]:
    first, last = annotation.blocks[index]
    return sum(annotation.sentence_tokens[first : last + 1]), annotation.memento_tokens[index]


def _domain(name: str, annotations: Sequence[Annotation], accept: float) -> DomainQuality:
    blocks = [(a, i) for a in annotations for i in range(len(a.blocks))]
    sizes = [_sizes(a, i) for a, i in blocks]
    ratios = [len(best(a.rounds[i]).memento) / len(a.block_text(i).strip()) for a, i in blocks]
    return DomainQuality(
        domain=name,
        traces=len(annotations),
        blocks=len(blocks),
        passed=sum(best(a.rounds[i]).score >= accept for a, i in blocks) / len(blocks),
        blocks_per_trace=len(blocks) / len(annotations),
        block_tokens=mean(b for b, _ in sizes),
        memento_tokens=mean(m for _, m in sizes),
        compression=sum(b for b, _ in sizes) / sum(m for _, m in sizes),
        character_ratio=median(ratios),
    )


def _case(annotation: Annotation, index: int) -> WorstCase:
    chosen = best(annotation.rounds[index])
    block_tokens, memento_tokens = _sizes(annotation, index)
    return WorstCase(
        id=annotation.id,
        block=index,
        score=chosen.score,
        rounds=len(annotation.rounds[index]),
        block_tokens=block_tokens,
        memento_tokens=memento_tokens,
        feedback=chosen.feedback,
    )


def report_tables(quality: QualityReport) -> Group:
    """The report for people."""
    from rich.console import Group
    from rich.table import Table

    parts: list[Any] = []
    if quality.pass_rate_by_round:
        rounds = Table(title="mementos by round of feedback")
        for name in ("rounds", "accepted so far", "mean score of the round"):
            rounds.add_column(name, justify="right")
        for n, (rate, score) in enumerate(zip(quality.pass_rate_by_round, quality.mean_score_by_round, strict=True)):
            rounds.add_row(str(n), f"{rate:.1%}", f"{score:.2f}")
        parts.append(rounds)
    if quality.domains:
        domains = Table(title="by domain")
        names = ("domain", "traces", "blocks", "accepted", "blocks/trace", "block", "memento", "compression", "chars")
        for name in names:
            domains.add_column(name, justify="left" if name == "domain" else "right")
        for d in quality.domains:
            domains.add_row(
                d.domain,
                str(d.traces),
                str(d.blocks),
                f"{d.passed:.1%}",
                f"{d.blocks_per_trace:.1f}",
                f"{d.block_tokens:.0f}",
                f"{d.memento_tokens:.0f}",
                f"{d.compression:.1f}×",
                f"{d.character_ratio:.2f}",
            )
        parts.append(domains)
    if quality.worst and quality.worst[0].score < 10:
        worst = Table(title="worst mementos")
        for name in ("trace", "block", "score", "rounds", "tokens", "the judge's last words"):
            worst.add_column(name, justify="left" if name in ("trace", "the judge's last words") else "right")
        for case in quality.worst[:5]:
            tokens = f"{case.block_tokens} → {case.memento_tokens}"
            worst.add_row(case.id, str(case.block), f"{case.score:g}", str(case.rounds), tokens, case.feedback[:80])
        parts.append(worst)
    lines = [f"{quality.traces} traces annotated, {quality.failed} failed"]
    lines += [f"  {count} × {reason}" for reason, count in quality.failures.items()]
    lines.append(
        f"{quality.answered} requests answered, {quality.remembered} remembered; {quality.prompt_tokens:,} prompt and "
        f"{quality.completion_tokens:,} completion tokens, ${quality.cost:.2f}"
    )
    if quality.failed_attempts:
        attempts = ", ".join(f"{count} × {reason}" for reason, count in quality.failed_attempts.items())
        lines.append(f"attempts without an answer: {attempts}")
    if quality.malformed:
        bad = ", ".join(f"{count} × {kind}" for kind, count in quality.malformed.items())
        lines.append(f"answers that could not be used: {bad}")
    return Group(*parts, *lines)
