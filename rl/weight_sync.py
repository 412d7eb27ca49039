"""New weights from the learner to the engines, checked at the far end.

learner ranks --gather, write--> safetensors in shared memory --path and checksum--> every engine
                                                                 pause, verify, load, reset the prefix cache, resume
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from memento.errors import RunFailed
from memento.rollout.weights import WeightUpdate, shared_memory_folder


class WeightSyncError(RunFailed):
    """The engines do not all run the weights that were sent. The message names the stage, engine and version."""


class Engines(Protocol):
    """What weight sync needs of `memento.rollout.pool.RolloutPool`."""

    def update_weights(self, update: WeightUpdate) -> Sequence[int]:
        """Load `update` everywhere; the version that each engine then runs."""
        ...


class Exporter(Protocol):
    """What weight sync needs of `memento.rl.learner.Learner`."""

    def export_weights(self, folder: str | Path, version: int) -> WeightUpdate: ...


class WeightSync:
    """Pushes versions of the weights.

    Args:
        learner: writes them.
        engines: load them.
        folder: where the files lie: a file system that learner rank 0 and all engines share. Default: a private folder
            in this machine's shared memory, which `close` removes. The last version's file stays, because an engine
            that is restarted reads it again.
    """

    def __init__(self, learner: Exporter, engines: Engines, folder: Path | None = None) -> None:
        self._learner, self._engines = learner, engines
        self.folder = shared_memory_folder() if folder is None else folder
        # Also when nobody calls close(): shared memory outlives the process.
        self._cleanup = weakref.finalize(self, _remove, self.folder) if folder is None else None

    def push(self, version: int) -> WeightUpdate:
        """Send the learner's current weights as `version`.

        Raises:
            WeightSyncError: an engine runs another version after it.
            LearnerError, WeightSyncFailed: the learner could not write them, or an engine not load them, in time; the
                message names the stage.
        """
        update = self._learner.export_weights(self.folder, version)
        if update.version != version:
            raise WeightSyncError(f"export: asked for version {version}, the learner wrote {update.version}")
        answers = list(self._engines.update_weights(update))
        wrong = {engine: answer for engine, answer in enumerate(answers) if answer != version}
        if wrong or not answers:
            raise WeightSyncError(
                f"handshake: sent version {version}, but "
                + (", ".join(f"engine {e} runs {a}" for e, a in wrong.items()) or "no engine answered")
            )
        return update

    def close(self) -> None:
        """Remove the private folder."""
        if self._cleanup is not None:
            self._cleanup()


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
