"""The same scripted traces through stock vLLM and through vLLM that evicts, interleaved, at several KV pools.

    python benchmarks/rollout_throughput.py --quick                     # two minutes on two cores
    python benchmarks/rollout_throughput.py --out runs/throughput       # all pools; JSON, Markdown table, plot
    python benchmarks/rollout_throughput.py --device cuda --model qwen3-8b --scale 0.25 --requests 240 \\
        --pools 10 20 40 --out runs/throughput-h200                     # dummy weights, nothing is downloaded

Traces have the averages of OpenMementos (MEMENTO, arXiv 2604.09852, section 2): 9 blocks of 1,150 tokens, mementos of
194, all multiplied by `--scale`; lengths vary by `--spread`. Both engines are told every token, so both generate
exactly the same ones; they ask for the sampled token's log-probability, as rollouts do. A trace ends with a stop token,
and `max_tokens` is the same for all: neither engine knows how long a request will be. A pool is given in whole traces:
`--pools 6` has room for six traces of average length at their end.

All requests arrive at once. Stock vLLM gives each its first token soon and preempts it then, so its time to first token
(TTFT) is short and its latency long; admission by expected peaks lets requests wait instead.

Each pool runs in a process of its own that holds both engines. The one that is behind runs for a second, so that both
work to the end and a busy machine slows both; an engine's clock runs only inside its own steps. Two ratios are given:
of the whole run, whose end is a pool that empties (the last requests run alone), and of the time while requests wait
for memory, which is when memory binds and the usual state of rollouts.

Two bounds are given. `area` is the area of stock over the area of ours (KV pages held, summed over generated tokens):
the ratio that a step of constant cost and perfect packing would give. But a step of more requests costs more, wherever
something else than reading weights and KV takes time. So the cost of a step is measured in the same run, for both
engines together, as a + b x requests, and `area and step` is what perfect packing gives at that cost.

Overhead is measured in lockstep, one step of each engine in turn on the same batch in a pool that holds everything:
with eviction off for each request (`off`), and on for traces without a block (`never`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from memento.format import MementoFormat, kv_profile

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

FMT = MementoFormat(1, 2, 3, 4, evict_delimiters=False)
CONTESTANTS = ("stock", "ours")
STOP = 5
FIRST_TEXT = 16
"""Token ids below it are delimiters and reserved; the rest is text."""

SHAPES: dict[str, dict[str, int]] = {
    # The quickstart's model: a step costs little but Python.
    "tiny": dict(hidden=64, layers=4, heads=4, kv_heads=2, head_dim=32, inner=256, vocab=512),
    # 25 M parameters: on a CPU a step costs mostly the reading of weights, as on a GPU.
    "small": dict(hidden=512, layers=8, heads=8, kv_heads=2, head_dim=64, inner=1536, vocab=4096),
    # 16 KiB of KV a token: as with long contexts on a GPU, a step costs mostly the reading of the KV pool.
    "long": dict(hidden=64, layers=4, heads=8, kv_heads=8, head_dim=64, inner=256, vocab=512),
    "qwen3-0.6b": dict(hidden=1024, layers=28, heads=16, kv_heads=8, head_dim=128, inner=3072, vocab=151936),
    "qwen3-1.7b": dict(hidden=2048, layers=28, heads=16, kv_heads=8, head_dim=128, inner=6144, vocab=151936),
    "qwen3-8b": dict(hidden=4096, layers=36, heads=32, kv_heads=8, head_dim=128, inner=12288, vocab=151936),
}


class Script(NamedTuple):
    """One request: its prompt, and the tokens it will generate."""

    prompt: list[int]
    completion: list[int]


def make_scripts(args: argparse.Namespace, seed: int, blocks: bool = True) -> list[Script]:
    """`args.requests` traces in groups that share a prompt. Without `blocks` the same lengths hold no delimiter."""
    rng = random.Random(seed)
    vocab = SHAPES[args.model]["vocab"]

    def text(mean: float) -> list[int]:
        length = max(1, round(rng.gauss(mean * args.scale, args.spread * mean * args.scale)))
        return [rng.randrange(FIRST_TEXT, vocab) for _ in range(length)]

    start, end, summary, close = FMT.delimiter_ids
    scripts: list[Script] = []
    while len(scripts) < args.requests:
        prompt = text(args.prompt_tokens)
        for _ in range(min(args.group_size, args.requests - len(scripts))):
            completion: list[int] = []
            for _ in range(max(1, round(rng.gauss(args.blocks, args.spread * args.blocks)))):
                completion += [start, *text(args.block_tokens), end, summary, *text(args.memento_tokens), close]
            completion += text(args.answer_tokens)
            if not blocks:
                completion = [token if token >= FIRST_TEXT else FIRST_TEXT for token in completion]
            scripts.append(Script(prompt, [*completion, STOP]))
    return scripts


def area_pages(script: Script, fmt: MementoFormat, page: int) -> int:
    """KV pages that the request holds, summed over its generated tokens."""
    resident = kv_profile(script.prompt + script.completion, fmt, len(script.prompt)).resident_T
    return int(np.ceil(resident[len(script.prompt) :] / page).sum())


# ---------------------------------------------------------------------------------------------- engines


def write_model(args: argparse.Namespace, folder: Path) -> None:
    """A Qwen3 `config.json` and nothing else: vLLM fills in random weights."""
    shape = SHAPES[args.model]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["inner"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "max_position_embeddings": 1 << 17,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "torch_dtype": args.dtype,
    }
    (folder / "config.json").write_text(json.dumps(config))


def page_bytes(args: argparse.Namespace) -> int:
    shape = SHAPES[args.model]
    values = 2 * shape["layers"] * shape["kv_heads"] * shape["head_dim"] * args.page
    return values * (4 if args.dtype == "float32" else 2)


def scripted_processor() -> type:
    """A logits processor that leaves one choice for each row. Made in a function because vLLM is imported late."""
    import torch
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates
    from vllm.v1.sample.logits_processor.interface import LogitsProcessor

    class Scripted(LogitsProcessor):
        def __init__(self, *_: Any) -> None:
            self._rows: dict[int, tuple[list[int], list[int]]] = {}

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            process_dict_updates(self._rows, batch_update, self._new_row)

        @staticmethod
        def _new_row(params: Any, _: Any, output_ids: list[int]) -> tuple[list[int], list[int]]:
            return params.extra_args["script"], output_ids

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            # A row that is still prefilling (its last sampled token will be thrown away) may ask past its script.
            tokens = [script[min(len(out), len(script) - 1)] for script, out in self._rows.values()]
            rows = torch.tensor(list(self._rows), device=logits.device)
            logits[rows, torch.tensor(tokens, device=logits.device)] = 1e4
            return logits

    return Scripted


def build(args: argparse.Namespace, model: str, pages: int, *, evict: bool, max_num_seqs: int) -> LLMEngine:
    """One engine; only the keys of `eviction_args` differ."""
    from memento.rollout import eviction_args
    from memento.rollout.engine import build_engine

    arguments: dict[str, Any] = {
        "model": model,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": args.dtype,
        "seed": 0,
        "block_size": args.page,
        "kv_cache_memory_bytes": pages * page_bytes(args),
        "max_model_len": args.max_model_len,
        "max_num_seqs": max_num_seqs,
        "enforce_eager": args.eager,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
    }
    processors: list[Any] = []
    if args.runner == "v2":
        arguments["enable_trace_replay"] = True
    else:
        processors = [scripted_processor()]
    if evict:
        arguments |= eviction_args(FMT, logits_processors=processors)
    else:
        arguments |= {"logits_processors": processors, "enable_prefix_caching": True}
        if args.watermark:
            arguments["watermark"] = args.watermark
    return build_engine(arguments)


class Batch(NamedTuple):
    """One step."""

    requests: int
    """Computed in it; but for chunks of prompts each generates a token."""
    tokens: int
    waiting: bool
    """Whether a request waits for memory."""
    seconds: float


def step_cost(batches: Sequence[Batch]) -> tuple[float, float]:
    """Seconds of a step that only generates: a + b x requests, by least squares over the medians of equal sizes."""
    times: dict[int, list[float]] = {}
    for batch in batches:
        if batch.requests == batch.tokens > 0:
            times.setdefault(batch.requests, []).append(batch.seconds)
    sizes = sorted(times)
    if len(sizes) < 2:
        return statistics.median(times[sizes[0]]) if sizes else math.nan, 0.0
    medians, weights = [statistics.median(times[n]) for n in sizes], [math.sqrt(len(times[n])) for n in sizes]
    slope, start = np.polyfit(sizes, medians, 1, w=weights)
    return float(start), float(slope)


class Contestant:
    """An engine, its clock, and what is watched between its steps."""

    def __init__(self, args: argparse.Namespace, name: str, engine: LLMEngine) -> None:
        self.name, self.engine, self._args = name, engine, args
        core: Any = engine.engine_core
        self.scheduler = core.engine_core.scheduler
        self._synchronize: Callable[[], None] = lambda: None
        if args.device == "cuda":
            import torch

            self._synchronize = torch.cuda.synchronize
        self._clock = time.process_time if args.clock == "cpu" else time.perf_counter
        self._preempt, self._schedule = self.scheduler._preempt_request, self.scheduler.schedule
        self.scheduler._preempt_request = self._count_preemption
        self.scheduler.schedule = self._note_batch
        self.reset()

    def reset(self) -> None:
        self.seconds, self.steps, self.tokens, self.finished = 0.0, 0, 0, 0
        self.preempted: list[str] = []
        self.first_token_s: dict[str, float] = {}
        self.finished_s: dict[str, float] = {}
        self.running = self.used = 0.0
        self.evictions = 0
        self.batches: list[Batch] = []

    def _count_preemption(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.preempted.append(request.request_id)
        return self._preempt(request, *args, **kwargs)

    def _note_batch(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        self._batch = len(output.num_scheduled_tokens), output.total_num_scheduled_tokens
        return output

    def add(self, scripts: Sequence[Script], **control: Any) -> None:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        for index, script in enumerate(scripts):
            extra: dict[str, Any] = {}
            if self._args.runner == "v1":
                extra["script"] = script.completion
            if control and self.name != "stock":
                extra["memento"] = control
            params = SamplingParams(
                temperature=0.0,
                max_tokens=self._args.max_model_len - self._args.longest_prompt,
                stop_token_ids=[STOP],
                logprobs=0,
                flat_logprobs=True,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args=extra or None,
            )
            if self._args.runner == "v2":
                params.trace_decode_token_ids = script.completion
            self.engine.add_request(str(index), tokens_input(script.prompt), params)

    @property
    def busy(self) -> bool:
        return self.engine.has_unfinished_requests()

    def step(self) -> float:
        """One step; the seconds it took."""
        began = self._clock()
        outputs: list[Any] = self.engine.step()
        took = self._clock() - began
        self.seconds += took
        self.steps += 1
        running = self.scheduler.running
        self.running += len(running)
        self.batches.append(Batch(*self._batch, bool(self.scheduler.waiting), took))
        pool = self.scheduler.kv_cache_manager.block_pool
        self.used += 1 - pool.get_num_free_blocks() / (pool.num_gpu_blocks - 1)
        for request in running:
            if request.num_output_tokens and (name := request.request_id.split("-")[0]) not in self.first_token_s:
                self.first_token_s[name] = self.seconds
        for output in outputs:
            if output.finished:
                self.finished += 1
                self.tokens += len(output.outputs[0].token_ids)
                self.first_token_s.setdefault(output.request_id, self.seconds)
                self.finished_s[output.request_id] = self.seconds
                self._outputs[output.request_id] = output
        return took

    def run_for(self, seconds: float) -> None:
        until = self.seconds + seconds
        while self.busy and self.seconds < until:
            self.step()
        before = self._clock()
        self._synchronize()
        self.seconds += self._clock() - before

    def check(self, scripts: Sequence[Script], evict: bool = True) -> None:
        """Every token is the script's, and every eviction the tokens'."""
        from memento.format import evictions
        from memento.rollout import eviction_stats

        assert len(self._outputs) == len(scripts), f"{self.name}: {len(self._outputs)} of {len(scripts)} finished"
        for output in self._outputs.values():
            script = scripts[int(output.request_id.split("-")[0])]
            assert list(output.outputs[0].token_ids) == script.completion, f"{self.name} left the script"
            if self.name != "stock":
                last = len(script.prompt) + len(script.completion) - 1
                fmt = FMT if evict else FMT.without_eviction()
                asked = evictions(script.prompt + script.completion, fmt, len(script.prompt))
                done = eviction_stats(output).evictions
                assert list(done) == [event for event in asked if event[0] < last], f"{self.name} evicted otherwise"
                self.evictions += len(done)

    def start(self, scripts: Sequence[Script], **control: Any) -> None:
        self.reset()
        self._outputs: dict[str, Any] = {}
        assert self.scheduler.reset_prefix_cache(), "the engine is not idle"
        self.add(scripts, **control)

    def waiting(self) -> tuple[int, float]:
        """Tokens generated, and seconds taken, by the steps after which a request waits for memory."""
        binding = [batch for batch in self.batches if batch.waiting]
        return sum(batch.requests for batch in binding), sum(batch.seconds for batch in binding)

    def summary(self, scripts: Sequence[Script]) -> dict[str, Any]:
        tokens, seconds = self.waiting()
        ttft = sorted(self.first_token_s.values())
        latency = sorted(self.finished_s.values())
        return {
            "tokens_per_s": self.tokens / self.seconds,
            "waiting_tokens_per_s": tokens / seconds if seconds else None,
            "waiting_share": seconds / self.seconds,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "steps": self.steps,
            "step_ms": 1e3 * self.seconds / self.steps,
            "running": self.running / self.steps,
            "computed": sum(batch.requests for batch in self.batches) / self.steps,
            "pool_use": self.used / self.steps,
            "preemptions": len(self.preempted),
            "preempted_requests": len(set(self.preempted)) / len(scripts),
            "ttft_p50_s": statistics.median(ttft),
            "ttft_max_s": ttft[-1],
            "latency_p50_s": statistics.median(latency),
            "evictions": self.evictions,
        }


# ---------------------------------------------------------------------------------------------- measurements


def pages_of(args: argparse.Namespace, traces: float) -> int:
    """Pages of a pool with room for so many whole traces of average length (one more is vLLM's null page)."""
    mean = args.prompt_tokens + args.blocks * (args.block_tokens + args.memento_tokens + 4 / args.scale)
    return math.ceil(traces * (mean + args.answer_tokens) * args.scale / args.page) + 1


def start_pair(args: argparse.Namespace, pages: int, folder: Path) -> tuple[Contestant, Contestant]:
    write_model(args, folder)
    ours = Contestant(args, "ours", build(args, str(folder), pages, evict=True, max_num_seqs=args.max_num_seqs))
    stock = Contestant(args, "stock", build(args, str(folder), pages, evict=False, max_num_seqs=args.max_num_seqs))
    for contestant, requests in ((stock, 3), (ours, args.warm_up)):
        # Of the usual length, because admission learns from what has finished.
        warm = make_scripts(argparse.Namespace(**vars(args) | {"requests": requests, "group_size": 1}), seed=10_000)
        contestant.start(warm)
        contestant.run_for(math.inf)
        contestant.check(warm)
    return stock, ours


def measure_pool(args: argparse.Namespace, traces: float, folder: Path) -> dict[str, Any]:
    """Both engines on `args.rounds` sets of traces."""
    pages = pages_of(args, traces)
    stock, ours = start_pair(args, pages, folder)
    rounds = []
    for number in range(args.rounds):
        scripts = make_scripts(args, seed=args.seed + number)
        area = {
            name: sum(area_pages(script, fmt, args.page) for script in scripts)
            for name, fmt in (("stock", FMT.without_eviction()), ("ours", FMT))
        }
        bound = area["stock"] / area["ours"]
        generated = sum(len(script.completion) for script in scripts)
        # Requests at once in a pool that is always full, less vLLM's null page.
        at_once = {name: min((pages - 1) * generated / pages_held, args.requests) for name, pages_held in area.items()}
        for contestant in (stock, ours):
            contestant.start(scripts)
        sat_out = ours.scheduler._manager.admission.sat_out if ours.scheduler._manager.admission else 0
        while running := [contestant for contestant in (stock, ours) if contestant.busy]:
            # Whoever is behind: so both are at work to the end, whatever else the machine does meanwhile.
            min(running, key=lambda contestant: contestant.running).run_for(args.slice_s)
            if args.progress:
                print(f"  {stock.finished}/{ours.finished} of {len(scripts)}", end="\r", file=sys.stderr, flush=True)
        for contestant in (stock, ours):
            contestant.check(scripts)
        results = {c.name: c.summary(scripts) for c in (stock, ours)}
        ratio = results["ours"]["tokens_per_s"] / results["stock"]["tokens_per_s"]
        start, each = step_cost([*stock.batches, *ours.batches])
        cost = {name: start + each * number for name, number in at_once.items()}
        found = {"ratio": ratio, "bound": bound, "step_bound": bound * cost["stock"] / cost["ours"]}
        found |= {"step_start_ms": 1e3 * start, "step_request_ms": 1e3 * each}
        waiting = [results[name]["waiting_tokens_per_s"] for name in ("ours", "stock")]
        found["waiting_ratio"] = waiting[0] / waiting[1] if all(waiting) else None
        admission = ours.scheduler._manager.admission
        found["sat_out"] = 0 if admission is None else (admission.sat_out - sat_out) / generated
        rounds.append(found | results)
    return {"traces": traces, "pages": pages, "pool_mib": pages * page_bytes(args) / 2**20, "rounds": rounds}


def measure_overhead(args: argparse.Namespace, kind: str, folder: Path) -> dict[str, Any]:
    """Seconds of a step of ours over that of stock on the same batch, step by step in turn."""
    args = argparse.Namespace(
        **vars(args) | {"requests": args.overhead_requests, "max_num_seqs": args.overhead_requests}
    )
    stock, ours = start_pair(args, pages_of(args, 3.0 * args.requests), folder)
    ratios: list[float] = []
    times: dict[str, list[float]] = {"stock": [], "ours": []}
    for number in range(args.overhead_rounds):
        scripts = make_scripts(args, seed=args.seed + number, blocks=kind == "off")
        control = {"evict": False} if kind == "off" else {}
        for contestant in (stock, ours):
            contestant.start(scripts, **control)
        took: dict[str, list[float]] = {"stock": [], "ours": []}
        while stock.busy and ours.busy:
            for contestant in (stock, ours) if stock.steps % 2 else (ours, stock):
                took[contestant.name].append(contestant.step())
        assert not stock.busy and not ours.busy and stock.steps == ours.steps, "the engines did not run in lockstep"
        for contestant in (stock, ours):
            contestant.check(scripts, evict=kind != "off")
            times[contestant.name] += took[contestant.name]
        for start in range(0, stock.steps - 49, 50):
            part = slice(start, start + 50)
            ratios.append(statistics.median(took["ours"][part]) / statistics.median(took["stock"][part]))
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "kind": kind,
        "overhead": quartiles[1] - 1,
        "quartiles": [quartiles[0] - 1, quartiles[2] - 1],
        "steps": len(times["stock"]),
        "requests": args.requests,
        "stock_step_ms": 1e3 * statistics.median(times["stock"]),
        "ours_step_ms": 1e3 * statistics.median(times["ours"]),
    }


