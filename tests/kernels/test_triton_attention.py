"""The Triton kernels under Triton's interpreter on the CPU, against the dense twin in float64.

The interpreter must be chosen before Triton is imported, and then holds for the whole process: the tests run in one
process of their own, and this module reads its findings.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from memento.format import NEVER
from memento.kernels import Visibility
from memento.kernels.attention import attend
from memento.kernels.tiles import TileList, TileLists, Tiling

triton = pytest.importorskip("triton")
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

AT = torch.arange(53)
DRAW = torch.Generator().manual_seed(0)
DRAWN = AT + 1 + torch.randint(0, 53, (53,), generator=DRAW)
# Two blocks [4, 20) and [24, 41) that leave before 24 and 44.
TRACE = torch.full((53,), NEVER)
TRACE[4:20], TRACE[24:41] = 24, 44
CASES: dict[str, dict[str, Any]] = {
    "trace": {"until": TRACE},
    "random": {"until": DRAWN},
    "all evicted at once": {"until": AT + 1},
    "in the past": {"until": torch.zeros_like(AT)},
    "nothing evicted": {"until": torch.full((53,), NEVER)},
    "one token": {"until": torch.tensor([NEVER])},
    "documents": {"until": TRACE, "document": torch.tensor([7] * 20 + [3] * 1 + [5] * 32)},
    "documents in pieces": {"until": DRAWN, "document": (AT // 17) % 2},
    "window": {"until": DRAWN, "lowest": (AT - 18).clamp(min=0)},
    "everything": {
        "until": DRAWN,
        "document": AT // 30,
        "lowest": torch.randint(-5, 53, (53,), generator=DRAW),
    },
    "odd head size": {"until": TRACE, "head_dim": 24},
    "wide heads": {"until": TRACE, "head_dim": 256},
    "two rows": {"until": torch.stack([TRACE, DRAWN])},
    "keys wider than queries": {"until": DRAWN, "tiling": (16, 32, 1, 1)},
    # Not bfloat16: the interpreter of Triton 3.9 multiplies the bit patterns of bfloat16 numbers.
    "float16": {"until": TRACE, "dtype": torch.float16},
}
INVISIBLE = "an invisible key changes nothing"


def visibility_of(case: dict[str, Any]) -> Visibility:
    rows = (None if (x := case.get(name)) is None else torch.atleast_2d(x) for name in ("lowest", "document"))
    return Visibility(torch.atleast_2d(case["until"]), *rows)


def inputs_of(case: dict[str, Any], tokens: int, rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    width, dtype = case.get("head_dim", 16), case.get("dtype", torch.float32)
    return [
        torch.randn(rows, tokens, heads, width, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (4, 2, 2)
    ]


def relative_errors(case: dict[str, Any], device: str = "cpu") -> list[float]:
    """Of output, dq, dk and dv; where the exact gradient is 0, over a tenth of dv."""
    visibility = visibility_of({n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in case.items()})
    rows, tokens = visibility.visible_until.shape
    inputs = [x.detach().to(device).requires_grad_() for x in inputs_of(case, tokens, rows)]
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    results = []
    for leaves, name in ((inputs, "triton"), ([x.detach().double().requires_grad_() for x in inputs], "dense")):
        q, k, v = leaves
        out = attend(q, k, v, visibility, implementation=name)
        results.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
    floor = 0.1 * results[1][3].norm()
    return [float((a - b).norm() / max(b.norm(), floor)) for a, b in zip(*results, strict=True)]


def changes_by_an_invisible_key() -> float:
    """Largest change in the outputs and gradients of a query when keys that it does not see change."""
    visibility, query = visibility_of(CASES["trace"]), 50
    hidden = (~visibility.mask[0, 0, query]).nonzero()[:, 0]
    results = []
    for shift in (0.0, 100.0):
        leaves = [x.detach().clone() for x in inputs_of({}, 53, 1)]
        leaves[1][:, :, hidden] += shift
        leaves[2][:, :, hidden] -= 3 * shift
        q, k, v = (x.requires_grad_() for x in leaves)
        out = attend(q, k, v, visibility, implementation="triton")
        weight = torch.zeros_like(out)
        weight[:, :, query] = 1.0
        results.append((out[:, :, query], *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))


def interpreted() -> None:
    """What the process with the interpreter does: print case -> errors as JSON."""
    from memento.kernels import triton_attention

    found: dict[str, Any] = {}
    for name, case in CASES.items():
        tiling = Tiling(*case.get("tiling", (16, 16, 1, 1)))
        triton_attention.tilings = lambda *_, chosen=tiling: (chosen, chosen)
        found[name] = relative_errors(case)
    found[INVISIBLE] = changes_by_an_invisible_key()
    print(json.dumps(found))


@pytest.mark.parametrize("name", list(CASES))
def test_outputs_and_gradients_are_those_of_the_dense_twin(findings: dict[str, Any], name: str) -> None:
    tolerance = 1e-2 if "dtype" in CASES[name] else 1e-5
    assert max(findings[name]) < tolerance


def test_an_invisible_key_changes_nothing_bit_for_bit(findings: dict[str, Any]) -> None:
    assert findings[INVISIBLE] == 0


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("sizes", [(16, 16), (16, 8), (4, 32), (64, 64)])
@pytest.mark.parametrize("ordered", [False, True], ids=["row order", "key order"])
def test_lists_hold_every_visible_tile_once_and_call_full_only_what_is(
    name: str, sizes: tuple[int, int], ordered: bool
) -> None:
    visibility = visibility_of(CASES[name])
    queries, keys = sizes
    position = visibility.key_order if ordered else None
    lists = TileLists.of(visibility.rule, Tiling(queries, keys, 1, 1), position)
    mask = visibility.mask[:, 0]
    rows, tokens, _ = mask.shape
    if position is not None:
        assert torch.equal(position.sort(-1).values, torch.arange(tokens).expand(rows, -1))
        mask = mask.take_along_dim(position[:, None], 2)
    padded = torch.nn.functional.pad(mask, (0, -tokens % keys, 0, -tokens % queries))
    tiles = padded.unflatten(2, (-1, keys)).unflatten(1, (-1, queries)).transpose(2, 3)  # [B, nQ, nK, queries, keys]
    beyond = torch.arange(tiles.shape[1] * queries).unflatten(0, (-1, queries)) >= tokens
    all_seen = (tiles | beyond[:, None, :, None]).all(-1).all(-1)
    some_seen = tiles.any(-1).any(-1)

    def listed(found: TileList, n: int, m: int) -> torch.Tensor:
        """How often each of m tiles is listed for each of n, as full and as partial: [2, B, n, m]."""
        counts = torch.zeros(rows * n * 2, m, dtype=torch.int64)
        for i, (low, high) in enumerate(found.bounds.flatten(0, 1).tolist()):
            counts[i, found.tiles[low:high].long()] += 1
        return counts.view(rows, n, 2, m).permute(2, 0, 1, 3)

    full, partial = listed(lists.of_queries, tiles.shape[1], tiles.shape[2])
    of_keys = listed(lists.of_keys, tiles.shape[2], tiles.shape[1])
    assert torch.equal(torch.stack([full, partial]), of_keys.transpose(2, 3))
    assert (full + partial <= 1).all()
    assert not (full.bool() & ~all_seen).any()
    assert ((full + partial).bool() | ~some_seen).all()


def test_keys_in_order_make_nearly_every_tile_full() -> None:
    """32 K tokens of blocks and mementos of random length: what is computed, and how much of it is seen."""
    tokens, at, rng = 32768, 0, random.Random(0)
    until = torch.full((1, tokens), NEVER)
    while at < tokens:
        block, memento = round(rng.gauss(1150, 290)), round(rng.gauss(194, 50))
        until[0, at : at + block] = at + block + memento
        at += block + memento
    visibility = Visibility(until)
    visible = int((until[0].clamp(max=tokens) - torch.arange(tokens)).sum())
    waste, partial = {}, {}
    for name, position in (("row", None), ("key", visibility.key_order)):
        lists = TileLists.of(visibility.rule, Tiling(128, 64, 1, 1), position)
        computed = len(lists.of_queries.tiles) * 128 * 64
        counts = lists.of_queries.bounds.diff(dim=-1).sum((0, 2))
        waste[name], partial[name] = 1 - visible / computed, float(counts[1] / counts.sum())
    assert partial["key"] < 0.5 * partial["row"]
    assert waste["key"] < 0.15 < waste["row"]


def test_what_the_lists_need_is_derived_once_a_batch() -> None:
    visibility, tiling = visibility_of(CASES["trace"]), Tiling(16, 16, 1, 1)
    assert visibility.tile_lists(tiling) is visibility.tile_lists(tiling)
    assert visibility.rule is visibility.rule


@pytest.mark.parametrize("width", [128, *(pytest.param(n, marks=pytest.mark.long) for n in (32, 64, 96, 256))])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["_forward", "_backward_queries", "_backward_keys"])
def test_the_kernels_compile_for_a_gpu_without_one(
    kernel: str, capability: int, width: int, tmp_path, monkeypatch
) -> None:
    """bf16: Triton's own assembler makes the binary, and shared memory fits."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from memento.kernels import triton_attention

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as it is unset, without the warning
    function = getattr(triton_attention, kernel)
    chosen = triton_attention.tilings(width, torch.bfloat16, capability == 90)[kernel != "_forward"]
    constants = {
        "GROUP": 4,
        "D": width,
        "BLOCK_D": triton.next_power_of_2(width),
        "QUERIES": chosen.queries,
        "KEYS": chosen.keys,
        "HAS_POSITION": True,
        "HAS_LOWEST": False,
        "HAS_DOCUMENT": False,
        "PRECISION": "tf32x3",
    }

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("lse", "delta"):
            return "*fp32"
        if name in ("bounds", "tiles", "position", "until", "lowest", "document"):
            return "*i32"
        if name.startswith("scale"):
            return "fp32"
        return "i32" if name in ("tokens", "heads") or name.endswith(("_row", "_head", "_token")) else "*bf16"

    signature = {name: kind(name) for name in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, of) in enumerate(signature.items())
        if of.startswith("*") or name.endswith(("_row", "_head", "_token"))
    }
    source = ASTSource(function, signature, {(function.arg_names.index(n),): x for n, x in constants.items()}, aligned)
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    # Hopper's asynchronous products take tiles of 64 rows; at 256 wide the registers of a backward pass hold fewer.
    asynchronous = capability == 90 and chosen.queries >= 64
    assert ("wgmma" if asynchronous else "mma.sync") in compiled.asm["ptx"]
    assert compiled.metadata.shared <= (227 if capability == 90 else 163) * 1024
    if capability == 90 and (assembler := PTXAS / "ptxas-blackwell").exists():
        (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
        command = [assembler, "-v", "-arch=sm_90a", tmp_path / "kernel.ptx", "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert "wgmma.mma_async instructions are serialized" not in said
        assert int(re.findall(r"(\d+) bytes stack frame", said)[-1]) <= 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("name", list(CASES))
def test_on_a_gpu(name: str, head_dim: int, dtype: torch.dtype) -> None:
    errors = relative_errors({**CASES[name], "head_dim": head_dim, "dtype": dtype}, "cuda")
    assert max(errors) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_without_a_gpu_it_says_what_to_do() -> None:
    q, k, v = inputs_of({}, 5, 1)
    with pytest.raises(ValueError, match="needs a GPU"):
        attend(q, k, v, Visibility(torch.full((1, 5), NEVER)), implementation="triton")
    with pytest.raises(ValueError, match="takes float32, bfloat16 or float16"):
        attend(q.double(), k.double(), v.double(), Visibility(torch.full((1, 5), NEVER)), implementation="triton")


if __name__ == "__main__":
    interpreted()
