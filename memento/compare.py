"""Runs side by side: what differs in their configurations, their metrics, their accuracy with standard errors.

    memento compare runs/a runs/b --metric kv/peak_ratio

Everything is read from the run folders; runs that still go on can be compared too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memento.errors import UserError
from memento.metrics import METRICS, find, nearest
from memento.run import load_run_config, read_metrics

if TYPE_CHECKING:
    from rich.console import Group

DEFAULT = (
    "eval/accuracy",
    "reward/mean",
    "train/loss",
    "train/entropy",
    "mismatch/kl_mean",
    "length/completion_mean",
    "memento/blocks_per_trace",
    "memento/block_tokens",
    "memento/compression",
    "kv/peak_ratio",
    "kv/area_ratio",
    "seconds/step",
)
"""Shown where no metric is named, as far as any of the runs has logged them."""

EXPECTED_TO_DIFFER = ("out", "tracking")


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What is compared of one run.

    Attributes:
        name: unique among the compared ones.
        config: the resolved tree, flat: dotted key -> value.
        points: metric -> (step, value), in order, finite values only.
    """

    name: str
    config: dict[str, Any]
    points: dict[str, list[tuple[float, float]]]

    def last(self, metric: str) -> tuple[float, float] | None:
        """Step and value of the last point."""
        return self.points[metric][-1] if self.points.get(metric) else None

    def at(self, metric: str, step: float) -> float | None:
        """The value logged at a step."""
        return next((value for s, value in self.points.get(metric, ()) if s == step), None)


@dataclass(frozen=True, slots=True)
class AccuracyDifference:
    """Last held-out accuracies of two runs.

    Attributes:
        difference: second minus first.
        stderr: of the difference, as if the two were independent: sqrt(a² + b²). On the same problems it is smaller, so
            this says "no difference" too often rather than too rarely. None where one of them is unknown.
    """

    first: str
    second: str
    difference: float
    stderr: float | None

    @property
    def verdict(self) -> str:
        """In words, at two standard errors."""
        if self.stderr is None:
            return "no standard error was logged"
        if not self.stderr:
            return "all or none of the problems are solved: no standard error"
        errors = abs(self.difference) / self.stderr
        return f"{errors:.1f} standard errors" + ("" if errors >= 2 else ": no difference that can be told from chance")


def read_run(folder: str | Path, name: str | None = None) -> RunSummary:
    """Read a run folder.

    Raises:
        UserError: it is none.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for row in read_metrics(folder):
        step = row.get("step")
        for key, value in row.items():
            if key != "step" and value is not None and step is not None:
                points.setdefault(key, []).append((step, value))
    config = load_run_config(folder).model_dump(mode="json")
    return RunSummary(name or Path(folder).name, dict(_flat(config)), points)


def read_runs(folders: Sequence[str | Path]) -> list[RunSummary]:
    """Several runs, named by the last parts of their paths that tell them apart.

    Raises:
        UserError: fewer than two, the same one twice, or one that is no run folder.
    """
    if len(folders) < 2:
        raise UserError("compare takes two run folders or more.")
    parts = [Path(folder).resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise UserError("compare was given the same run folder twice.")
    depth = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(parts))
    return [read_run(folder, "/".join(p[-depth:])) for folder, p in zip(folders, parts, strict=True)]


def config_differences(runs: Sequence[RunSummary]) -> list[tuple[str, list[Any]]]:
    """Dotted keys whose values differ, with the value of each run; a key that a run lacks is None there."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    found = []
    for key in keys:
        values = [run.config.get(key) for run in runs]
        if key.split(".")[0] not in EXPECTED_TO_DIFFER and any(value != values[0] for value in values):
            found.append((key, values))
    return found


def chosen_metrics(runs: Sequence[RunSummary], asked: Sequence[str] = ()) -> list[str]:
    """The metrics to show: those asked for, else those of `DEFAULT` that were logged.

    Raises:
        UserError: no run logged one that was asked for; the message has the nearest name.
    """
    logged = {name for run in runs for name in run.points}
    for name in asked:
        if name not in logged:
            hint = nearest(name, logged | ({m.name for m in METRICS} if find(name) else set()))
            raise UserError(f"--metric: none of these runs has logged {name!r}{hint}.")
    return list(asked) or [name for name in DEFAULT if name in logged]


def accuracy_differences(runs: Sequence[RunSummary]) -> Iterator[AccuracyDifference]:
    """Each run's last held-out accuracy against the first run's."""
    evaluated = [run for run in runs if run.points.get("eval/accuracy")]
    for run in evaluated[1:]:
        (step_a, a), (step_b, b) = evaluated[0].points["eval/accuracy"][-1], run.points["eval/accuracy"][-1]
        errors = (evaluated[0].at("eval/accuracy_stderr", step_a), run.at("eval/accuracy_stderr", step_b))
        stderr = None if None in errors else math.hypot(*(e for e in errors if e is not None))
        yield AccuracyDifference(evaluated[0].name, run.name, b - a, stderr)


def comparison(folders: Sequence[str | Path], metrics: Sequence[str] = ()) -> Group:
    """The tables of ``memento compare``.

    Raises:
        UserError: as `read_runs` and `chosen_metrics`.
    """
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    runs = read_runs(folders)
    shown = chosen_metrics(runs, metrics)
    parts: list[Any] = []
    differences = config_differences(runs)
    table = Table("key", *(escape(run.name) for run in runs), title="Configuration: what differs")
    for key, values in differences:
        table.add_row(key, *(escape(_text(value)) for value in values))
    parts.append(table if differences else "The configurations are the same.")
    table = Table("metric", *(escape(run.name) for run in runs), title="Metrics: first → last (best, at step)")
    for name in shown:
        table.add_row(name, *(_course(run, name) for run in runs))
    parts.append(table)
    rows = list(accuracy_differences(runs))
    if rows:
        table = Table("", "difference", "", title="Held-out accuracy, last evaluation")
        for d in rows:
            error = "" if d.stderr is None else f" ± {100 * d.stderr:.1f}"
            table.add_row(
                f"{escape(d.second)} - {escape(d.first)}", f"{100 * d.difference:+.1f}{error} points", d.verdict
            )
        parts.append(table)
    return Group(*parts)


def _course(run: RunSummary, metric: str) -> str:
    points = run.points.get(metric)
    if not points:
        return "–"
    described = find(metric)
    text = f"{points[0][1]:.4g} → {points[-1][1]:.4g}"
    if metric == "eval/accuracy" and (error := run.at("eval/accuracy_stderr", points[-1][0])) is not None:
        text += f" ± {error:.2g}"
    if described is not None and described.summary == "max" and not metric.startswith("mismatch/"):
        step, best = max(points, key=lambda point: point[1])
        text += f" ({best:.4g}, {step:g})"
    return text


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _text(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
