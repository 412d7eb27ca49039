"""``report.html``: what a run did, on one page that needs no server and loads nothing.

    write_report("runs/quickstart")     the whole pipeline, with its result table
    write_report("runs/rl")             one RL run

Everything on the page is read from files of the folder; what is not there is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from memento import charts, results, view
from memento.charts import Series
from memento.errors import UserError
from memento.results import QuickstartResults
from memento.run import replace_text
from memento.trajectory import RewardResult, ScoredGroup, Trajectory

Row = dict[str, float | None]
"""One line of ``metrics.jsonl``."""

ROLLOUT_BYTES = 8 * 2**20
"""How much of the end of ``rollouts.jsonl`` is searched for a trajectory to show. Long runs have gigabytes of it."""


STAGES = ("stage1", "stage2", "control", "")
"""The order in which SFT runs are shown."""


CURVES: tuple[tuple[str, str, dict[str, Any], tuple[tuple[str, str, dict[str, Any]], ...]], ...] = (
    (
        "Reward and held-out accuracy",
        "mean score",
        {"y_range": (0, 1)},
        (
            ("reward/mean", "training reward, mean", {}),
            ("eval/accuracy", "evaluation ({how})", {"colour": 1, "dots": True}),
        ),
    ),
    (
        "Engine against learner",
        "mismatch (nats), logarithmic",
        {"log": True},
        (
            ("mismatch/kl_mean", "mismatch KL, mean over tokens", {}),
            ("mismatch/max_abs_logprob_diff", "largest |log-prob difference|", {"colour": 1}),
        ),
    ),
    (
        "Blocks and mementos",
        "mean length (tokens)",
        {"y_range": (0, None)},
        (("memento/block_tokens", "block", {}), ("memento/memento_tokens", "memento", {"colour": 2})),
    ),
    (
        "Blocks of a trace",
        "blocks per trace",
        {"y_range": (0, None)},
        (("memento/blocks_per_trace", "blocks per trace", {}),),
    ),
    (
        "KV saved",
        "without over with eviction (×)",
        {"y_range": (1, None)},
        (("kv/peak_ratio", "peak KV", {}), ("kv/area_ratio", "KV-AUC", {"colour": 1})),
    ),
    (
        "Completion length",
        "completion (tokens)",
        {"y_range": (0, None)},
        (
            ("length/completion_mean", "mean", {}),
            ("length/completion_max", "longest", {"colour": 3, "faint": True}),
        ),
    ),
    (
        "Entropy of the policy",
        "nats per token",
        {"y_range": (0, None)},
        (("train/entropy", "entropy", {}),),
    ),
    (
        "Throughput",
        "tokens per second",
        {"y_range": (0, None)},
        (
            ("engine/tokens_per_s", "engines", {}),
            ("learner/tokens_per_s", "learner, while it trains", {"colour": 1}),
        ),
    ),
)
"""The curves of an RL run: title, y axis and its options, and the lines: metric, name, style."""


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The files of one run folder, as far as they are there."""

    folder: Path
    config: dict[str, Any]
    metrics: tuple[Row, ...]
    environment: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """Read a run folder; missing files are empty."""
        config = folder / "config.yaml"
        return cls(
            folder,
            (yaml.safe_load(config.read_text(encoding="utf-8")) or {}) if config.is_file() else {},
            tuple(_lines(folder / "metrics.jsonl")),
            _object(folder / "environment.json"),
        )

    @property
    def kind(self) -> str:
        """``rl``, ``sft``, or empty for a folder without a config."""
        return str(self.config.get("kind", ""))

    def series(self, key: str, name: str = "", **style: Any) -> Series:
        """One metric over the steps at which it was logged."""
        rows = [row for row in self.metrics if row.get(key) is not None]
        return Series(name or key, [row["step"] or 0 for row in rows], [row[key] for row in rows], **style)


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a run folder or a quickstart folder.

    Returns:
        The file, replaced as a whole.

    Raises:
        UserError: the folder is neither (no config.yaml, metrics.jsonl or results.json, here or one level down).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; a report is written into a run folder.")
    file = folder / "report.html"
    replace_text(file, report_page(folder))
    return file


def report_page(folder: Path) -> str:
    """The page of `write_report` as text."""
    found = [RunFiles.read(place) for place in (folder, *sorted(p for p in folder.iterdir() if p.is_dir()))]
    runs = [run for run in found if run.config or run.metrics]
    outcome = results.read_results(folder / "results.json") if (folder / "results.json").is_file() else None
    if not runs and outcome is None:
        raise UserError(f"{folder} holds no run: there is no config.yaml, metrics.jsonl or results.json in it.")
    rl = next((run for run in runs if run.kind == "rl"), None) or next((run for run in runs if run.kind != "sft"), None)
    sft = sorted((run for run in runs if run.kind == "sft"), key=lambda run: STAGES.index(run.config.get("stage", "")))
    main = rl or (sft[0] if sft else None)
    sections = [
        _headline(folder, main, outcome),
        _result_section(outcome) if outcome else "",
        _training_section(rl) if rl else "",
        _sft_section(sft),
        _trajectory_section(rl) if rl else "",
        _seconds_section(rl, outcome),
        _config_section([*([rl] if rl else []), *sft]),
    ]
    return view.page(f"{folder.resolve().name} · memento", "\n".join(s for s in sections if s))


