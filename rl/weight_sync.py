"""New weights from the learner to the engines, checked at the far end.

`WeightSync`, by file:

learner ranks --gather, write--> safetensors in shared memory --path and checksum--> every engine
                                                                 pause, verify, load, reset the prefix cache, resume

`ChannelSync`, from process to process (`memento.rollout.weight_channel`), and by file where that fails:

learner ranks --gather a bucket, send it, and so on--> every engine
                                                       pause, load, compare checksums, reset the prefix cache, resume
"""

from __future__ import annotations

import shutil
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from memento.config import RlConfig, WeightSyncConfig
from memento.errors import RunFailed, UserError
from memento.preflight import ENGINE, LEARNER_RANK, ResourcePlan
from memento.rollout.channel_records import LOOPBACK, ChannelBroken, ChannelSettings, ChannelUpdate, TensorSpec
from memento.rollout.weights import WeightUpdate, shared_memory_folder

if TYPE_CHECKING:
    from memento.rl.learner import Learner
    from memento.rollout.pool import RolloutPool

Transport = Literal["file", "broadcast", "ipc"]

GIVE_UP_AFTER = 3
"""Versions in a row that did not get through a channel: then all go by file, without waiting for a timeout each."""


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


class Sender(Exporter, Protocol):
    """What sending through a channel needs of `memento.rl.learner.Learner` beside that."""

    def tensor_specs(self) -> tuple[TensorSpec, ...]: ...

    def open_store(self, timeout_s: float) -> tuple[str, int]: ...

    def join_channel(self, settings: ChannelSettings) -> None: ...

    def send_weights(self, version: int) -> None: ...


class WeightSync:
    """Pushes versions of the weights.

    Args:
        learner: writes them.
        engines: load them.
        folder: where the files lie: a file system that learner rank 0 and all engines share. Default: a private folder
            in this machine's shared memory. The last version's file stays, because an engine that is restarted reads
            it again.
        private: whether `close` removes the folder. Default: where it is in shared memory.
    """

    def __init__(
        self, learner: Exporter, engines: Engines, folder: Path | None = None, *, private: bool = False
    ) -> None:
        self._learner, self._engines = learner, engines
        self.folder = shared_memory_folder() if folder is None else folder
        # Also when nobody calls close(): shared memory outlives the process.
        self._cleanup = weakref.finalize(self, _remove, self.folder) if private or folder is None else None

    def push(self, version: int) -> WeightUpdate | ChannelUpdate:
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

    def heal(self, version: int) -> None:
        """Serve engines that came back without weights. The learner must hold `version`: call it between steps."""

    def close(self) -> None:
        """Remove a private folder."""
        if self._cleanup is not None:
            self._cleanup()


