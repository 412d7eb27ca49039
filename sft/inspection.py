"""`memento inspect`: what a memento data set holds, and what training would make of it.

Blocks a trace, lengths of blocks and mementos, compression by domain: the quantities of MEMENTO's figure 3 (arXiv
2604.09852), for any source that `memento.sft.rows` reads.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memento.errors import UserError
from memento.problems import Record
from memento.sft.annotate.command import token_counter
from memento.sft.rows import REASONS, annotated_blocks, check_response, read_rows, split_thinking

if TYPE_CHECKING:
    from rich.console import Group

ALL = "all"
TITLES = {
    "blocks": "blocks a trace",
    "trace_tokens": "tokens a response",
    "block_tokens": "tokens a block",
    "memento_tokens": "tokens a memento",
    "compression": "block tokens over memento tokens, a trace",
    "character_ratio": "memento characters over block characters, a trace",
}
"""What is measured -> what that is."""
QUANTILES = (0.05, 0.5, 0.95, 1.0)


class Distribution(Record):
    """One measure of one domain.

    Attributes:
        count: traces, or blocks for the measures of blocks.
        quantiles: 5 %, median, 95 %, largest.
    """

    domain: str
    measure: str
    count: int
    mean: float
    quantiles: tuple[float, float, float, float]


class Inspection(Record):
    """See the module.

    Attributes:
        rows: read; `usable` of them have memento format, `plain` are reasoning without blocks.
        dropped: reason -> rows that stages 1 and 2 would leave out.
        counted_by: the tokenizer, or ``estimate``.
        values: domain -> measure -> every value; for plots.
    """

    source: str
    rows: int
    usable: int
    plain: int
    dropped: dict[str, int]
    counted_by: str
    distributions: tuple[Distribution, ...]
    values: dict[str, dict[str, list[float]]]


def inspect_data(
    data: str, *, tokenizer: str | None = None, limit: int | None = None, strict: bool = True
) -> Inspection:
    """Read a source and measure it.

    Args:
        data: as for `memento.sft.rows.read_rows`.
        tokenizer: folder or hub id of the model whose tokens are counted; None estimates.
        limit: only the first so many rows.
        strict: as `SftConfig.strict_blocks`.

    Raises:
        UserError: the source cannot be read, or holds no row.
    """
    count_tokens = token_counter(tokenizer)
    dropped: Counter[str] = Counter()
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    rows = usable = plain = 0
    for row in islice(read_rows(data, dropped=dropped), limit):
        rows += 1
        reason = check_response(row.response, blocks=True, strict=strict)
        if reason == "no blocks":
            plain += 1
        if reason is not None:
            dropped[reason] += 1
            if reason == "no blocks":
                _add(values, row.domain, "trace_tokens", [count_tokens(row.response)])
            continue
        usable += 1
        pairs = annotated_blocks(split_thinking(row.response)[0])
        blocks, mementos = zip(*((count_tokens(b), count_tokens(m)) for b, m in pairs), strict=True)
        _add(values, row.domain, "blocks", [len(pairs)])
        _add(values, row.domain, "trace_tokens", [count_tokens(row.response)])
        _add(values, row.domain, "block_tokens", blocks)
        _add(values, row.domain, "memento_tokens", mementos)
        _add(values, row.domain, "compression", [sum(blocks) / max(1, sum(mementos))])
        ratio = sum(len(m.strip()) for _, m in pairs) / sum(len(b.strip()) for b, _ in pairs)
        _add(values, row.domain, "character_ratio", [ratio])
    rows += sum(n for reason, n in dropped.items() if reason in ("empty", "wrong roles"))
    if not rows:
        raise UserError(f"{data} holds no rows.")
    if len(values) == 2:  # one domain and all: the same numbers twice
        del values[next(domain for domain in values if domain != ALL)]
    distributions = [
        _distribution(domain, measure, values[domain][measure])
        for domain in sorted(values, key=lambda d: (d == ALL, d))
        for measure in TITLES
        if measure in values[domain]
    ]
    return Inspection(
        source=data,
        rows=rows,
        usable=usable,
        plain=plain,
        dropped=dict(dropped.most_common()),
        counted_by=tokenizer or "estimate",
        distributions=tuple(distributions),
        values={domain: dict(found) for domain, found in values.items()},
    )


def _add(values: dict[str, dict[str, list[float]]], domain: str, measure: str, new: Any) -> None:
    for name in (domain or "(none)", ALL):
        values[name][measure] += [float(x) for x in new]


def _distribution(domain: str, measure: str, values: list[float]) -> Distribution:
    low, middle, high, most = (float(q) for q in np.quantile(values, QUANTILES))
    return Distribution(
        domain=domain,
        measure=measure,
        count=len(values),
        mean=float(np.mean(values)),
        quantiles=(low, middle, high, most),
    )


def tables(found: Inspection) -> Group:
    """The inspection for people."""
    from rich.console import Group
    from rich.table import Table

    lines = [f"{found.source}: {found.rows} rows, {found.usable} in memento format; tokens by {found.counted_by}"]
    lines += [f"  {count} dropped: {reason} ({REASONS[reason]})" for reason, count in found.dropped.items()]
    table = Table()
    for name in ("domain", "measure", "count", "mean", "5 %", "median", "95 %", "largest"):
        table.add_column(name, justify="left" if name in ("domain", "measure") else "right")
    last = None
    for d in found.distributions:
        if last not in (None, d.domain):
            table.add_section()
        digits = 2 if d.measure in ("compression", "character_ratio") else 0 if d.measure != "blocks" else 1
        numbers = [f"{x:,.{digits}f}" for x in (d.mean, *d.quantiles)]
        table.add_row("" if d.domain == last else d.domain, TITLES[d.measure], f"{d.count:,}", *numbers)
        last = d.domain
    return Group(*lines, *([table] if found.distributions else []))


def plot_inspection(found: Inspection, path: Path) -> Path:
    """Histograms of every measure, one colour a domain. The file's ending decides the format (PNG, SVG, PDF).

    Raises:
        UserError: an ending that matplotlib cannot write, or nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    domains = [d for d in sorted(found.values) if d != ALL] or [ALL]
    measures = [m for m in TITLES if any(m in found.values[d] for d in domains)]
    if not measures:
        raise UserError(f"{found.source} has no trace in memento format, so there is nothing to plot.")
    rows = (len(measures) + 2) // 3
    figure, axes = pyplot.subplots(rows, 3, figsize=(13, 3.6 * rows), layout="constrained", squeeze=False)
    for axis, measure in zip(axes.flat, measures, strict=False):
        shown = {d: np.array(found.values[d][measure]) for d in domains if measure in found.values[d]}
        every = np.concatenate(list(shown.values()))
        top = float(np.quantile(every, 0.99)) if len(every) > 100 else float(every.max())
        edges = np.arange(0.5, max(top, 2) + 1.5) if measure == "blocks" else np.linspace(0, top * 1.02 or 1, 31)
        for domain, values in shown.items():
            weights = np.full(len(values), 1 / len(values))
            label = f"{domain}, median {np.median(values):,.3g}"
            axis.hist(
                np.minimum(values, edges[-1]), edges, weights=weights, histtype="step", linewidth=1.6, label=label
            )
        axis.set_title(TITLES[measure], fontsize=10)
        axis.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(measures) :]:
        axis.set_visible(False)
    figure.suptitle(f"{found.source}: {found.usable:,} traces (the last bin holds what lies above)", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=130)
    except ValueError as error:
        raise UserError(f"--plot {path}: {error}") from error
    finally:
        pyplot.close(figure)
    return path
