"""`memento quickstart`: the whole pipeline on this machine, with the real parts and a model of 0.3 million parameters.

Stage 1 (full attention), stage 2 (memento attention), the SFT-only control, RL under eviction, evaluation of all of
them, export. Each training phase is the command a user would run, in a process of its own::

    python -m memento.sft.train configs/sft/quickstart_stage1.yaml out=DIR/stage1
    python -m memento.rl.train  configs/rl/quickstart.yaml model=DIR/stage2/hf out=DIR/rl

The result table is read from what they leave in DIR: ``eval/*.json``, ``rl/metrics.jsonl``, ``phases.json``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import memento
from memento.arithmetic import SPLITS
from memento.config import ProblemsConfig, RlConfig, load_config
from memento.errors import UserError
from memento.problems import save_problems
from memento.results import (
    ROWS,
    TEMPERATURES,
    QuickstartResults,
    Row,
    Temperature,
    result_table,
    sampling_temperature,
    write_results,
)
from memento.sources import read_problems
from memento.trajectory import SamplingParams, append_jsonl

if TYPE_CHECKING:
    from memento.rollout.weights import WeightUpdate

CONFIGS = Path(memento.__file__).parent / "configs"
"""The shipped configurations, in a checkout and in a wheel alike."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large a quickstart is: which configs it runs, and how much it evaluates."""

    prefix: str
    """``configs/sft/{prefix}_stage1.yaml`` and so on, ``configs/rl/{prefix}.yaml``."""
    problems: int
    """Held-out problems at temperature 1."""
    cool_problems: int
    """Held-out problems at temperature 0.6 and greedy."""


SIZES = {
    "full": Size("quickstart", problems=400, cool_problems=100),
    "small": Size("small", problems=400, cool_problems=100),
}
"""`full` is what the README shows; `small` is the same path on shorter problems, for the test suite."""


class PhaseFailed(RuntimeError):
    """A phase's process ended with an error; its own message is above, and its exit code here."""

    def __init__(self, phase: str, code: int) -> None:
        super().__init__(f"{phase} ended with exit code {code}")
        self.code = code


