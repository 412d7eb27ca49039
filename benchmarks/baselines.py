"""The paper's comparisons on the tiny model: is each phenomenon there at this size?

    memento quickstart --out runs/q0 --seed 0; memento quickstart --out runs/q1 --seed 1; ...
    python benchmarks/baselines.py runs/q0 runs/q1 runs/q2 --out runs/baselines
    python benchmarks/baselines.py runs/q0 --out runs/one --problems 100        # one seed, quickly

For each finished quickstart (MEMENTO, arXiv 2604.09852: tables 2 and 3, figures of the ablations, section 6.2.2)

* stage 1 and stage 2 with and without eviction: does full attention alone prepare a model for it?
* restart mode: mementos recomputed without their block. What is their KV worth beyond their text?
* the SFT-only control at full attention, against stage 2 and stage 2 with RL under eviction: accuracy and peak KV
* ``keep_last_n``: completed blocks that stay
* probing: a random digit is written at the end of a block, and a linear probe reads it off the keys and values of
  mementos before that block, of its own memento, and of the later ones, which never saw it.

Writes ``baselines.json``, ``baselines.png`` and prints the table. Every engine runs in a process of its own; what it
found is kept in ``parts``, so a command that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

TERMS = (5, 7)
PROBLEM_SEED = 3001
MAX_TOKENS = 768
DIGITS = 10

MODES: dict[str, dict[str, dict[str, Any]]] = {
    "stage1": {"stage 1, full attention": {"evict": False}, "stage 1, evicted": {}},
    "stage2": {
        "stage 2, evicted": {},
        "stage 2, full attention": {"evict": False},
        "stage 2, keep_last_n 1": {"keep_last_n": 1},
        "stage 2, keep_last_n 2": {"keep_last_n": 2},
        "stage 2, keep_last_n 4": {"keep_last_n": 4},
    },
    "stage2 restart": {"stage 2, restart mode": {}},
    "control": {"control, full attention": {"evict": False}},
    "rl": {"stage 2 and RL, evicted": {}},
}
"""Engine -> row of the table -> what its requests ask for."""


def held_out(count: int) -> list[Any]:
    """Problems of a class of sums that neither SFT nor RL of seeds 0 to 2 has seen."""
    from memento.arithmetic import make_problems

    return make_problems(count, PROBLEM_SEED, terms=TERMS)


def generate(folder: Path, engine: str, problems: int, temperature: float, seed: int) -> dict[str, Any]:
    """One engine, all its rows: accuracy and peak KV of each. Runs in a process of its own."""
    from memento.config import FormatConfig, RolloutConfig
    from memento.rollout.engine import set_environment

    set_environment(RolloutConfig(device="cpu", dtype="float32"))
    from vllm import LLM, SamplingParams

    from memento.boxed import last_boxed
    from memento.chat import encode_prompts
    from memento.format import kv_profile
    from memento.preflight import load_tokenizer
    from memento.rollout import eviction_args

    model, _, restart = engine.partition(" ")
    tokenizer = load_tokenizer(folder / model / "hf")
    fmt = FormatConfig().bind(tokenizer)
    llm = LLM(
        str(folder / model / "hf"),
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        kv_cache_memory_bytes=128 << 20,
        max_model_len=1024,
        max_num_seqs=64,
        disable_log_stats=True,
        **eviction_args(fmt, restart=bool(restart)),
    )
    tasks = held_out(problems)
    prompts = encode_prompts(tokenizer, [task.prompt for task in tasks])
    found = {}
    for name, control in MODES[engine].items():
        settings = [
            SamplingParams(
                temperature=temperature,
                max_tokens=MAX_TOKENS,
                seed=seed * 100_000 + i,
                extra_args={"memento": {**control, "prompt_len": len(prompt)}},
            )
            for i, prompt in enumerate(prompts)
        ]
        started = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)
        right, peaks, full_peaks = [], [], []
        keep = -1 if control.get("evict") is False else control.get("keep_last_n", 0)
        shown = FormatConfig(keep_last_n=keep).bind(tokenizer)
        for task, prompt, output in zip(tasks, prompts, outputs, strict=True):
            ids = list(output.outputs[0].token_ids)
            answer = last_boxed(tokenizer.decode(ids))
            right.append(answer is not None and answer.strip().isdigit() and int(answer) == int(task.answer or ""))
            peaks.append(kv_profile([*prompt, *ids], shown, len(prompt)).peak_tokens)
            full_peaks.append(len(prompt) + len(ids))
        found[name] = {
            "accuracy": mean(right),
            "stderr": math.sqrt(max(mean(right) * (1 - mean(right)), 1e-9) / len(right)),
            "peak_kv_tokens": mean(peaks),
            "tokens": mean(full_peaks),
            "seconds": time.perf_counter() - started,
        }
    return found


# ---------------------------------------------------------------------------------------------- probing


def probe(folder: Path, traces: int, seed: int) -> dict[str, Any]:
    """Accuracy of a linear probe for the hidden digit, by the place of the memento relative to its block."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from memento.arithmetic import make_traces
    from memento.chat import encode_prompt
    from memento.config import FormatConfig
    from memento.format import BLOCK_END, parse, visible_until
    from memento.kernels.hf import attach, pack
    from memento.preflight import load_tokenizer

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(folder / "stage2" / "hf")
    fmt = FormatConfig().bind(tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "stage2" / "hf", dtype=torch.float32).eval()
    attach(model)
    kept: list[torch.Tensor] = []
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.register_forward_hook(lambda _module, _args, out: kept.append(out[0]))
    rng, places = random.Random(seed), {"before": -1, "own": 0, "next": 1, "second next": 2}
    features: dict[str, list[Any]] = {place: [] for place in places}
    digits = []
    for problem, trace in make_traces(traces, 7, terms=(6, 7)):
        # The digit stands at the end of the second block, where nothing but the KV of its memento can carry it on.
        parts = trace.split(BLOCK_END)
        if len(parts) < 6:
            continue
        digit = rng.randrange(DIGITS)
        text = parts[0] + BLOCK_END + parts[1] + f", code {digit}" + BLOCK_END + BLOCK_END.join(parts[2:])
        prompt = encode_prompt(tokenizer, problem.prompt)
        ids = np.array([*prompt, *tokenizer(text, add_special_tokens=False)["input_ids"]])
        blocks = parse(ids, fmt, len(prompt)).blocks
        kept.clear()
        with torch.no_grad():
            model.get_decoder()(**{k: v for k, v in pack([ids], [visible_until(ids, fmt, len(prompt))]).items()})
        values = torch.cat(kept, dim=-1)  # [T, layers x (keys + values)]
        for place, offset in places.items():
            block = blocks[1 + offset]
            span = values[block.memento_start - 1 : block.memento_end + 1]
            features[place].append(torch.cat([span.mean(0), span[-1]]).numpy())
        digits.append(digit)
    labels = np.array(digits)
    found = {place: cross_validated(np.stack(rows).astype(np.float64), labels) for place, rows in features.items()}
    tested = len(labels)
    return {"accuracy": found, "tested": tested, "stderr": math.sqrt(0.1 * 0.9 / tested), "chance": 1 / DIGITS}


