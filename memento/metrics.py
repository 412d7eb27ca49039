"""Every metric that a run logs: unit, meaning, healthy range. ``docs/metrics.md`` is this table, printed.

    memento reference metrics > docs/metrics.md

`find` looks a logged name up; the tests hold finished runs against the table in both directions, so a metric that is
not described here, or one that is described and not logged, fails them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

When = Literal["step", "eval", "sft", "some"]
"""In which lines of metrics.jsonl a metric stands: each RL step, each evaluation, each SFT report, or under a condition
that its `only` names."""

Summary = Literal["last", "max", "min", "mean"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: as logged; ``*`` stands for any text without a slash.
        unit: of the number; ``1`` for ratios and fractions.
        meaning: what it is, with its formula.
        healthy: what a good run shows, or when to look closer.
        when: the lines it stands in.
        only: the condition of ``when: some``.
        summary: which of a run's values stands for it in a table of runs.
    """

    name: str
    unit: str
    meaning: str
    healthy: str = ""
    when: When = "step"
    only: str = ""
    summary: Summary = "last"

    def __post_init__(self) -> None:
        if bool(self.only) != (self.when == "some"):
            raise ValueError(f"{self.name}: `only` belongs to when: some, and to nothing else")


SECTIONS: dict[str, tuple[str, tuple[Metric, ...]]] = {
    "reward": (
        "The verifiers' scores of the step's completions.",
        (
            Metric("reward/mean", "score", "mean score of all completions that have one", "rises", summary="max"),
            Metric(
                "reward/std",
                "score",
                "standard deviation of these scores (ddof 1)",
                "above 0; near 0 nothing is left to learn",
            ),
            Metric(
                "reward/zero_std_fraction",
                "1",
                "groups whose scores are all equal, over complete groups: they have no advantage and train nothing",
                "below 0.5; otherwise problems are too easy or too hard, see `algorithm.dynamic_sampling`",
            ),
            Metric(
                "reward/kl_mean",
                "nats",
                "KL(policy || reference) of a whole completion, mean",
                "slowly rising",
                "some",
                "`algorithm.kl_in: reward`",
            ),
            Metric(
                "reward/part/*",
                "score",
                "mean of one part of the scores: the verifier's own (math, code, tests_passed, choice), and each of "
                "`rewards.terms` before its weight",
                "",
                "some",
                "a completion whose result has that part",
            ),
            Metric("outcome/correct", "1", "fraction of completions judged correct", "rises"),
            Metric("outcome/wrong", "1", "fraction judged wrong"),
            Metric(
                "outcome/unparsable",
                "1",
                "fraction without an answer that can be read",
                "falls towards 0; a rise is a change of format",
            ),
            Metric("outcome/timeout", "1", "fraction that could not be verified in time", "below 0.01"),
            Metric(
                "outcome/verifier_error",
                "1",
                "fraction whose verifier failed: no score, the whole group is left out",
                "0",
            ),
        ),
    ),
    "length": (
        "Tokens of prompts and completions.",
        (
            Metric("length/prompt_mean", "tokens", "mean prompt"),
            Metric("length/completion_mean", "tokens", "mean completion, forced tokens and end token included"),
            Metric("length/completion_max", "tokens", "longest completion of the step"),
            Metric(
                "length/truncated_fraction",
                "1",
                "completions that ended at `sampling.max_tokens` (by finish reason, not by length)",
                "below 0.1; see `algorithm.mask_truncated`",
            ),
        ),
    ),
    "memento": (
        "What the model writes. Accuracy as the only reward lets blocks drift, which no reward curve shows.",
        (
            Metric("memento/blocks_per_trace", "blocks", "complete blocks (block and memento) of a completion, mean"),
            Metric(
                "memento/block_tokens",
                "tokens",
                "mean content of a complete block, delimiters excluded",
                "steady; a rise is block drift, see `format.max_block_tokens`",
                "some",
                "a step with at least one complete block",
            ),
            Metric(
                "memento/memento_tokens",
                "tokens",
                "mean content of a memento, delimiters excluded",
                "steady",
                "some",
                "a step with at least one complete block",
            ),
            Metric(
                "memento/compression",
                "1",
                "block tokens over memento tokens, both summed over all complete blocks",
                "5 to 7 in published traces",
                "some",
                "a step with at least one memento token",
            ),
            Metric(
                "memento/malformed_rate",
                "1",
                "completions with a delimiter out of order, or ended (not truncated) inside a block",
                "below 0.05",
            ),
            Metric(
                "memento/forced_rate",
                "1",
                "completions in which the block cap wrote a token",
                "0 without a cap; with one, falling",
            ),
        ),
    ),
    "kv": (
        "What eviction saves, from what the engines report.",
        (
            Metric("kv/peak_tokens", "tokens", "largest number of resident tokens of a completion, mean"),
            Metric(
                "kv/peak_ratio",
                "1",
                "peak of the same tokens without eviction over the peak with it (of the sums over completions)",
                "above 1; 1 means that nothing is evicted",
                summary="last",
            ),
            Metric(
                "kv/area_ratio",
                "1",
                "the same for KV-AUC, resident tokens summed over generated tokens",
                "above 1",
            ),
            Metric(
                "preemptions",
                "count",
                "times an engine dropped and replayed one of the step's completions",
                "0; otherwise lower `rollout.max_num_seqs` or give the pool more memory",
            ),
        ),
    ),
    "lag": (
        "How old the step's groups are.",
        (
            Metric("lag/mean", "steps", "weight version that trains minus the oldest that sampled a completion, mean"),
            Metric("lag/max", "steps", "its maximum", "at most `max_lag`"),
            Metric("groups/stale", "groups", "dropped since the last step: older than `max_lag`", "near 0"),
            Metric("groups/incomplete", "groups", "dropped: a completion has no score", "0"),
            Metric("groups/failed", "groups", "dropped: generation or verification raised", "0"),
            Metric("groups/filtered", "groups", "dropped by dynamic sampling: equal scores"),
            Metric("groups/pending", "groups", "admitted and not yet trained, after the step"),
        ),
    ),
    "train": (
        "The optimiser steps of the learner. Means are over the step's loss tokens unless it says otherwise.",
        (
            Metric("train/loss", "1", "the loss, mean over minibatches", "no trend: it is no measure of progress"),
            Metric(
                "train/grad_norm",
                "1",
                "norm of the gradient before clipping, mean over minibatches",
                "no sudden rise; mostly below `learner.max_grad_norm`",
            ),
            Metric("train/lr", "1", "learning rate of the last optimiser step"),
            Metric(
                "train/entropy",
                "nats",
                "entropy of the policy at each loss token, mean",
                "falls slowly; a fall to 0 within few steps is collapse",
            ),
            Metric(
                "train/kl_reference",
                "nats",
                "KL(policy || reference), k3 estimate, mean",
                "slowly rising",
                "some",
                "`algorithm.kl_coef` above 0 and `kl_in: loss`",
            ),
            Metric("train/loss_tokens", "tokens", "tokens in the loss: sampled, not masked, over all ranks"),
            Metric("train/optimizer_steps", "steps", "optimiser steps since the start of the run"),
            Metric("train/skipped_minibatches", "count", "minibatches without a single loss token", "0"),
            Metric(
                "ratio/min",
                "1",
                "smallest importance ratio, current over proximal policy; 1 in the first minibatch",
                "above 0.1",
            ),
            Metric("ratio/mean", "1", "its mean", "0.99 to 1.01"),
            Metric("ratio/max", "1", "its maximum", "below 10"),
            Metric("clip/low_fraction", "1", "loss tokens whose ratio is clipped from below", "below 0.1"),
            Metric("clip/high_fraction", "1", "loss tokens whose ratio is clipped from above", "below 0.1"),
            Metric("advantage/min", "1", "smallest advantage of a loss token", "-5 to 0"),
            Metric("advantage/mean", "1", "mean advantage of a loss token", "near 0; not 0 where lengths differ"),
            Metric("advantage/max", "1", "largest advantage of a loss token", "0 to 5"),
        ),
    ),
    "mismatch": (
        "The engines against the learner, on the tokens that were sampled and under the weights before the step. "
        "They run different kernels under the same rule of what is visible; more than rounding is a fault.",
        (
            Metric(
                "mismatch/kl_mean",
                "nats",
                "KL(sampler || learner), k3 estimate `exp(d) - 1 - d` with d = learner - sampler, mean",
                "fp32: below 1e-9; bf16: below 1e-2. `algorithm.mismatch_kl_limit` stops the run",
                summary="max",
            ),
            Metric("mismatch/kl_max", "nats", "its maximum over tokens", "a few times above the mean's order"),
            Metric(
                "mismatch/max_abs_logprob_diff",
                "nats",
                "largest |learner - sampler| over tokens",
                "fp32: below 5e-4; a wrong mask shows as 0.1 or more",
                summary="max",
            ),
            Metric("mismatch/ratio_min", "1", "smallest ratio learner / sampler of a token", "near 1"),
            Metric("mismatch/ratio_mean", "1", "its mean", "0.99 to 1.01"),
            Metric("mismatch/ratio_max", "1", "its maximum", "near 1; bf16: below 10"),
            Metric(
                "mismatch/weight_mean",
                "1",
                "weight of the sampler correction, mean over loss tokens",
                "0.99 to 1.01",
                "some",
                "a sampler correction or mask is on (the default)",
            ),
            Metric(
                "mismatch/capped_fraction",
                "1",
                "loss tokens whose correction reached `algorithm.sampler_correction_cap`",
                "below 0.01",
                "some",
                "`algorithm.sampler_correction` is tis or sequence_tis",
            ),
            Metric(
                "mismatch/masked_fraction",
                "1",
                "loss tokens that the correction or mask left out",
                "below 0.05",
                "some",
                "`algorithm.sampler_mask_range` is set",
            ),
        ),
    ),
    "verifier": (
        "The verifiers, over the time since the step before. Evaluations count too.",
        (
            Metric("verifier/samples_per_s", "1/s", "verdicts over wall time"),
            Metric("verifier/p50_s", "s", "median seconds of a verdict", "", "some", "at least one verdict"),
            Metric(
                "verifier/p99_s", "s", "99th percentile", "below `rewards.timeout_s`", "some", "at least one verdict"
            ),
            Metric("verifier/correct", "count", "verdicts by outcome"),
            Metric("verifier/wrong", "count", "the same"),
            Metric("verifier/unparsable", "count", "completions without an answer that can be read"),
            Metric("verifier/timeout", "count", "not verified in time", "near 0"),
            Metric("verifier/verifier_error", "count", "the verifier failed: no score", "0"),
            Metric("verifier/restarts", "count", "workers that were started again", "0"),
            Metric("verifier/retries", "count", "verifications that were tried again", "0"),
            Metric("verifier/timeouts", "count", "workers that were killed at their deadline", "near 0"),
            Metric("verifier/recycled", "count", "workers renewed after their share of jobs"),
            Metric("verifier/pending", "groups", "inside the pool when the step was logged"),
            Metric("verifier/waiting", "groups", "callers that wait for a full pool", "0"),
        ),
    ),
    "engine": (
        "The vLLM engines, over the time since the step before.",
        (
            Metric("engine/tokens_per_s", "tokens/s", "completion tokens of all engines over wall time"),
            Metric("engine/busy_tokens_per_s", "tokens/s", "of one engine while it works"),
            Metric(
                "engine/busy_fraction",
                "1",
                "time inside engine steps over wall time, mean over engines",
                "near 1 with `max_lag` above 0; otherwise the rollout's share of a step",
            ),
            Metric("engine/running", "completions", "waiting or running when the step was logged"),
            Metric("engine/preemptions", "count", "preemptions of completions that finished", "0"),
            Metric("engine/ready", "engines", "that take work", "`rollout.engines`"),
            Metric("engine/restarts", "count", "engines that Ray started again, since the start of the run", "0"),
            Metric("engine/requeued", "count", "parts of groups given to another engine, since the start", "0"),
            Metric("engine/timeouts", "count", "parts without an answer in `rollout.request_timeout_s`", "0"),
            Metric("engine/hung", "count", "engines killed because they made no step, since the start", "0"),
            Metric("engine/dropped", "count", "parts given up after four attempts, since the start", "0"),
            Metric("engine/version", "steps", "weight version that every ready engine holds", "the step"),
        ),
    ),
    "seconds": (
        "Where a step's time goes. Phases of the loop do not overlap; rollouts that run ahead do not count.",
        (
            Metric("seconds/step", "s", "wall time since the line before"),
            Metric("seconds/rollout", "s", "waiting for enough scored groups"),
            Metric("seconds/batch", "s", "advantages and packing"),
            Metric("seconds/train", "s", "the learner's step"),
            Metric("seconds/sync", "s", "new weights to the engines"),
            Metric("seconds/start", "s", "engines, learner and verifiers coming up", "", "some", "the first line"),
            Metric("seconds/eval", "s", "evaluation on held-out problems", "", "some", "lines with an evaluation"),
            Metric("seconds/checkpoint", "s", "the checkpoint after the step before", "", "some", "after a checkpoint"),
            Metric("learner/seconds", "s", "the learner's step, as the learner sees it"),
            Metric("learner/tokens_per_s", "tokens/s", "packed tokens, prompts included, over `learner/seconds`"),
            Metric("sync/seconds", "s", "gathering and writing the weights"),
            Metric("sync/mib", "MiB", "size of the weights"),
            Metric("sync/gb_per_s", "GB/s", "their size over all of `seconds/sync`, engines included"),
            Metric("step/tokens_per_s", "tokens/s", "completion tokens trained, over rollout, training and sync"),
            Metric(
                "idle/learner", "1", "part of that time in which the learner does not train", "lower with `max_lag`"
            ),
            Metric("memory/driver_rss_mib", "MiB", "host memory of the driver's process", "does not grow"),
            Metric("memory/learner_rss_mib", "MiB", "host memory of the largest learner rank", "does not grow"),
        ),
    ),
    "eval": (
        "Held-out problems, sampled by the engines under eviction with the settings of `eval`: before the first step, "
        "every `eval.interval` steps and after the last one.",
        (
            Metric(
                "eval/accuracy", "1", "pass@1: mean over samples, then over problems", "rises", "eval", summary="max"
            ),
            Metric(
                "eval/accuracy_stderr",
                "1",
                "its standard error over problems (standard deviation / sqrt(problems))",
                "differences below 2 standard errors say nothing",
                "some",
                "an evaluation of at least two problems",
            ),
            Metric(
                "eval/pass_at_*",
                "1",
                "unbiased pass@k, 1 - C(n - c, k) / C(n, k), k = `eval.samples`",
                "",
                "some",
                "an evaluation with a problem of so many scored samples",
            ),
            Metric("eval/maj_at_*", "1", "accuracy of the majority answer, ties broken uniformly", when="eval"),
            Metric("eval/reward", "score", "mean score", when="eval"),
            Metric("eval/excluded", "completions", "without a score, left out of every accuracy", "0", "eval"),
            Metric("eval/kv_peak_tokens", "tokens", "peak of resident tokens, mean", when="eval"),
            Metric(
                "eval/part/*",
                "score",
                "mean of one part of the scores, as `reward/part/*`",
                "",
                "some",
                "a completion whose result has that part",
            ),
            Metric("eval/kv_peak_ratio", "1", "as `kv/peak_ratio`, computed from the tokens", "above 1", "eval"),
            Metric("eval/kv_area_ratio", "1", "as `kv/area_ratio`, computed from the tokens", "above 1", "eval"),
            Metric("eval/blocks_per_trace", "blocks", "complete blocks of a completion, mean", when="eval"),
            Metric("eval/block_tokens", "tokens", "mean content of a block", "", "some", "at least one complete block"),
            Metric("eval/longest_block_tokens", "tokens", "longest block", "", "some", "at least one complete block"),
            Metric(
                "eval/memento_tokens", "tokens", "mean content of a memento", "", "some", "at least one complete block"
            ),
            Metric("eval/compression", "1", "block over memento tokens", "", "some", "at least one memento token"),
            Metric("eval/completion_tokens", "tokens", "mean completion", when="eval"),
            Metric("eval/malformed_rate", "1", "as `memento/malformed_rate`", "below 0.05", "eval"),
            Metric("eval/truncation_rate", "1", "completions that ended at the length limit", "below 0.1", "eval"),
            Metric("eval/forced_blocks_per_trace", "blocks", "blocks that the cap closed", "", "eval"),
            Metric("eval/seconds", "s", "wall time of the evaluation", when="eval"),
        ),
    ),
    "sft": (
        "SFT stages, every `logging_steps` steps. Their `train/loss`, `train/grad_norm`, `train/lr`, `train/entropy` "
        "and `seconds/step` are those of TRL's trainer, means since the line before.",
        (
            Metric(
                "train/loss", "nats", "mean loss of a completion token", "falls; stage 2 starts a little higher", "sft"
            ),
            Metric(
                "train/grad_norm",
                "1",
                "norm of the gradient before clipping",
                "no sudden rise",
                "some",
                "`zero_stage` above 0: without ZeRO, DeepSpeed reports none",
            ),
            Metric("train/lr", "1", "learning rate", when="sft"),
            Metric("train/entropy", "nats", "entropy of the model at each token, mean", "falls", "sft"),
            Metric("train/token_accuracy", "1", "tokens that are the model's most likely one", "rises", "sft"),
            Metric("train/tokens", "tokens", "trained on so far", when="sft"),
            Metric("loss/block", "nats", "mean loss of block tokens", "falls", "some", "traces with blocks"),
            Metric(
                "loss/memento",
                "nats",
                "mean loss of memento tokens",
                "falls; in stage 2 no more than a little above stage 1",
                "some",
                "traces with blocks",
            ),
            Metric(
                "loss/delimiter", "nats", "mean loss of the four delimiters", "below 0.1", "some", "traces with blocks"
            ),
            Metric("loss/answer", "nats", "mean loss of everything else of a completion", "falls", "sft"),
            Metric("seconds/step", "s", "wall time since the line before", when="sft"),
        ),
    ),
}
"""Section -> what it is about, and its metrics."""