def _headline(folder: Path, main: RunFiles | None, outcome: QuickstartResults | None) -> str:
    facts = []
    if main is not None:
        environment = main.environment
        git = environment.get("git") or {}
        commit = f"commit {git['commit'][:10]}{' + changes' if git.get('dirty') else ''}" if git.get("commit") else ""
        facts = [str(environment.get("time", ""))[:16].replace("T", " "), commit, f"{environment.get('cpus', '')} CPUs"]
        facts = [fact for fact in facts if fact and fact != " CPUs"]
        if not outcome:
            facts.insert(0, f"model {main.config.get('model')}" if main.config.get("model") else "")
    if outcome:
        facts.append(f"seed {outcome.seed}")
    title = "Memento quickstart: reasoning under eviction" if outcome else f"Run {folder.resolve().name}"
    sub = f'<p class="sub">{escape(" · ".join(f for f in facts if f))}</p>'
    return f"<h1>{escape(title)}</h1>{sub}{_summary(main, outcome)}"


def _summary(main: RunFiles | None, outcome: QuickstartResults | None) -> str:
    """The result in one sentence."""
    if outcome is not None:
        before, after = outcome.accuracy.stage2_evicted, outcome.accuracy.rl_evicted
        return (
            f"<p>A small model reasons in blocks and closes each with a <em>memento</em>; then the block leaves the KV "
            f"cache. RL under this eviction moved held-out accuracy from <b>{100 * before:.1f} %</b> to "
            f"<b>{100 * after:.1f} %</b>, with a peak KV cache <b>{outcome.kv.peak_ratio:.2f}×</b> smaller than for "
            "the same tokens without eviction.</p>"
        )
    rewards = main.series("reward/mean").points() if main else []
    if len(rewards) < 2:
        return ""
    (first, low), (last, high) = rewards[0], rewards[-1]
    return f"<p>Mean reward <b>{low:.3f}</b> at step {first:g}, <b>{high:.3f}</b> at step {last:g}.</p>"


def _result_section(outcome: QuickstartResults) -> str:
    head = "".join(f'<th class="num wrap">{name}</th>' for name in results.TEMPERATURES.values())
    body = ""
    for row, model in results.ROWS.items():
        # On a narrow screen the error may stand below its value, but not half of it.
        figures = [results.percent(outcome.cell(row, t)).replace("± ", "±&nbsp;") for t in results.TEMPERATURES]
        cells = "".join(f'<td class="num">{figure}</td>' for figure in figures)
        body += f"<tr{' class=key' if row == 'rl_evicted' else ''}><td>{escape(model.label)}</td>{cells}</tr>"
    return (
        f"<h2>Result</h2><p>{escape(results.caption(outcome))}.</p>"
        f'<div class="scroll"><table><tr><th>model</th>{head}</tr>{body}</table></div>'
        f"{view.table_of_facts(results.costs(outcome)[:3])}"
    )


def _figure(title: str, chart: str, note: str = "") -> str:
    if not chart:
        return ""
    return f"<figure><figcaption><b>{escape(title)}</b>{escape(note)}</figcaption>{chart}</figure>"


def _training_section(run: RunFiles) -> str:
    config = run.config.get("eval") or {}
    how = f"temperature {config['temperature']:g}" if config.get("temperature") is not None else "held out"
    shown = ""
    for title, y_label, options, lines in CURVES:
        series = [run.series(key, name.format(how=how), **style) for key, name, style in lines]
        shown += _figure(title, charts.line_chart(series, x_label="step", y_label=y_label, **options))
    return f'<h2>RL, step by step</h2><div class="figures">{shown}</div>' if shown else ""


def _sft_section(runs: Sequence[RunFiles]) -> str:
    losses = []
    for colour, run in enumerate(runs[:4]):
        key = next((k for k in ("train/loss", "loss") if run.series(k).points()), "")
        if key:
            losses.append(run.series(key, str(run.config.get("stage", run.folder.name)), colour=colour))
    chart = charts.line_chart(
        losses, x_label="optimiser step", y_label="loss (nats per token), logarithmic", log=True, wide=charts.FULL_WIDE
    )
    return f"<h2>SFT</h2>{_figure('Training loss', chart)}" if chart else ""


