"""Generation in transformers with a cache that really shrinks, against the mask over the whole trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memento.format import (
    BLOCK_END,
    BLOCK_START,
    SUMMARY_END,
    SUMMARY_START,
    MementoFormat,
    evictions,
    kv_profile,
    visible_until,
)
from memento.generation import generate
from memento.tiny import make_tokenizer, write_tiny_model

SCRIPT = f"7 + 8 = {BLOCK_START}1 + 2{BLOCK_END}{SUMMARY_START}3{SUMMARY_END}{BLOCK_START}4 + 5 + 6{BLOCK_END}"
SCRIPT += (
    f"{SUMMARY_START}+6=15{SUMMARY_END}{BLOCK_START}9{BLOCK_END}{SUMMARY_START}{SUMMARY_END} 15, and more text after it"
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[int], list[int], MementoFormat]:
    """A model that cannot help writing `SCRIPT`, whatever it sees: prompt, script, format."""
    from transformers import AutoModelForCausalLM

    folder = write_tiny_model(tmp_path_factory.mktemp("model"), seed=3, hidden_size=32, layers=2)
    tokenizer: Any = make_tokenizer()
    fmt = MementoFormat.from_tokenizer(tokenizer, evict_delimiters=False)
    prompt, script = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("What is 7 + 8?", SCRIPT))
    return AutoModelForCausalLM.from_pretrained(folder), prompt, script, fmt


class Scripted:
    """A model whose greedy choice is the next token of a script; what it computes is the real model's."""

    def __init__(self, model: Any, script: list[int], prompt_len: int) -> None:
        self.model, self.script, self.prompt_len = model, script, prompt_len
        self.logits: list[torch.Tensor] = []
        self.device, self.config, self.generation_config = model.device, model.config, model.generation_config

    def __call__(self, **inputs: Any) -> Any:
        out = self.model(**inputs)
        self.logits.append(out.logits[0, -1].clone())
        done = int(inputs["position_ids"][0, -1]) - self.prompt_len + 1
        out.logits[0, -1, self.script[done]] = 1e4
        return out


@pytest.mark.parametrize(("keep_last_n", "evict_delimiters"), [(0, False), (0, True), (1, False), (-1, False)])
def test_every_token_sees_what_the_rule_says(parts: Any, keep_last_n: int, evict_delimiters: bool) -> None:
    model, prompt, script, fmt = parts
    fmt = replace(fmt, keep_last_n=keep_last_n, evict_delimiters=evict_delimiters)
    scripted = Scripted(model, script, len(prompt))
    done = generate(scripted, prompt, fmt, max_new_tokens=len(script), eos_token_ids=[])
    assert list(done.completion_ids) == script and not done.ended
    ids = prompt + script
    assert [tuple(e) for e in done.evictions] == evictions(ids, fmt, len(prompt))
    assert done.peak_tokens == max(kv_profile(ids, fmt, len(prompt)).resident_T[:-1])  # the last is never computed
    # The same trace in one forward under the mask.
    until = torch.from_numpy(visible_until(ids, fmt, len(prompt)))
    position = torch.arange(len(ids))
    seen = (position[None] <= position[:, None]) & (position[:, None] < until[None])
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    whole = model(input_ids=torch.tensor([ids]), attention_mask=mask, position_ids=position[None], use_cache=False)
    ours = torch.stack(scripted.logits)
    assert torch.allclose(ours, whole.logits[0, len(prompt) - 1 : -1], atol=1e-5)
    if keep_last_n == 0:
        causal = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        assert (ours - causal).abs().max() > 1e-2, "full attention is another model: the comparison can fail"


def test_sampling_follows_the_seed_and_stops_at_an_end(parts: Any) -> None:
    model, prompt, _, fmt = parts
    first, again, other = (
        generate(model, prompt, fmt, max_new_tokens=12, temperature=1.0, seed=seed, eos_token_ids=[])
        for seed in (1, 1, 2)
    )
    assert first == again != other and len(first.completion_ids) == 12
    assert all(logprob < 0 for logprob in first.logprobs)
    end = first.completion_ids[4]
    stopped = generate(model, prompt, fmt, max_new_tokens=12, temperature=1.0, seed=1, eos_token_ids=[end])
    assert stopped.ended and stopped.completion_ids == first.completion_ids[: first.completion_ids.index(end) + 1]


def test_nothing_to_do_is_refused(parts: Any) -> None:
    model, prompt, _, fmt = parts
    with pytest.raises(ValueError, match="nothing to generate"):
        generate(model, [], fmt, max_new_tokens=4)
    with pytest.raises(ValueError, match="nothing to generate"):
        generate(model, prompt, fmt, max_new_tokens=0)


def test_the_module_needs_no_torch_until_it_is_used() -> None:
    import subprocess
    import sys

    code = "import sys, memento.generation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path("/"), check=False).returncode == 0
