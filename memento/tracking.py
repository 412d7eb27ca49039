"""Where a run's curves go besides ``metrics.jsonl``: W&B, TensorBoard, both or neither.

`open_trackers` turns the `tracking` section of a config into one `Tracker`; a run talks to that and never asks which.
W&B and TensorBoard are imported only when they are used.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from memento.config import Config, TrackingConfig
from memento.errors import UserError
from memento.format import SUMMARY_END, SUMMARY_START
from memento.metrics import METRICS
from memento.trajectory import ScoredGroup

if TYPE_CHECKING:
    from memento.view import View

TABLE = "rollouts/table"
"""The W&B table of sampled trajectories; one row a completion, see `COLUMNS`."""

TRACE = "rollouts/trace"
"""One trajectory as a page: KV sawtooth, blocks and mementos, a slider over time."""

COLUMNS = (
    "step",
    "problem",
    "sample",
    "reward",
    "outcome",
    "answer",
    "tokens",
    "blocks",
    "mementos",
    "peak KV",
    "peak KV without eviction",
    "forced tokens",
    "text",
)

CODE = (".py", ".pyi", ".yaml")
"""What the code artifact holds of the package."""

_USERS_DATA_DIR = os.environ.get("WANDB_DATA_DIR")


class Tracker(Protocol):
    """What a run tells its trackers."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """The metrics of a step."""

    def groups(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """What a step trains on. Called before the step's `log`."""

    def checkpoint(self, step: int, folder: Path) -> None:
        """A checkpoint is complete."""

    def alert(self, title: str, text: str) -> None:
        """Something that a person must look at."""

    def finish(self, exit_code: int) -> None:
        """The run ends."""


