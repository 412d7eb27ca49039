"""`memento view`: the picture agrees with the record and with the one rule of what is visible."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from memento.config import FormatConfig, RlConfig, dump_config
from memento.errors import UserError
from memento.format import NEVER, kv_profile, parse, visible_until
from memento.trajectory import ScoredGroup, append_jsonl
from memento.view import Role, facts, load_view, make_view, print_view, token_texts, trace_section, view_file, view_page


@pytest.fixture
def run_folder(tmp_path: Path, groups: Sequence[ScoredGroup], tokenizer: Any) -> Path:
    config = RlConfig.model_validate({"out": tmp_path, "model": "base/model", "problems": {"arithmetic": {}}})
    dump_config(config, tmp_path / "config.yaml")
    append_jsonl(groups, tmp_path / "rollouts.jsonl")
    tokenizer.save_pretrained(tmp_path / "hf")
    return tmp_path


def shown(view: Any, width: int = 100) -> str:
    console = Console(width=width, file=StringIO(), color_system=None)
    print_view(view, console)
    file = console.file
    assert isinstance(file, StringIO)
    return file.getvalue()


def test_the_picture_is_the_rule(groups: Sequence[ScoredGroup], tokenizer: Any) -> None:
    trajectory = groups[0].trajectories[0]
    ids, fmt = trajectory.token_ids, FormatConfig().bind(tokenizer)
    view = make_view(trajectory, tokenizer=tokenizer)
    assert not view.warning
    assert np.array_equal(view.resident_T, kv_profile(ids, fmt, trajectory.prompt_len).resident_T)
    limits = np.concatenate([np.full(s.end - s.start, s.visible_until) for s in view.segments])
    assert np.array_equal(limits, visible_until(ids, fmt, trajectory.prompt_len))
    assert [s.start for s in view.segments][1:] == [s.end for s in view.segments][:-1]
    blocks = parse(ids, fmt, trajectory.prompt_len).blocks
    assert [(s.start, s.end) for s in view.segments if s.role is Role.BLOCK] == [(b.start, b.end) for b in blocks]
    mementos = [(s.start, s.end) for s in view.segments if s.role is Role.MEMENTO]
    assert mementos == [(b.memento_start, b.memento_end) for b in blocks]
    assert "".join(view.text(s) for s in view.segments) == tokenizer.decode(ids)


def test_forced_tokens_stand_apart(groups: Sequence[ScoredGroup], tokenizer: Any) -> None:
    trajectory = groups[0].trajectories[0].model_copy(update={"forced": (30, 31)})
    forced = [s for s in make_view(trajectory, tokenizer=tokenizer).segments if s.forced]
    assert [(s.start, s.end) for s in forced] == [(trajectory.prompt_len + 30, trajectory.prompt_len + 32)]


def test_an_eviction_that_never_came_to_pass_is_not_shown(groups: Sequence[ScoredGroup], tokenizer: Any) -> None:
    whole = groups[0].trajectories[0]
    end = whole.evictions[0].boundary - whole.prompt_len  # cut right behind the first <|summary_end|>
    cut = whole.model_copy(
        update={"completion_ids": whole.completion_ids[:end], "rollout_logprobs": whole.rollout_logprobs[:end]}
    ).model_copy(update={"evictions": whole.evictions[:1]})
    view = make_view(cut, tokenizer=tokenizer)
    assert view.evictions == ()
    assert not view.warning
    assert all(s.visible_until == NEVER for s in view.segments)


def test_a_record_that_contradicts_its_tokens_is_reported(groups: Sequence[ScoredGroup], tokenizer: Any) -> None:
    trajectory = groups[0].trajectories[0]
    assert "evict_delimiters" in make_view(trajectory, (), 0, tokenizer, FormatConfig(evict_delimiters=True)).warning
    without = trajectory.model_copy(update={"evictions": ()})
    assert make_view(without, tokenizer=tokenizer).warning
    assert not make_view(without.model_copy(update={"evict": False}), tokenizer=tokenizer).warning


def test_characters_split_over_tokens_come_out_whole(tokenizer: Any) -> None:
    text = "a → b 😀 <|block_start|>é"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = list(token_texts(tokenizer, ids))
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert "<|block_start|>" in pieces


def test_terminal(run_folder: Path) -> None:
    text = shown(load_view(run_folder / "rollouts.jsonl", 1))
    assert "1 (correct, answer" in text
    assert "0 1 –, mean 0.50" in text
    assert "<|summary_start|>" in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert shown(load_view(run_folder / "rollouts.jsonl", 1), width=30)  # a narrow one does not break


def test_index_counts_trajectories(run_folder: Path, groups: Sequence[ScoredGroup]) -> None:
    file = run_folder / "rollouts.jsonl"
    assert load_view(file, 4).trajectory == groups[1].trajectories[1]
    assert load_view(file, -1).trajectory == groups[-1].trajectories[-1]
    for index in (12, -13):
        with pytest.raises(UserError, match="holds 12 trajectories"):
            load_view(file, index)


def test_without_a_tokenizer_ids_and_text_are_shown(tmp_path: Path, groups: Sequence[ScoredGroup]) -> None:
    trajectory = groups[0].trajectories[0]
    append_jsonl([trajectory], tmp_path / "plain.jsonl")
    view = load_view(tmp_path / "plain.jsonl")
    assert "--model" in view.warning
    assert view.reward is None
    assert [(s.start, s.end) for s in view.segments if s.role is Role.BLOCK] == [e[1:] for e in trajectory.evictions]
    text = shown(view)
    assert f"‹{trajectory.prompt_ids[0]}›" in text
    assert "block_start" in text
    assert "block_start" in view_page(view)


def test_bad_input_names_file_and_fix(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(UserError, match="no trajectory file"):
        load_view(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_view(run_folder / "rollouts.jsonl", model=tmp_path)
    (tmp_path / "bad.jsonl").write_text('\n{"id": 3}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2"):
        load_view(tmp_path / "bad.jsonl")


def test_the_page_is_self_contained_and_tells_the_slider_the_truth(run_folder: Path, tokenizer: Any) -> None:
    out = run_folder / "trace.html"
    view_file(run_folder / "rollouts.jsonl", Console(file=StringIO()), 1, out)
    page = out.read_text()
    assert not re.search(r"(?:src|href)\s*=|@import|url\(|https?://", page)
    blob = re.search(r'<script type="application/json">(.*?)</script>', page)
    assert blob
    data = json.loads(blob[1])
    trajectory = load_view(run_folder / "rollouts.jsonl", 1).trajectory
    # What the slider shows at token t is what the rule says query t sees.
    limits = visible_until(trajectory.token_ids, FormatConfig().bind(tokenizer), trajectory.prompt_len)
    for t in range(0, data["total"], 7):
        seen = [k for s in data["segments"] for k in range(s["start"], s["end"]) if k <= t < s["until"]]
        assert seen == [k for k in range(len(limits)) if k <= t < limits[k]]
        assert data["resident"][t] == len(seen)


def test_text_cannot_break_out_of_the_page(groups: Sequence[ScoredGroup], tokenizer: Any) -> None:
    evil = "</script><script>alert(1)</script>"
    ids = tuple(tokenizer(evil, add_special_tokens=False)["input_ids"])
    trajectory = (
        groups[0]
        .trajectories[0]
        .model_copy(
            update={"completion_ids": ids, "rollout_logprobs": (0.0,) * len(ids), "evictions": (), "problem_id": evil}
        )
    )
    view = make_view(trajectory, tokenizer=tokenizer)
    assert "<script>alert" not in view_page(view)
    assert trace_section(view).count("</script>") == 1
    assert ("problem", evil) in facts(view)
