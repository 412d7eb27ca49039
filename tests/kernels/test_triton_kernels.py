"""KV compaction and log-probabilities in Triton: under the interpreter on the CPU, compiled for GPUs, and on one.

The interpreter must be chosen before Triton is imported, and then holds for the whole process: it runs in one process
of its own, and this module reads its findings.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from memento.kernels.compaction import Moves, PagedCache, compact
from memento.kernels.logprobs import linear_logprobs, logits_logprobs

pytest.importorskip("triton")

CAPABILITIES = [80, 90]


def moved_alike(seed: int, device: str, tokens: int = 60) -> bool:
    """Whether the kernel leaves the same bits as torch, in several layers of several requests on scattered pages."""
    rng = np.random.default_rng(seed)
    page_tokens, heads, content = (4, 3, 24) if seed % 2 else (16, 2, 64)
    dtype = [torch.bfloat16, torch.float32, torch.float8_e4m3fn][seed % 3]
    requests, pages = [], rng.permutation(60)
    for _ in range(4):
        n = int(rng.integers(2, tokens))
        taken, pages = pages[: -(-n // page_tokens)], pages[-(-n // page_tokens) :]
        start = int(rng.integers(0, n))
        end = int(rng.integers(start, n))
        slots = taken[np.arange(n) // page_tokens] * page_tokens + np.arange(n) % page_tokens
        requests.append((slots[end:], slots[start : start + n - end]) if end > start else (slots[:0], slots[:0]))
    generator = torch.Generator().manual_seed(seed)
    shape = (60, page_tokens, heads, content) if seed % 4 < 2 else (60, heads, page_tokens, content)
    drawn = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    both = []
    for implementation in ("torch", "triton"):
        layers = [x.clone().to(device) for x in drawn]
        layers = [x.transpose(1, 2) if seed % 4 < 2 else x for x in layers]
        compact(PagedCache(tuple(layers)), Moves.of(requests, device), implementation=implementation)
        both.append(layers)
    return all(torch.equal(a.float(), b.float()) for a, b in zip(*both, strict=True))


def logprob_errors(
    shape: tuple[int, int, int], chunks: tuple[int, int], dtype: torch.dtype, device: str
) -> list[float]:
    """Relative to float64: of log-probabilities, entropies, and the gradients of hidden states and head."""
    tokens, width, words = shape
    generator = torch.Generator().manual_seed(tokens)
    drawn = [torch.randn(n, width, generator=generator) for n in (tokens, words)]
    hidden, head = ((x * 3 / width**0.25).to(dtype).to(device).requires_grad_() for x in drawn)
    targets = torch.randint(0, words, (tokens,), generator=generator).to(device)
    weights = torch.randn(2, tokens, generator=generator).to(device)
    results = []
    for leaves, implementation in (
        ((hidden, head), "triton"),
        ((hidden.detach().double(), head.detach().double()), ""),
    ):
        h, w = (x.requires_grad_() for x in leaves)
        if implementation:
            out = linear_logprobs(h, w, targets, 0.7, *chunks, implementation=implementation)
        else:
            out = logits_logprobs(h @ w.T, targets, 0.7)
        total = sum((a * b).sum() for a, b in zip(out, weights, strict=True))
        assert isinstance(total, torch.Tensor)
        results.append((*out, *torch.autograd.grad(total, (h, w))))
    return [float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(*results, strict=True)]


def interpreted() -> None:
    """What the process with the interpreter does: print findings as JSON."""
    from memento.kernels import triton_compaction

    found: dict[str, Any] = {"moved": [moved_alike(seed, "cpu") for seed in range(8)]}
    triton_compaction.tile_of = lambda *_: (4, 16)  # several tiles a request, several programs a token
    found["moved in tiles"] = [moved_alike(seed, "cpu") for seed in range(8)]
    found["logprobs"] = [
        logprob_errors((21, 8, 3000), (8, 2500), torch.float32, "cpu"),
        logprob_errors((5, 8, 17), (100, 100), torch.float32, "cpu"),
    ]
    print(json.dumps(found))


def test_compaction_leaves_the_bits_that_torch_leaves(findings: dict[str, Any]) -> None:
    assert findings["moved"] == [True] * 8
    assert findings["moved in tiles"] == [True] * 8


def test_logprobs_and_gradients_are_those_of_log_softmax(findings: dict[str, Any]) -> None:
    assert max(map(max, findings["logprobs"])) < 1e-5


def compiled(module: str, kernel: str, signature: dict[str, str], constants: dict[str, Any], capability: int) -> Any:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(module), kernel)
    signature = {name: "constexpr" if name in constants else signature[name] for name in function.arg_names}
    # What a launch finds out by itself: pointers, strides and widths are multiples of 16 here.
    sixteens = [n for n, of in signature.items() if of.startswith(("*", "i64")) or n in ("content", "words")]
    aligned = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in sixteens}
    source = ASTSource(function, signature, {(function.arg_names.index(n),): x for n, x in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compaction_compiles_for_a_gpu_without_one(capability: int, tmp_path, monkeypatch) -> None:
    """bf16, 200 tokens of 8 x 128: whole tokens are read and written 16 bytes at a time, and a barrier lies between."""
    from memento.kernels.triton_compaction import WORDS, tile_of

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as it is unset, without the warning
    tokens, values = tile_of(200, 256, 2)
    kernel = compiled(
        "memento.kernels.triton_compaction",
        "_compact",
        {
            **dict.fromkeys(["addresses", "source", "target", "offsets"], "*i64"),
            **dict.fromkeys(["page_stride", "head_stride", "token_stride"], "i64"),
            **dict.fromkeys(["heads", "page_tokens", "content"], "i32"),
        },
        {"WORD": WORDS[2], "TOKENS": tokens, "VALUES": values, "ALIGNED": True},
        capability,
    )
    ptx = kernel.asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
    assert "bar.sync" in ptx[ptx.rindex("ld.global.v4.b32") : ptx.index("st.global.v4.b32")]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_logprobs_compile_for_a_gpu_without_one(capability: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    rows = ["top", "total", "weighted", "at_target", "normaliser", "entropy", "grad_logprobs", "grad_entropy", "logits"]
    signature = {**dict.fromkeys(rows, "*fp32"), "targets": "*i64", "out": "*bf16", "words": "i32"}
    for kernel, constants in (("_fold", {}), ("_turn", {"HAS_ENTROPY": True})):
        ptx = compiled(
            "memento.kernels.triton_logprobs", kernel, signature, {**constants, "WORDS": 2048}, capability
        ).asm["ptx"]
        assert ".local" not in ptx, "registers are spilled"


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("seed", range(24))
    def test_compaction(self, seed: int) -> None:
        assert moved_alike(seed, "cuda")

    def test_compaction_of_long_overlapping_moves(self) -> None:
        assert all(moved_alike(seed, "cuda", tokens=240) for seed in range(100, 140))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(300, 64, 5000), (7, 32, 17), (1024, 128, 8192)])
    def test_logprobs(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert max(logprob_errors(shape, (256, 2048), dtype, "cuda")) < tolerance


if __name__ == "__main__":
    interpreted()
