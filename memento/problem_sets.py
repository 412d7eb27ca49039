r"""Public problem sets: where they are, and how their columns become `Problem`s.

    read_rows("gsm8k")                       the hub, by the name of a known set
    read_rows("openai/gsm8k", split="train") the hub, by id
    read_rows("data/math/")                  a folder of JSONL, JSON, Parquet or CSV
    read_rows("aime.parquet")                a file

A row becomes a problem by the set it belongs to, which its columns give away (`recognise`). A new set is one function
from a row to the fields of a `Problem`, and one line in `FORMATS`. Rows keep the place they came from, so that every
complaint names a file and a line.
"""

from __future__ import annotations

import csv
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from memento import code_sets
from memento.boxed import last_boxed
from memento.errors import UserError
from memento.row_files import Located, json_lines, loading, numbered, parquet_rows, reading
from memento.rows import BadRow, Fields, Row, digest, text_of

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
BOXED = "Reason step by step, and put the final answer within \\boxed{}."
LETTER = "Reason step by step, and put the letter of the right choice within \\boxed{}."
LETTERS = "ABCDEFGHIJ"


# ---------------------------------------------------------------------------------------------- columns -> fields


def _id(row: Row, name: str, prompt: str, *columns: str) -> str:
    own = next((str(row[c]) for c in columns if row.get(c) not in (None, "")), None)
    return f"{name}/{own if own is not None else digest(prompt)}"


def _rest(row: Row, *columns: str) -> Fields:
    """Short columns that say more about a problem, for its metadata."""
    return {c: row[c] for c in columns if isinstance(row.get(c), str | int | float) and row[c] != ""}


def _gsm8k(row: Row) -> Fields:
    """``question``, ``answer``: a worked solution with the number after ``####``."""
    prompt, solution = text_of(row, "question"), text_of(row, "answer")
    _, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise BadRow("the answer has no number after ####")
    return {
        "id": _id(row, "gsm8k", prompt, "id"),
        "kind": "math",
        "prompt": prompt,
        "answer": answer.strip(),
        "source": "gsm8k",
    }


def _competition(name: str) -> Callable[[Row], Fields]:
    """``problem`` and ``answer``; without an answer, the last box of ``solution``. Capitalised columns too."""

    def fields(row: Row) -> Fields:
        prompt = text_of(row, "problem", "Problem", "question", "Question")
        try:
            answer = text_of(row, "answer", "Answer", "expected_answer")
        except BadRow:
            answer = last_boxed(text_of(row, "solution", "Solution")) or ""
        if not answer.strip():
            raise BadRow("no answer, and no \\boxed{} in the solution")
        known = ("level", "subject", "type", "year", "url", "competition", "problem_type", "difficulty", "domain")
        return {
            "id": _id(row, name, prompt, "unique_id", "problem_idx", "id", "ID"),
            "kind": "math",
            "prompt": prompt,
            "answer": answer,
            "source": name,
            "metadata": _rest(row, *known),
        }

    return fields


def _openmementos(row: Row) -> Fields:
    """``problem``, ``response``: a trace whose last box is the answer. Code and science rows often have none."""
    prompt, response = text_of(row, "problem"), text_of(row, "response")
    answer = last_boxed(response.rpartition("</think>")[2])
    if answer is None:
        raise BadRow("the response has no \\boxed{} after its thinking, so there is nothing to verify")
    return {
        "id": _id(row, "openmementos", prompt, "id"),
        "kind": "math",
        "prompt": prompt,
        "answer": answer,
        "source": "openmementos",
        "metadata": _rest(row, "domain", "source", "difficulty"),
    }


