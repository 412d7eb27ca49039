"""Stage 2 computes what a dense mask says, in every architecture: logits, gradients, under every ZeRO stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memento.arithmetic import make_traces
from memento.chat import CHATML, encode_prompt, install_template, opens_thinking
from memento.errors import UserError
from memento.format import MementoFormat, visible_until
from memento.kernels.hf import attach, pack
from memento.sft.data import Examples, read_examples
from memento.tiny import FAMILIES, write_tiny_model

OUTER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR", "DS_ACCELERATOR"}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("twins") / request.param, seed=0, family=request.param)


@pytest.fixture(scope="module")
def fmt(folder: Path) -> MementoFormat:
    return MementoFormat.from_tokenizer(AutoTokenizer.from_pretrained(folder), evict_delimiters=folder.name == "phi3")


@pytest.fixture(scope="module")
def data(folder: Path, fmt: MementoFormat) -> Examples:
    rows = [(p.prompt, t) for p, t in make_traces(3, 0, terms=(3, 5))]
    return read_examples(rows, AutoTokenizer.from_pretrained(folder), fmt, "stage2", 2048)


@pytest.fixture(scope="module")
def dense(folder: Path, data: Examples, fmt: MementoFormat) -> list[torch.Tensor]:
    """Logits of each trace alone, by eager attention with a dense mask that is written out key by key."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    window, found = getattr(model.config, "sliding_window", None), []
    for example in data:
        until = visible_until(example.token_ids, fmt, example.prompt_len)
        length = len(until)
        seen, near = torch.zeros(2, length, length, dtype=torch.bool)
        for q in range(length):
            resident = [k for k in range(q + 1) if q < until[k]]
            seen[q, resident] = True
            near[q, resident[-window:] if window else resident] = True
        full, sliding = (torch.where(m, 0.0, torch.finfo(torch.float32).min)[None, None] for m in (seen, near))
        mask = {"full_attention": full, "sliding_attention": sliding} if folder.name == "olmo3" else full
        with torch.no_grad():
            ids = torch.from_numpy(example.token_ids).long()[None]
            found.append(model(ids, attention_mask=mask, use_cache=False).logits[0])
    return found


def test_packed_padded_and_single_logits_are_those_of_the_dense_mask(
    folder: Path, data: Examples, dense: list[torch.Tensor]
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    attach(model)
    lengths = [len(e) for e in data]
    packed = pack([e.token_ids for e in data], [e.visible_until for e in data], pad_to=sum(lengths) + 9)
    single = [pack([e.token_ids], [e.visible_until], pad_to=max(lengths)) for e in data]
    batch = {name: torch.cat([row[name] for row in single]) for name in single[0]}
    batch["attention_mask"] = (batch.pop("document") >= 0).long()
    with torch.no_grad():
        in_one_row = model(**packed).logits[0].split([*lengths, 9])
        padded = model(**batch).logits
        for i, (example, expected) in enumerate(zip(data, dense, strict=True)):
            alone = model(**pack([example.token_ids], [example.visible_until])).logits[0]
            for logits in (in_one_row[i], padded[i, : lengths[i]], alone):
                assert (logits - expected).abs().max() < 1e-5
    unmasked = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        full = unmasked(torch.from_numpy(data[0].token_ids).long()[None]).logits[0]
    assert (full - dense[0]).abs().max() > 1e-3, "the mask matters"


@pytest.mark.slow
def test_gradients_under_every_zero_stage_are_those_of_the_dense_mask() -> None:
    script = Path(__file__).parent / "zero_gradients.py"
    clean = {k: v for k, v in os.environ.items() if k not in OUTER}
    command = [sys.executable, str(script), "qwen3", "phi3", "olmo3"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found = json.loads(line.removeprefix("RESULT "))
    assert set(found) == {f"{family} zero{stage}" for family in ("qwen3", "phi3", "olmo3") for stage in range(4)}
    for name, (loss, gradient) in found.items():
        assert loss < 1e-6, name
        assert gradient < 1e-5, name


def test_the_template_of_each_family(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chosen = install_template(tokenizer)
    prompt = tokenizer.decode(encode_prompt(tokenizer, "1+1?"))
    if folder.name == "phi3":
        assert chosen == "own"
        expected = "<|im_start|>system<|im_sep|>Think in blocks.<|im_end|><|im_start|>user<|im_sep|>1+1?<|im_end|>"
        assert prompt == expected + "<|im_start|>assistant<|im_sep|>"
    else:
        assert chosen == "chatml"
        assert prompt == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", "no system prompt"


def test_templates_that_add_something_are_replaced(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    theirs = "<|im_start|>system\nYou are helpful.<|im_end|>\n" + CHATML[:-11] + "<think>\n{% endif %}"
    tokenizer.chat_template = theirs
    assert opens_thinking(tokenizer)
    assert install_template(tokenizer, "own") == "own" and tokenizer.chat_template == theirs
    assert install_template(tokenizer) == "chatml" and tokenizer.chat_template == CHATML
    assert not opens_thinking(tokenizer)


def test_a_tokenizer_without_chatml_needs_a_template_of_its_own() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match="no chat template and no ChatML tokens"):
        install_template(bare)
    with pytest.raises(UserError, match=r"chatml needs <\|im_start\|> and <\|im_end\|>"):
        install_template(bare, "chatml")
