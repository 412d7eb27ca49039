"""The command line. Every command imports what it needs when it runs, so that `memento --help` answers at once.

Exit codes: 0 done, 1 failed, 2 bad usage or input (one paragraph on stderr, nothing started or overwritten), 128 + n
after signal n (the run can be resumed).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import memento
from memento.errors import RunFailed, UserError, disk_is_full, full_disk_message

if TYPE_CHECKING:
    from rich.console import Console

    from memento.config import Config, RlConfig
    from memento.problems import Problem

app = typer.Typer(
    name="memento",
    help="Reinforcement learning with compressed reasoning.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, e.g. configs/rl/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="a.b=c", help="Dotted overrides, e.g. learner.lr=1e-4 steps=100.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on in the run folder from its newest checkpoint.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face folder or hub id.")]
Problems = Annotated[
    str,
    typer.Option("--problems", help="File or folder (JSONL, JSON, Parquet, CSV), known set (gsm8k, aime25) or hub id."),
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Completions of each problem.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many problems.")]
Evict = Annotated[bool, typer.Option("--evict/--no-evict", help="Evict finished blocks, or use full attention.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same completions.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0)]
TopK = Annotated[int, typer.Option("--top-k", min=-1, help="-1 for all tokens.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Completion tokens, at most.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of rollout, format, rewards or problems, e.g. rollout.engines=2. Repeatable.",
    ),
]


def _console() -> Console:
    from rich.console import Console

    return Console()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(memento.__version__)
        raise typer.Exit


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Folder for models, runs, results and the report.")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Of the model, the data and the sampling.")] = 0,
    size: Annotated[str, typer.Option("--size", help="full, or small: the same path on shorter problems.")] = "full",
    resume: Annotated[bool, typer.Option("--resume", help="Skip the phases that are done.")] = False,
) -> None:
    """The whole pipeline on this machine: SFT stages 1 and 2, RL, evaluation, export.

    Needs two CPU cores and no GPU; prints the result table and writes report.html.

    Example: `memento quickstart --out runs/quickstart --seed 0`
    """
    from memento.quickstart import PhaseFailed, run_quickstart

    try:
        run_quickstart(out, seed=seed, size=size, resume=resume)
    except PhaseFailed as error:
        typer.echo(f"error: {error}. Fix it and go on with: memento quickstart --out {out} --resume", err=True)
        raise typer.Exit(error.code if error.code in (2, 130, 143) else 1) from error


@app.command()
def sft(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """One SFT stage; the model is left in OUT/hf.

    Example: `memento sft configs/sft/quickstart_stage1.yaml out=runs/stage1 seed=1`
    """
    from memento.sft.train import main as train

    raise typer.Exit(train(_argv(config, overrides, resume)))


@app.command()
def rl(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """An RL run; metrics, rollouts and checkpoints are left in OUT, the model in OUT/hf.

    The same as `python -m memento.rl.train`, which is what `ray job submit` takes.

    Example: `memento rl configs/rl/quickstart.yaml model=runs/quickstart/stage2/hf out=runs/rl learner.lr=1e-4`
    """
    from memento.rl.train import main as train

    raise typer.Exit(train(_argv(config, overrides, resume)))


@app.command()
def replay(
    config: ConfigFile,
    rollouts: Annotated[Path, typer.Option("--rollouts", help="Scored groups, e.g. a run's rollouts.jsonl.")],
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Train on recorded rollouts, with no engine: the learner alone.

    A run's own rollouts, on the model it started from, give its losses again.

    Example: `memento replay runs/rl/config.yaml --rollouts runs/rl/rollouts.jsonl out=runs/again`
    """
    from memento.rl.replay import replay as train

    train(_rl_config(config, overrides), rollouts, resume=resume)