class Phases:
    """Which phases of a quickstart are done and how long each took, in ``phases.json``: what `--resume` reads."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self.file = folder / "phases.json"
        self.seconds: dict[str, float] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self._before = self.seconds.get("total", 0.0)
        self._started = time.perf_counter()

    def done(self, name: str) -> bool:
        """Whether an earlier run finished this phase."""
        return name in self.seconds

    @contextmanager
    def phase(self, name: str, title: str) -> Iterator[bool]:
        """Time a phase. Yields False when it was done in an earlier run and must be skipped."""
        if self.done(name):
            self.console.print(f"[dim]{title}: done before ({self.seconds[name]:.0f} s)[/dim]")
            yield False
            return
        self.console.rule(f"[bold]{title}", align="left")
        started = time.perf_counter()
        yield True
        self.record(name, time.perf_counter() - started)
        self.console.print(f"[green]{title}: {self.seconds[name]:.0f} s[/green]")

    def record(self, name: str, seconds: float) -> None:
        """Mark a phase as done. ``total`` is wall time over all runs: phases may overlap."""
        self.seconds[name] = round(seconds, 2)
        self.seconds["total"] = round(self._before + time.perf_counter() - self._started, 2)
        aside = self.file.with_suffix(".tmp")
        aside.write_text(json.dumps(self.seconds, indent=2) + "\n")
        os.replace(aside, self.file)


class Training:
    """One training phase in a process of its own: ``python -m module config out=... overrides``.

    Args:
        log: where its output goes; None shows it.
    """

    def __init__(self, module: str, config: Path, out: Path, overrides: Sequence[str], log: Path | None = None) -> None:
        resume = ["--resume"] if (out / "config.yaml").is_file() else []
        command = [sys.executable, "-m", module, str(config), f"out={out}", *overrides, *resume]
        self.name, self.log, self.seconds = f"python -m {module} {config.name}", log, 0.0
        started = time.perf_counter()
        with ExitStack() as files:
            target = files.enter_context(log.open("ab")) if log is not None else None
            self.process = subprocess.Popen(command, stdout=target, stderr=target)

        def watch() -> None:
            self.process.wait()
            self.seconds = time.perf_counter() - started

        self._watcher = threading.Thread(target=watch, daemon=True)
        self._watcher.start()

    def wait(self) -> None:
        """Wait for its end.

        Raises:
            PhaseFailed: it ended with an error.
        """
        self._watcher.join()
        if self.process.returncode != 0:
            if self.log is not None:
                sys.stderr.write("".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-20:]))
            raise PhaseFailed(self.name, self.process.returncode)


@contextmanager
def trainings() -> Iterator[list[Training]]:
    """The trainings that are running; none outlives the block, and each can save what it has when a signal arrives.

    Ctrl-C reaches the processes by itself (one process group), a SIGTERM reaches only us. A process that hears the
    same wish twice leaves without saving, so only the second is passed on.
    """
    running: list[Training] = []

    def forward(number: int, _frame: object = None) -> None:
        for training in running:
            if training.process.poll() is None:
                training.process.send_signal(number)

    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, forward)
    try:
        yield running
    except BaseException as error:
        stopped = isinstance(error, PhaseFailed) and error.code in (128 + signal.SIGINT, 128 + signal.SIGTERM)
        if not stopped:  # one of them failed: the others did not hear of it
            forward(signal.SIGTERM)
        raise
    finally:
        for training in running:
            training.process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def run_quickstart(out: Path, *, seed: int = 0, size: str = "full", resume: bool = False) -> QuickstartResults:
    """Run all phases in `out` and return the result table.

    Args:
        out: the folder; ``results.json``, ``report.html`` and one folder a phase are written there.
        seed: of the model, the data and the sampling.
        size: a key of `SIZES`.
        resume: skip the phases that are done, and go on with the one that was interrupted.

    Raises:
        UserError: `out` is not empty and `resume` is false, or an unknown size.
        PhaseFailed: a phase's process failed.
    """
    if size not in SIZES:
        raise UserError(f"--size must be one of {', '.join(SIZES)}, got {size!r}.")
    if out.exists() and any(out.iterdir()) and not resume:
        raise UserError(f"{out} is not empty. Take another --out, or go on with what is there: --resume.")
    out.mkdir(parents=True, exist_ok=True)
    chosen = SIZES[size]
    console = Console()
    phases = Phases(out, console)
    with trainings() as running:
        train(out, chosen, seed, phases, running)
    with phases.phase("eval", "Evaluation on held-out problems") as todo:
        if todo:
            evaluate_rows(out, chosen, seed, console)

    results = QuickstartResults.read(out, seed=seed)
    write_results(results, out / "results.json")
    console.print(result_table(results))
    from memento.report import write_report

    console.print(f"report: {write_report(out)}")
    console.print(f"model:  {out / 'rl' / 'hf'}   (serve it with eviction: memento serve {out / 'rl' / 'hf'})")
    return results


def train(out: Path, size: Size, seed: int, phases: Phases, running: list[Training]) -> None:
    """All training phases. The control shares the machine with stages 1 and 2: each uses one core."""

    def start(phase: str, config: str, *overrides: str, log: Path | None = None) -> Training:
        module = "memento.rl.train" if config.startswith("rl/") else "memento.sft.train"
        training = Training(module, CONFIGS / config, out / phase, [f"seed={seed}", *overrides], log)
        running.append(training)
        return training

    control = None
    if not phases.done("control"):
        log = out / "control.log"
        control = start("control", f"sft/{size.prefix}_control.yaml", log=log)
        phases.console.print(f"SFT-only control, no blocks: beside the next two phases, see {log}", soft_wrap=True)
    with phases.phase("stage1", "SFT stage 1, full attention") as todo:
        if todo:
            start("stage1", f"sft/{size.prefix}_stage1.yaml").wait()
    with phases.phase("stage2", "SFT stage 2, memento attention") as todo:
        if todo:
            start("stage2", f"sft/{size.prefix}_stage2.yaml", f"model={out / 'stage1' / 'hf'}").wait()
    if control is not None:
        control.wait()
        phases.record("control", control.seconds)
        phases.console.print(f"[green]SFT-only control, no blocks: {control.seconds:.0f} s, side by side[/green]")
    with phases.phase("rl", "RL under eviction") as todo:
        if todo:
            start("rl", f"rl/{size.prefix}.yaml", f"model={out / 'stage2' / 'hf'}").wait()


def held_out(config: RlConfig, count: int, taken: Sequence[int]) -> ProblemsConfig:
    """`count` problems of the family of the run's own evaluation, disjoint from those of the seeds `taken`."""
    assert config.eval.problems is not None
    classes = {seed % SPLITS for seed in taken}
    fresh = next(seed for seed in range(3000, 3000 + SPLITS) if seed % SPLITS not in classes)
    return config.eval.problems.model_copy(update={"count": count, "seed": fresh})


