"""One trajectory to look at: its blocks, mementos and evictions, and what is in the KV cache at every token.

    memento view runs/rl/rollouts.jsonl --index 5
    memento view runs/rl/rollouts.jsonl --index 5 --html trace.html

`load_view` brings the record, its verdict and the text of every token together; `print_view` shows it in a terminal,
`view_page` as one self-contained HTML file with a slider over time. The tokenizer is looked for in the run folder of
the file; without one the text of the record is shown as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memento import charts
from memento.config import FormatConfig, RlConfig
from memento.errors import UserError
from memento.format import NEVER, Eviction, MementoFormat, parse
from memento.run import load_run_config, replace_text
from memento.trajectory import RewardResult, Trajectory, read_scored

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


class Role(StrEnum):
    """What a token is part of."""

    PROMPT = "prompt"
    TEXT = "text"
    DELIMITER = "delimiter"
    BLOCK = "block"
    MEMENTO = "memento"


@dataclass(frozen=True, slots=True)
class Segment:
    """Adjacent tokens ``[start, end)`` that are shown alike: one role, one eviction, all forced or none."""

    start: int
    end: int
    role: Role
    visible_until: int
    forced: bool

    @property
    def evicted(self) -> bool:
        """Whether these tokens leave the cache before the trace ends."""
        return self.visible_until < NEVER


@dataclass(frozen=True, slots=True)
class View:
    """A trajectory with everything that is shown of it.

    Attributes:
        pieces: [T] text of each token; empty for a token that only continues a character. None without a tokenizer.
        segments: cover [0, T) in order.
        resident_T: [T] tokens in the KV cache when each position is computed, from the recorded evictions.
        reward: its verdict, where the file holds scored groups.
        group: the verdicts of its whole group, itself included.
        warning: what a reader must know, e.g. that record and tokens disagree.
    """

    trajectory: Trajectory
    pieces: tuple[str, ...] | None
    segments: tuple[Segment, ...]
    resident_T: NDArray[np.int64]
    reward: RewardResult | None
    group: tuple[RewardResult, ...]
    warning: str = ""

    @property
    def evictions(self) -> tuple[Eviction, ...]:
        """The evictions that happened inside the trace."""
        total = len(self.trajectory.token_ids)
        return tuple(e for e in self.trajectory.evictions if e.boundary < total)

    def text(self, segment: Segment) -> str:
        """The text of a segment; token ids where there is no tokenizer."""
        if self.pieces is None:
            return "".join(f"‹{i}›" for i in self.trajectory.token_ids[segment.start : segment.end])
        return "".join(self.pieces[segment.start : segment.end])


# ---------------------------------------------------------------------------------------------- reading


def load_view(path: str | Path, index: int = 0, model: str | Path | None = None) -> View:
    """Read trajectory number `index` (from 0, over all groups of the file; negative counts from the end).

    Args:
        path: JSONL of trajectories or scored groups.
        index: which one.
        model: folder with the tokenizer. None looks in the run folder that holds `path`.

    Raises:
        UserError: as `read_scored`, an index that is not there, or a `model` without a tokenizer.
    """
    if index < 0:
        index += sum(1 for _ in read_scored(path))
    count = 0
    for trajectory, rewards, place in read_scored(path):
        if count == index:
            tokenizer, config = find_tokenizer(Path(path).parent, model)
            return make_view(trajectory, rewards, place, tokenizer, config)
        count += 1
    raise UserError(f"{path} holds {count} trajectories; --index takes 0 to {count - 1}.")


def find_tokenizer(folder: Path, model: str | Path | None = None) -> tuple[Any | None, FormatConfig]:
    """The tokenizer and the format of a run: from `model`, else from the run folder at or above `folder`.

    Returns:
        The tokenizer (None if none is found and `model` was not given), and the run's format or its default.
    """
    config = FormatConfig()
    candidates: list[Path] = [Path(model)] if model is not None else []
    for place in (folder, *list(folder.resolve().parents)[:2]):
        if (place / "config.yaml").is_file():
            run = load_run_config(place)
            config = run.format
            candidates += [place / "hf"]
            if isinstance(run, RlConfig) and model is None:
                candidates += [Path(run.model)]
            break
    else:
        candidates += [folder / "hf", folder, folder.parent / "rl" / "hf"]
    for candidate in candidates:
        if any((candidate / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(candidate), config
        if model is not None:
            raise UserError(f"{model} holds no tokenizer; --model takes a Hugging Face folder.")
    return None, config


def make_view(
    trajectory: Trajectory,
    group: Sequence[RewardResult] = (),
    place: int = 0,
    tokenizer: Any | None = None,
    config: FormatConfig | None = None,
) -> View:
    """Bring a record and its text together.

    What left the cache is taken from the record (what the engine did); blocks and mementos are read from the tokens,
    which needs the tokenizer's delimiters. Where the two contradict each other the view says so.
    """
    ids, prompt_len = trajectory.token_ids, trajectory.prompt_len
    limits = np.full(len(ids), NEVER, dtype=np.int64)
    resident = np.arange(1, len(ids) + 1, dtype=np.int64)
    done = [e for e in trajectory.evictions if e.boundary < len(ids)]  # one at the very end shows nothing
    for boundary, start, end in done:
        limits[start:end] = boundary
        resident[boundary:] -= end - start
    roles: list[Role] = [Role.PROMPT] * prompt_len + [Role.TEXT] * (len(ids) - prompt_len)
    pieces, warning = None, ""
    if tokenizer is None:
        warning = "no tokenizer found: token ids are shown. Name a model folder with --model."
        for _, start, end in done:
            roles[start:end] = [Role.BLOCK] * (end - start)
    else:
        pieces = tuple(token_texts(tokenizer, ids))
        fmt = (config or FormatConfig()).bind(tokenizer)
        _mark_roles(roles, ids, fmt, prompt_len)
        expected = (
            [e for e in parse(ids, fmt, prompt_len).evictions if e.boundary < len(ids)] if trajectory.evict else []
        )
        if expected != done:
            warning = (
                f"the record has {len(done)} evictions, its tokens call for {len(expected)} under this "
                "format: is the model folder, or evict_delimiters or keep_last_n, another than in the run?"
            )
    forced = {prompt_len + position for position in trajectory.forced}
    reward = group[place] if group else None
    segments = tuple(_segments(roles, limits, forced))
    return View(trajectory, pieces, segments, resident, reward, tuple(group), warning)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    """The text each token adds. Bytes of an unfinished character are held back until the token that completes it.

    Each token is decoded together with the last ones before it, because what it adds may depend on them (a leading
    space, half a character). Special tokens are spelled out.
    """

    def decode(part: Sequence[int]) -> str:
        return tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    context, shown = 0, 0  # ids[context:shown] are on the page, and are the context of what comes next
    for end in range(1, len(ids) + 1):
        before, text = decode(ids[context:shown]), decode(ids[context:end])
        if text.endswith("�") and end < len(ids):
            yield ""
            continue
        yield text[len(before) :]
        context, shown = shown, end


def _mark_roles(roles: list[Role], ids: Sequence[int], fmt: MementoFormat, prompt_len: int) -> None:
    delimiters = set(fmt.delimiter_ids)
    trace = parse(ids, fmt, prompt_len)
    if trace.open_block is not None:
        roles[trace.open_block :] = [Role.BLOCK] * (len(ids) - trace.open_block)
    for block in trace.blocks:
        roles[block.start : block.end] = [Role.BLOCK] * block.block_tokens
        roles[block.memento_start : block.memento_end] = [Role.MEMENTO] * block.memento_tokens
    for position in range(prompt_len, len(ids)):
        if ids[position] in delimiters:
            roles[position] = Role.DELIMITER


def _segments(roles: Sequence[Role], limits: NDArray[np.int64], forced: set[int]) -> Iterator[Segment]:
    start = 0
    for end in range(1, len(roles) + 1):
        same = end < len(roles) and (roles[end], limits[end], end in forced) == (
            roles[start],
            limits[start],
            start in forced,
        )
        if not same:
            yield Segment(start, end, roles[start], int(limits[start]), start in forced)
            start = end


def facts(view: View) -> list[tuple[str, str]]:
    """What is known about a trajectory, as label and value."""
    t = view.trajectory
    peak, total = int(view.resident_T.max(initial=0)), len(t.token_ids)
    rows = [("problem", t.problem_id), ("group", f"{t.group_id}, sample {t.sample_index}")]
    if view.reward is not None:
        score = "no score" if view.reward.score is None else f"{view.reward.score:g}"
        answer = f", answer {view.reward.extracted}" if view.reward.extracted else ""
        rows.append(("reward", f"{score} ({view.reward.outcome.value}{answer})"))
    if len(view.group) > 1:
        scores = [r.score for r in view.group if r.score is not None]
        mean = f", mean {np.mean(scores):.2f}" if scores else ""
        rows.append(
            ("rewards of the group", " ".join("–" if r.score is None else f"{r.score:g}" for r in view.group) + mean)
        )
    rows += [
        ("tokens", f"{t.prompt_len:,} prompt + {len(t.completion_ids):,} completion, ended by {t.finish_reason.value}"),
        ("peak KV", f"{peak:,} tokens instead of {total:,} ({total / max(peak, 1):.2f}× lower)"),
        ("evictions", f"{len(view.evictions)}, {sum(e.end - e.start for e in view.evictions):,} tokens"),
        ("sampled", f"temperature {t.temperature:g}, seed {t.seed}, weights {_versions(t)}, {t.seconds:.2f} s"),
    ]
    if t.forced:
        rows.append(("forced tokens", f"{len(t.forced)}, written by the block cap"))
    if t.preemptions:
        rows.append(("preemptions", str(t.preemptions)))
    return rows


def _versions(trajectory: Trajectory) -> str:
    versions = sorted({span.version for span in trajectory.weight_versions})
    return f"v{versions[0]}" if len(versions) == 1 else f"v{versions[0]} to v{versions[-1]}"


# ---------------------------------------------------------------------------------------------- terminal

STYLES = {
    Role.PROMPT: "blue",
    Role.TEXT: "",
    Role.DELIMITER: "cyan",
    Role.BLOCK: "",
    Role.MEMENTO: "bold green",
}


def print_view(view: View, console: Console) -> None:
    """Show a trajectory in a terminal."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for label, value in facts(view):
        grid.add_row(Text(label, style="bold"), Text(value))
    console.print(grid)
    if view.warning:
        console.print(Text(view.warning, style="yellow"))
    console.print()
    console.print(sawtooth_text(view, min(console.width, 100)))
    console.print(
        Text.assemble(
            ("prompt", "blue"), "  ", ("evicted block", "dim"), "  ", ("memento", "bold green"), "  ",
            ("delimiter", "cyan"), "  ", ("forced by the block cap", "reverse red"),
        )
    )  # fmt: skip
    console.print()
    console.print(trace_text(view), soft_wrap=False)


