"""Checkpoints: everything a run needs to go on as if nothing had happened.

    <run>/checkpoints/step-000025/
        state.json       the loop: step, problem cursor, groups in flight, best metric
        learner/         weights, optimiser, step count, random state of each rank
        manifest.json    size of every file, written last

A checkpoint is written under a temporary name and renamed, and removed under a temporary name as well, so whatever is
called ``step-...`` was complete once. The manifest catches what happens to it afterwards.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import ValidationError

import memento
from memento.errors import UserError
from memento.problems import Record, explain
from memento.trajectory import RolloutRequest

if TYPE_CHECKING:
    from memento.rl.window import GroupWindow, ProblemStream

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
UNIVERSAL = ".universal-"
"""Prefix of the folder that holds a checkpoint's universal form while it is loaded."""
_ASIDE, _OLD = ".writing-", ".removing-"
_MANIFEST, _STATE = "manifest.json", "state.json"


class RunState(Record):
    """Where the loop stands.

    Attributes:
        step: steps that are done; the next one has this index.
        cursor: problems handed out so far, over all epochs.
        pending: groups admitted but not trained yet, in order; they are generated again.
        best_metric: best held-out accuracy so far, if there was an evaluation.
        best_step: the step after which it was.
        wandb_id: of the W&B run, to continue its curves.
    """

    step: int = 0
    cursor: int = 0
    pending: tuple[RolloutRequest, ...] = ()
    best_metric: float | None = None
    best_step: int | None = None
    wandb_id: str | None = None

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> RunState:
        """With the evaluation among a step's metrics, should there be one and should it be the best so far."""
        accuracy = metrics.get("eval/accuracy")
        if accuracy is None or (self.best_metric is not None and accuracy <= self.best_metric):
            return self
        return self.model_copy(update={"best_metric": accuracy, "best_step": step})

    def at(self, step: int, stream: ProblemStream, window: GroupWindow) -> RunState:
        """Where the loop stands after `step` steps."""
        return self.model_copy(update={"step": step, "cursor": stream.cursor, "pending": tuple(window.pending())})


class Saver(Protocol):
    """What a checkpoint needs of `memento.rl.learner.Learner`."""

    def save(self, folder: str | Path) -> None: ...


def save_checkpoint(
    run_folder: Path | str, state: RunState, learner: Saver, *, keep: int, keep_best: bool = False
) -> Path:
    """Write ``checkpoints/step-<state.step>``; then remove all but the newest `keep`.

    With `keep_best` that of ``state.best_step`` stays too, where there is one.

    A checkpoint of the same step that is there already is replaced.

    Returns:
        Its folder.
    """
    folder = Path(run_folder) / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in (f for prefix in (_ASIDE, _OLD, UNIVERSAL) for f in folder.glob(f"{prefix}*")):
        shutil.rmtree(leftover, ignore_errors=True)
    target = folder / f"step-{state.step:06d}"
    with replace_folder(target) as aside:
        learner.save(aside)
        (aside / _STATE).write_text(state.model_dump_json(), encoding="utf-8")
        (aside / _MANIFEST).write_text(json.dumps(_sizes(aside)), encoding="utf-8")
    for old in _by_step(folder)[:-keep]:
        if not (keep_best and _step(old) == state.best_step):
            _remove(old)
    return target


def latest_checkpoint(run_folder: Path | str) -> Path | None:
    """The newest whole checkpoint of a run, or None. Torn ones are passed over with a warning that names them."""
    for folder in reversed(_by_step(Path(run_folder) / CHECKPOINTS)):
        fault = _fault(folder)
        if fault is None:
            return folder
        log.warning("checkpoint %s is torn (%s); trying an older one", folder, fault)
    return None


def load_state(checkpoint: Path | str) -> RunState:
    """The loop's part of a checkpoint.

    Raises:
        UserError: it is not a whole checkpoint; the message names it and what is wrong.
    """
    checkpoint = Path(checkpoint)
    fault = _fault(checkpoint)
    if fault is not None:
        raise UserError(f"the checkpoint {checkpoint} is torn: {fault}. Resume from an older one.")
    text = (checkpoint / _STATE).read_text(encoding="utf-8")
    try:
        return RunState.model_validate_json(text)
    except ValidationError as error:
        unknown = [str(e["loc"][0]) for e in error.errors() if e["type"] == "extra_forbidden" and e["loc"]]
        if unknown:
            raise UserError(
                f"{checkpoint} was written by a newer version: this one, memento-rl {memento.__version__}, does not "
                f"know its {', '.join(unknown)}. Install the newer one, or go on from an older checkpoint."
            ) from error
        raise UserError(f"{checkpoint / _STATE} is not a run state: {explain(error)}.") from error


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends without an error.

    Every file is on the disk before the name changes. A folder that had the name is removed after that.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{_ASIDE}{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for file in (f for f in aside.rglob("*") if f.is_file()):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        old = target.with_name(f"{_OLD}{target.name}")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(aside, target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _remove(folder: Path) -> None:
    doomed = folder.with_name(f"{_OLD}{folder.name}")
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _by_step(folder: Path) -> list[Path]:
    found = [f for f in folder.glob("step-*") if f.is_dir() and f.name.removeprefix("step-").isdigit()]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _sizes(folder: Path) -> dict[str, int]:
    files = (f for f in folder.rglob("*") if f.is_file() and f.name != _MANIFEST)
    return {str(f.relative_to(folder)): f.stat().st_size for f in sorted(files)}


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest: dict[str, int] = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"no readable {_MANIFEST} ({error})"
    here = _sizes(checkpoint)
    for name, size in manifest.items():
        if name not in here:
            return f"{name} is missing"
        if here[name] != size:
            return f"{name} has {here[name]} bytes, {size} were written"
    return None
