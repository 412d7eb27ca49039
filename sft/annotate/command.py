"""`memento annotate`: the pipeline with a progress bar and a report at the end."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from memento.sft.annotate.endpoint import EndpointSettings, Usage
from memento.sft.annotate.pipeline import (
    AnnotationSettings,
    TokenCounter,
    annotate_rows,
    approximate_tokens,
    retry_failed,
)
from memento.sft.annotate.quality import report_tables
from memento.sft.rows import read_rows


def annotate_file(
    data: str,
    out: Path,
    endpoint: EndpointSettings,
    settings: AnnotationSettings,
    *,
    limit: int | None = None,
    tokenizer: str | None = None,
    retry: bool = False,
) -> bool:
    """Annotate a source into a folder, with a progress bar on stderr and the report on stdout.

    Args:
        data: as for `memento.sft.rows.read_rows`.
        limit: only the first so many rows.
        tokenizer: folder or hub id of the model whose tokens are counted; None estimates.
        retry: try failed traces of an earlier run again.

    Returns:
        Whether every row was taken to its end; False when the budget or a Ctrl-C stopped it.

    Raises:
        UserError: no such data; `memento.sft.annotate.pipeline.annotate_rows`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    count_tokens = token_counter(tokenizer)
    total = min(_count(data), limit or 10**12)  # read once before anything is asked: broken lines show up now
    if retry:
        retry_failed(out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("annotating", total=total)
        counts = {"done": 0, "failed": 0}

        def advance(what: str, usage: Usage) -> None:
            counts[what] = counts.get(what, 0) + 1
            words = f"annotating: {counts['failed']} failed, {usage.answered} answers"
            if endpoint.price_in or endpoint.price_out:
                words += f", ${usage.cost(endpoint):.2f}"
            progress.update(bar, advance=1, description=words)

        rows = islice(read_rows(data), limit)
        outcome = annotate_rows(rows, out, endpoint, settings, count_tokens=count_tokens, progress=advance)
    console = Console()
    assert outcome.quality is not None
    console.print(report_tables(outcome.quality))
    if outcome.skipped or outcome.repeated:
        console.print(f"{outcome.skipped} were there before, {outcome.repeated} rows repeat another")
    if outcome.stopped:
        console.print(f"stopped: {outcome.stopped}. Run the same command to go on.")
    console.print(f"{out / 'default.jsonl'}, {out / 'full.jsonl'}, {out / 'report.json'}", soft_wrap=True)
    return not outcome.stopped


def token_counter(model: str | None) -> TokenCounter:
    """Counts tokens with the tokenizer of a model, or estimates them.

    Raises:
        UserError: the model's tokenizer cannot be loaded.
    """
    if model is None:
        return approximate_tokens
    from memento.preflight import load_tokenizer

    tokenizer = load_tokenizer(model)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return count


def _count(data: str) -> int:
    return sum(1 for _ in read_rows(data))