@app.command()
def record(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """The rollouts and rewards of an RL run without its learner, for `memento replay`.

    Example: `memento record configs/rl/quickstart.yaml model=runs/quickstart/stage2/hf out=runs/recorded steps=4`
    """
    from memento.rl.replay import record as run

    run(_rl_config(config, overrides), resume=resume)


@app.command()
def drift(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="How many.")] = 3,
) -> None:
    """The whole loop at learning rate 0: no weight may move, and engine and learner must agree. Exit code 1 if not.

    Example: `memento drift configs/rl/quickstart.yaml model=runs/quickstart/stage2/hf out=runs/drift groups_per_step=4`
    """
    from memento.rl.replay import drift as check
    from memento.rl.replay import drift_table

    report = check(_rl_config(config, overrides), steps)
    for line in drift_table(report):
        typer.echo(line)
    for fault in report.faults:
        typer.echo(f"failed: {fault}", err=True)
    if report.faults:
        raise typer.Exit(1)


@app.command()
def evaluate(
    model: Model,
    problems: Problems,
    samples: Samples = 1,
    evict: Evict = True,
    restart: Annotated[
        bool, typer.Option("--restart", help="Ablation: kept tokens are computed again without the evicted block.")
    ] = False,
    limit: Limit = None,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    top_k: TopK = 20,
    max_tokens: MaxTokens = 31_744,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Write the result as JSON here.")] = None,
    trajectories: Annotated[
        Path | None, typer.Option("--trajectories", help="Keep the scored groups as JSONL, for `memento view`.")
    ] = None,
    settings: Set = None,
) -> None:
    """Accuracy (pass@1, pass@k, maj@k) and what the KV cache costs: peak, area, compression.

    Interrupted, it goes on where it was when the same command is given again with --out or --trajectories.

    Example: `memento evaluate runs/rl/hf --problems held_out.jsonl --samples 4 --out result.json`
    """
    from memento.rl.evaluate import evaluate_model, result_table
    from memento.run import replace_text
    from memento.trajectory import SamplingParams

    _refuse_existing(out)
    if restart and not evict:
        raise UserError("--restart changes what an eviction does, and --no-evict leaves none: choose one of the two.")
    tasks = _load(problems, limit, settings)
    sampling = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens)
    engine = _engine_config(settings)
    result = evaluate_model(
        model,
        tasks,
        sampling,
        samples=samples,
        seed=seed,
        evict=evict,
        rollout=engine.rollout.model_copy(update={"restart": True}) if restart else engine.rollout,
        fmt=engine.format,
        rewards=engine.rewards,
        trajectories=trajectories,
        resume_file=out.with_name(out.name + ".partial.jsonl") if out is not None else None,
    )
    _console().print(result_table(result))
    if out is not None:
        replace_text(out, result.model_dump_json(indent=2) + "\n")


@app.command()
def generate(
    model: Model,
    problems: Problems,
    out: Annotated[Path, typer.Option("--out", help="JSONL of trajectories to write.")],
    samples: Samples = 1,
    evict: Evict = True,
    limit: Limit = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = -1,
    max_tokens: MaxTokens = 31_744,
    seed: Seed = 0,
    settings: Set = None,
) -> None:
    """Sample completions to a JSONL file, with log-probabilities, evictions and KV statistics; no learner.

    Run again, it generates only what the file lacks.

    Example: `memento generate runs/rl/hf --problems held_out.jsonl --samples 8 --out rollouts.jsonl`
    """
    from memento.rollout.generate import generate_file
    from memento.trajectory import SamplingParams

    tasks = _load(problems, limit, settings, verify=False)
    sampling = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens)
    engine = _engine_config(settings)
    result = generate_file(
        model,
        tasks,
        samples,
        out,
        sampling,
        rollout=engine.rollout.model_copy(update={"evict": evict}),
        format=engine.format,
        seed=seed,
    )
    before = f", {result.skipped} were there" if result.skipped else ""
    typer.echo(f"{result.generated} trajectories, {result.tokens:,} tokens, {result.seconds:.1f} s{before}: {out}")


