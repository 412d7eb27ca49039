"""Where rows are read from, which columns they may have, and which are dropped and why."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from memento.errors import UserError
from memento.sft.rows import REASONS, Row, check_response, has_blocks, read_rows, split_thinking, strip_blocks

B, E, S, Z = "<|block_start|>", "<|block_end|>", "<|summary_start|>", "<|summary_end|>"
GOOD = f"<think>\n{B}1+1: total 2{E}{S}+1=2{Z}\n{B}check{E}{S}ok{Z}\n</think>\n2"
FULL = {
    "problem": "1+1?",
    "sentences": ["One plus one. ", "That is two.", "Check it.", "The answer is 2."],
    "blocks": [[0, 1], [2, 2]],
    "block_summaries": ["1+1=2", "checked"],
    "domain": "math",
    "source": "mine",
    "difficulty": 3,
}
OPENTHOUGHTS = {
    "conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "<think>\ntwo\n</think>\n2"}],
    "domain": "code",
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_columns_of_openmementos_and_openthoughts(tmp_path: Path) -> None:
    default = {"problem": "p", "response": GOOD, "domain": "math", "source": "s", "difficulty": None, "more": 1}
    chat = {"messages": [{"role": r, "content": c} for r, c in (("system", "x"), ("user", "q"), ("assistant", "a"))]}
    found = list(read_rows(write(tmp_path / "a.jsonl", default, FULL, OPENTHOUGHTS, chat)))
    assert found[0] == Row("p", GOOD, "math", "s", None)
    blocks = [f"{B}One plus one. That is two.{E}{S}1+1=2{Z}", f"{B}Check it.{E}{S}checked{Z}"]
    assembled = "\n".join(["<think>", *blocks, "</think>", "The answer is 2."])
    assert found[1] == Row("1+1?", assembled, "math", "mine", 3)
    assert found[2] == Row("1+1?", "<think>\ntwo\n</think>\n2", "code")
    assert found[3] == Row("q", "a")
    assert check_response(found[1].response, blocks=True) is None
    full = FULL | {"response": GOOD}
    assert next(read_rows(write(tmp_path / "b.jsonl", full))).response == GOOD, "the response of the set is the truth"


def test_every_source_gives_the_same_rows(tmp_path: Path) -> None:
    import datasets

    rows = [{"problem": f"p{i}", "response": GOOD, "domain": "math"} for i in range(5)]
    expected = [Row(f"p{i}", GOOD, "math") for i in range(5)]
    jsonl = write(tmp_path / "data.jsonl", *rows)
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(tmp_path / "data.parquet")
    made.save_to_disk(tmp_path / "saved")
    hub = tmp_path / "hub"  # what a repository of the hub looks like, with two subsets
    hub.mkdir()
    made.to_parquet(hub / "default.parquet")
    datasets.Dataset.from_list([FULL] * 2).to_parquet(hub / "full.parquet")
    configs = [
        {"config_name": n, "data_files": [{"split": "train", "path": f"{n}.parquet"}]} for n in ("default", "full")
    ]
    (hub / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    for source in (jsonl, tmp_path / "data.parquet", tmp_path / "saved", hub, f"{hub}:default@train"):
        assert list(read_rows(source)) == expected, source
    assert list(read_rows(hub, streaming=True)) == expected
    assert [row.source for row in read_rows(f"{hub}:full")] == ["mine", "mine"]
    with pytest.raises(UserError, match=r"cannot load the data set .*:absent"):
        list(read_rows(f"{hub}:absent"))


def test_errors_name_the_line(tmp_path: Path) -> None:
    good = {"problem": "p", "response": "r"}
    cases = {
        r"line 2: `response` is missing": [good, {"problem": "p"}],
        r"line 1: columns question, answer; known are problem": [{"question": "q", "answer": "a"}],
        r"line 1: a row is an object": [[1, 2]],
        r"line 1: a turn of `conversations` needs": [{"conversations": [{"speaker": "x"}]}],
        r"line 1: `conversations` must be a list": [{"conversations": "hello"}],
        r"line 1: `block_summaries` is missing": [{"problem": "p", "sentences": ["a"], "blocks": [[0, 0]]}],
    }
    for message, rows in cases.items():
        with pytest.raises(UserError, match=message):
            list(read_rows(write(tmp_path / "data.jsonl", *rows)))
    (tmp_path / "data.jsonl").write_text('{"problem": \n')
    with pytest.raises(UserError, match="line 1: not JSON"):
        list(read_rows(tmp_path / "data.jsonl"))
    (tmp_path / "data.jsonl").write_bytes(b"\x00\xff\xfe\x80")
    with pytest.raises(UserError, match=r"data\.jsonl cannot be read"):
        list(read_rows(tmp_path / "data.jsonl"))
    (tmp_path / "data.parquet").write_bytes(b"PAR1 not parquet")
    with pytest.raises(UserError, match=r"data\.parquet is no Parquet file"):
        list(read_rows(tmp_path / "data.parquet"))
    with pytest.raises(UserError, match="no data file"):
        list(read_rows(tmp_path / "absent.jsonl"))


def test_rows_of_no_use_are_dropped_and_counted(tmp_path: Path) -> None:
    turns = OPENTHOUGHTS["conversations"]
    assert isinstance(turns, list)
    rows = [
        {"conversations": [turns[1], turns[0]]},
        {"conversations": turns + turns},
        {"conversations": []},
        {"problem": " ", "response": GOOD},
        FULL | {"blocks": [[0, 1], [3, 3]]},
        FULL | {"blocks": [[0, 1], [2, 9]]},
        FULL | {"block_summaries": ["one only"]},
        {"problem": "p", "response": GOOD},
    ]
    dropped: Counter[str] = Counter()
    assert len(list(read_rows(write(tmp_path / "a.jsonl", *rows), dropped=dropped))) == 1
    assert dropped == {"wrong roles": 3, "empty": 1, "malformed blocks": 3}


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (GOOD, None),
        (GOOD.replace("\n", ""), None),
        ("2", "no thinking"),
        (GOOD.replace("<think>", ""), "no thinking"),
        ("Well. " + GOOD, "no thinking"),
        (GOOD + "</think>", "no thinking"),
        ("</think> 2 <think>", "no thinking"),
        ("<think> \n </think> 2", "empty thinking"),
        ("<think>two</think> 2", "no blocks"),
        (GOOD.replace(E, "", 1), "malformed blocks"),
        (GOOD.replace(Z, "", 1), "malformed blocks"),
        (GOOD.replace(f"{B}check", f"{B}{B}check"), "malformed blocks"),
        (GOOD.replace(f"{S}ok{Z}", ""), "malformed blocks"),
        (f"<think>{S}a{Z}</think> 2", "malformed blocks"),
        (GOOD + f"{B}more", "malformed blocks"),
        (GOOD + f"{B}more{E}{S}m{Z}", "blocks outside of thinking"),
        (GOOD.replace("check", "  "), "empty block"),
        (GOOD.replace("ok", ""), "empty memento"),
        (GOOD.replace("</think>", "and so\n</think>"), "text between blocks"),
        (GOOD.replace(f"{E}{S}ok", f"{E} hm {S}ok"), "text between blocks"),
        (GOOD.replace(f"{Z}\n{B}", f"{Z} now {B}"), "text between blocks"),
        (" \n", "empty"),
    ],
)
def test_the_grammar_of_a_response(response: str, reason: str | None) -> None:
    assert check_response(response, blocks=True) == reason
    assert reason is None or reason in REASONS
    lenient = check_response(response, blocks=True, strict=False)
    assert lenient == (None if reason == "text between blocks" else reason)
    plain = check_response(response, blocks=False)
    assert plain == (None if reason == "no blocks" else reason), "the control keeps the traces that the stages keep"


def test_taking_a_response_apart() -> None:
    assert split_thinking("<think>\na\n</think>\nb") == ("\na\n", "\nb")
    assert split_thinking("a only") == ("a only", "")
    assert has_blocks(GOOD) and not has_blocks(strip_blocks(GOOD))
    assert strip_blocks(GOOD) == "<think>\n1+1: total 2\ncheck\n</think>\n2"