def _conversation(value: object) -> str:
    """The one user turn of a chat, or the text itself."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        turns = [t for t in value if isinstance(t, Mapping)]
        users = [str(t.get("content", "")) for t in turns if t.get("role") == "user"]
        if len(users) == 1 and users[0].strip():
            return users[0]
        raise BadRow(f"a chat with {len(users)} user turns; a problem is one")
    raise BadRow("no prompt")


def _single(value: object) -> str:
    """One answer: a string, a number, a list of one, or JSON of these."""
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        try:
            decoded = json.loads(value)
        except json.JSONDecodeError:
            return value  # an interval, not a list
        # [0, 1] is an interval as well; only a list of strings, or of one thing, is a wrapping
        wraps = isinstance(decoded, list) and (len(decoded) == 1 or all(isinstance(v, str) for v in decoded))
        return _single(decoded) if wraps else value
    if isinstance(value, list | tuple):
        answers = list(dict.fromkeys(str(v).strip() for v in value if v is not None and str(v).strip()))
        if len(answers) != 1:
            raise BadRow(f"{len(answers)} different answers; a problem has one")
        return _single(answers[0]) if answers[0][:1] == "[" else answers[0]
    if value is None or not str(value).strip():
        raise BadRow("no answer")
    return str(value)


def _dolci(row: Row) -> Fields:
    """DolciMath and other RLVR sets of Ai2: ``prompt`` or ``messages``, ``ground_truth``, ``dataset``."""
    kinds = row.get("dataset")
    kind = str(kinds[0] if isinstance(kinds, list | tuple) and kinds else kinds or "math").lower()
    if not any(word in kind for word in ("math", "gsm8k", "aime")):
        raise BadRow(f"a problem of the kind {kind!r}, for which there is no verifier here")
    prompt = _conversation(row.get("prompt") or row.get("messages"))
    return {
        "id": _id(row, "dolci", prompt, "id", "custom_id"),
        "kind": "math",
        "prompt": re.sub(r"\A\s*(?i:user:)\s*", "", prompt),
        "answer": _single(row.get("ground_truth")),
        "source": "dolci",
        "metadata": _rest(row, "original_dataset", "dataset_source"),
    }


def _verl(row: Row) -> Fields:
    """Parquet as verl takes it: ``prompt`` as a chat, ``reward_model.ground_truth``, ``data_source``."""
    judge = row["reward_model"]
    if not isinstance(judge, Mapping):
        raise BadRow("reward_model is no mapping")
    source = str(row["data_source"])
    prompt = _conversation(row["prompt"])
    extra = row.get("extra_info")
    index = extra.get("index") if isinstance(extra, Mapping) else None
    return {
        "id": f"{source}/{index if index not in (None, '') else digest(prompt)}",
        "kind": "math",
        "prompt": prompt,
        "answer": _single(judge.get("ground_truth")),
        "source": source,
    }


def _choices(name: str, own: str, question: str, options: Sequence[str], right: int) -> Fields:
    if not 2 <= len(options) <= len(LETTERS):
        raise BadRow(f"{len(options)} choices; 2 to {len(LETTERS)} can be lettered")
    if not 0 <= right < len(options):
        raise BadRow(f"the answer is choice {right} of {len(options)}")
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    return {
        "id": f"{name}/{own}",
        "kind": "choice",
        "prompt": f"{question.strip()}\n\n{listed}",
        "answer": LETTERS[right],
        "source": name,
    }


def _gpqa(row: Row) -> Fields:
    """``Question``, ``Correct Answer``, ``Incorrect Answer 1..3``: shuffled by the question, the same in every run."""
    question = text_of(row, "Question")
    right = text_of(row, "Correct Answer").strip()
    options = [right, *(text_of(row, f"Incorrect Answer {n}").strip() for n in (1, 2, 3))]
    own = str(row.get("Record ID") or digest(question))
    random.Random(own).shuffle(options)
    fields = _choices("gpqa", own, question, options, options.index(right))
    return fields | {"metadata": _rest(row, "High-level domain", "Subdomain")}


def _mmlu(row: Row) -> Fields:
    """MMLU (``choices``, ``answer`` as an index) and MMLU-Pro (``options``, ``answer_index``)."""
    question = text_of(row, "question")
    options = row.get("options") or row.get("choices")
    if not isinstance(options, Sequence) or isinstance(options, str):
        raise BadRow("no list of choices")
    index = row.get("answer_index", row.get("answer"))
    right = LETTERS.find(index) if isinstance(index, str) and len(index) == 1 and index.isalpha() else index
    if not str(right).lstrip("-").isdigit():
        raise BadRow(f"the answer {index!r} is no index")
    own = str(row.get("question_id") or digest(question + "".join(map(str, options))))
    fields = _choices("mmlu", own, question, [str(o) for o in options], int(str(right)))
    return fields | {"metadata": _rest(row, "subject", "category")}


@dataclass(frozen=True, slots=True)
class SetFormat:
    """How the rows of one kind of set become problems.

    Attributes:
        columns: a row that has all of these is taken for one of this set, unless an earlier format wants it.
        instruction: put below every prompt, unless the caller says otherwise.
    """

    name: str
    columns: frozenset[str]
    fields: Callable[[Row], Fields]
    instruction: str = ""


def _format(name: str, columns: str, fields: Callable[[Row], Fields], instruction: str = "") -> SetFormat:
    return SetFormat(name, frozenset(columns.split("|")), fields, instruction)


FORMATS: tuple[SetFormat, ...] = (
    _format("problems", "id|kind|prompt", dict),
    _format("humaneval", "task_id|prompt|test|entry_point", code_sets.human_eval),
    _format("mbpp", "task_id|test_list", code_sets.mbpp),
    _format("livecodebench", "question_id|question_content|public_test_cases", code_sets.livecodebench),
    _format("apps", "problem_id|question|input_output", code_sets.apps),
    _format("taco", "question|input_output", code_sets.apps),
    _format("gpqa", "Question|Correct Answer|Incorrect Answer 1", _gpqa, LETTER),
    _format("mmlu", "question|options|answer_index", _mmlu, LETTER),
    _format("mmlu", "question|choices|answer", _mmlu, LETTER),
    _format("openmementos", "problem|response", _openmementos, BOXED),
    _format("matharena", "problem_idx|problem|answer", _competition("matharena"), BOXED),
    _format("verl", "data_source|prompt|reward_model", _verl),
    _format("dolci", "ground_truth|messages", _dolci, BOXED),
    _format("dolci", "ground_truth|prompt", _dolci, BOXED),
    _format("math", "problem|solution|level", _competition("math"), BOXED),
    _format("aime", "problem|answer", _competition("aime"), BOXED),
    _format("aime", "Problem|Answer", _competition("aime"), BOXED),
    _format("math", "problem|solution", _competition("math"), BOXED),
    _format("gsm8k", "question|answer", _gsm8k, BOXED),
)
"""In the order in which a row is tried. Several formats may have one name: the same set under other columns."""


class HubSet(NamedTuple):
    """Where a known set lies on the Hugging Face hub."""

    id: str
    subset: str | None
    split: str
    files: tuple[str, ...] = ()
    """Files to read instead of the set's own loader (a set that has only a loading script)."""