@app.command()
def score(
    trajectories: Annotated[Path, typer.Argument(help="JSONL of `memento generate`, or a run's rollouts.jsonl.")],
    problems: Problems,
    out: Annotated[Path | None, typer.Option("--out", help="Write scored groups as JSONL here.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Folder or hub id with the delimiters, for format terms.")
    ] = None,
    settings: Set = None,
) -> None:
    """Rewards for recorded completions, by the verifier of each problem or as `rewards.terms` says.

    Example: `memento score rollouts.jsonl --problems held_out.jsonl --out scored.jsonl`
    """
    from collections import Counter

    from memento.preflight import load_tokenizer
    from memento.rewards.format_terms import trace_shape
    from memento.rewards.scoring import Scorer, check_terms, score_all
    from memento.trajectory import ScoredGroup, Trajectory, append_jsonl, read_trajectories

    _refuse_existing(out)
    config = _engine_config(settings)
    check_terms(config.rewards)
    fmt = config.format.bind(load_tokenizer(model)) if model is not None else None
    by_id = {problem.id: problem for problem in _load(problems, None, settings)}
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in read_trajectories(trajectories):
        if trajectory.problem_id not in by_id:
            raise UserError(
                f"{trajectories} holds a completion of problem {trajectory.problem_id!r}, which is not in {problems}."
            )
        groups.setdefault(trajectory.group_id, []).append(trajectory)
    if not groups:
        raise UserError(f"{trajectories} holds no trajectories.")
    outcomes: Counter[str] = Counter()
    scores: list[float] = []
    scorer = Scorer(config.rewards)
    for members in _progress(list(groups.values()), "scoring"):
        problem = by_id[members[0].problem_id]
        shapes = [trace_shape(member, fmt) for member in members] if fmt is not None else None
        rewards = score_all(problem, [member.text for member in members], scorer, shapes)
        outcomes.update(reward.outcome.value for reward in rewards)
        scores += [reward.score for reward in rewards if reward.score is not None]
        if out is not None:
            group = ScoredGroup(problem=problem, trajectories=tuple(members), rewards=tuple(rewards))
            append_jsonl([group], out)
    scorer.close()
    total = sum(outcomes.values())
    mean = f"mean score {sum(scores) / len(scores):.4f}" if scores else "no completion has a score"
    typer.echo(f"{total} completions of {len(groups)} groups: {mean}")
    for outcome, count in outcomes.most_common():
        typer.echo(f"  {outcome:<15}{count:>7}  {100 * count / total:5.1f} %")


