"""Rows of SFT data: where they are read from, which columns they may have, and which of them can be used.

A source is a JSONL or Parquet file, a folder (`datasets.save_to_disk`, or files that `datasets` can load), or a hub id;
``:subset`` and ``@split`` may follow (``microsoft/OpenMementos:full``, ``my/set@test``). Rows are read one by one.

=================  ==================================================================================================
columns            what they are
=================  ==================================================================================================
problem, response  OpenMementos ``default``: the response is in memento format (or plain, for stage 0 and the control)
problem,           OpenMementos ``full``; where it has no ``response``, one is put together: ``blocks`` are inclusive
sentences, blocks, [first, last] sentence indices
block_summaries
conversations      OpenThoughts: one human and one gpt turn (``from``, ``value``), after an optional system turn
messages           the same as ``role``, ``content``
=================  ==================================================================================================

``domain``, ``source`` and ``difficulty`` are carried along; other columns are ignored. A row that has none of these
sets of columns, or a broken line, is an error that names the line. A row that is well formed but of no use is dropped
and counted, by the reasons in `REASONS`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from memento.errors import UserError
from memento.format import BLOCK_END, BLOCK_START, DELIMITERS, SUMMARY_END, SUMMARY_START, MementoFormat, parse
from memento.row_files import Located, json_lines, loading, numbered, parquet_rows

REASONS = {
    "empty": "no text in the problem or the response",
    "wrong roles": "a conversation that is not one question and one answer",
    "no thinking": "not exactly one <think> ... </think>, at the beginning of the response",
    "empty thinking": "nothing between <think> and </think>",
    "no blocks": "a response without blocks, in a stage that trains on them",
    "malformed blocks": "delimiters out of order, a block left open, or blocks that do not fit the sentences",
    "blocks outside of thinking": "a delimiter after </think>",
    "empty block": "a block without text",
    "empty memento": "a memento without text",
    "text between blocks": "reasoning that no block holds (kept with strict_blocks: false)",
    "special token in the response": "a chat token such as <|im_end|> inside the text",
    "prompt too long": "a prompt that fills max_length alone",
}
"""Why a row is dropped -> what that means."""

_DELIMITER = re.compile("|".join(map(re.escape, DELIMITERS)))
_ANNOTATION = re.compile(
    rf"{re.escape(SUMMARY_START)}.*?{re.escape(SUMMARY_END)}|{re.escape(BLOCK_START)}|{re.escape(BLOCK_END)}", re.DOTALL
)
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TEXT_FORMAT = MementoFormat(1, 2, 3, 4, evict_delimiters=False)
_TEXT = 0


class Row(NamedTuple):
    """One trace."""

    problem: str
    response: str
    domain: str = ""
    source: str = ""
    difficulty: str | int | float | None = None


class _Unusable(Exception):
    """A row to drop; the text is one of `REASONS`."""


def read_rows(data: Path | str, *, dropped: Counter[str] | None = None, streaming: bool = False) -> Iterator[Row]:
    """The rows of a source, in order.

    Args:
        data: see the module.
        dropped: counts the rows that are left out here (``empty``, ``wrong roles``, ``malformed blocks``).
        streaming: read a hub data set as it arrives instead of downloading all of it first.

    Raises:
        UserError: no such file, folder or data set; a line that is not JSON; columns that are not there or hold
            something else. The message names file and line.
    """
    counts: Counter[str] = Counter() if dropped is None else dropped
    for where, raw in _raw_rows(data, streaming):
        try:
            yield to_row(raw, where)
        except _Unusable as reason:
            counts[str(reason)] += 1


def _raw_rows(data: Path | str, streaming: bool) -> Iterator[Located]:
    path = Path(data)
    if path.is_file() and path.suffix == ".parquet":
        return parquet_rows(path)
    if path.is_file():
        return json_lines(path)
    if path.suffix in (".jsonl", ".json", ".parquet") and not path.is_dir():
        raise UserError(f"no data file at {path}. `data` takes a JSONL or Parquet file, a folder, or a hub id.")
    return numbered(_data_set(data, streaming), str(data))


def _data_set(data: Path | str, streaming: bool) -> Any:
    name, subset, split = split_source(str(data))
    advice = "`data` takes a JSONL or Parquet file, a folder or a hub id, with :subset and @split if it has several."
    with loading(f"cannot load the data set {data}", advice) as datasets:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(name, subset, split=split, streaming=streaming)


def split_source(data: str) -> tuple[str, str | None, str]:
    """(name, subset, split) of ``name:subset@split``."""
    name, _, split = data.partition("@")
    name, _, subset = name.partition(":")
    return name, subset or None, split or "train"


def to_row(raw: Any, where: str) -> Row:
    """A row of any of the known sets of columns.

    Raises:
        UserError: none of them fits; `where` names the row.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: a row is an object with columns, got {type(raw).__name__}.")
    if "conversations" in raw or "messages" in raw:
        problem, response = _conversation(raw, where)
    elif "problem" in raw and (raw.get("response") is not None or "sentences" not in raw):
        problem, response = _text(raw, "problem", where), _text(raw, "response", where)
    elif "problem" in raw:
        problem, response = _text(raw, "problem", where), _assembled(raw, where)
    else:
        raise UserError(
            f"{where}: columns {', '.join(map(str, raw)) or '(none)'}; known are problem and response, problem with "
            "sentences, blocks and block_summaries, conversations, and messages."
        )
    if not problem.strip() or not response.strip():
        raise _Unusable("empty")
    difficulty = raw.get("difficulty")
    return Row(
        problem,
        response,
        str(raw.get("domain") or ""),
        str(raw.get("source") or ""),
        difficulty if isinstance(difficulty, str | int | float) else None,
    )


