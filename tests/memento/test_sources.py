"""Public problem sets by their columns, in every file format; each problem once; what is held out stays out."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from memento.config import ProblemsConfig
from memento.errors import UserError
from memento.problem_sets import BOXED, LETTER
from memento.problems import Problem, ProblemKind, load_problems
from memento.rewards.choice import find_letter
from memento.rewards.scoring import load_verified
from memento.sources import load, normalised

Row = dict[str, Any]

# A twin of each public set: its columns, our own content.
TWINS: dict[str, list[Row]] = {
    "gsm8k": [
        {"question": "Ann has 3 boxes of 6 eggs. How many eggs?", "answer": "3*6=<<3*6=18>>18\n#### 18"},
        {"question": "A ship costs 1,200 dollars twice. Total?", "answer": "It is 2,400.\n#### 2,400"},
    ],
    "math500": [
        {
            "problem": "Add $\\frac12$ and $\\frac14$.",
            "solution": "We get $\\boxed{\\frac{3}{4}}$.",
            "answer": "\\frac{3}{4}",
            "subject": "Prealgebra",
            "level": 1,
            "unique_id": "test/prealgebra/1.json",
        }
    ],
    "hendrycks": [
        {"problem": "Solve $x+1=3$.", "level": "Level 1", "type": "Algebra", "solution": "So $x=\\boxed{2}$, as asked."}
    ],
    "aime": [
        {
            "id": 60,
            "problem": "Find it.",
            "solution": "...",
            "answer": "204",
            "url": "https://example.org",
            "year": "2024",
        },
        {
            "id": 61,
            "problem": "Find that.",
            "solution": "...",
            "answer": "025",
            "url": "https://example.org",
            "year": "2024",
        },
    ],
    "aime_capitalised": [{"ID": "2024-I-3", "Problem": "Alice and Bob play.", "Solution": "", "Answer": 809}],
    "matharena": [{"problem_idx": 1, "problem": "Count them.", "answer": "70", "problem_type": ["Combinatorics"]}],
    "gpqa": [
        {
            "Record ID": f"rec{n}",
            "Question": f"Which of these is particle {n}?",
            "Correct Answer": "the muon\n",
            "Incorrect Answer 1": "the ant",
            "Incorrect Answer 2": "the hat",
            "Incorrect Answer 3": "the cat",
            "High-level domain": "Physics",
            "Subdomain": "Particles",
        }
        for n in range(12)
    ],
    "mmlu": [{"question": "2+2?", "subject": "arithmetic", "choices": ["3", "4", "5", "6"], "answer": 1}],
    "mmlu_pro": [
        {
            "question_id": 7,
            "question": "Largest?",
            "options": [str(n) for n in range(10)],
            "answer": "J",
            "answer_index": 9,
            "category": "math",
        }
    ],
    "openmementos": [
        {
            "problem": "What is 6 times 7?",
            "response": "<think>\n<|block_start|>\\boxed{41}?<|block_end|>...</think>\nIt is \\boxed{42}.",
            "domain": "math",
            "source": "ai2-adapt-dev/openmath-2-math",
            "difficulty": 3,
        }
    ],
    "dolci": [
        {
            "prompt": "user: How many primes are below 10?",
            "ground_truth": ["4"],
            "dataset": ["math"],
            "original_dataset": "orz",
        },
        {
            "messages": [{"role": "user", "content": "What is the interval?"}],
            "prompt": None,
            "ground_truth": "[0, 1]",
            "dataset": "math",
        },
    ],
    "verl": [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": "Half of 10?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "5"},
            "extra_info": {"split": "train", "index": 0},
        }
    ],
    "qa": [{"question": "Compute 3^3.", "answer": "27"}],
}
GOLDS: dict[str, list[str]] = {
    "gsm8k": ["18", "2,400"],
    "math500": ["\\frac{3}{4}"],
    "hendrycks": ["2"],
    "aime": ["204", "025"],
    "aime_capitalised": ["809"],
    "matharena": ["70"],
    "mmlu": ["B"],
    "mmlu_pro": ["J"],
    "openmementos": ["42"],
    "dolci": ["4", "[0, 1]"],
    "verl": ["5"],
    "qa": ["27"],
}


def write_jsonl(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_gzip(path: Path, rows: Sequence[Row]) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def write_json(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[Row]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", sorted(TWINS))
def test_every_set_by_its_columns(name: str, tmp_path: Path) -> None:
    problems = load_problems(write_jsonl(tmp_path / "rows.jsonl", TWINS[name]))
    assert len({p.id for p in problems}) == len(TWINS[name])
    if name in GOLDS:
        assert [p.answer for p in problems] == GOLDS[name]
    choice = name in ("gpqa", "mmlu", "mmlu_pro")
    assert {p.kind for p in problems} == {ProblemKind.CHOICE if choice else ProblemKind.MATH}
    for problem, row in zip(problems, TWINS[name], strict=True):
        asked = row.get("problem") or row.get("question") or row.get("Question") or row.get("Problem")
        assert asked is None or str(asked) in problem.prompt
        assert problem.source and problem.prompt.endswith((LETTER if choice else BOXED) if name != "verl" else "?")
    loaded = load_verified(ProblemsConfig(path=tmp_path / "rows.jsonl"))
    assert list(loaded.problems) == problems, "every gold can be verified"


def test_choices_are_shuffled_once_and_for_all(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "gpqa.jsonl", TWINS["gpqa"])
    problems = load_problems(file)
    assert problems == load_problems(file)
    letters = [p.answer for p in problems]
    assert len(set(letters)) > 1, "the right choice is not always the first"
    for problem in problems:
        assert f"({problem.answer}) the muon" in problem.prompt
        assert find_letter(f"\\boxed{{{problem.answer}}}") == problem.answer


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_jsonl, "a.jsonl"),
        (write_gzip, "a.jsonl.gz"),
        (write_json, "a.json"),
        (write_parquet, "a.parquet"),
        (write_csv, "a.csv"),
    ],
)
def test_every_file_format_gives_the_same(
    write: Callable[[Path, Sequence[Row]], Path], name: str, tmp_path: Path
) -> None:
    expected = load_problems(write_jsonl(tmp_path / "expected.jsonl", TWINS["gsm8k"]))
    assert load_problems(write(tmp_path / name, TWINS["gsm8k"])) == expected


def test_a_folder_and_its_splits(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k" / "main"
    folder.mkdir(parents=True)
    write_parquet(folder / "train-00000-of-00001.parquet", TWINS["gsm8k"][:1])
    write_parquet(folder / "test-00000-of-00001.parquet", TWINS["gsm8k"][1:])
    with pytest.raises(UserError, match="splits test, train; choose one"):
        load_problems(tmp_path / "gsm8k")
    loaded = load(ProblemsConfig(path=tmp_path / "gsm8k", split="test"))
    assert [p.answer for p in loaded.problems] == ["2,400"]
    assert loaded.where[loaded.problems[0].id].endswith("test-00000-of-00001.parquet, row 1")
    with pytest.raises(UserError, match="no file of the split 'dev'"):
        load(ProblemsConfig(path=tmp_path / "gsm8k", split="dev"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no problem file"):
        load_problems(tmp_path / "empty")


def test_a_set_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def unreachable(*arguments: object, **keys: object) -> None:
        asked.append((arguments, keys))
        raise ConnectionError("Couldn't reach the hub")

    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"openai/gsm8k/main cannot be loaded.*file or folder"):
        load(ProblemsConfig(path="gsm8k", split="train"))
    assert asked == [(("openai/gsm8k", "main"), {"split": "train"})]
    with pytest.raises(UserError, match="known set"):
        load(ProblemsConfig(path="no_such_set"))


def test_columns_of_a_set_nobody_knows(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "x.jsonl", [{"nr": 1, "task": "1+1?", "gold": 2}, {"nr": 2, "task": "2+2?", "gold": 4}]
    )
    with pytest.raises(UserError, match="line 1: the columns nr, task, gold belong to no known problem set"):
        load_problems(file)
    columns = {"id": "nr", "prompt": "task", "answer": "gold"}
    loaded = load(ProblemsConfig(path=file, columns=columns, instruction="Be brief."))
    assert [(p.id, p.prompt, p.answer) for p in loaded.problems] == [
        ("1", "1+1?\n\nBe brief.", "2"),
        ("2", "2+2?\n\nBe brief.", "4"),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([TWINS["gsm8k"][0], {"question": "?", "answer": "no number"}], "line 2: .*no number after ####"),
        ([{"problem": "p", "level": 1, "solution": "no box"}], "line 1: .*no .boxed"),
        ([{"question": "?", "choices": ["a", "b"], "answer": 5}], "choice 5 of 2"),
        ([{"question": "?", "choices": ["a"], "answer": 0}], "1 choices"),
        ([{"prompt": "p", "ground_truth": ["1", "2"], "dataset": "math"}], "2 different answers"),
        ([{"prompt": "p", "ground_truth": "1", "dataset": "ifeval"}], "no verifier"),
        ([{"messages": [], "ground_truth": "1", "dataset": "math"}], "no prompt|0 user turns"),
    ],
)
def test_a_bad_row_is_an_error_with_its_place_or_counted(rows: list[Row], message: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=message):
        load_problems(file)
    good = write_jsonl(tmp_path / "good.jsonl", [*rows, {**rows[0], **TWINS["gsm8k"][0]}] if len(rows) > 1 else rows)
    if len(rows) > 1:
        loaded = load(ProblemsConfig(path=good, skip_bad=True))
        assert len(loaded.problems) == 1 and len(loaded.bad) == 1
    else:
        with pytest.raises(UserError, match="holds no problems"):
            load(ProblemsConfig(path=file, skip_bad=True))


def own(name: str, prompt: str, answer: str, source: str = "") -> Row:
    return {"id": name, "kind": "math", "prompt": prompt, "answer": answer, "source": source}


def test_an_unparsable_gold_is_an_error_at_load_with_its_line(tmp_path: Path) -> None:
    rows = [
        own("a", "1+1?", "2"),
        own("b", "half?", "\\frac{1}{2}"),
        own("c", "?!", "\\frac{1}{"),
        own("d", "x?", "x+1"),
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"rows.jsonl, line 3: problem 'c'.*problems.skip_bad=true"):
        load_verified(ProblemsConfig(path=file))
    loaded = load_verified(ProblemsConfig(path=file, skip_bad=True))
    assert [p.id for p in loaded.problems] == ["a", "b", "d"]
    assert len(loaded.bad) == 1 and "line 3" in loaded.bad[0]
    assert str(loaded) == "3 problems (4 read; 1 bad)"
    with pytest.raises(UserError, match=r"line 1: problem 'q'.*not a letter"):
        load_verified(
            ProblemsConfig(path=write_jsonl(tmp_path / "q.jsonl", [own("q", "?", "Paris") | {"kind": "choice"}]))
        )


def test_each_problem_once(tmp_path: Path) -> None:
    rows = [
        own("a", "What is $x+1$ for $x=1$?", "2"),
        own("b", "what  is $x + 1$ for\n$\\left x=1\\right$", "2"),  # the same in another layout
        own("c", "What is $x-1$ for $x=1$?", "0"),  # an operator makes another problem
        own("d", "How many?", "3"),
        own("e", "how many", "4"),  # contradicts d: neither can be trusted
    ]
    loaded = load(ProblemsConfig(path=write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert [p.id for p in loaded.problems] == ["a", "c"]
    assert (loaded.read, loaded.duplicates, loaded.conflicts) == (5, 1, 2)
    assert str(loaded) == "2 problems (5 read; 1 duplicates, 2 with contradicting answers)"
    with pytest.raises(UserError, match=r"'a' occurs more than once, at .*line 1 and at .*line 2"):
        load(ProblemsConfig(path=write_jsonl(tmp_path / "ids.jsonl", [own("a", "x?", "1"), own("a", "y?", "1")])))


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    held_out = write_jsonl(
        tmp_path / "test.jsonl", [own("t1", "Add 2 and 3!", "5", "set"), own("t2", "Old wording", "7", "set")]
    )
    rows = [
        own("n1", "add 2 and 3", "5", "set"),  # by its text
        own("t2", "New wording", "7", "set"),  # by its id in the same set
        own("t1", "Another problem of another set", "1", "other"),
        own("n2", "Fresh", "9", "set"),
    ]
    training = ProblemsConfig(path=write_jsonl(tmp_path / "train.jsonl", rows))
    for loaded in (
        load(training, exclude=[load(ProblemsConfig(path=held_out))]),
        load(training.model_copy(update={"exclude": (str(held_out),)})),
    ):
        assert [p.id for p in loaded.problems] == ["t1", "n2"]
        assert loaded.excluded == 2
    with pytest.raises(UserError, match="all 2 are also in what is held out"):
        load(ProblemsConfig(path=held_out, exclude=(str(held_out),)))


def test_the_first_so_many_of_what_is_left(tmp_path: Path) -> None:
    rows = [own(str(n), "same" if n < 3 else f"problem {n}", "1") for n in range(6)]
    loaded = load(ProblemsConfig(path=write_jsonl(tmp_path / "rows.jsonl", rows), count=2))
    assert [p.id for p in loaded.problems] == ["0", "3"]


def test_generated_problems_go_the_same_way() -> None:
    config = ProblemsConfig.model_validate({"arithmetic": {}, "count": 20, "seed": 1})
    loaded = load_verified(config)
    assert len(loaded.problems) == loaded.read == 20 and isinstance(loaded.problems[0], Problem)


def test_normalised() -> None:
    assert normalised("What is  $\\dfrac12$ ?") == normalised("what is \\frac12")
    assert normalised("Ｆind ½") == normalised("find 1⁄2")
    assert normalised("x+1") != normalised("x-1") and normalised("f(x)") != normalised("fx")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"id": 1\n', "line 1: not JSON"),
        ("a.jsonl", b"\x00\xff\xfe\x80", "cannot be read"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.json", b'{"a": 1', "not JSON"),
        ("a.json", b"3", "a list of objects"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.parquet", b"PAR1 not parquet", "no Parquet file"),
        ("a.csv", b"", "holds no problems"),
        ("a.csv", b"one,two\n1,2\n", "belong to no known"),
    ],
)
def test_garbage_is_one_readable_error(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_problems(tmp_path / name)