# ---------------------------------------------------------------------------------------------- report


def middle(pool: dict[str, Any], *path: str) -> float:
    values = []
    for value in pool["rounds"]:
        for key in path:
            value = value[key]
        values.append(value)
    return statistics.median(values)


def table(result: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    if not result["pools"]:
        return "\n".join(overhead_lines(result)) + "\n"
    lines = [
        "| KV pool (whole traces) | tokens/s, stock / ours | ratio (lowest - highest) | while requests wait "
        "| bound: area | reached | bound: area and step | reached | computed at once, stock / ours "
        "| pool use, stock / ours | preempted requests, stock / ours | sat out | TTFT p50, stock / ours "
        "| latency p50, stock / ours |",
        "|---" * 14 + "|",
    ]
    for pool in result["pools"]:
        ratios = [round_["ratio"] for round_ in pool["rounds"]]
        binds = all(round_["waiting_ratio"] for round_ in pool["rounds"])
        # Where memory never binds there is nothing to reach.
        best = middle(pool, "waiting_ratio") if binds else math.nan
        waiting = [round_["waiting_ratio"] for round_ in pool["rounds"]] if binds else []
        area, step = middle(pool, "bound"), middle(pool, "step_bound")

        def both(name: str, style: str, pool: dict[str, Any] = pool) -> str:
            return " / ".join(style.format(middle(pool, who, name)) for who in CONTESTANTS)

        lines.append(
            f"| {pool['traces']:g} ({pool['pool_mib']:,.0f} MiB) | {both('tokens_per_s', '{:,.0f}')} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) "
            + (f"| {best:.2f} ({min(waiting):.2f} - {max(waiting):.2f}) " if binds else "| never ")
            + (f"| {area:.2f} | {best / area:.0%} | {step:.2f} | {best / step:.0%} " if binds else "| - " * 4)
            + f"| {both('computed', '{:.1f}')} | {both('pool_use', '{:.0%}')} "
            f"| {both('preempted_requests', '{:.1%}')} | {middle(pool, 'sat_out'):.1%} "
            f"| {both('ttft_p50_s', '{:.2f} s')} | {both('latency_p50_s', '{:.0f} s')} |"
        )
    lines += [
        "",
        "Reached: by the ratio while requests wait. Sat out: steps that running requests waited for a page, as a part "
        "of the tokens generated. A step costs "
        + "; ".join(
            f"{middle(pool, 'step_start_ms'):.2f} ms + {middle(pool, 'step_request_ms'):.3f} ms a request "
            f"(pool of {pool['traces']:g})"
            for pool in result["pools"]
        )
        + ".",
    ]
    return "\n".join([*lines, *overhead_lines(result)]) + "\n"


def overhead_lines(result: dict[str, Any]) -> list[str]:
    what = {"off": "eviction off for each request", "never": "eviction on, traces without blocks"}
    lines: list[str] = []
    for entry in result["overhead"]:
        low, high = entry["quartiles"]
        lines += [
            "",
            f"Overhead, {what[entry['kind']]}: {entry['overhead']:+.1%} a step (quartiles {low:+.1%} to {high:+.1%}; "
            f"{entry['steps']:,} steps of up to {entry['requests']} requests, stock {entry['stock_step_ms']:.2f} ms).",
        ]
    return lines


def plot(result: dict[str, Any], file: Path) -> None:
    """Tokens per second and their ratio over the pool."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pools = result["pools"]
    x = [pool["traces"] for pool in pools]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for name, colour in (("stock", "#888888"), ("ours", "#0a6fb8")):
        left.plot(x, [middle(pool, name, "tokens_per_s") for pool in pools], "o-", color=colour, label=name)
        for pool in pools:
            left.plot(
                [pool["traces"]] * len(pool["rounds"]),
                [round_[name]["tokens_per_s"] for round_ in pool["rounds"]],
                ".",
                color=colour,
                alpha=0.4,
            )
    left.set(xlabel="KV pool (whole traces)", ylabel="tokens / s", xscale="log", ylim=(0, None))
    right.plot(x, [middle(pool, "ratio") for pool in pools], "o-", color="#0a6fb8", label="ours / stock")
    right.plot(x, [middle(pool, "bound") for pool in pools], "--", color="#888888", label="bound (area)")
    steps = [middle(pool, "step_bound") for pool in pools]
    right.plot(x, steps, ":", color="#888888", label="bound (area and step)")
    right.axhline(1, color="#cccccc", linewidth=1)
    right.set(xlabel="KV pool (whole traces)", ylabel="ratio of tokens / s", xscale="log", ylim=(0, None))
    for axis in (left, right):
        axis.set_xticks(x, [f"{value:g}" for value in x], minor=False)
        axis.minorticks_off()
        axis.legend()
    figure.suptitle(f"{result['args']['model']}, {result['machine']}")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


# ---------------------------------------------------------------------------------------------- command line


def in_own_process(args: argparse.Namespace, *what: str) -> dict[str, Any]:
    """One measurement in a process of its own: in-process engines cannot be ended and started again in one."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, __file__, *sys.argv[1:], *what, str(file)]
        done = subprocess.run(command, env=environment(args), check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(what)}: the measurement failed (exit code {done.returncode})")
        return json.loads(file.read_text())


def environment(args: argparse.Namespace) -> dict[str, str]:
    chosen = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if args.runner == "v2" else "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "OMP_NUM_THREADS": str(args.threads),
        "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", ""),
    }
    if args.device == "cpu":
        chosen |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    return {**os.environ, **chosen}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pool, one round, short traces: is it all in order?")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=[*SHAPES], help="default: tiny; on cuda qwen3-8b (random weights)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32; on cuda bfloat16")
    parser.add_argument("--runner", choices=["v1", "v2"], default="v1", help="vLLM's model runner, of both engines")
    parser.add_argument("--graphs", action="store_true", help="compile and capture graphs (default: eager)")
    pools = [3.0, 6.0, 12.0, 96.0]
    parser.add_argument(
        "--pools", type=float, nargs="*", default=pools, help="in whole traces; none: only the overhead"
    )
    parser.add_argument("--requests", type=int, help="default: 192")
    parser.add_argument("--rounds", type=int, help="sets of traces a pool; default: 3")
    parser.add_argument("--scale", type=float, help="of all lengths; default: 1/8, on cuda 1/4")
    parser.add_argument("--blocks", type=float, default=9, help="a trace, on average")
    parser.add_argument("--block-tokens", type=float, default=1150)
    parser.add_argument("--memento-tokens", type=float, default=194)
    parser.add_argument("--prompt-tokens", type=float, default=100)
    parser.add_argument("--answer-tokens", type=float, default=100)
    parser.add_argument("--spread", type=float, default=0.25, help="standard deviation of lengths over their mean")
    parser.add_argument("--group-size", type=int, default=8, help="requests that share a prompt")
    parser.add_argument("--warm-up", type=int, default=12, help="requests from which ours learns before it is measured")
    parser.add_argument("--max-num-seqs", type=int, help="default: all requests")
    parser.add_argument("--page", type=int, help="tokens a KV page; default: 32, on cuda 16")
    parser.add_argument("--watermark", type=float, default=0.0, help="vLLM's watermark for the stock engine")
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU seconds of the process")
    parser.add_argument("--slice-s", type=float, default=1.0, help="how long one engine runs before the other's turn")
    parser.add_argument("--overhead-requests", type=int, default=16)
    parser.add_argument("--overhead-rounds", type=int, help="default: 3")
    parser.add_argument("--no-overhead", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for rollout_throughput.json, .md and .png")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--measure-pool", nargs=2, metavar=("TRACES", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--measure-overhead", nargs=2, metavar=("KIND", "FILE"), help=argparse.SUPPRESS)
    return parser


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    cuda = args.device == "cuda"
    args.eager = not args.graphs
    defaults: dict[str, Any] = {
        "model": "qwen3-8b" if cuda else "tiny",
        "dtype": "bfloat16" if cuda else "float32",
        "scale": 1 / 4 if cuda else 1 / 8,
        "page": 16 if cuda else 32,
        "requests": 192,
        "rounds": 3,
        "overhead_rounds": 3,
    }
    if args.quick:
        args.pools = args.pools[:1]
        defaults |= {"requests": 16, "rounds": 1, "scale": defaults["scale"] / 2, "overhead_rounds": 1}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.max_num_seqs = args.max_num_seqs or args.requests
    args.longest_prompt = math.ceil(args.prompt_tokens * args.scale * (1 + 6 * args.spread))
    longest = args.prompt_tokens + args.answer_tokens + args.blocks * (args.block_tokens + args.memento_tokens + 4)
    args.max_model_len = math.ceil(longest * args.scale * (1 + 6 * args.spread) / 256) * 256
    return args


def main() -> None:
    args = with_defaults(parser().parse_args())
    if args.measure_pool or args.measure_overhead:
        what, file = args.measure_pool or args.measure_overhead
        with tempfile.TemporaryDirectory() as folder:
            if args.measure_pool:
                result = measure_pool(args, float(what), Path(folder))
            else:
                result = measure_overhead(args, what, Path(folder))
        Path(file).write_text(json.dumps(result))
        sys.stdout.flush()
        os._exit(0)  # two engines share the process's distributed groups: ending them one by one complains
    machine = f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch sees no GPU here")
        machine = torch.cuda.get_device_name()
    print(
        f"{machine}; {args.model}, {args.dtype}, {args.requests} requests of "
        f"{pages_of(args, 1) * args.page - args.page:,} tokens on average, pages of {args.page}, {args.rounds} rounds, "
        f"{args.clock} time",
        flush=True,
    )
    result: dict[str, Any] = {
        "command": sys.argv,
        "machine": machine,
        "args": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "pools": [],
        "overhead": [],
    }
    for traces in args.pools:
        result["pools"].append(in_own_process(args, "--measure-pool", str(traces)))
        pool = result["pools"][-1]
        bounds = f"{middle(pool, 'step_bound'):.2f}x (by area {middle(pool, 'bound'):.2f}x)"
        found = f"{middle(pool, 'ratio'):.2f}x of {bounds}"
        print(f"pool of {traces:g} traces: {found}", flush=True)
    if not args.no_overhead:
        result["overhead"] = [in_own_process(args, "--measure-overhead", kind) for kind in ("off", "never")]
    print("\n" + table(result))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "rollout_throughput.json").write_text(json.dumps(result, indent=1))
        (args.out / "rollout_throughput.md").write_text(table(result))
        if result["pools"]:
            plot(result, args.out / "rollout_throughput.png")
        print(f"written: {args.out}/rollout_throughput.*")


if __name__ == "__main__":
    main()