@app.command()
def view(
    file: Annotated[Path, typer.Argument(help="JSONL of trajectories, e.g. a run's rollouts.jsonl.")],
    index: Annotated[int, typer.Option("--index", help="Which one, from 0; negative counts from the end.")] = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Write a self-contained page instead.")] = None,
    model: Annotated[Path | None, typer.Option("--model", help="Folder with the tokenizer.")] = None,
) -> None:
    """One trajectory: blocks, mementos, evictions, the KV sawtooth, the reward.

    Example: `memento view runs/rl/rollouts.jsonl --index 3 --html trace.html`
    """
    from memento.view import view_file

    view_file(file, _console(), index, html, model)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of an RL run.")],
    out: Annotated[Path, typer.Option("--out", help="The Hugging Face folder to write.")],
    step: Annotated[int | None, typer.Option("--step", min=0, help="This checkpoint, not the finished model.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16. Default: the learner's.")
    ] = None,
    shard_gb: Annotated[float, typer.Option("--shard-gb", min=0.001, help="Largest safetensors file.")] = 5.0,
) -> None:
    """A plain Hugging Face folder that transformers and vLLM load: weights, tokenizer, chat template, model card.

    Example: `memento export runs/rl --out models/my-memento`
    """
    from memento.rl.export import export_run

    typer.echo(f"model: {export_run(run, out, step, dtype=dtype, shard_gb=shard_gb)}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An exported model.")],
    to: Annotated[str, typer.Option("--to", metavar="ORG/NAME", help="The repository on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="A new repository is private otherwise.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Also to a repository that holds files already.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list only; no network.")] = False,
) -> None:
    """Send an exported model to the Hugging Face hub, as one commit. It is checked first.

    Example: `memento push models/my-memento --to my-organisation/my-memento --dry-run`
    """
    from memento.rl.hub import plan_push
    from memento.rl.hub import push as send

    plan = plan_push(folder, to)
    for name, size in plan.files:
        typer.echo(f"{size / 1e6:>12,.2f} MB  {name}")
    typer.echo(f"{plan.total / 1e6:>12,.2f} MB  together, to {to}")
    if not dry_run:
        typer.echo(f"pushed: {send(folder, to, public=public, update=update)}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Model,
    evict_delimiters: Annotated[
        bool, typer.Option("--evict-delimiters/--keep-delimiters", help="As the model was trained (Phi: evict).")
    ] = False,
    keep_last_n: Annotated[int, typer.Option("--keep-last-n", min=-1, help="Completed blocks that stay.")] = 0,
    max_block_tokens: Annotated[int | None, typer.Option("--max-block-tokens", min=1, help="Block cap.")] = None,
) -> None:
    """vLLM's OpenAI-compatible server with eviction. Other flags go to `vllm serve` as they are.

    Example: `memento serve runs/rl/hf --port 8000 --max-model-len 32768`
    """
    from memento.config import FormatConfig
    from memento.preflight import check_model, check_vllm_version, load_tokenizer
    from memento.rollout.serve import serve as run_server

    check_vllm_version()
    check_model(model)
    fmt = FormatConfig(
        evict_delimiters=evict_delimiters, keep_last_n=keep_last_n, max_block_tokens=max_block_tokens
    ).bind(load_tokenizer(model))
    run_server(model, fmt, context.args)


@app.command()
def show(
    config: ConfigFile,
    overrides: Overrides = None,
    like: Annotated[
        str | None, typer.Option("--like", help="Reckon with this model's sizes: a folder, or e.g. Qwen/Qwen3-8B.")
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Reckon with this GPU: A100, H100, H200 or B200.")] = None,
) -> None:
    """The resolved configuration, and what the run will reserve, hold and take. Starts nothing and imports no torch.

    Example: `memento show configs/rl/qwen3_8b.yaml --like Qwen/Qwen3-8B --gpu H100`
    """
    from memento.config import load_config, to_yaml

    resolved = load_config(config / "config.yaml" if config.is_dir() else config, overrides or ())
    console = _console()
    if console.is_terminal:
        from rich.syntax import Syntax

        console.print(Syntax(to_yaml(resolved), "yaml", background_color="default"))
    else:
        typer.echo(to_yaml(resolved))
    for line in _plan(resolved, like, gpu):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def annotate(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Plain traces: JSONL, Parquet, folder or hub id.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for results and journal; run again, it goes on there.")],
    model: Annotated[str, typer.Option("--model", help="The model's name at the endpoint.")],
    base_url: Annotated[
        str | None, typer.Option("--base-url", help="e.g. http://localhost:8000/v1; default: OPENAI_BASE_URL.")
    ] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", help="Default: OPENAI_API_KEY.")] = None,
    limit: Limit = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests at the same time.")] = 32,
    temperature: Temperature = 0.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of one answer, thinking included.")] = 4096,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for one request.")] = 300.0,
    retries: Annotated[int, typer.Option("--retries", min=0, help="After a failure, and after a useless answer.")] = 6,
    backoff: Annotated[float, typer.Option("--backoff", min=0.0, help="First wait in seconds; doubles.")] = 1.0,
    longest_wait: Annotated[float, typer.Option("--longest-wait", min=0.0, help="Seconds.")] = 60.0,
    price_in: Annotated[float, typer.Option("--price-in", help="Dollars a million prompt tokens.")] = 0.0,
    price_out: Annotated[float, typer.Option("--price-out", help="Dollars a million completion tokens.")] = 0.0,
    budget: Annotated[float | None, typer.Option("--budget", help="Stop after so many dollars.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Model whose tokens are counted; default: estimated.")
    ] = None,
    min_block_tokens: Annotated[int, typer.Option("--min-block-tokens", min=1)] = 200,
    variance_weight: Annotated[
        float, typer.Option("--variance-weight", min=0.0, help="How much even block sizes matter.")
    ] = 0.5,
    accept: Annotated[float, typer.Option("--accept", help="Points of 10 from which a memento passes.")] = 8.0,
    rounds: Annotated[int, typer.Option("--rounds", min=0, help="Rounds of feedback, at most.")] = 2,
    require_pass: Annotated[
        bool, typer.Option("--require-pass", help="Leave out traces with a memento that did not pass.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry-failed", help="Also what failed in an earlier run.")] = False,
    body: Annotated[
        str | None, typer.Option("--body", help="JSON object with further fields of every request.")
    ] = None,
) -> None:
    """Cut plain reasoning traces into blocks and write a memento for each, with any OpenAI-compatible endpoint.

    Leaves both OpenMementos schemas (default.jsonl, full.jsonl) and a quality report. Interrupted at any moment, it
    goes on where it was: no request that was answered is sent again.

    Example: `memento annotate traces.jsonl --out annotated --model Qwen3-32B --base-url http://localhost:8000/v1`
    """
    from memento.sft.annotate.command import annotate_file
    from memento.sft.annotate.endpoint import EndpointSettings
    from memento.sft.annotate.mementos import MementoSettings
    from memento.sft.annotate.pipeline import AnnotationSettings

    endpoint = EndpointSettings(
        model=model,
        base_url=base_url,
        api_key=api_key,
        concurrency=concurrency,
        timeout_s=timeout,
        retries=retries,
        backoff_s=backoff,
        longest_wait_s=longest_wait,
        temperature=temperature,
        max_tokens=max_tokens,
        price_in=price_in,
        price_out=price_out,
        budget=budget,
        body=_json_object(body, "--body"),
    )
    settings = AnnotationSettings(
        min_block_tokens=min_block_tokens,
        variance_weight=variance_weight,
        mementos=MementoSettings(accept=accept, rounds=rounds),
        require_pass=require_pass,
        traces_in_flight=max(8, concurrency),
    )
    complete = annotate_file(data, out, endpoint, settings, limit=limit, tokenizer=tokenizer, retry=retry)
    if not complete:
        raise typer.Exit(1)