def _trajectory_section(run: RunFiles) -> str:
    chosen = pick_trajectory(run.folder / "rollouts.jsonl")
    if chosen is None:
        return ""
    trajectory, rewards, place = chosen
    tokenizer, config = view.find_tokenizer(run.folder)
    shown = view.make_view(trajectory, rewards, place, tokenizer, config)
    return (
        "<h2>One trajectory, as it was sampled</h2>"
        "<p>Each memento closes a block; before the next token is computed the block leaves the cache. Move the slider "
        "to see what the model could still see at that token.</p>"
        f"{view.trace_section(shown)}{view.facts_table(shown)}"
    )


def pick_trajectory(path: Path) -> tuple[Trajectory, tuple[RewardResult, ...], int] | None:
    """A telling trajectory of the last groups of a file: right if any is, with the most evictions, then the shortest.

    Returns:
        The trajectory, the verdicts of its group and its place among them; None if the file holds no group.
    """
    return most_telling(last_groups(path))


def most_telling(groups: Iterable[ScoredGroup]) -> tuple[Trajectory, tuple[RewardResult, ...], int] | None:
    """The choice of `pick_trajectory` among these groups."""
    best = None
    for group in groups:
        for place, (trajectory, reward) in enumerate(zip(group.trajectories, group.rewards, strict=True)):
            happened = sum(e.boundary < len(trajectory.token_ids) for e in trajectory.evictions)
            key = ((reward.score or 0) > 0, not trajectory.truncated, happened, -len(trajectory.token_ids))
            if best is None or key > best[0]:
                best = (key, trajectory, group.rewards, place)
    return best[1:] if best else None


def last_groups(path: Path, limit_bytes: int = ROLLOUT_BYTES) -> Iterator[ScoredGroup]:
    """The scored groups in the last `limit_bytes` of a file (at least the last one), in order."""
    if not path.is_file():
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - limit_bytes))
        tail = file.read()
        while size > len(tail) and tail.count(b"\n") < 2:  # a single group larger than the limit
            file.seek(max(0, size - 2 * len(tail)))
            tail = file.read()
    lines = tail.splitlines()[1 if size > len(tail) else 0 :]
    for number, line in enumerate(lines):
        # The last line may be half written while the run goes on, and a plain trajectory is no group.
        if b'"trajectories"' in line and (number < len(lines) - 1 or tail.endswith(b"\n")):
            yield ScoredGroup.model_validate_json(line)


def _seconds_section(run: RunFiles | None, outcome: QuickstartResults | None) -> str:
    parts = []
    if outcome is not None:
        phases = {name: s for name, s in outcome.seconds.items() if name != "total"}
        total = outcome.seconds.get("total", sum(phases.values()))
        parts.append(_figure("Phases", _bars(phases, total), f" of the pipeline, {total:.0f} s in total"))
    if run is not None:
        keys = sorted(
            {key for row in run.metrics for key in row if key.startswith("seconds/") and key != "seconds/step"}
        )
        sums = {key.removeprefix("seconds/"): sum(row.get(key) or 0.0 for row in run.metrics) for key in keys}
        total = sum(row.get("seconds/step") or 0.0 for row in run.metrics)
        if any(sums.values()):
            parts.append(_figure("RL steps", _bars(sums, max(total, 1e-9)), f", {total:.0f} s in total"))
    shown = "".join(parts)
    return f'<h2>Where the time went</h2><div class="figures">{shown}</div>' if shown else ""


def _bars(seconds: dict[str, float], total: float) -> str:
    rows = "".join(
        f'<tr><td>{escape(name.replace("_", " "))}</td><td class="bar"><i style="width:{100 * min(s / total, 1):.1f}%">'
        f'</i></td><td class="num">{s:.1f} s</td><td class="num sub">{100 * s / total:.0f} %</td></tr>'
        for name, s in sorted(seconds.items(), key=lambda item: -item[1])
    )
    return f'<table class="bars">{rows}</table>'


def _config_section(runs: Sequence[RunFiles]) -> str:
    shown = "".join(_config(run) for run in runs if run.config)
    return f"<h2>Configuration</h2>{shown}" if shown else ""


def _config(run: RunFiles) -> str:
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    packages = run.environment.get("packages") or {}
    versions = " ".join(f"{name} {version}" for name, version in packages.items())
    command = run.environment.get("command")
    lead = f"<p><code>{escape(str(command))}</code></p>" if command else ""
    name = {"rl": "RL", "sft": f"SFT {run.config.get('stage', '')}"}.get(run.kind, run.folder.name)
    return (
        f"<details><summary>{escape(name)}: config.yaml, as resolved</summary>{lead}"
        f"<pre>{escape(text)}</pre>{f'<p class=sub>{escape(versions)}</p>' if versions else ''}</details>"
    )


def _lines(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file. A last line that is half written (the run goes on, or crashed) is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise UserError(f"{path}, line {number}: not JSON ({error.msg}).") from error
        if not isinstance(row, dict) or "step" not in row:
            raise UserError(f"{path}, line {number}: not a step's metrics (an object with `step`).")
        yield row


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path}: not a JSON object.") from error