@dataclass(slots=True)
class SavedModel:
    """A Hugging Face folder in the place of a learner: what `WeightSync` sends when nothing is being trained."""

    folder: Path

    def export_weights(self, folder: str | Path, version: int) -> WeightUpdate:
        """Write the folder's weights as `version`."""
        from safetensors.torch import load_file

        from memento.rollout.weights import write_weights

        return write_weights(load_file(self.folder / "model.safetensors"), folder, version)


def evaluate_rows(out: Path, size: Size, seed: int, console: Console) -> None:
    """Evaluate every model at every temperature with one engine, whose weights are exchanged in between."""
    from memento.cluster import connect, disconnect
    from memento.preflight import load_tokenizer
    from memento.rewards.pool import RewardPool
    from memento.rl.evaluate import evaluate
    from memento.rl.weight_sync import WeightSync
    from memento.rollout.pool import RolloutPool

    config = load_config(out / "rl" / "config.yaml")
    assert isinstance(config, RlConfig) and config.eval.problems is not None
    problems = read_problems(held_out(config, size.problems, (seed, config.problems.seed, config.eval.problems.seed)))
    folder = out / "eval"
    folder.mkdir(exist_ok=True)
    save_problems(problems, folder / "problems.jsonl")
    model = SavedModel(out / next(iter(ROWS.values())).folder / "hf")
    fmt = config.format.bind(load_tokenizer(model.folder))
    jobs: list[tuple[Row, Temperature, int]] = [
        (row, t, size.problems if t == "1.0" else size.cool_problems) for row in ROWS for t in TEMPERATURES
    ]
    columns = (TextColumn("{task.description:>24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    connect()
    with ExitStack() as parts:
        parts.callback(disconnect)
        engines = RolloutPool(config.rollout, config.format, str(model.folder))
        parts.callback(engines.close)
        rewards = RewardPool(config.rewards)
        parts.callback(rewards.close)
        weights = WeightSync(model, engines)
        parts.callback(weights.close)
        progress = parts.enter_context(Progress(*columns, console=console, transient=True))
        bar = progress.add_task("", total=sum(count for _, _, count in jobs))
        version = 0
        for row, temperature, count in jobs:
            progress.update(bar, description=f"{row} T={temperature}")
            if model.folder != out / ROWS[row].folder / "hf":
                version, model.folder = version + 1, out / ROWS[row].folder / "hf"
                weights.push(version)
            result, groups = evaluate(
                engines,
                rewards,
                problems[:count],
                SamplingParams(temperature=sampling_temperature(temperature), max_tokens=config.sampling.max_tokens),
                fmt=fmt,
                samples=1,
                seed=seed,
                evict=ROWS[row].evict,
                group_prefix="final",
                progress=lambda _: progress.advance(bar),
                concurrency=config.rollout.engines * config.rollout.max_num_seqs,
                model=str(model.folder),
            )
            name = f"{row}_t{temperature}"
            (folder / f"{name}.jsonl").unlink(missing_ok=True)  # half a file of an evaluation that was interrupted
            append_jsonl(groups, folder / f"{name}.jsonl")
            (folder / f"{name}.json").write_text(result.model_dump_json(indent=2) + "\n")
            console.print(f"{row:>16}  T={temperature:<7}{count:>4} problems  accuracy {result.accuracy.mean:.3f}")