def trace_text(view: View) -> Text:
    """The whole trace; what left the cache is dim, what the block cap wrote is reversed."""
    from rich.text import Text

    text = Text()
    for segment in view.segments:
        style = "dim" if segment.evicted else STYLES[segment.role]
        text.append(view.text(segment), style=f"{style} reverse red" if segment.forced else style)
    if view.pieces is None:
        text.append(f"\n\n{view.trajectory.text}")
    return text


def sawtooth_text(view: View, width: int, height: int = 10) -> Text:
    """The KV sawtooth in block characters: filled as sampled, dotted for the same tokens without eviction."""
    from rich.text import Text

    resident, total = view.resident_T, len(view.resident_T)
    margin = len(f"{total:,}") + 2
    columns = max(min(width - margin - 1, total), 1)
    # The maximum within a column, so that no peak is lost.
    edges = np.linspace(0, total, columns + 1).astype(int)
    heights = [int(resident[a : max(b, a + 1)].max()) / total * height for a, b in pairwise(edges)]
    full = [(b / total) * height for b in edges[1:]]
    chart = Text()
    chart.append("resident KV (tokens)\n", style="bold")
    for row in range(height, 0, -1):
        label = f"{total:,}" if row == height else f"{total // 2:,}" if row == height // 2 else ""
        chart.append(f"{label:>{margin - 1}}│", style="dim")
        for own, without in zip(heights, full, strict=True):
            filled = own - (row - 1)
            if filled >= 1 / 16:
                chart.append(" ▁▂▃▄▅▆▇█"[min(8, max(1, round(8 * filled)))], style="blue")
            elif row - 1 < without <= row:
                chart.append("·", style="dim")
            else:
                chart.append(" ")
        chart.append("\n")
    axis = f"{'':>{margin - 1}}└{'─' * columns}\n{'':>{margin}}0{f'{total - 1:,}':>{columns - 1}}\n"
    chart.append(axis, style="dim")
    chart.append(f"{'':>{margin}}position (tokens); ")
    chart.append("█", style="blue")
    chart.append(" with eviction  ")
    chart.append("·", style="dim")
    chart.append(" without\n")
    return chart