METRICS: tuple[Metric, ...] = tuple(metric for _, metrics in SECTIONS.values() for metric in metrics)


def find(name: str) -> Metric | None:
    """The metric of a logged name, or None."""
    return next((metric for metric in METRICS if fnmatchcase(name, metric.name)), None)


def undocumented(names: Iterable[str]) -> list[str]:
    """Those of `names` that the table lacks; ``step`` is the axis and no metric."""
    return sorted({name for name in names if name != "step" and find(name) is None})


def missing(names: Iterable[str], when: When) -> list[str]:
    """Metrics of every line of this kind that `names` lacks."""
    names = list(names)
    return [m.name for m in METRICS if m.when == when and not any(fnmatchcase(name, m.name) for name in names)]


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)`` for a misspelt name, or the names there are."""
    known = sorted(set(known))
    if close := get_close_matches(name, known, n=1, cutoff=0.4):
        return f" (did you mean {close[0]}?)"
    return f" (there are: {', '.join(known)})" if known else ""


INTRODUCTION = """\
# Metrics

Printed by `memento reference metrics`; a test holds it against finished runs.

Every line of a run's `metrics.jsonl` is one step: `{"step": 12, "reward/mean": 0.41, ...}`. W&B and TensorBoard get the
same names; the part before the slash is the section of the panel, and `step` is the axis of all of them: RL steps in an
RL run, optimiser steps in an SFT stage. A number that is not finite is null in `metrics.jsonl`, and a mean over nothing
is left out: a failure is never a number. Where a step's numbers come from, in the code: `rl/metrics.py` (rollouts),
`rl/learner.py` (learner), `rollout/pool.py` (engines), `rl/evaluate.py` (evaluation), `memento/run.py` (seconds).

Healthy ranges are rules of thumb: a value outside of them is a reason to look, not a verdict.

In a table of runs, W&B shows the last value of a metric; of `reward/mean`, `eval/accuracy` and the mismatch the
largest.
"""

TITLES = {
    "reward": "Reward",
    "length": "Length",
    "memento": "Blocks and mementos",
    "kv": "KV cache",
    "lag": "Lag and dropped groups",
    "train": "Learner",
    "mismatch": "Mismatch of engine and learner",
    "verifier": "Verifiers",
    "engine": "Engines",
    "seconds": "Seconds",
    "eval": "Evaluation",
    "sft": "SFT",
}


def metrics_reference() -> str:
    """``docs/metrics.md``."""
    parts = [INTRODUCTION]
    for section, (about, metrics) in SECTIONS.items():
        parts.append(f"\n## {TITLES[section]}\n\n{about}\n")
        parts.append("| metric | unit | what it is | healthy |\n|---|---|---|---|")
        for m in metrics:
            condition = f" Only: {m.only}." if m.only else ""
            parts.append(f"| `{m.name}` | {m.unit} | {_sentence(m.meaning)}{condition} | {m.healthy} |")
    return "\n".join(parts) + "\n"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].replace("|", "\\|") + "."
