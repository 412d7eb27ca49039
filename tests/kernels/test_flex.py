"""FlexAttention under the rule: its block mask against the dense mask, its output against the dense twin.

Compiling it takes long on the CPU, so most of this reads the block mask and runs FlexAttention's own eager reference.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention as eager

from memento.format import NEVER
from memento.kernels import Visibility, flex
from memento.kernels.attention import attend

AT = torch.arange(300)
DRAW = torch.Generator().manual_seed(0)
DRAWN = AT + 1 + torch.randint(0, 300, (300,), generator=DRAW)
TRACE = torch.full((300,), NEVER)
TRACE[4:150], TRACE[160:250] = 160, 260
ROWS = {
    "trace": Visibility(TRACE[None]),
    "random": Visibility(DRAWN[None]),
    "nothing evicted": Visibility(torch.full((1, 300), NEVER)),
    "all evicted at once": Visibility(AT[None] + 1),
    "two rows": Visibility(torch.stack([TRACE, DRAWN])),
    "documents": Visibility(TRACE[None], None, torch.tensor([[7] * 150 + [3] + [5] * 149])),
    "documents in pieces": Visibility(DRAWN[None], None, (AT // 70 % 3)[None]),
    "window": Visibility(TRACE[None], (AT - 37).clamp(min=0)[None]),
    "everything": Visibility(DRAWN[None], torch.randint(-5, 300, (1, 300), generator=DRAW), AT[None] // 90),
    "one token": Visibility(torch.tensor([[NEVER]])),
}


def qkv(visibility: Visibility, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    rows, tokens = visibility.visible_until.shape
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, h, tokens, 32, generator=generator).to(device, dtype) for h in (4, 2, 2)]


@pytest.mark.parametrize("name", list(ROWS))
def test_the_block_mask_covers_the_mask_and_calls_full_only_what_is(name: str) -> None:
    visibility = ROWS[name]
    rows, tokens = visibility.visible_until.shape
    mask, seen = visibility.block_mask, visibility.mask[:, 0]
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    assert mask.shape == (rows, 1, tokens, tokens)
    at = torch.arange(tokens)
    for row in range(rows):
        rule = mask.mask_mod(torch.tensor(row), torch.tensor(0), at[:, None], at[None])
        for tile in range(mask.kv_num_blocks.shape[2]):
            queries = slice(tile * 128, tile * 128 + 128)
            covered = torch.zeros(min(128, tokens - tile * 128), tokens, dtype=torch.bool)
            for counts, which, full in (
                (mask.kv_num_blocks, mask.kv_indices, False),
                (mask.full_kv_num_blocks, mask.full_kv_indices, True),
            ):
                for key_tile in which[row, 0, tile, : int(counts[row, 0, tile])].tolist():
                    keys = slice(key_tile * 128, key_tile * 128 + 128)
                    covered[:, keys] = True if full else rule[queries, keys]
            assert torch.equal(covered, seen[row, queries])


@pytest.mark.parametrize("name", ["trace", "two rows", "everything"])
def test_eager_reference_gives_the_dense_twin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "compiled", lambda _device: eager)
    q, k, v = qkv(ROWS[name])
    found = attend(q, k, v, ROWS[name], implementation="flex")
    exact = attend(q.double(), k.double(), v.double(), ROWS[name], implementation="dense")
    assert (found - exact).norm() < 1e-5 * exact.norm()


def test_no_gradients_on_the_cpu() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(ROWS["trace"]))
    with pytest.raises(ValueError, match="no backward pass on the CPU"):
        attend(q, k, v, ROWS["trace"], implementation="flex")


@pytest.mark.long
@pytest.mark.parametrize("name", list(ROWS))
def test_compiled_for_the_cpu(name: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(ROWS[name]))
    with torch.no_grad():
        found = attend(q, k, v, ROWS[name], implementation="flex")
    exact = attend(q.double(), k.double(), v.double(), ROWS[name], implementation="dense")
    assert (found - exact).norm() < 1e-5 * exact.norm()


def on(device: str, visibility: Visibility) -> Visibility:
    rest: list[Any] = [visibility.lowest_visible, visibility.document]
    return Visibility(visibility.visible_until.to(device), *(None if x is None else x.to(device) for x in rest))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["trace", "random", "two rows", "documents", "everything"])
def test_on_a_gpu(name: str) -> None:
    visibility = on("cuda", ROWS[name])
    leaves = [x.requires_grad_() for x in qkv(visibility, "cuda", torch.bfloat16)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    results = []
    for (q, k, v), implementation in ((leaves, "flex"), (exact, "dense")):
        out = attend(q, k, v, visibility, implementation=implementation)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    floor = 0.1 * results[1][3].norm()
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 1e-2 * max(b.norm(), floor)
