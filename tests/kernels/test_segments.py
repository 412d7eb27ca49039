"""Attention by segments against the dense twin in float64, wherever rows are cut."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from memento.format import NEVER, MementoFormat, visible_until
from memento.kernels import Visibility
from memento.kernels.attention import SEGMENTS_FROM_TOKENS, attend, default_implementation
from memento.kernels.segments import Costs, RowPlan, plan_row

FMT = MementoFormat(1, 2, 3, 4, evict_delimiters=False)
HEADS, KV_HEADS, WIDTH = 4, 2, 16
EVERY_CUT = Costs(segment_ns=0, merge_ns=0, merge_token_ns=0)
NO_CUT = Costs(segment_ns=1e18)


def trace(tokens: int, seed: int, malformed: bool = False) -> list[int]:
    """Blocks and mementos of random length, and where malformed also delimiters out of order; cut at `tokens`."""
    rng = random.Random(seed)
    ids = [9] * 5
    while len(ids) < tokens:
        ids += [1] + [7] * rng.randint(0, 30) + [2, 3] + [8] * rng.randint(0, 6) + [4]
        if malformed:
            ids += rng.choices([1, 2, 3, 4, 9], k=rng.randint(0, 4))
    return ids[:tokens]


def until(tokens: int, seed: int, fmt: MementoFormat = FMT, malformed: bool = False) -> torch.Tensor:
    return torch.from_numpy(visible_until(trace(tokens, seed, malformed), fmt, 5))


def row(until: torch.Tensor, document: torch.Tensor | None = None, lowest: torch.Tensor | None = None) -> Visibility:
    return Visibility(until[None], *(None if x is None else x[None] for x in (lowest, document)))


AT = torch.arange(203)
DRAW = torch.Generator().manual_seed(0)
DRAWN = AT + 1 + torch.randint(0, 203, (203,), generator=DRAW)
ROWS = {
    "well-formed": row(until(203, 0)),
    "malformed": row(until(203, 3, malformed=True)),
    "delimiters evicted": row(until(203, 4, MementoFormat(1, 2, 3, 4, evict_delimiters=True))),
    "keep_last_n": row(until(203, 5, MementoFormat(1, 2, 3, 4, evict_delimiters=False, keep_last_n=2))),
    "random": row(DRAWN),
    "all evicted at once": row(AT + 1),
    "in the past": row(torch.zeros_like(AT)),
    "nothing evicted": row(torch.full((203,), NEVER)),
    "one token": row(torch.tensor([NEVER])),
    "two tokens": row(torch.tensor([1, 2])),
    "documents": row(
        torch.cat([until(60, 1), torch.tensor([61]), until(99, 2) + 61, torch.full((43,), NEVER)]),
        torch.tensor([0] * 60 + [1] + [2] * 99 + [-1] * 43),
    ),
    "documents in pieces": row(DRAWN, (AT // 20) % 3),
    "window": row(until(203, 6), None, (AT - 37).clamp(min=0)),
    "random window": row(DRAWN, AT // 90, torch.randint(-5, 203, (203,), generator=DRAW)),
}


def qkv(tokens: int, dtype: torch.dtype = torch.float32, batch: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(batch, tokens, heads, WIDTH, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def run(inputs: list[torch.Tensor], visibility: Visibility, implementation: str = "segments") -> torch.Tensor:
    q, k, v = inputs
    return attend(q, k, v, visibility, implementation=implementation)


def plans(visibility: Visibility, costs: Costs, dtype: torch.dtype = torch.float32) -> tuple[RowPlan, ...]:
    until, lowest, document = (
        [None] * len(visibility.visible_until) if x is None else list(x.numpy())
        for x in (visibility.visible_until, visibility.lowest_visible, visibility.document)
    )
    return tuple(
        plan_row(u, low, doc, HEADS * WIDTH, dtype, costs)
        for u, low, doc in zip(until, lowest, document, strict=True)
        if u is not None
    )


def cut(visibility: Visibility, costs: Costs, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> Visibility:
    """The same visibility, cut as if cutting had these costs."""
    again = Visibility(visibility.visible_until, visibility.lowest_visible, visibility.document)
    again._row_plans[HEADS * width, dtype] = plans(visibility, costs, dtype)
    return again


def check(visibility: Visibility, costs: Costs, dtype: torch.dtype, tolerance: float) -> None:
    inputs = qkv(visibility.visible_until.shape[1], dtype, len(visibility.visible_until))
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = run(exact, visibility, "dense")
    expected_gradients = torch.autograd.grad((expected * weight).sum(), exact)
    got = run(inputs, cut(visibility, costs, dtype))
    assert got.dtype == dtype
    gradients = torch.autograd.grad((got * weight).sum(), inputs)
    # Where every query sees only itself the gradients of q and k are 0: measured against those of v.
    scale = expected_gradients[2].norm()
    for a, b in zip((got, *gradients), (expected, *expected_gradients), strict=True):
        assert (a - b).norm() <= tolerance * max(b.norm(), 0.1 * scale)


@pytest.mark.parametrize("costs", [NO_CUT, Costs(), EVERY_CUT], ids=["no cut", "some", "every cut"])
@pytest.mark.parametrize("name", list(ROWS))
def test_outputs_and_gradients_are_those_of_the_dense_twin(name: str, costs: Costs) -> None:
    check(ROWS[name], costs, torch.float32, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["well-formed", "documents", "random window"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    check(ROWS[name], EVERY_CUT, dtype, 1e-2)


@pytest.mark.parametrize("implementation", ["segments", "sdpa"])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
def test_head_sizes(width: int, implementation: str) -> None:
    generator = torch.Generator().manual_seed(width)
    inputs = [
        torch.randn(1, heads, 203, width, generator=generator).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    visibility = cut(ROWS["well-formed"], EVERY_CUT, width=width)
    results = []
    for leaves, name in ((inputs, implementation), ([x.detach().double().requires_grad_() for x in inputs], "dense")):
        out = run(leaves, visibility, name)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("implementation", ["segments", "sdpa"])
def test_the_same_bits_in_every_run(implementation: str) -> None:
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            inputs = qkv(203)
            out = run(inputs, cut(ROWS["documents"], EVERY_CUT), implementation)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("malformed", [False, True])
def test_a_long_row_in_parts(malformed: bool) -> None:
    """20,000 tokens, too many for a dense twin: some queries, and what their gradient is in all keys, in float64."""
    tokens = 20_000
    visibility = row(until(tokens, 1, malformed=malformed))
    queries = torch.randperm(tokens, generator=torch.Generator().manual_seed(2))[:200]
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 1, tokens, 16, generator=generator).requires_grad_() for _ in range(3))
    out = run([q, k, v], visibility)[0, 0, queries]
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    at = torch.arange(tokens)
    seen = (at <= queries[:, None]) & (queries[:, None] < visibility.visible_until[0])
    scores = (exact[0][0, 0, queries] @ exact[1][0, 0].T / 4).masked_fill(~seen, float("-inf"))
    expected = scores.softmax(-1) @ exact[2][0, 0]
    for a, b in zip((out, *gradients), (expected, *torch.autograd.grad(expected.square().sum(), exact)), strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_rows_of_a_batch_have_plans_of_their_own() -> None:
    both = [ROWS["well-formed"], ROWS["random"], ROWS["nothing evicted"]]
    check(Visibility(torch.cat([v.visible_until for v in both])), EVERY_CUT, torch.float32, 1e-5)


def plan_of(visibility: Visibility, costs: Costs) -> RowPlan:
    (plan,) = plans(visibility, costs)
    return plan


@pytest.mark.parametrize("costs", [NO_CUT, EVERY_CUT], ids=["no cut", "every cut"])
@pytest.mark.parametrize("name", list(ROWS))
def test_a_plan_names_every_visible_pair_once(name: str, costs: Costs) -> None:
    visibility = ROWS[name]
    plan = plan_of(visibility, costs)
    tokens = visibility.visible_until.shape[1]
    seen = torch.zeros(tokens, tokens, dtype=torch.int64)
    segments = [(chain, s) for chain in plan.chains for s in chain.segments]
    assert [0, *(s.end for _, s in segments)] == [*(s.start for _, s in segments), tokens]
    for chain, s in segments:
        seen[s.start : s.end, chain.kept[: s.kept]] += 1
        mask = plan.mask(s, torch.float32)
        own = torch.arange(s.start, s.end)
        keys = own if s.partial is None else torch.cat([s.partial, own])
        causal = keys <= own[:, None]
        seen[s.start : s.end, keys] += (causal if mask is None else causal & (mask == 0)).long()
    assert torch.equal(seen, visibility.mask[0, 0].long())


@pytest.mark.parametrize("keep_last_n", [0, 1])
def test_a_well_formed_trace_needs_no_mask_and_one_list_of_kept_keys(keep_last_n: int) -> None:
    fmt = MementoFormat(1, 2, 3, 4, evict_delimiters=False, keep_last_n=keep_last_n)
    visibility = Visibility(until(203, 0, fmt)[None])
    plan = plan_of(visibility, EVERY_CUT)
    segments = [s for chain in plan.chains for s in chain.segments]
    edges = sorted({0, 203, *(u for u in visibility.visible_until[0].tolist() if u < 203)})
    assert [(s.start, s.end) for s in segments] == list(pairwise(edges))
    assert len(segments) > 5
    assert not any(s.masked for s in segments)
    if keep_last_n == 0:
        assert len(plan.chains) == 1


def test_tiny_documents_are_not_cut() -> None:
    segments = [s for chain in plan_of(ROWS["documents"], NO_CUT).chains for s in chain.segments]
    assert [(s.start, s.end) for s in segments] == [(0, 60), (60, 61), (61, 160), (160, 203)]


def test_masks_that_would_not_be_o_of_t_are_made_at_each_use() -> None:
    tokens = 3000
    generator = torch.Generator().manual_seed(0)
    drawn = torch.arange(tokens) + 1 + torch.randint(0, tokens, (tokens,), generator=generator)
    plan = plan_of(Visibility(drawn[None]), NO_CUT)
    assert all(s.mask is None for chain in plan.chains for s in chain.segments)


@pytest.mark.parametrize("name", ["well-formed", "malformed", "random", "window", "documents"])
@pytest.mark.parametrize("costs", [NO_CUT, EVERY_CUT], ids=["no cut", "every cut"])
def test_an_invisible_key_changes_nothing_bit_for_bit(name: str, costs: Costs) -> None:
    visibility = cut(ROWS[name], costs)
    mask = visibility.mask[0, 0]
    inputs = qkv(len(mask))
    query = 150
    changed = (~mask[query]).nonzero()[:, 0]
    weight = torch.zeros(len(mask), WIDTH)
    weight[query] = 1.0
    results = []
    for shift in (0.0, 100.0):
        q, k, v = (x.detach().clone() for x in inputs)
        k[:, :, changed] += shift
        v[:, :, changed] -= 3 * shift
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = run(leaves, visibility)
        results.append((out[:, :, query], *torch.autograd.grad((out * weight).sum(), leaves)))
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)
    assert not results[0][2][:, :, changed].any()


def test_gradcheck_where_it_is_cut() -> None:
    visibility = Visibility(torch.tensor([[9, 4, 4, 9, 9, 7, 8, 9, 9]]), None, torch.tensor([[0] * 8 + [1]]))
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, h, 9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for h in (HEADS, KV_HEADS, KV_HEADS)
    ]
    visibility = cut(visibility, EVERY_CUT, torch.float64, width=3)
    (plan,) = visibility.row_plans(HEADS * 3, torch.float64)
    assert any(s.kept for chain in plan.chains for s in chain.segments)
    torch.autograd.gradcheck(lambda *x: run(list(x), visibility), inputs)


def test_under_gradient_checkpointing_the_gradients_are_the_same() -> None:
    visibility = cut(ROWS["well-formed"], EVERY_CUT)
    inputs = qkv(203)

    def layer(*x: torch.Tensor) -> torch.Tensor:
        return run(list(x), visibility).square().sum()

    plain = torch.autograd.grad(layer(*inputs), inputs)
    saved = torch.autograd.grad(checkpoint(layer, *inputs, use_reentrant=False), inputs)  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))


def test_layers_share_one_plan() -> None:
    visibility = Visibility(until(203, 0)[None])
    assert visibility.row_plans(64, torch.float32) is visibility.row_plans(64, torch.float32)


def test_it_is_the_default_on_cpu_for_long_rows() -> None:
    assert default_implementation(torch.empty(1, 4, SEGMENTS_FROM_TOKENS, 8)) == "segments"
    assert default_implementation(torch.empty(1, 4, SEGMENTS_FROM_TOKENS - 1, 8)) == "sdpa"


def test_other_devices_are_refused() -> None:
    q, k, v = (x.to("meta") for x in qkv(3))
    with pytest.raises(ValueError, match="runs on the CPU only"):
        attend(q, k, v, Visibility(torch.full((1, 3), NEVER)), implementation="segments")
