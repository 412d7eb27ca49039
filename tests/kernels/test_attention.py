"""Memento attention: every implementation against the dense one, and all against the rule itself."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from memento.format import MementoFormat, visible_until
from memento.kernels import Visibility, memento_attention
from memento.kernels.attention import attend

IMPLEMENTATIONS = ["dense", "sdpa", "segments"]
FMT = MementoFormat(1, 2, 3, 4, evict_delimiters=False)
TRACE = [9, 9, 1, 7, 7, 7, 2, 3, 8, 4, 1, 6, 6, 2, 3, 5, 4, 9, 9]  # evicts 3..6 before 10 and 11..13 before 17
UNTIL = torch.from_numpy(visible_until(TRACE, FMT, 2))


def qkv(
    rows: int, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, tokens, 8, generator=generator, dtype=dtype, requires_grad=True)

    return draw(4), draw(2), draw(2)


def random_visibility(rows: int, tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """Any vectors that are legal, not only those of well-formed traces."""
    generator = torch.Generator().manual_seed(seed)
    until = torch.arange(tokens) + 1 + torch.randint(0, tokens, (rows, tokens), generator=generator)
    lowest = (torch.arange(tokens) - torch.randint(0, tokens, (rows, tokens), generator=generator)).clamp(min=0)
    document = (torch.rand(rows, tokens, generator=generator) < 0.1).long().cumsum(-1)
    return {"visible_until": until, "lowest_visible": lowest, "document": document}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("given", [(), ("lowest_visible",), ("document",), ("lowest_visible", "document")])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_equal_to_dense_in_output_and_gradient(
    implementation: str, seed: int, rows: int, given: tuple[str, ...]
) -> None:
    inputs = q, k, v = qkv(rows, 33, seed=seed)
    vectors = {k: v for k, v in random_visibility(rows, 33, seed).items() if k == "visible_until" or k in given}
    weight = torch.randn(rows, 4, 33, 8, generator=torch.Generator().manual_seed(seed))
    out, gradients = {}, {}
    for name in ("dense", implementation):
        out[name] = attend(q, k, v, Visibility(**vectors), implementation=name)
        gradients[name] = torch.autograd.grad((out[name] * weight).sum(), inputs)
    assert torch.allclose(out["dense"], out[implementation], atol=1e-5)
    for expected, got in zip(gradients["dense"], gradients[implementation], strict=True):
        assert torch.allclose(expected, got, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_mask_is_the_rule_written_out(implementation: str) -> None:
    q, k, v = (x.detach() for x in qkv(1, len(TRACE)))
    out = memento_attention(q, k, v, UNTIL[None], implementation=implementation)
    for query in range(len(TRACE)):
        seen = [key for key in range(query + 1) if query < int(UNTIL[key])]
        for head in range(4):
            weights = (k[0, head // 2, seen] @ q[0, head, query] * 8**-0.5).softmax(0)
            assert torch.allclose(out[0, head, query], weights @ v[0, head // 2, seen], atol=1e-5)


def test_gradcheck() -> None:
    vectors = random_visibility(1, 7, 0)
    for implementation in IMPLEMENTATIONS:
        torch.autograd.gradcheck(
            partial(memento_attention, **vectors, implementation=implementation),
            qkv(1, 7, torch.float64),
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_invisible_key_changes_nothing_bit_for_bit(implementation: str) -> None:
    q, k, v = (x.detach() for x in qkv(1, len(TRACE)))
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 3:6] += 5.0
    v2[:, :, 3:6] -= 7.0
    before = memento_attention(q, k, v, UNTIL[None], implementation=implementation)
    after = memento_attention(q, k2, v2, UNTIL[None], implementation=implementation)
    assert torch.equal(before[:, :, 10:], after[:, :, 10:])
    assert not torch.allclose(before[:, :, 9], after[:, :, 9]), "<|summary_end|> itself still sees the block"


def test_a_mask_shifted_by_one_is_detected() -> None:
    q, k, v = (x.detach() for x in qkv(1, len(TRACE)))
    right = memento_attention(q, k, v, UNTIL[None])
    for shift in (-1, 1):
        shifted = torch.where(UNTIL == 2**62, UNTIL, UNTIL + shift)
        wrong = memento_attention(q, k, v, shifted[None])
        differing = ((right - wrong).abs().amax(dim=(0, 1, 3)) > 1e-4).nonzero()[:, 0].tolist()
        assert differing == ([9, 16] if shift == -1 else [10, 17])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_documents_do_not_see_each_other(implementation: str) -> None:
    n = len(TRACE)
    q, k, v = (x.detach() for x in qkv(1, 2 * n))
    until = torch.cat([UNTIL, UNTIL + n])[None]
    document = torch.tensor([[0] * n + [1] * n])
    packed = memento_attention(q, k, v, until, document=document, implementation=implementation)
    for part in (slice(0, n), slice(n, 2 * n)):
        alone = memento_attention(q[:, :, part], k[:, :, part], v[:, :, part], UNTIL[None])
        assert torch.allclose(packed[:, :, part], alone, atol=1e-5)
    k2 = k.clone()
    k2[:, :, :n] += 3.0
    changed = memento_attention(q, k2, v, until, document=document, implementation=implementation)
    assert torch.equal(packed[:, :, n:], changed[:, :, n:])


def test_a_document_in_two_pieces_is_still_one_document() -> None:
    q, k, v = (x.detach() for x in qkv(1, 6))
    never, document = torch.full((1, 6), 2**62), torch.tensor([[0, 0, 1, 1, 0, 0]])
    assert Visibility(never, None, document).spans is None
    dense = memento_attention(q, k, v, never, document=document, implementation="dense")
    assert torch.allclose(dense, memento_attention(q, k, v, never, document=document), atol=1e-5)


def test_wrong_shapes_and_names_are_refused() -> None:
    q, k, v = qkv(1, 4)
    until = torch.full((1, 4), 9)
    with pytest.raises(ValueError, match="unknown implementation 'nope'"):
        memento_attention(q, k, v, until, implementation="nope")
    with pytest.raises(ValueError, match=r"visible_until must be \[B, T\]"):
        memento_attention(q, k, v, until[:, :3])
    with pytest.raises(ValueError, match="document must be an integer tensor"):
        memento_attention(q, k, v, until, document=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="multiple of H_kv"):
        memento_attention(q[:, :3], k, v, until)
