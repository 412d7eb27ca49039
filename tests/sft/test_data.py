"""From traces to packed rows: what is kept, what is masked, and the plan of the steps."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from memento.arithmetic import SloppyTeacher, make_problems, make_traces, plain_trace, worked_trace
from memento.chat import CHATML
from memento.config import SftConfig, SftPhase, load_config
from memento.errors import UserError
from memento.format import NEVER, MementoFormat, visible_until
from memento.sft.data import (
    IGNORED,
    Region,
    RowCollator,
    pack_steps,
    read_examples,
    training_examples,
)
from memento.sft.rows import strip_blocks

STAGES = ("stage1", "stage2", "control")
GOOD = "<think>\n<|block_start|>1+1: total 2<|block_end|><|summary_start|>+1=2<|summary_end|>\n</think>\n2"


@pytest.fixture(scope="module")
def fmt(tokenizer) -> MementoFormat:
    return MementoFormat.from_tokenizer(tokenizer, evict_delimiters=False)


def config(**changes: object) -> SftConfig:
    tree = {
        "stage": "stage2",
        "out": "unused",
        "batch_size": 4,
        "micro_batch_tokens": 1000,
        "max_length": 500,
        "seed": 0,
    }
    return SftConfig.model_validate(tree | changes)


def test_loss_covers_the_completion_only_and_every_token_of_it(tokenizer, fmt: MementoFormat) -> None:
    data = read_examples([("1+1?", GOOD)] * 2, tokenizer, fmt, "stage2", 500)
    row = RowCollator(data)([{"examples": [0, 1]}])
    (example, _), (labels, ids) = data[:2], (row["labels"][0], row["input_ids"][0])
    assert all(tensor.shape == (1, 2 * len(example)) for tensor in row.values())
    trained = torch.tensor(([False] * example.prompt_len + [True] * (len(example) - example.prompt_len)) * 2)
    assert torch.equal(labels != IGNORED, trained)
    assert torch.equal(labels[trained], ids[trained])
    text = tokenizer.decode(ids[trained][: int(trained.sum()) // 2])
    assert text == GOOD + "<|im_end|>", "the end of the turn is learned"


def test_stage_2_hides_finished_blocks_and_the_other_stages_nothing(tokenizer, fmt: MementoFormat) -> None:
    rows = [("1+1?", GOOD)]
    for stage in ("stage1", "control"):
        example = read_examples(rows, tokenizer, fmt, stage, 500)[0]
        assert (example.visible_until == NEVER).all()
    example = read_examples(rows, tokenizer, fmt, "stage2", 500)[0]
    assert (example.visible_until == visible_until(example.token_ids, fmt, example.prompt_len)).all()
    hidden = tokenizer.decode(example.token_ids[example.visible_until != NEVER])
    assert hidden == "1+1: total 2"


def test_regions_of_a_trace(tokenizer, fmt: MementoFormat) -> None:
    example = read_examples([("1+1?", GOOD)], tokenizer, fmt, "stage1", 500)[0]
    text = {region: tokenizer.decode(example.token_ids[example.region == region]) for region in Region}
    assert text[Region.BLOCK] == "1+1: total 2"
    assert text[Region.MEMENTO] == "+1=2"
    assert text[Region.DELIMITER] == "<|block_start|><|block_end|><|summary_start|><|summary_end|>"
    assert text[Region.ANSWER] == "<think>\n\n</think>\n2<|im_end|>"


def test_delimiters_spelled_in_the_problem_are_text(tokenizer, fmt: MementoFormat) -> None:
    example = read_examples([("what is <|block_start|>?", GOOD)], tokenizer, fmt, "stage2", 500)[0]
    assert (example.token_ids == fmt.block_start).sum() == 1


def test_what_cannot_be_used_is_dropped_and_counted(tokenizer, fmt: MementoFormat) -> None:
    rows = [
        ("a", GOOD),
        ("", GOOD),
        ("b", "<think>\nno blocks</think>\n2"),
        ("c", GOOD.replace("<|block_end|>", "")),
        ("d", GOOD + "<|block_start|>unclosed"),
        ("e" * 2000, GOOD),
        ("f", GOOD + " long" * 500),
    ]
    data = read_examples(rows, tokenizer, fmt, "stage1", 100)
    assert len(data) == 2
    assert data.dropped == {"empty": 1, "no blocks": 1, "malformed blocks": 2, "prompt too long": 1}
    assert data.truncated == 1
    assert max(map(len, data)) == 100
    assert "2 dropped (malformed blocks)" in data.report()
    control = read_examples(rows, tokenizer, fmt, "control", 100)
    assert len(control) == 3, "a plain trace is what the control is for"
    assert not any(np.isin(e.token_ids, fmt.delimiter_ids).any() for e in control)


def test_stripping_a_worked_trace_gives_the_plain_one() -> None:
    for problem in make_problems(20, 0):
        worked = worked_trace(problem, Random(3), SloppyTeacher())
        assert strip_blocks(worked) == plain_trace(problem, Random(3), SloppyTeacher())


def test_a_cut_trace_keeps_the_labels_of_what_is_half_open(tokenizer, fmt: MementoFormat) -> None:
    whole = read_examples([("1+1?", GOOD)], tokenizer, fmt, "stage2", 500)[0]
    cuts = [int(i) for i in np.flatnonzero(whole.region == Region.BLOCK)[1:]]
    cuts += [int(i) for i in np.flatnonzero(whole.region == Region.MEMENTO)[1:]]
    assert len(cuts) > 5
    for cut in cuts:
        example = read_examples([("1+1?", GOOD)], tokenizer, fmt, "stage2", cut)[0]
        assert len(example) == cut
        assert (example.region == whole.region[:cut]).all(), "a half-open block or memento is labelled as one"
        assert (example.visible_until == NEVER).all(), "and an unfinished block stays visible"
        assert (RowCollator([example])([{"examples": [0]}])["labels"][0, example.prompt_len :] != IGNORED).all()


def test_a_chat_token_inside_a_response_is_no_text(tokenizer, fmt: MementoFormat) -> None:
    rows = [("a", GOOD), ("b", GOOD.replace("total", "<|im_end|>")), ("c <|im_end|>", GOOD)]
    data = read_examples(rows, tokenizer, fmt, "stage1", 500)
    assert len(data) == 2
    assert data.dropped == {"special token in the response": 1}


def test_a_plain_stage_needs_no_delimiters(fmt: MementoFormat, tiny: Path) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tiny)
    rows = [("1+1?", GOOD), ("1+2?", strip_blocks(GOOD)), ("", ""), ("3?", "<think></think>3")]
    data = read_examples(rows, other, None, "stage0", 500)
    assert data.dropped == {"empty": 1, "empty thinking": 1}
    first, second = data
    assert (first.token_ids[first.prompt_len :] == second.token_ids[second.prompt_len :]).all()
    assert set(first.region.tolist()) == {Region.PROMPT, Region.ANSWER}
    assert (first.visible_until == NEVER).all()


def test_a_prompt_that_opens_the_thinking_is_not_opened_twice(fmt: MementoFormat, tiny: Path) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tiny)
    plain = read_examples([("1+1?", GOOD)], other, fmt, "stage1", 500)[0]
    other.chat_template = CHATML.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
    )
    opened = read_examples([("1+1?", GOOD)], other, fmt, "stage1", 500)[0]
    assert other.decode(opened.token_ids) == other.decode(plain.token_ids)
    assert opened.prompt_len > plain.prompt_len


def test_cached_tokens_are_the_same_and_made_once(tokenizer, fmt: MementoFormat, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    rows = [{"problem": p.prompt, "response": t} for p, t in make_traces(7, 0)] + [{"problem": "x", "response": "y"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = tmp_path / "cache"
    found = {}
    for stage in STAGES:
        fresh, steps = training_examples(config(data=file, stage=stage), tokenizer, fmt)
        cached, again = training_examples(config(data=file, stage=stage, cache=cache), tokenizer, fmt)
        assert steps == again
        assert list(cached.lengths) == list(fresh.lengths) == [len(e) for e in fresh]
        assert fresh.dropped == cached.dropped == {"no thinking": 1}
        for a, b in zip(fresh, cached, strict=True):
            assert (a.token_ids == b.token_ids).all() and (a.visible_until == b.visible_until).all()
            assert (a.region == b.region).all() and a.prompt_len == b.prompt_len
        found[stage] = len(list(cache.glob("*/traces.arrow")))
    assert found == {"stage1": 1, "stage2": 1, "control": 2}, "both stages share one file"
    written = {f: f.stat().st_mtime_ns for f in cache.glob("*/traces.arrow")}
    training_examples(config(data=file, cache=cache), tokenizer, fmt)
    assert written == {f: f.stat().st_mtime_ns for f in cache.glob("*/traces.arrow")}
    training_examples(config(data=file, cache=cache, max_length=50), tokenizer, fmt)
    file.write_text(file.read_text() + "\n")
    training_examples(config(data=file, cache=cache), tokenizer, fmt)
    assert len(list(cache.glob("*/traces.arrow"))) == 4, "another length or another file is another cache"


def test_phases_follow_each_other_and_the_plan_is_a_function_of_the_seed(tokenizer, fmt: MementoFormat) -> None:
    phases = [
        {"steps": 3, "problems": {"min_terms": 2, "max_terms": 2}},
        {"steps": 2, "problems": {"min_terms": 4, "max_terms": 4}},
    ]
    data, steps = training_examples(config(phases=phases), tokenizer, fmt)
    again, _ = training_examples(config(phases=phases), tokenizer, fmt)
    assert [len(step) for step in steps] == [4] * 5
    blocks = [int((data[i].token_ids == fmt.block_start).sum()) for step in steps for i in step]
    assert max(blocks[:12]) == 1 < min(blocks[12:])
    assert all((a.token_ids == b.token_ids).all() for a, b in zip(data, again, strict=True))
    same = [phases[0], phases[0]]
    data, _ = training_examples(config(phases=same), tokenizer, fmt)
    assert [e.token_ids.tolist() for e in data[:12]] != [e.token_ids.tolist() for e in data[12:]]


def test_epochs_over_a_file_show_every_trace_equally_often(tokenizer, fmt: MementoFormat, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    rows = [{"problem": p.prompt, "response": t} for p, t in make_traces(8, 0)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, steps = training_examples(config(data=file, epochs=3), tokenizer, fmt)
    assert len(steps) == 6
    assert sorted(i for step in steps for i in step) == sorted(list(range(8)) * 3)
    assert steps[:2] != steps[2:4]
    with pytest.raises(UserError, match="less than one batch of 4"):
        training_examples(config(data=file, epochs=0.25), tokenizer, fmt)


def test_a_step_is_spread_over_rows_of_about_equal_length() -> None:
    lengths = [90, 10, 50, 50, 40, 60, 30, 70]
    rows, per_rank = pack_steps([[0, 1, 2, 3], [4, 5, 6, 7]], lengths, micro_batch_tokens=110, ranks=1)
    assert per_rank == 2
    assert [sorted(r) for r in rows] == [[0, 1], [2, 3], [6, 7], [4, 5]]
    rows, per_rank = pack_steps([[0, 1, 2, 3]], lengths, micro_batch_tokens=5, ranks=2)
    assert per_rank == 2, "a trace longer than the budget has a row of its own"
    assert sorted(map(len, rows)) == [1, 1, 1, 1]
    with pytest.raises(UserError, match="every rank needs a trace"):
        pack_steps([[0]], lengths, micro_batch_tokens=100, ranks=2)


@pytest.mark.parametrize("name", [f"{size}_{stage}" for size in ("quickstart", "small") for stage in STAGES])
def test_shipped_configs_load(name: str) -> None:
    import memento

    shipped = load_config(Path(memento.__file__).parent / "configs" / "sft" / f"{name}.yaml")
    assert isinstance(shipped, SftConfig)
    assert shipped.stage == name.split("_")[1]
    assert all(isinstance(phase, SftPhase) and phase.problems for phase in shipped.phases)