# ---------------------------------------------------------------------------------------------- HTML

PAGE_CSS = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--muted:#667080;--rule:#e3e6ea;--soft:#f5f6f8;
--c0:#1f6feb;--c1:#c2410c;--c2:#15803d;--memento:#15803d;--memento-bg:#e6f4ea;--block-bg:#eef3fb;--bad:#b91c1c}
@media (prefers-color-scheme:dark){:root{--paper:#14171c;--ink:#e4e7eb;--muted:#97a1af;--rule:#2b313a;--soft:#1b2027;
--c0:#6aa6ff;--c1:#f59e5b;--c2:#5fcf86;--memento:#7fdc9d;--memento-bg:#17301f;--block-bg:#1a2535;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1220px;padding:28px 24px 64px;background:var(--paper);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:26px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:18px;margin:44px 0 10px;padding-top:14px;border-top:1px solid var(--rule)}
p{max-width:78ch;margin:8px 0}.sub{color:var(--muted)}
table{border-collapse:collapse;width:100%}.scroll{overflow-x:auto}
th,td{text-align:left;padding:6px 10px;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:600;color:var(--muted);font-size:13px}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.key td{font-weight:650}.num.wrap{white-space:normal}
.facts{margin-top:12px}.facts td:first-child{color:var(--muted);white-space:nowrap;width:1%}
.facts td{padding:3px 10px 3px 0;border:0;overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;color:var(--muted);font-size:13px;margin-top:6px}
.legend span{display:inline-flex;align-items:center;gap:6px}.legend svg{flex:none}
.trace{font:13px/1.65 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre-wrap;
overflow-wrap:anywhere;border:1px solid var(--rule);border-radius:8px;padding:14px 16px;margin-top:12px}
.trace span{transition:opacity .12s}
.trace-key{margin-top:18px}.trace-key span{padding:0 6px;border-radius:3px}
.trace-key+.trace{margin-top:8px}
:is(.trace,.trace-key) .prompt{color:var(--c0)}.trace .delimiter{color:var(--muted)}
:is(.trace,.trace-key) .block{background:var(--block-bg)}
:is(.trace,.trace-key) .memento{color:var(--memento);background:var(--memento-bg);font-weight:600}
.trace .forced{outline:1px solid var(--bad);color:var(--bad)}
:is(.trace,.trace-key) .gone{opacity:.42;background:none}
.trace .later{opacity:.13;background:none}
.trace .now{outline:2px solid var(--c1);outline-offset:1px;border-radius:2px}
.time{position:sticky;bottom:0;background:var(--paper);border-top:1px solid var(--rule);padding:10px 0;margin-top:14px}
.time input{width:100%;accent-color:var(--c0);margin:0}.time output{font-variant-numeric:tabular-nums}
.warn{border-left:3px solid var(--c1);padding:4px 12px;background:var(--soft)}
.figures{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:30px 40px}
figure{margin:14px 0 0}figcaption{margin-bottom:8px;color:var(--muted)}figcaption b{color:var(--ink)}
.bars td{padding:4px 8px 4px 0;border:0}.bars td:first-child{white-space:nowrap;width:1%;min-width:72px}
.bar{width:70%}.bar i{display:block;height:12px;min-width:2px;background:var(--c0);border-radius:2px;margin-top:5px}
pre{background:var(--soft);padding:14px 16px;border-radius:8px;overflow-x:auto;font-size:12.5px;line-height:1.5}
code{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.92em}
details summary{cursor:pointer;color:var(--muted)}
@media (max-width:640px){.figures{grid-template-columns:minmax(0,1fr)}
body{padding:18px 14px 48px;font-size:14px}h1{font-size:22px}h2{margin-top:34px}
th,td{padding:5px 3px}th{font-size:11.5px}.num{white-space:normal}
.trace{padding:10px 11px;font-size:12px}.facts td:first-child{white-space:normal;width:32%}}
@media print{.time{display:none}}
"""

SLIDER_JS = """
for (const box of document.querySelectorAll('[data-trace]')) {
  const data = JSON.parse(box.querySelector('script[type="application/json"]').textContent);
  const spans = [...box.querySelectorAll('.trace > span')];
  const slider = box.querySelector('input'), output = box.querySelector('output');
  const cursors = [...box.querySelectorAll('.cursor')].map(c => [c, c.ownerSVGElement.dataset]);
  const last = data.total - 1;
  function part(text, name) {
    const span = document.createElement('span');
    span.className = name; span.textContent = text;
    return span;
  }
  let split = -1;
  function show(t) {
    if (split >= 0) spans[split].textContent = data.segments[split].pieces.join('');
    split = -1;
    data.segments.forEach((s, i) => {
      const list = spans[i].classList;
      list.toggle('gone', s.until <= t);
      list.toggle('later', s.start > t);
      if (s.start <= t && t < s.end) {
        const k = t - s.start;
        spans[i].replaceChildren(s.pieces.slice(0, k).join(''), part(s.pieces[k], 'now'),
                                 part(s.pieces.slice(k + 1).join(''), 'later'));
        split = i;
      }
    });
    for (const [c, {x0, x1}] of cursors)
      c.setAttribute('transform', `translate(${(+x0 + (x1 - x0) * t / Math.max(last, 1)).toFixed(2)} 0)`);
    const seen = data.resident[t];
    output.textContent = `token ${t} of ${last}: sees ${seen} of the ${t + 1} tokens so far` +
      (seen < t + 1 ? `, ${t + 1 - seen} have left the cache` : '');
  }
  slider.addEventListener('input', () => show(+slider.value));
  for (const svg of box.querySelectorAll('svg[data-x0]')) {
    const jump = e => {
      const r = svg.getBoundingClientRect(), x = (e.clientX - r.left) * svg.viewBox.baseVal.width / r.width;
      const t = Math.round(last * (x - svg.dataset.x0) / (svg.dataset.x1 - svg.dataset.x0));
      slider.value = Math.min(Math.max(t, 0), last); show(+slider.value);
    };
    svg.style.cursor = 'crosshair'; svg.addEventListener('click', jump);
    svg.addEventListener('pointermove', e => { if (e.buttons) jump(e); });
  }
  slider.disabled = false; show(+slider.value);
}
"""


def page(title: str, body: str) -> str:
    """A self-contained HTML page: no external resource, light and dark, wide and narrow."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{PAGE_CSS}{charts.CSS}</style></head>\n"
        f"<body>\n{body}\n<script>{SLIDER_JS}</script></body></html>\n"
    )


def view_page(view: View) -> str:
    """One trajectory as a self-contained page with a slider over time."""
    t = view.trajectory
    body = (
        f"<h1>Trajectory of {escape(t.problem_id)}</h1>"
        f"{facts_table(view)}<h2>KV cache and trace</h2>{trace_section(view)}"
    )
    return page(f"{t.problem_id} · memento", body)


def facts_table(view: View) -> str:
    """`facts` as an HTML table."""
    return table_of_facts(facts(view)) + (f'<p class="warn">{escape(view.warning)}</p>' if view.warning else "")


def table_of_facts(rows: Sequence[tuple[str, str]]) -> str:
    """Labels and values as an HTML table without lines."""
    cells = "".join(f"<tr><td>{escape(label)}</td><td>{escape(value)}</td></tr>" for label, value in rows)
    return f'<table class="facts">{cells}</table>'


def trace_section(view: View) -> str:
    """Sawtooth, trace and slider. Without a script it shows the end of the trace."""
    total = len(view.trajectory.token_ids)
    ids = view.trajectory.token_ids
    spans, data = [], []
    for segment in view.segments:
        names = [segment.role.value, *(["forced"] if segment.forced else []), *(["gone"] if segment.evicted else [])]
        title = f' title="left the cache before token {segment.visible_until}"' if segment.evicted else ""
        spans.append(f'<span class="{" ".join(names)}"{title}>{escape(view.text(segment))}</span>')
        pieces = view.pieces if view.pieces is not None else tuple(f"‹{i}›" for i in ids)
        data.append(
            {
                "start": segment.start,
                "end": segment.end,
                "until": min(segment.visible_until, total),
                "pieces": pieces[segment.start : segment.end],
            }
        )
    # "<" inside JSON must not end the script element.
    blob = json.dumps({"total": total, "segments": data, "resident": view.resident_T.tolist()}).replace("<", "\\u003c")
    keys = (
        ("prompt", "prompt"),
        ("block", "block in the cache"),
        ("gone", "evicted block"),
        ("memento", "memento"),
    )
    key = "".join(f'<span class="{name}">{text}</span>' for name, text in keys)
    recorded = "" if view.pieces is not None else f"<h2>Text</h2><pre>{escape(view.trajectory.text)}</pre>"
    return (
        f"<div data-trace>{charts.sawtooth(view.resident_T, view.evictions, view.trajectory.prompt_len, cursor=True)}"
        f'<div class="legend trace-key">{key}</div>'
        f'<div class="trace">{"".join(spans)}</div>'
        f'<div class="time"><label><output>the whole trace</output>'
        f'<input type="range" min="0" max="{total - 1}" value="{total - 1}" disabled '
        f'aria-label="position in the trace"></label></div><script type="application/json">{blob}</script></div>'
        f"{recorded}"
    )


def view_file(
    path: str | Path,
    console: Console,
    index: int = 0,
    html: str | Path | None = None,
    model: str | Path | None = None,
) -> None:
    """``memento view FILE [--index N] [--html OUT] [--model FOLDER]``. Errors as for `load_view`."""
    view = load_view(path, index, model)
    if html is None:
        print_view(view, console)
        return
    replace_text(Path(html), view_page(view))
    console.print(f"wrote {html}")