def cross_validated(x: Any, labels: Any, folds: int = 5) -> float:
    """How often a linear probe, fitted to the other folds, names the right label."""
    import numpy as np

    right = 0
    for fold in range(folds):
        test = np.arange(len(x)) % folds == fold
        scaled = (x - x[~test].mean(0)) / (x[~test].std(0) + 1e-6)
        scaled = np.concatenate([scaled, np.ones((len(x), 1))], axis=1)
        weights = ridge(scaled[~test], np.eye(DIGITS)[labels[~test]])
        right += int(((scaled[test] @ weights).argmax(1) == labels[test]).sum())
    return right / len(x)


def ridge(x: Any, y: Any) -> Any:
    """Ridge regression whose weight of the penalty is chosen on a fifth of the training rows."""
    import numpy as np

    cut = 4 * len(x) // 5

    def fit(x: Any, y: Any, weight: float) -> Any:
        return np.linalg.solve(x.T @ x + weight * np.eye(x.shape[1]), x.T @ y)

    def right(weight: float) -> float:
        guess = (x[cut:] @ fit(x[:cut], y[:cut], weight)).argmax(1)
        return float((guess == y[cut:].argmax(1)).mean())

    return fit(x, y, max((1.0, 10.0, 100.0, 1000.0, 10_000.0), key=right))