def _text(raw: Mapping[str, Any], column: str, where: str) -> str:
    if not isinstance(raw.get(column), str):
        raise UserError(f"{where}: `{column}` is missing or no text; each line needs `problem` and `response`.")
    return raw[column]


def _conversation(raw: Mapping[str, Any], where: str) -> tuple[str, str]:
    column = "conversations" if "conversations" in raw else "messages"
    turns = raw[column]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError(f"{where}: `{column}` must be a list of turns.")
    said = []
    for turn in turns:
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or not isinstance(text, str):
            raise UserError(f"{where}: a turn of `{column}` needs `from` and `value`, or `role` and `content`.")
        said.append((_ROLES.get(role, role), text))
    if said and said[0][0] == "system":
        said = said[1:]
    if [role for role, _ in said] != ["user", "assistant"]:
        raise _Unusable("wrong roles")
    return said[0][1], said[1][1]


def _assembled(raw: Mapping[str, Any], where: str) -> str:
    """The response of a row of OpenMementos `full`: blocks in thinking tags, then what follows the last block."""
    sentences, blocks, mementos = raw.get("sentences"), raw.get("blocks"), raw.get("block_summaries")
    for column, value in (("sentences", sentences), ("blocks", blocks), ("block_summaries", mementos)):
        if not isinstance(value, list):
            raise UserError(f"{where}: `{column}` is missing or no list, and there is no `response` either.")
    assert isinstance(sentences, list) and isinstance(blocks, list) and isinstance(mementos, list)
    expected, parts = 0, ["<think>"]
    if len(blocks) != len(mementos):
        raise _Unusable("malformed blocks")
    for block, memento in zip(blocks, mementos, strict=True):
        if len(block) != 2 or block[0] != expected or not block[0] <= block[1] < len(sentences):
            raise _Unusable("malformed blocks")
        expected = block[1] + 1
        text = _joined(sentences[block[0] : expected])
        parts.append(f"{BLOCK_START}{text}{BLOCK_END}{SUMMARY_START}{memento.strip()}{SUMMARY_END}")
    return "\n".join([*parts, "</think>", _joined(sentences[expected:])])


def _joined(sentences: list[str]) -> str:
    """Sentences as one text; those that carry no white space of their own get a space between."""
    text = ""
    for sentence in sentences:
        text += sentence if not text or text[-1].isspace() or sentence[:1].isspace() else " " + sentence
    return text.strip()


def split_thinking(response: str) -> tuple[str, str]:
    """(reasoning, answer) of a response as it stands; without think tags all of it is reasoning."""
    before, closed, answer = response.partition("</think>")
    reasoning = before.partition("<think>")[2] if "<think>" in before else before
    return (reasoning, answer) if closed else (reasoning, "")


def strip_blocks(response: str) -> str:
    """The same reasoning without blocks and mementos: what the SFT-only control is trained on."""
    return _ANNOTATION.sub("", response)


def annotated_blocks(thinking: str) -> list[tuple[str, str]]:
    """(block, memento) texts of well-formed thinking, in order."""
    texts = _DELIMITER.split(thinking)
    return [(texts[i], texts[i + 2]) for i in range(1, len(texts) - 2, 4)]


def has_blocks(response: str) -> bool:
    """Whether any delimiter is in the text."""
    return _DELIMITER.search(response) is not None


def check_response(response: str, *, blocks: bool, strict: bool = True) -> str | None:
    """Why a response cannot be used: a key of `REASONS`, or None for a good one.

    Args:
        blocks: whether it must be in memento format. Where not, plain thinking will do, but what has delimiters must
            have them right, so that all stages keep the same traces.
        strict: also refuse text between blocks.
    """
    if not response.strip():
        return "empty"
    start, end = response.find("<think>"), response.find("</think>")
    once = response.count("<think>") == 1 and response.count("</think>") == 1
    if not once or end < start or response[:start].strip():
        return "no thinking"
    thinking, answer = response[start + len("<think>") : end], response[end + len("</think>") :]
    if not thinking.strip():
        return "empty thinking"
    if _DELIMITER.search(answer):
        well_formed = parse(_symbols(response), _TEXT_FORMAT).well_formed
        return "blocks outside of thinking" if well_formed else "malformed blocks"
    symbols = _symbols(thinking)
    if len(symbols) == 1 and not blocks:
        return None
    if len(symbols) == 1:
        return "no blocks"
    trace = parse(symbols, _TEXT_FORMAT)
    if not trace.well_formed or not trace.blocks:
        return "malformed blocks"
    # Delimiters and the texts between them alternate: text, B, text, E, text, S, text, Z, text, ...
    texts = _DELIMITER.split(thinking)
    for number in range(len(trace.blocks)):
        outside, block, between, memento = texts[4 * number : 4 * number + 4]
        if not block.strip():
            return "empty block"
        if not memento.strip():
            return "empty memento"
        if strict and (outside.strip() or between.strip()):
            return "text between blocks"
    return "text between blocks" if strict and texts[-1].strip() else None


def _symbols(text: str) -> list[int]:
    """The delimiters of a text as ids of `_TEXT_FORMAT`, with one `_TEXT` for each text between them."""
    symbols = [_TEXT]
    for match in _DELIMITER.finditer(text):
        symbols += [DELIMITERS.index(match.group()) + 1, _TEXT]
    return symbols
