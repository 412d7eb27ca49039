"""Memento attention inside a transformers model, against transformers' own eager attention with a dense mask."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from memento.format import MementoFormat, visible_until
from memento.kernels import attention
from memento.kernels.hf import PackedPolicy, attach, pack
from memento.kernels.segments import plan_row

FMT = MementoFormat(1, 2, 3, 4, evict_delimiters=False)
TRACES = [
    [9, 9, 1, 7, 7, 7, 2, 3, 8, 4, 1, 6, 6, 2, 3, 5, 4, 9, 9],
    [11, 1, 12, 13, 2, 3, 14, 4, 15],
    [20, 21, 1, 22, 23, 2, 3, 24],
]
UNTIL = [visible_until(trace, FMT, 1) for trace in TRACES]


def tiny(**changes: object) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        **changes,  # pyright: ignore[reportArgumentType]
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def eager() -> list[torch.Tensor]:
    """Logits of each trace alone: transformers' eager attention and a dense additive mask."""
    model = tiny(attn_implementation="eager")
    logits = []
    for trace, until in zip(TRACES, UNTIL, strict=True):
        at = torch.arange(len(trace))
        visible = (at[None] <= at[:, None]) & (at[:, None] < torch.from_numpy(until)[None])
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad():
            logits.append(model(torch.tensor([trace]), attention_mask=mask, use_cache=False).logits[0])
    return logits


@pytest.fixture(scope="module")
def attached() -> Qwen3ForCausalLM:
    model = tiny()
    attach(model)
    attach(model)  # twice is once
    return model


def test_packed_single_and_padded_equal_eager(attached: Qwen3ForCausalLM, eager: list[torch.Tensor]) -> None:
    with torch.no_grad():
        packed = attached(**pack(TRACES, UNTIL, pad_to=48)).logits[0].split([*map(len, TRACES), 12])
        longest = max(map(len, TRACES))
        rows = [pack([t], [u], pad_to=longest) for t, u in zip(TRACES, UNTIL, strict=True)]
        batch = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
        padding = (batch.pop("document") >= 0).long()
        padded = attached(**batch, attention_mask=padding).logits
        for i, (trace, until) in enumerate(zip(TRACES, UNTIL, strict=True)):
            single = attached(torch.tensor([trace]), visible_until=torch.from_numpy(until)[None]).logits[0]
            for logits in (single, packed[i], padded[i, : len(trace)]):
                assert torch.allclose(logits, eager[i], atol=1e-5)


def test_the_reference_sees_the_difference(attached: Qwen3ForCausalLM, eager: list[torch.Tensor]) -> None:
    with torch.no_grad():
        full = attached(torch.tensor([TRACES[0]]), visible_until=torch.full((1, len(TRACES[0])), 2**62)).logits[0]
    differs = (full - eager[0]).abs().amax(-1) > 1e-3
    assert not differs[:10].any()
    assert differs[10:].all()


def test_dense_and_sdpa_agree_through_the_model(attached: Qwen3ForCausalLM) -> None:
    row = pack(TRACES, UNTIL)
    with torch.no_grad():
        dense, sdpa = (attached(**row, memento_implementation=name).logits for name in ("dense", "sdpa"))
    assert torch.allclose(dense, sdpa, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    plain, saving = PackedPolicy(tiny()), PackedPolicy(tiny())
    saving.model.gradient_checkpointing_enable()
    saving.train()
    row = pack(TRACES, UNTIL)
    for policy in (plain, saving):
        logprobs, entropy = policy(**row, chunk_tokens=7)
        (logprobs.sum() + 0.1 * entropy.sum()).backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_a_row_is_planned_once_for_all_layers_and_their_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    monkeypatch.setattr(attention, "plan_row", lambda *args: planned.append(args) or plan_row(*args))
    policy = PackedPolicy(tiny())
    policy.model.gradient_checkpointing_enable()
    policy.train()
    monkeypatch.setattr(attention, "SEGMENTS_FROM_TOKENS", 1)
    logprobs, _ = policy(**pack(TRACES, UNTIL))
    logprobs.sum().backward()
    assert len(planned) == 1


@pytest.mark.parametrize("implementation", ["segments", "sdpa"])
def test_a_compiled_model_is_the_same_model(attached: Qwen3ForCausalLM, implementation: str) -> None:
    """torch.compile breaks its graph at the attention, which runs as it is."""
    row = pack(TRACES, UNTIL)
    results = []
    for model in (attached, torch.compile(attached, backend="aot_eager")):
        attached.zero_grad()
        logits = model(**row, memento_implementation=implementation).logits
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in attached.parameters() if p.grad is not None)])
    attached.zero_grad()
    assert len(results[0]) == len(results[1]) > 10
    for plain, compiled in zip(*results, strict=True):
        assert torch.allclose(plain, compiled, atol=1e-6, rtol=1e-5)


def test_packed_policy_gives_the_log_softmax_of_the_logits(
    attached: Qwen3ForCausalLM, eager: list[torch.Tensor]
) -> None:
    policy = PackedPolicy(copy.deepcopy(attached))
    with torch.no_grad():
        logprobs, entropy = policy(**pack(TRACES, UNTIL, pad_to=40), temperature=0.7)
    start = 0
    for trace, logits in zip(TRACES, eager, strict=True):
        expected = (logits / 0.7).log_softmax(-1)
        here = slice(start + 1, start + len(trace))
        assert torch.allclose(
            logprobs[here], expected[:-1].gather(-1, torch.tensor(trace[1:])[:, None])[:, 0], atol=1e-5
        )
        assert torch.allclose(entropy[here], -(expected.exp() * expected).sum(-1)[:-1], atol=1e-5)
        assert logprobs[start] == entropy[start] == 0
        start += len(trace)


def test_changing_one_document_leaves_the_others_bit_for_bit(attached: Qwen3ForCausalLM) -> None:
    policy = PackedPolicy(copy.deepcopy(attached))
    other = [TRACES[0], [16, 1, 17, 18, 2, 3, 19, 4, 10], TRACES[2]]
    with torch.no_grad():
        before, _ = policy(**pack(TRACES, UNTIL))
        after, _ = policy(**pack(other, UNTIL))
    first, second = len(TRACES[0]), len(TRACES[0]) + len(TRACES[1])
    assert torch.equal(before[:first], after[:first])
    assert torch.equal(before[second:], after[second:])
    assert not torch.equal(before[first:second], after[first:second])


def test_the_exported_config_does_not_ask_for_memento_attention(attached: Qwen3ForCausalLM, tmp_path) -> None:
    attached.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "memento" not in str(config)
    assert config["use_cache"] is True
    with torch.no_grad():
        logits = Qwen3ForCausalLM.from_pretrained(tmp_path)(torch.tensor([TRACES[0]])).logits
    assert torch.isfinite(logits).all()


def test_what_is_not_supported_is_refused(attached: Qwen3ForCausalLM) -> None:
    ids = torch.tensor([TRACES[0]])
    with pytest.raises(ValueError, match="needs visible_until"):
        attached(ids)
    with pytest.raises(ValueError, match="chunked_attention layers"):
        strange = tiny()
        strange.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
        attach(strange)
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        attach(tiny(attention_dropout=0.1))
    with pytest.raises(ValueError, match="do not fit into a row of 10"):
        pack(TRACES, UNTIL, pad_to=10)