HUB: dict[str, HubSet] = {
    "gsm8k": HubSet("openai/gsm8k", "main", "test"),
    "math500": HubSet("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": HubSet("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": HubSet("MathArena/aime_2025", None, "train"),
    "aime26": HubSet("MathArena/aime_2026", None, "train"),
    "hmmt25": HubSet("MathArena/hmmt_feb_2025", None, "train"),
    "gpqa": HubSet("Idavidrein/gpqa", "gpqa_diamond", "train"),
    "humaneval": HubSet("openai/openai_humaneval", None, "test"),
    "mbpp": HubSet("google-research-datasets/mbpp", "sanitized", "test"),
    "livecodebench": HubSet("livecodebench/code_generation_lite", None, "train", ("test6.jsonl",)),
    "openmementos": HubSet("microsoft/OpenMementos", None, "train"),
    "dolcimath": HubSet("allenai/Dolci-RL-Zero-Math-7B", None, "train"),
}
"""Known sets by name. `subset` and `split` are what is taken where the config names none."""


def recognise(row: Row) -> SetFormat | None:
    """The format whose columns a row has; None if no known set looks like that."""
    for known in FORMATS:
        if known.columns <= row.keys():
            if known.name == "gsm8k" and "####" not in str(row["answer"]):
                return _format("qa", "question|answer", _competition("qa"), BOXED)
            return known
    return None


def format_named(name: str, row: Row) -> SetFormat:
    """The format of this name that fits a row best.

    Raises:
        UserError: no set has that name.
    """
    named = [known for known in FORMATS if known.name == name]
    if not named:
        names = ", ".join(sorted({known.name for known in FORMATS}))
        raise UserError(f"there is no problem set called {name!r}. Known: {names}; or give `columns`.")
    return next((known for known in named if known.columns <= row.keys()), named[0])


# ---------------------------------------------------------------------------------------------- places -> rows


def read_rows(source: Path | str, *, subset: str | None = None, split: str | None = None) -> Iterator[Located]:
    """The rows of a file, a folder, a known set or a hub data set, each with its place.

    Args:
        source: where to look, in this order: a path that exists, the name of a known set, a hub id.
        subset: configuration of a hub data set.
        split: split of a hub data set, or files of a folder whose names begin with it.

    Raises:
        UserError: nothing there, nothing that can be read, or several splits and none chosen.
    """
    path = Path(source)
    if path.is_file():
        yield from _read_file(path)
    elif path.is_dir():
        for file in _files_of(path, split):
            yield from _read_file(file)
    elif str(source) in HUB:
        known = HUB[str(source)]
        yield from _read_hub(known._replace(subset=subset or known.subset, split=split or known.split))
    elif HUB_ID.fullmatch(str(source)) and not path.suffix:
        known = next((k for k in HUB.values() if k.id == str(source)), None) or HubSet(str(source), None, "")
        yield from _read_hub(known._replace(subset=subset or known.subset, split=split or known.split))
    else:
        raise UserError(
            f"no problem file at {source}. Problems come from a file ({', '.join(SUFFIXES)}), a folder of them, a "
            f"known set ({', '.join(HUB)}) or a hub id (organisation/name)."
        )


_SPLIT = re.compile(r"(train|test|validation|valid|val|dev)(?![a-z])")


def _files_of(folder: Path, split: str | None) -> list[Path]:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name.endswith(SUFFIXES) and f.name[0] != ".")
    if not files:
        raise UserError(f"{folder} holds no problem file ({', '.join(SUFFIXES)}).")
    if split is not None:
        chosen = [f for f in files if f.name.startswith(split) or split in f.relative_to(folder).parts[:-1]]
        if not chosen:
            raise UserError(f"{folder} holds no file of the split {split!r}: {', '.join(f.name for f in files[:8])}.")
        return chosen
    splits = sorted({match[1] for f in files if (match := _SPLIT.match(f.name))})
    if len(splits) > 1:
        raise UserError(f"{folder} holds the splits {', '.join(splits)}; choose one with `split`.")
    return files


def _read_file(path: Path) -> Iterator[Located]:
    if path.name.endswith(".parquet"):
        found = parquet_rows(path)
    elif path.name.endswith((".csv", ".tsv")):
        found = _read_csv(path)
    elif path.name.endswith(".json"):
        found = _read_json(path)
    else:
        found = json_lines(path)
    return map(_checked, found)


def _checked(located: Located) -> Located:
    if not isinstance(located.row, dict):
        raise UserError(
            f"{located.where}: a problem is an object with named fields, this is {str(located.row)[:60]!r}."
        )
    return located


def _read_json(path: Path) -> Iterator[Located]:
    with reading(path):
        text = path.read_text(encoding="utf-8")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}). One object a line is JSONL: call it .jsonl.") from error
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        value = lists[0] if len(lists) == 1 else list(value.values())
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of objects.")
    for number, row in enumerate(value, 1):
        yield Located(f"{path}, entry {number}", row)


def _read_csv(path: Path) -> Iterator[Located]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with reading(path), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        try:
            for row in reader:
                yield Located(f"{path}, line {reader.line_num}", {k: v for k, v in row.items() if k is not None})
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not CSV ({error}).") from error


def _read_hub(known: HubSet) -> Iterator[Located]:
    where = "/".join(filter(None, (known.id, known.subset)))
    advice = "Without a network, give a file or folder that was downloaded before."
    with loading(f"the hub data set {where} cannot be loaded", advice) as datasets:
        if known.files:
            files = [f"hf://datasets/{known.id}/{file}" for file in known.files]
            loaded = datasets.load_dataset("json", data_files=files, split="train")
        else:
            loaded = datasets.load_dataset(known.id, known.subset, split=known.split or None)
    if isinstance(loaded, dict):
        if len(loaded) > 1:
            raise UserError(
                f"the hub data set {where} has the splits {', '.join(map(str, loaded))}; choose one with `split`."
            )
        loaded = next(iter(loaded.values()))
    yield from numbered(loaded, where)