# ---------------------------------------------------------------------------------------------- all of it


def in_a_process(args: argparse.Namespace, folder: Path, part: str) -> dict[str, Any]:
    """One part, or what an earlier call with the same settings found."""
    settings = {"problems": args.problems, "temperature": args.temperature, "traces": args.traces}
    kept = args.out / "parts" / f"{folder.name} {part}.json"
    if kept.is_file() and (earlier := json.loads(kept.read_text()))["settings"] == settings:
        return earlier["found"]
    print(f"{folder}: {part} ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, str(folder), "--part", part, "--problems", str(args.problems)]
    command += ["--temperature", str(args.temperature), "--traces", str(args.traces)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode != 0 or not lines:
        raise SystemExit(f"{part} of {folder} failed:\n{done.stderr[-3000:]}")
    found = json.loads(lines[-1].removeprefix("RESULT "))
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps({"settings": settings, "found": found}) + "\n")
    return found


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for engine in MODES:
        rows |= in_a_process(args, folder, engine)
    return {"rows": rows, "probe": in_a_process(args, folder, "probe")}


def verdicts(runs: list[dict[str, Any]]) -> list[tuple[str, bool, str]]:
    """(phenomenon, whether it shows in every run, the numbers)."""

    def rows(run: dict[str, Any], name: str) -> dict[str, float]:
        return run["rows"][name]

    def sure(run: dict[str, Any], high: str, low: str) -> bool:
        """Whether one accuracy is above the other by more than two standard errors of the difference."""
        a, b = rows(run, high), rows(run, low)
        return a["accuracy"] - b["accuracy"] > 2 * math.hypot(a["stderr"], b["stderr"])

    def numbers(*names: str) -> str:
        return "; ".join(" against ".join(f"{100 * rows(r, n)['accuracy']:.1f} %" for n in names) for r in runs)

    stage1, stage2, restart = "stage 1, evicted", "stage 2, evicted", "stage 2, restart mode"
    control, trained = "control, full attention", "stage 2 and RL, evicted"
    peak = [rows(r, control)["peak_kv_tokens"] / rows(r, stage2)["peak_kv_tokens"] for r in runs]
    probes = [r["probe"]["accuracy"] for r in runs]
    error = max(r["probe"]["stderr"] for r in runs)

    def above(place: str) -> bool:
        return all(p[place] > 0.1 + 3 * error for p in probes)

    def shown(place: str) -> str:
        return "; ".join(f"{100 * p[place]:.1f} %" for p in probes)

    return [
        ("stage 2 beats stage 1 under eviction", all(sure(r, stage2, stage1) for r in runs), numbers(stage2, stage1)),
        (
            "restart mode is worse than keeping KV",
            all(sure(r, stage2, restart) for r in runs),
            numbers(stage2, restart),
        ),
        (
            "stage 2 under eviction is as right as the control (less than 2 standard errors below it)",
            not any(sure(r, control, stage2) for r in runs),
            numbers(stage2, control),
        ),
        ("at a peak KV at least 2 times lower", min(peak) >= 2, "; ".join(f"{p:.2f}x" for p in peak)),
        (
            "RL makes good what mementos cost: it beats the control",
            all(sure(r, trained, control) for r in runs),
            numbers(trained, control),
        ),
        ("a block's own memento holds its digit (probe above chance, 10 %)", above("own"), shown("own")),
        ("the next memento, which never saw it, does too", above("next"), shown("next")),
        ("so does the one after that", above("second next"), shown("second next")),
        ("the memento before it does not", not above("before"), shown("before")),
    ]


def plot(runs: list[dict[str, Any]], names: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    rows = [name for engine in MODES.values() for name in engine]
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        height = 0.8 / len(runs)
        places = [r + i * height for r in range(len(rows))]
        values = [run["rows"][row]["accuracy"] for row in rows]
        errors = [run["rows"][row]["stderr"] for row in rows]
        left.barh(places, values, height, xerr=errors, label=name)
        found = run["probe"]["accuracy"]
        right.plot(range(len(found)), list(found.values()), marker="o", label=name)
        right.set_xticks(range(len(found)), list(found))
    for n, row in enumerate(rows):
        points = [(run["rows"][row]["peak_kv_tokens"], run["rows"][row]["accuracy"]) for run in runs]
        middle.scatter(*zip(*points, strict=True), label=row, color=pyplot.get_cmap("tab10")(n), marker="osD^"[n % 4])
    left.set_yticks([r + 0.4 - 0.4 / len(runs) for r in range(len(rows))], rows, fontsize=8)
    left.invert_yaxis()
    left.set_title("accuracy")
    middle.set_title("accuracy against peak KV (tokens)")
    middle.set_ylim(top=1.0)
    middle.legend(fontsize=7, frameon=False, ncols=2, loc="upper center")
    right.axhline(0.1, color="grey", linestyle="--", linewidth=1)
    right.set_title("probe for a digit of an evicted block, by memento")
    right.set_ylim(0, 1)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished quickstarts, one a seed")
    parser.add_argument("--out", type=Path, help="folder for baselines.json and baselines.png")
    parser.add_argument("--problems", type=int, default=400, help="held-out problems")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--traces", type=int, default=2000, help="traces for the probe")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is not None:
        folder = args.runs[0]
        seed = int(json.loads((folder / "results.json").read_text()).get("seed", 0))
        if args.part == "probe":
            found = probe(folder, args.traces, seed)
        else:
            found = generate(folder, args.part, args.problems, args.temperature, seed)
        print("RESULT " + json.dumps(found))
        return
    if args.out is None:
        parser.error("--out is needed")
    for folder in args.runs:
        for model in ("stage1", "stage2", "control", "rl"):
            if not (folder / model / "hf" / "config.json").is_file():
                parser.error(f"{folder} is no finished quickstart: it has no {model}/hf")
    args.out.mkdir(parents=True, exist_ok=True)
    names = [folder.name for folder in args.runs]
    runs = [measure(args, folder) for folder in args.runs]
    found = verdicts(runs)
    for name, run in zip(names, runs, strict=True):
        print(f"\n{name}, {args.problems} problems at temperature {args.temperature:g}")
        print(f"  {'':<28}{'accuracy':>16}{'peak KV':>10}{'tokens':>10}")
        for row, values in run["rows"].items():
            accuracy = f"{100 * values['accuracy']:.1f} ± {100 * values['stderr']:.1f}"
            print(f"  {row:<28}{accuracy:>16}{values['peak_kv_tokens']:>10.0f}{values['tokens']:>10.0f}")
        p = run["probe"]
        shown = ", ".join(f"{place} {100 * value:.1f} %" for place, value in p["accuracy"].items())
        print(f"  probe ({p['tested']} traces, chance 10 ± {100 * p['stderr']:.1f} %): {shown}")
    print("\nDoes it show?")
    for phenomenon, shows, values in found:
        print(f"  {'yes' if shows else 'NO ':<4} {phenomenon}: {values}")
    result = {"command": sys.argv, "runs": dict(zip(names, runs, strict=True)), "verdicts": found}
    (args.out / "baselines.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(runs, names, args.out / "baselines.png")
    print(f"\n{args.out / 'baselines.json'}, {args.out / 'baselines.png'}")


if __name__ == "__main__":
    main()