class ChannelSync(WeightSync):
    """Sends versions through a channel that is opened anew whenever an engine has come or gone.

    Args:
        learner, engines, folder, private: as for `WeightSync`.
        transport: how the bytes go.
        config: bucket size and timeout.
        ranks: of the learner.
        one_machine: whether all actors are on one.
        say: told when weights had to go by file, and why.
    """

    def __init__(
        self,
        learner: Sender,
        engines: RolloutPool,
        folder: Path | None = None,
        *,
        private: bool = False,
        transport: Literal["broadcast", "ipc"],
        config: WeightSyncConfig,
        ranks: int,
        one_machine: bool,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(learner, engines, folder, private=private)
        self._ranks, self._pool = learner, engines
        self._transport: Literal["broadcast", "ipc"] = transport
        self._senders = ranks if transport == "ipc" else 1
        self._config, self._one_machine, self._say = config, one_machine, say
        self._members: tuple[tuple[int, int], ...] = ()  # of the channel that is open
        self._tensors: tuple[TensorSpec, ...] = ()
        self._failures = 0  # in a row

    def push(self, version: int) -> WeightUpdate | ChannelUpdate:
        """See `WeightSync.push`."""
        if self._failures < GIVE_UP_AFTER:
            try:
                update = self._send(version)
                self._failures = 0
                return update
            except ChannelBroken as error:
                self._members, self._failures = (), self._failures + 1
                which = f"{version}" if self._failures < GIVE_UP_AFTER else f"{version} and all that follow"
                self._say(f"weights {which} go by file ({self._transport}: {error})")
        return super().push(version)

    def heal(self, version: int) -> None:
        """See `WeightSync.heal`."""
        if self._pool.lacks_weights():
            super().push(version)

    def _send(self, version: int) -> ChannelUpdate:
        members = self._pool.members()
        if not members:
            raise ChannelBroken("no engine is in service")
        if members != self._members:
            self._open(members)
        update = ChannelUpdate(version=version, bytes=sum(tensor.bytes for tensor in self._tensors))
        began, failures = time.perf_counter(), list[ChannelBroken]()

        def send() -> None:
            try:
                self._ranks.send_weights(version)
            except ChannelBroken as error:
                failures.append(error)

        versions = self._pool.receive_weights(update, members, send)
        if failures:
            raise failures[0]
        if versions != [version] * len(members):
            raise ChannelBroken(f"{len(members) - versions.count(version)} of {len(members)} engines did not take them")
        return update.model_copy(update={"seconds": time.perf_counter() - began})

    def _open(self, members: tuple[tuple[int, int], ...]) -> None:
        self._members = ()
        self._tensors = self._tensors or self._ranks.tensor_specs()
        address, port = self._ranks.open_store(self._config.timeout_s)
        settings = ChannelSettings(
            transport=self._transport,
            address=LOOPBACK if self._one_machine else address,
            port=port,
            senders=self._senders,
            receivers=len(members) * self._pool.workers_per_engine,
            tensors=self._tensors,
            bucket_bytes=self._config.bucket_mib << 20,
            timeout_s=self._config.timeout_s,
        )
        with ThreadPoolExecutor(1) as threads:
            engines = threads.submit(self._pool.join_channel, settings, members)
            self._ranks.join_channel(settings)
            engines.result()
        self._members = members


def choose_transport(config: RlConfig, plan: ResourcePlan, machines: int) -> Transport:
    """What ``weight_sync.transport: auto`` means for these actors.

    A file where everything is on the CPUs of one machine, or engines and learner on other kinds of devices; ipc where
    every engine shares its GPU with a learner rank; else broadcast.

    Raises:
        UserError: a channel was asked for between a GPU and a CPU.
    """
    kinds_of_devices = {actors.gpus > 0 for actors in plan.actors if actors.kind in (ENGINE, LEARNER_RANK)}
    asked = config.weight_sync.transport
    if len(kinds_of_devices) > 1:
        if asked in ("broadcast", "ipc"):
            raise UserError(
                f"weight_sync.transport={asked} needs engines and learner on the same kind of device (rollout.device, "
                "learner.device). Use weight_sync.transport=file."
            )
        return "file"
    if asked != "auto":
        return asked
    if plan.gpus == 0:
        return "file" if machines == 1 else "broadcast"
    kinds = [{kind for kind, _ in bundle.members} for bundle in plan.bundles]
    together = all(LEARNER_RANK in kind for kind in kinds if ENGINE in kind)
    return "ipc" if together and config.rollout.tensor_parallel_size == 1 else "broadcast"


def open_sync(
    config: RlConfig,
    plan: ResourcePlan,
    machines: int,
    learner: Learner,
    engines: RolloutPool,
    say: Callable[[str], None],
) -> WeightSync:
    """Weight sync as a run configures it. Nothing is sent yet."""
    transport = choose_transport(config, plan, machines)
    # Shared memory reaches no other machine; the run folder does.
    folder = config.weight_sync.folder or (None if machines == 1 else Path(config.out) / "weights")
    private = config.weight_sync.folder is None
    if transport == "file":
        return WeightSync(learner, engines, folder, private=private)
    say(f"weights go by {transport}")
    return ChannelSync(
        learner,
        engines,
        folder,
        private=private,
        transport=transport,
        config=config.weight_sync,
        ranks=config.learner.ranks,
        one_machine=machines == 1,
        say=say,
    )


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