class Trackers:
    """Several trackers as one; none at all for ``tracking.mode: disabled``.

    A tracker that fails ends no run: its service may die (`ray job stop` sends SIGTERM to W&B's process too), its
    server or its disk be gone, and ``metrics.jsonl`` has everything. It is left out from then on, and said once.
    """

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self._trackers = list(trackers)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._tell(lambda tracker: tracker.log(step, metrics))

    def groups(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        self._tell(lambda tracker: tracker.groups(step, groups))

    def checkpoint(self, step: int, folder: Path) -> None:
        self._tell(lambda tracker: tracker.checkpoint(step, folder))

    def alert(self, title: str, text: str) -> None:
        self._tell(lambda tracker: tracker.alert(title, text))

    def finish(self, exit_code: int) -> None:
        self._tell(lambda tracker: tracker.finish(exit_code))

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                name = type(tracker).__name__.removesuffix("Tracker")
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                print(f"{name} no longer follows this run: {reason}. metrics.jsonl goes on.", file=sys.stderr)


class WandbTracker:
    """A W&B run. Offline ones never touch the network; ``wandb sync RUN/wandb/offline-run-*`` uploads them, by hand.

    A resumed run keeps its id: its curves continue. Online, W&B shows a step that was taken twice (once before and once
    after a resume from an older checkpoint) twice; ``metrics.jsonl`` does not.
    """

    def __init__(self, config: Config, folder: Path, run_id: str) -> None:
        # Artifacts are staged for upload beside the run, not in the user's home.
        os.environ["WANDB_DATA_DIR"] = _USERS_DATA_DIR or str((folder / "wandb").resolve())
        import wandb

        tracking = config.tracking
        self._tracking, self._folder = tracking, folder
        self._run = wandb.init(
            id=run_id,
            resume="allow" if tracking.mode == "online" else None,  # offline, the same id is enough
            mode="online" if tracking.mode == "online" else "offline",
            entity=tracking.entity,
            project=tracking.project,
            name=tracking.name or folder.name,
            dir=str(folder),
            job_type=config.kind,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        for metric in METRICS:
            if metric.summary != "last" and "*" not in metric.name:
                self._run.define_metric(metric.name, step_metric="step", summary=metric.summary)
        if (folder / "environment.json").is_file():
            self._run.save(str(folder / "environment.json"), base_path=str(folder), policy="now")
        if tracking.artifacts != "none":
            code = wandb.Artifact(f"{tracking.project}-source", type="code")
            for file, name in package_files():
                code.add_file(str(file), name=name)
            self._run.log_artifact(code)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send one step; ``step`` is its place on every axis."""
        self._run.log({"step": step, **metrics})

    def groups(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """A table of trajectories and one trajectory as a page, every ``tracking.trajectories_interval`` steps."""
        tracking = self._tracking
        if not tracking.trajectories or not groups or (step - 1) % tracking.trajectories_interval:
            return
        import wandb

        rows: Any = list(table_rows(step, groups, tracking.trajectories))
        media: dict[str, Any] = {TABLE: wandb.Table(columns=list(COLUMNS), data=rows)}
        if (view := telling_view(self._folder, groups)) is not None:
            from memento.view import view_page

            media[TRACE] = wandb.Html(view_page(view), inject=False)
        self._run.log({"step": step, **media}, commit=False)  # into the line that `log` writes

    def checkpoint(self, step: int, folder: Path) -> None:
        """An artifact of type ``checkpoint``: the place of the folder, or the folder itself."""
        import wandb

        if self._tracking.artifacts == "none":
            return
        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="checkpoint", metadata={"step": step})
        if self._tracking.artifacts == "upload":
            artifact.add_dir(str(folder))
        else:
            # A checkpoint of a real model has a hundred gigabytes: its sizes are in its own manifest, no sum is taken.
            artifact.add_reference(folder.resolve().as_uri(), name=folder.name, checksum=False)
        self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    def alert(self, title: str, text: str) -> None:
        """A W&B alert: by mail or Slack, as the user has set it there."""
        self._run.alert(title=title[:64], text=text, level="ERROR")

    def finish(self, exit_code: int) -> None:
        """Close the run's files."""
        self._run.finish(exit_code=exit_code)


class TensorBoardTracker:
    """Event files in ``RUN/tensorboard``, for ``tensorboard --logdir runs``."""

    def __init__(self, tracking: TrackingConfig, folder: Path) -> None:
        self._tracking, self._folder = tracking, folder / "tensorboard"
        self._writer: Any = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One scalar a metric."""
        writer = self._at(step)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def groups(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """The text of some completions."""
        tracking = self._tracking
        if not tracking.trajectories or not groups or (step - 1) % tracking.trajectories_interval:
            return
        for row in table_rows(step, groups, tracking.trajectories):
            cells = dict(zip(COLUMNS, row, strict=True))
            head = f"{cells['problem']}, sample {cells['sample']}: {cells['outcome']}, reward {cells['reward']}"
            text = "\n".join("    " + line for line in str(cells["text"]).splitlines())
            self._at(step).add_text(f"rollouts/{cells['problem']}-{cells['sample']}", f"{head}\n\n{text}", step)

    def checkpoint(self, step: int, folder: Path) -> None:
        """Its place, as text."""
        self._at(step).add_text("checkpoint", str(folder.resolve()), step)

    def alert(self, title: str, text: str) -> None:
        """As text; TensorBoard has no alerts."""
        if self._writer is not None:
            self._writer.add_text("alert", f"{title}\n\n{text}")

    def finish(self, exit_code: int) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()

    def _at(self, step: int) -> Any:
        """The writer. It is opened at the first step, because a resumed run hides what came after that step."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        return self._writer


def check_tracking(tracking: TrackingConfig) -> None:
    """Find out about missing packages and keys before a folder is made.

    Raises:
        UserError: W&B or TensorBoard is not installed, or ``mode: online`` without a key or a network.
    """
    if tracking.tensorboard:
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError(
                "TensorBoard is not installed: `pip install tensorboard`, or set tracking.tensorboard=false."
            ) from error
    if tracking.mode == "disabled":
        return
    if tracking.mode == "offline":
        # Before wandb is imported: it would report its own errors to its makers.
        os.environ["WANDB_MODE"] = "offline"
        os.environ["WANDB_ERROR_REPORTING"] = "false"
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "W&B is not installed. Install the extra (`pip install memento-rl[cpu]`) or set tracking.mode=disabled."
        ) from error
    if tracking.mode == "online" and not _logged_in(wandb):
        raise UserError(
            "tracking.mode is online, but there is no W&B key, or the server does not take it or cannot be reached. "
            "Run `wandb login`, set WANDB_API_KEY, or use tracking.mode=offline and `wandb sync` later."
        )


def _logged_in(wandb: Any) -> bool:
    try:
        return bool(wandb.login(prompt=False))
    except (wandb.errors.Error, OSError, ValueError):
        return False


def open_trackers(config: Config, folder: Path, run_id: str) -> Tracker:
    """The trackers that a config asks for, as one.

    Raises:
        UserError: W&B refuses the run.
    """
    trackers: list[Tracker] = []
    if config.tracking.mode != "disabled":
        trackers.append(_open_wandb(config, folder, run_id))
    if config.tracking.tensorboard:
        trackers.append(TensorBoardTracker(config.tracking, folder))
    return Trackers(trackers)


def _open_wandb(config: Config, folder: Path, run_id: str) -> WandbTracker:
    from wandb.errors import Error

    try:
        return WandbTracker(config, folder, run_id)
    except Error as error:
        raise UserError(
            f"W&B does not start: {' '.join(str(error).split())}. Use tracking.mode=offline or tracking.mode=disabled; "
            f"the run folder {folder} is there already, so add --resume."
        ) from error


def package_files() -> Iterator[tuple[Path, str]]:
    """The files of this package, links followed, each with its name below ``memento/``."""
    package = Path(__file__).parent
    for place, folders, files in os.walk(package, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            if name.endswith(CODE):
                file = Path(place) / name
                yield file, f"memento/{file.relative_to(package)}"


def table_rows(step: int, groups: Sequence[ScoredGroup], count: int) -> Iterator[list[Any]]:
    """`count` completions for the table of trajectories, from as many groups as possible: the first of each group, then
    the second of each, ..."""
    places = [(i, g) for i in range(max(len(g.trajectories) for g in groups)) for g in groups]
    for i, group in [(i, g) for i, g in places if i < len(g.trajectories)][:count]:
        t, reward = group.trajectories[i], group.rewards[i]
        mementos = re.findall(f"{re.escape(SUMMARY_START)}(.*?){re.escape(SUMMARY_END)}", t.text, re.S)
        yield [
            step,
            group.problem.prompt,
            t.sample_index,
            reward.score,
            reward.outcome.value,
            reward.extracted,
            len(t.completion_ids),
            len(mementos),
            "\n".join(memento.strip() for memento in mementos),
            t.peak_kv_tokens,
            len(t.token_ids),
            len(t.forced),
            t.text,
        ]


def telling_view(folder: Path, groups: Sequence[ScoredGroup]) -> View | None:
    """The most telling trajectory of some groups, with its text where the run folder leads to a tokenizer."""
    from memento.report import most_telling
    from memento.view import find_tokenizer, make_view

    if (chosen := most_telling(groups)) is None:
        return None
    trajectory, rewards, place = chosen
    return make_view(trajectory, rewards, place, *find_tokenizer(folder))