@app.command()
def inspect(
    data: Annotated[str, typer.Argument(metavar="DATA", help="JSONL, Parquet, folder or hub id (name:subset@split).")],
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Model whose tokens are counted; default: estimated.")
    ] = None,
    limit: Limit = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write histograms to this PNG, SVG or PDF.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the numbers as JSON here.")] = None,
    lenient: Annotated[bool, typer.Option("--lenient", help="As strict_blocks: false.")] = False,
) -> None:
    """What a memento data set holds: blocks, lengths, compression by domain, and what training would drop and why.

    Example: `memento inspect microsoft/OpenMementos --limit 2000 --tokenizer Qwen/Qwen3-8B --plot mementos.png`
    """
    from memento.run import replace_text
    from memento.sft.inspection import inspect_data, plot_inspection, tables

    _refuse_existing(out)
    found = inspect_data(data, tokenizer=tokenizer, limit=limit, strict=not lenient)
    _console().print(tables(found))
    if plot is not None:
        typer.echo(f"plot: {plot_inspection(found, plot)}")
    if out is not None:
        replace_text(out, found.model_dump_json(indent=2, exclude={"values"}) + "\n")


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Also: would this run find what it needs here?")
    ] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Every machine of the Ray cluster, and what must agree between them.")
    ] = False,
) -> None:
    """Check this machine or cluster: versions, GPUs, memory, ports, W&B, the run's files. Exit code 1 for a problem.

    Example: `memento doctor configs/rl/quickstart.yaml`
    """
    from memento.config import load_config
    from memento.doctor import diagnose, diagnose_cluster

    run = load_config(config, overrides or ()) if config is not None else None
    found = diagnose_cluster(run) if cluster else {"": diagnose(run)}
    mark = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}
    from rich.markup import escape
    from rich.table import Table

    for machine, checks in found.items():
        table = Table(show_header=False, box=None, pad_edge=False)
        for check in checks:
            lines = check.found + (f"\n→ {check.fix}" if check.fix else "")
            table.add_row(mark[check.level], escape(check.name), escape(lines))
        if machine:
            _console().rule(f"[bold]{escape(machine)}", align="left")
        _console().print(table)
    if any(check.level == "problem" for checks in found.values() for check in checks):
        raise typer.Exit(1)


