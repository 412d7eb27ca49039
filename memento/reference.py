"""Pages of the documentation that are printed, not written, so that they cannot disagree with the code.

memento reference config  > docs/configuration.md        from the schema
memento reference metrics > docs/metrics.md              from `memento.metrics`
memento reference picture > docs/images/visible.svg      from the rule of what is visible
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from memento.config import RlConfig, SftConfig
from memento.format import MementoFormat, kv_profile, visible_until
from memento.metrics import metrics_reference

INTRODUCTION = """\
# Configuration

Printed by `memento reference config` from the schema in `memento/config.py`; a test holds it against that file.

A configuration is a YAML file plus dotted overrides on the command line:

    memento rl configs/rl/quickstart.yaml learner.lr=1e-4 eval.interval=10 out=runs/second

`kind` says whether a file describes an RL run or an SFT stage. A key that is not in the tables below is an error that
names the nearest known one. A file may start from another one with `base: other.yaml` (a path beside it): its keys are
laid over that file's. Nothing changes a configuration after it was read; the resolved tree is saved as `config.yaml` in
the run folder, and that file runs the same run again. `memento show CONFIG` prints it, with what the run will reserve.

Values on the command line are read as YAML: `rollout.max_model_len=null`, `learner.betas=[0.9,0.95]`,
`format.evict_delimiters=true`. A resumed run may differ in `out`, `steps`, `tracking`, `eval` and `checkpoint` only.
"""


def config_reference() -> str:
    """``docs/configuration.md``."""
    parts = [INTRODUCTION]
    for title, schema in (("RL runs", RlConfig), ("SFT stages", SftConfig)):
        parts.append(f"\n## {title}\n\n{_text(schema)}\n")
        kind, seen = title.split()[0], dict[type[BaseModel], str]()
        parts.append(_table(schema, kind, ""))
        for path, section in _sections(schema, ""):
            parts.append(f"\n### {kind}: `{path}`\n")
            if section in seen:
                parts.append(f"As [`{seen[section]}`](#{_anchor(kind, seen[section])}).")
                continue
            seen[section] = path
            parts.append(f"{_text(section)}\n")
            parts.append(_table(section, kind, f"{path}."))
    return "\n".join(parts) + "\n"


def _sections(schema: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections below a schema, each with its dotted path, in the order of the file."""
    for name, field in schema.model_fields.items():
        if (section := _section(field.annotation)) is not None:
            many = "[]" if get_origin(field.annotation) is tuple else ""
            yield f"{prefix}{name}{many}", section
            yield from _sections(section, f"{prefix}{name}{many}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _anchor(kind: str, path: str) -> str:
    """What the site makes of the heading of a section."""
    return re.sub(r"[^a-z0-9_ -]", "", f"{kind}: {path}".lower()).replace(" ", "-")


def _table(schema: type[BaseModel], kind: str, prefix: str) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in schema.model_fields.items():
        section = _section(field.annotation)
        meaning, shown, default = _cell(field.description or ""), _type(field), _default(field)
        if section is not None:
            many = "[]" if get_origin(field.annotation) is tuple else ""
            shown = shown.replace("section", f"[section](#{_anchor(kind, f'{prefix}{name}{many}')})")
            default = "" if field.default is not None else default
        rows.append(f"| `{name}` | {shown} | {default} | {meaning} |")
    return "\n".join(rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """A value as one would write it in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(_yaml(v) for v in value)}]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _type(field: FieldInfo) -> str:
    """The type of a field and the limits of its value: ``integer ≥ 1 or null``."""
    limits = []
    for condition in field.metadata:
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
            if (bound := getattr(condition, name, None)) is not None:
                limits.append(f"{sign} {_yaml(bound)}")
    names = [n for n in _names(field.annotation) if n != "null"]
    optional = " or null" if "null" in _names(field.annotation) else ""
    return " or ".join(names) + (f" {' and '.join(limits)}" if limits else "") + optional


def _names(annotation: Any) -> list[str]:
    """What a YAML author would call each alternative of a type."""
    if annotation is type(None):
        return ["null"]
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return list(dict.fromkeys(name for part in inside for name in _names(part)))
    if origin is Literal:
        return [", ".join(f"`{_yaml(value)}`" for value in inside)]
    if origin in (tuple, list):
        items = [part for part in inside if part is not Ellipsis]
        if len(items) == len(inside):
            return [f"[{', '.join(' or '.join(_names(part)) for part in items)}]"]
        return [f"list of {' or '.join(_names(items[0]))}"]
    if origin is dict:
        return [f"mapping to {' or '.join(_names(inside[1]))}"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ["section"]
    return [
        {int: "integer", float: "number", bool: "boolean", str: "text"}.get(annotation, annotation_name(annotation))
    ]


def annotation_name(annotation: Any) -> str:
    """``path`` for `pathlib.Path`; the name of any other class."""
    name = getattr(annotation, "__name__", str(annotation)).lower()
    return "text" if name in ("jsonvalue", "any") else name


def _text(schema: type[BaseModel]) -> str:
    return " ".join((schema.__doc__ or "").split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# ---------------------------------------------------------------------------------------------- the picture

_FORMAT = MementoFormat(block_start=1, block_end=2, summary_start=3, summary_end=4, evict_delimiters=False)
_TRACE = "ppp 1bbbbb2 3mm4 1bbbb2 3m4 aaa".replace(" ", "")
"""A prompt, two blocks with their mementos, an answer: one letter or digit a token."""
_IDS = tuple(int(t) if t.isdigit() else 9 for t in _TRACE)
_CELL, _TOP, _LEFT = 20, 92, 104
_NAMES = {"1": "block_start", "2": "block_end", "3": "summary_start", "4": "summary_end", "p": "prompt", "a": "answer"}
_GONE = "#f5f6f8"
_COLOURS = {"p": "#7d8da1", "b": "#1f6feb", "m": "#15803d", "a": "#7d8da1"}


def visibility_picture() -> str:
    """Which keys each query of a short trace sees, and what the cache holds: a standalone SVG."""
    prompt_len, total = _TRACE.count("p"), len(_TRACE)
    until = visible_until(_IDS, _FORMAT, prompt_len)
    resident = kv_profile(_IDS, _FORMAT, prompt_len).resident_T
    side = total * _CELL
    bar, unit = _LEFT + side + 24, 7
    width, height = bar + int(resident.max()) * unit + 120, _TOP + side + 66
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="Which keys each query sees" font-family="system-ui,sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>',
        f'<text x="{_LEFT}" y="20" font-size="13" font-weight="600">keys (tokens in the cache)</text>',
        f'<text x="{bar}" y="{_TOP - 10}" font-size="13" font-weight="600">resident</text>',
        f'<text x="14" y="{_TOP - 10}" font-size="13" font-weight="600">queries</text>',
    ]
    for t, token in enumerate(_TRACE):
        x, y = _LEFT + t * _CELL, _TOP + t * _CELL
        name = _NAMES.get(token, "")
        if name and (t == 0 or _TRACE[t - 1] != token):
            parts.append(f'<text x="14" y="{y + 14}" fill="#667080">{name}</text>')
            parts.append(f'<text transform="translate({x + 13} {_TOP - 6}) rotate(-60)" fill="#667080">{name}</text>')
        elif token in "bm" and _TRACE[t - 1] != token:
            name = "block" if token == "b" else "memento"
            parts.append(f'<text x="14" y="{y + 14}" fill="{_COLOURS[token]}" font-weight="600">{name}</text>')
            parts.append(
                f'<text transform="translate({x + 13} {_TOP - 6}) rotate(-60)" fill="{_COLOURS[token]}" '
                f'font-weight="600">{name}</text>'
            )
        for k in range(t + 1):
            left, colour = _LEFT + k * _CELL, _COLOURS.get(_TRACE[k], "#c9a227")
            if t < until[k]:
                parts.append(_square(left + 1, y + 1, _CELL - 2, colour))
            else:
                parts.append(_square(left + 1, y + 1, _CELL - 2, _GONE))
                slash = f"M{left + 5},{y + _CELL - 5}L{left + _CELL - 5},{y + 5}"
                parts.append(f'<path d="{slash}" stroke="{colour}" opacity=".45"/>')
        parts.append(
            f'<rect x="{bar}" y="{y + 3}" width="{int(resident[t]) * unit}" height="{_CELL - 6}" fill="#1f6feb" '
            f'opacity=".28"/><text x="{bar + int(resident[t]) * unit + 5}" y="{y + 14}">{int(resident[t])}</text>'
        )
    edge = bar + int(resident.max()) * unit + 26
    for boundary in sorted(set(until[until < total].tolist())):
        y, gone = _TOP + boundary * _CELL, int(np.count_nonzero(until == boundary))
        parts.append(f'<path d="M{_LEFT},{y}H{edge}" stroke="#c2410c" stroke-width="1.5"/>')
        parts.append(f'<text x="{edge + 5}" y="{y + 4}" fill="#c2410c">{gone} tokens leave</text>')
    legend = (("#7d8da1", "prompt, answer"), ("#c9a227", "delimiter"), ("#1f6feb", "block"), ("#15803d", "memento"))
    x, y = _LEFT, _TOP + side + 34
    for colour, text in legend:
        parts.append(_square(x, y - 11, 14, colour))
        parts.append(f'<text x="{x + 20}" y="{y}">{text}</text>')
        x += 40 + 7 * len(text)
    parts.append(_square(x, y - 11, 14, _GONE))
    parts.append(f'<path d="M{x + 3},{y}L{x + 11},{y - 8}" stroke="#1f6feb" opacity=".6"/>')
    parts.append(f'<text x="{x + 20}" y="{y}">evicted</text>')
    return "".join(parts) + "</svg>\n"


def _square(x: int, y: int, side: int, colour: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{side}" height="{side}" rx="2" fill="{colour}"/>'


REFERENCES = {"config": config_reference, "metrics": metrics_reference, "picture": visibility_picture}
"""What `memento reference` prints, and the committed files that the tests hold it against."""

FILES = {"config": "docs/configuration.md", "metrics": "docs/metrics.md", "picture": "docs/images/visible.svg"}