@app.command()
def reference(
    page: Annotated[str, typer.Argument(metavar="PAGE", help="config, metrics or picture.")],
) -> None:
    """Print a page of the documentation that is read out of the code: the configuration, the metrics, the picture.

    Example: `memento reference config > docs/configuration.md`
    """
    from memento.reference import REFERENCES

    if page not in REFERENCES:
        raise UserError(f"there is no reference {page!r}; there are {', '.join(REFERENCES)}.")
    typer.echo(REFERENCES[page](), nl=False)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Folders of two runs or more.")],
    metrics: Annotated[
        list[str] | None, typer.Option("--metric", help="This metric (docs/metrics.md). Repeatable.")
    ] = None,
) -> None:
    """Runs side by side: what differs in their configurations, their metrics, accuracy with standard errors.

    Example: `memento compare runs/rl runs/second --metric kv/peak_ratio`
    """
    from memento.compare import comparison

    _console().print(comparison(runs, metrics or ()))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or of a quickstart.")],
) -> None:
    """Write RUN/report.html: curves, tables, a trajectory, the configuration. One file, no server; also while it runs.

    Example: `memento report runs/rl`
    """
    from memento.report import write_report

    typer.echo(f"report: {write_report(run)}")


# ---------------------------------------------------------------------------------------------- inside


def _argv(config: Path, overrides: Sequence[str] | None, resume: bool) -> list[str]:
    return [str(config), *(overrides or ()), *(["--resume"] if resume else [])]


def _rl_config(file: Path, overrides: Sequence[str] | None) -> RlConfig:
    from memento.config import RlConfig, load_config

    config = load_config(file, overrides or ())
    if not isinstance(config, RlConfig):
        raise UserError(f"{file} describes a {config.kind} run, and this command takes an RL run.")
    return config


def _json_object(text: str | None, option: str) -> dict[str, Any]:
    import json

    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise UserError(f"{option} is not JSON ({error.msg} at column {error.colno}): {text}") from error
    if not isinstance(value, dict):
        raise UserError(f"{option} must be a JSON object, got {text}")
    return value


def _refuse_existing(out: Path | None) -> None:
    if out is not None and out.exists():
        raise UserError(f"{out} exists already and is not overwritten; choose another --out.")


def _engine_config(settings: Sequence[str] | None) -> RlConfig:
    """The `rollout`, `format`, `rewards` and `problems` sections as ``--set rollout.engines=2`` change them."""
    from memento.config import RlConfig, override_config

    # Only these sections are read; the rest of the tree just has to be there for the schema.
    base = RlConfig.model_validate({"out": "unused", "model": "unused", "problems": {"path": "unused"}})
    changed = override_config(base, settings or (), "--set")
    assert isinstance(changed, RlConfig)
    return changed


def _load(source: str, limit: int | None, settings: Sequence[str] | None, *, verify: bool = True) -> list[Problem]:
    """The problems of ``--problems``, every gold checked if `verify`; what was left out is said on stderr."""
    from memento.rewards.scoring import load_verified
    from memento.sources import load

    config = _engine_config(settings)
    section = config.problems.model_copy(update={"path": source, "count": limit or config.problems.count})
    loaded = load_verified(section, config.rewards) if verify else load(section)
    if len(loaded.problems) != loaded.read:
        typer.echo(f"{source}: {loaded}", err=True)
    return list(loaded.problems)


def _progress(items: Sequence[Any], what: str) -> Any:
    from rich.console import Console
    from rich.progress import track

    return track(items, what, console=Console(stderr=True), disable=len(items) < 20)


def _plan(config: Config, like: str | None, gpu: str | None) -> list[str]:
    """What a run will reserve, hold and take, as lines for people."""
    from memento.config import RlConfig
    from memento.footprint import plan_lines

    if isinstance(config, RlConfig):
        return list(plan_lines(config, like, gpu))
    from memento.sft_footprint import sft_plan_lines

    return list(sft_plan_lines(config, like, gpu))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except UserError as error:
        # Out of a Ray task it arrives wrapped, with a remote traceback as its text.
        cause = getattr(error, "cause", None)
        typer.echo(f"error: {cause if isinstance(cause, UserError) else error}", err=True)
        sys.exit(2)
    except RunFailed as error:
        typer.echo(f"failed: {error}", err=True)
        sys.exit(1)
    except Exception as error:
        if not disk_is_full(error):
            raise
        typer.echo(full_disk_message(error, "and give the same command again."), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
