"""The fleet: N engines as Ray actors behind `generate` (blocking) and `stream` (as they finish), both thread-safe.

    stream(group) --> parts of at most 16 samples --> the engine with the fewest samples in flight --> trajectories
                               ^                            |
                               |   engine died, hangs, went stale, timed out: count it, and give what is
                               |   missing of the part to another one
                               +----------------------------+

One thread looks after the engines: one that is dead, or has work and makes no step, is killed before anybody waits for
it in vain. An engine that died is started again by Ray with the weights of the model folder. It takes no work before it
was started *and* holds the current weights; every request names the oldest version it accepts, so an engine that was
restarted unnoticed refuses instead of answering with old weights. What is sampled depends on run seed, group and
sample index alone (`memento.trajectory.sample_seed`), not on which engine serves it or how many there are.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from memento.cluster import connect
from memento.config import FormatConfig, RolloutConfig
from memento.errors import RunFailed, UserError
from memento.rollout.channel_records import ChannelBroken, ChannelSettings, ChannelUpdate
from memento.rollout.engine import FIRST_VERSION, SLEEPING, EngineInfo, RolloutEngine, StaleEngine
from memento.rollout.engine_thread import EngineFailed
from memento.rollout.weights import WeightUpdate
from memento.trajectory import RolloutRequest, Trajectory

PART_SAMPLES = 16
"""A larger group is cut into parts of this many: by then the shared prompt has paid for itself."""

ATTEMPTS = 4
"""How often a part is tried before its group fails."""

INFO_TIMEOUT_S = 5.0

WATCH_INTERVAL_S = 5.0
"""How often each engine is looked at, at the least."""

RESTART_POLL_S = 0.25
"""How often a dead engine is asked whether Ray has started it again."""


class NoEngines(RunFailed):
    """All engines are gone for good. The message carries the last reason."""


class GroupFailed(RunFailed):
    """A group could not be generated although other engines were tried."""


class WeightSyncFailed(RunFailed):
    """An engine did not take the new weights. The message names engine and stage."""


@dataclass(slots=True)
class Progress:
    """When an engine was last seen to get on with its work.

    Attributes:
        steps: its engine steps then; None before it was seen at all.
        since_s: when that was, on any steady clock.
    """

    steps: int | None = None
    since_s: float = 0.0

    def stalled_s(self, info: EngineInfo | None, now_s: float) -> float:
        """Take a look; how long the engine has had work, or given no answer (`info` is None), without a step.

        An engine that loads weights or starts has its own deadline, and one without work has none.
        """
        if self.steps is None:
            self.steps, self.since_s = -1, now_s
        if info is not None and (info.active == 0 or info.stage != "ready" or info.steps != self.steps):
            self.steps, self.since_s = info.steps, now_s
        return now_s - self.since_s


@dataclass(slots=True, eq=False)
class _Engine:
    """The pool's view of one actor. Guarded by the pool's condition."""

    index: int
    actor: Any
    state: str = "starting"  # starting | ready | restarting | waiting (for weights) | lost
    life: int = 0  # how often it was restarted
    in_flight: int = 0  # samples
    why: str = ""
    tokens: int = 0  # at the last call of `metrics`
    busy_s: float = 0.0
    preemptions: int = 0
    progress: Progress = field(default_factory=Progress)


class RolloutPool:
    """Starts the engines and waits until all are ready.

    Args:
        config: how many, and how each is built.
        format: how the delimiters are used.
        model: Hugging Face folder or hub id; on a cluster every node must reach it.
        places: further Ray options of each engine, from `memento.cluster.Reservation`. Empty: Ray places the engines
            one by one.

    Raises:
        UserError: the resources are not there, or the model cannot be served as configured.
        EngineFailed: vLLM did not start, or an engine died in each of its starts.
    """

    def __init__(
        self, config: RolloutConfig, format: FormatConfig, model: str, places: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        import ray

        total = connect()
        if config.device == "auto":
            config = config.model_copy(update={"device": "cuda" if total.get("GPU", 0) > 0 else "cpu"})
        self._config = config
        self._gpus = config.gpus if config.device == "cuda" else 0.0
        self._condition = threading.Condition()
        self._update_lock = threading.Lock()
        self._update: WeightUpdate | ChannelUpdate | None = None
        self._served = FIRST_VERSION  # every engine that is `ready` holds at least this version
        self._closed = self._asleep = False
        self._counts: Counter[str] = Counter()
        self._began_metrics = time.perf_counter()
        self._check_resources(total)
        actor: Any = ray.remote(RolloutEngine)
        options: dict[str, Any] = {
            "num_cpus": config.cpus,
            "num_gpus": self._gpus,
            "max_restarts": config.max_restarts,
            "max_task_retries": 0,  # the pool retries, on another engine
            "max_concurrency": 4096,
        }
        where = places or [{}] * config.engines
        self._engines = [
            _Engine(index, actor.options(**options, **where[index]).remote(config, model, format, index))
            for index in range(config.engines)
        ]
        try:
            self.start_s = self._start()
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._watch, name="watch-engines", daemon=True).start()

    # Starting.

    def _check_resources(self, total: dict[str, float]) -> None:
        """Fail now where waiting cannot help: on one machine nothing is added later."""
        import ray

        asked = {"CPU": self._config.cpus * self._config.engines, "GPU": self._gpus * self._config.engines}
        short = {name: amount for name, amount in asked.items() if amount > total.get(name, 0)}
        if short and len(ray.nodes()) == 1:
            raise UserError(f"{self._wanted()}, but this machine offers Ray {_resources(total, short)}. {_FIX}")

    def _wanted(self) -> str:
        gpus = f" and {self._gpus:g} GPU" if self._gpus else ""
        return f"rollout: {self._config.engines} engines ask for {self._config.cpus:g} CPU{gpus} each"

    def _start(self) -> float:
        began = time.perf_counter()
        starts = [engine.actor.start.remote() for engine in self._engines]
        deadline = began + self._config.start_timeout_s
        for engine, start in zip(self._engines, starts, strict=True):
            self._finish_start(engine, start, deadline)
            engine.state = "ready"
        return time.perf_counter() - began

    def _finish_start(self, engine: _Engine, start: Any, deadline: float) -> None:
        """Wait for an engine's start. If it dies meanwhile, Ray makes it anew and it starts again."""
        import ray
        from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

        while True:
            try:
                _get(start, max(deadline - time.perf_counter(), 0.0))
                return
            except GetTimeoutError:
                raise UserError(
                    f"engine {engine.index} was not ready after {self._config.start_timeout_s:g} s "
                    f"(rollout.start_timeout_s): {self._stage(engine)}. {self._wanted()}; free in the cluster: "
                    f"{_resources(ray.available_resources(), ('CPU', 'GPU'))}. {_FIX}"
                ) from None
            except ActorUnavailableError:  # also until the new process is there
                time.sleep(RESTART_POLL_S)
                start = engine.actor.start.remote()
            except ActorDiedError as error:
                raise EngineFailed(
                    f"engine {engine.index} died while it started, and again in each of "
                    f"{self._config.max_restarts} restarts (rollout.max_restarts): {error}"
                ) from None

    def _stage(self, engine: _Engine) -> str:
        """What an engine was doing when the pool lost patience with it."""
        from ray.exceptions import GetTimeoutError, RayError

        try:
            return f"it is at `{self._info(engine).stage}`"
        except GetTimeoutError:
            return "its actor was never placed, or does not answer"
        except RayError as error:
            return f"its actor is gone ({type(error).__name__})"

    def _info(self, engine: _Engine) -> EngineInfo:
        return _get(engine.actor.info.remote(), INFO_TIMEOUT_S)

    # Generating.

    def generate(self, request: RolloutRequest, indices: Sequence[int] | None = None) -> tuple[Trajectory, ...]:
        """Complete a group. Blocks; may be called from many threads.

        Args:
            request: the group.
            indices: only these samples of it; null for all.

        Returns:
            One trajectory for each index, in order.

        Raises:
            UserError: the request itself is at fault (a prompt that is too long).
            RolloutFault: an engine's answer cannot be trained on.
            GroupFailed: it failed on several engines.
            NoEngines: none is left.
        """
        wanted = list(range(request.group_size) if indices is None else indices)
        done = {trajectory.sample_index: trajectory for trajectory in self.stream(request, wanted)}
        return tuple(done[index] for index in wanted)

    def stream(self, request: RolloutRequest, indices: Sequence[int] | None = None) -> Iterator[Trajectory]:
        """As `generate`, but each trajectory as soon as it is finished, in any order.

        Whoever stops listening (closes the iterator) aborts what still runs.
        """
        wanted = list(range(request.group_size) if indices is None else indices)
        parts = [wanted[start : start + PART_SAMPLES] for start in range(0, len(wanted), PART_SAMPLES)]
        if len(parts) == 1:
            yield from self._stream_part(request, parts[0])
        elif parts:
            yield from self._merge([self._stream_part(request, part) for part in parts])

    def _merge(self, parts: Sequence[Iterator[Trajectory]]) -> Iterator[Trajectory]:
        """What several iterators yield, as it comes; each runs in a thread. The first error ends them all."""
        arrived: SimpleQueue[Trajectory | BaseException | None] = SimpleQueue()  # None: a part is through
        stop = threading.Event()

        def listen(part: Iterator[Trajectory]) -> None:
            try:
                for trajectory in part:
                    arrived.put(trajectory)
                    if stop.is_set():
                        return
            except BaseException as error:
                arrived.put(error)
            else:
                arrived.put(None)
            finally:
                part.close()  # type: ignore[attr-defined]

        for part in parts:
            threading.Thread(target=listen, args=(part,), name="stream-part", daemon=True).start()
        try:
            left = len(parts)
            while left:
                item = arrived.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            stop.set()

    def _stream_part(self, request: RolloutRequest, indices: Sequence[int]) -> Iterator[Trajectory]:
        import ray
        from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

        left, why = list(indices), ""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._count("requeued")
            engine, at_least = self._acquire(len(left))
            held, stream = len(left), None
            deadline = time.perf_counter() + self._config.request_timeout_s
            try:
                stream = engine.actor.stream.options(num_returns="streaming").remote(request, left, at_least)
                while left:
                    trajectory = _next(stream, deadline)
                    left.remove(trajectory.sample_index)
                    self._release(engine, 1)
                    held -= 1
                    yield trajectory
                return
            except GetTimeoutError:
                why = f"engine {engine.index}: no answer within rollout.request_timeout_s"
                self._count("timeouts")
                ray.cancel(stream)
            except (ActorDiedError, ActorUnavailableError, EngineFailed, StaleEngine) as error:
                why = f"engine {engine.index}: {type(error).__name__}: {error}"
                self._recover(engine, why, kill=isinstance(error, EngineFailed))
            except GeneratorExit:
                ray.cancel(stream)
                raise
            finally:
                self._release(engine, held)
        self._count("dropped")
        raise GroupFailed(f"group {request.group_id} failed {ATTEMPTS} times, at last with: {why}")

    def _acquire(self, samples: int) -> tuple[_Engine, int]:
        with self._condition:
            while True:
                if self._closed:
                    raise NoEngines("the pool was closed")
                ready = [engine for engine in self._engines if engine.state == "ready"]
                if ready:
                    engine = min(ready, key=lambda e: (e.in_flight, e.index))
                    engine.in_flight += samples
                    return engine, self._served
                if all(engine.state == "lost" for engine in self._engines):
                    raise NoEngines(f"no rollout engine is left; the last one: {self._engines[-1].why}")
                self._condition.wait(1.0)

    def _release(self, engine: _Engine, samples: int) -> None:
        with self._condition:
            engine.in_flight -= samples
            self._condition.notify_all()

    def _count(self, name: str) -> None:
        with self._condition:
            self._counts[name] += 1

    # Recovering.

    def _watch(self) -> None:
        """Take engines out of service that died or hang, whether or not somebody waits for them."""
        import ray

        timeout_s = self._config.progress_timeout_s
        interval_s = min(WATCH_INTERVAL_S, timeout_s / 4)
        with ThreadPoolExecutor(len(self._engines), thread_name_prefix="watch") as threads:
            while True:
                with self._condition:
                    self._condition.wait_for(lambda: self._closed, interval_s)
                    if self._closed or not ray.is_initialized():
                        return
                    ready = [engine for engine in self._engines if engine.state == "ready"]
                list(threads.map(self._look_at, ready))

    def _look_at(self, engine: _Engine) -> None:
        from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError

        info = None
        try:
            info = self._info(engine)
        except (ActorDiedError, ActorUnavailableError) as error:
            self._recover(engine, f"{type(error).__name__}: {error}")
            return
        except (GetTimeoutError, RayError):
            pass  # it does not answer now; perhaps it will
        stalled_s = engine.progress.stalled_s(info, time.perf_counter())
        if info is not None and info.failure is not None:
            self._recover(engine, info.failure, kill=True)
        elif info is not None and info.version is None:  # Ray has been faster than this look
            self._recover(engine, "its process died while it had no work")
        elif stalled_s > self._config.progress_timeout_s:
            what = "gave no answer" if info is None else f"has {info.active} completions and made no step"
            self._count("hung")
            self._recover(engine, f"it {what} for {stalled_s:.0f} s", kill=True)

    def _recover(self, engine: _Engine, why: str, *, kill: bool = False) -> None:
        """Take an engine out of service, and bring it back in the background. The first to notice starts it."""
        with self._condition:
            if engine.state != "ready" or self._closed:
                return
            engine.state, engine.why, engine.progress = "restarting", why, Progress()
            engine.life += 1
            self._counts["restarts"] += 1
        threading.Thread(
            target=self._bring_back, args=(engine, kill), name=f"recover-{engine.index}", daemon=True
        ).start()

    def _bring_back(self, engine: _Engine, kill: bool) -> None:
        import ray
        from ray.exceptions import ActorUnavailableError

        if kill:  # the process lives, its engine does not
            ray.kill(engine.actor, no_restart=False)
        deadline = time.perf_counter() + self._config.start_timeout_s
        while not self._closed:
            left = max(deadline - time.perf_counter(), 0.1)
            update = self._update
            file = update if isinstance(update, WeightUpdate) else None
            try:
                info = _get(engine.actor.start.remote(file), left)
                if file is not None and info.version != file.version:
                    _get(engine.actor.update_weights.remote(file), left)
            except ActorUnavailableError:
                if time.perf_counter() < deadline:
                    time.sleep(RESTART_POLL_S)
                    continue
                self._lose(engine, f"{engine.why}; it did not come back in time")
                return
            except Exception as error:  # dead for good, too slow, or its start failed: all end the same way
                self._lose(engine, f"{engine.why}; then it did not come back: {type(error).__name__}: {error}")
                return
            with self._condition:
                if isinstance(self._update, ChannelUpdate):  # it was not listening: somebody must write a file
                    engine.state = "waiting"
                    self._condition.notify_all()
                    self._condition.wait_for(lambda: self._closed or not isinstance(self._update, ChannelUpdate))
                    deadline = time.perf_counter() + self._config.start_timeout_s
                elif self._update is update:  # else newer weights were pushed meanwhile: go round again
                    engine.state = "ready"
                    self._condition.notify_all()
                    return

    def _lose(self, engine: _Engine, why: str) -> None:
        with self._condition:
            engine.state, engine.why = "lost", why
            self._condition.notify_all()

    # Weights.

    def update_weights(self, update: WeightUpdate) -> list[int]:
        """Bring all engines to new weights, at the same time and between two of their steps.

        Engines that are being restarted get them before they take work. ``update.path`` must stay until the next
        update has returned.

        Returns:
            The version each engine that is in service holds.

        Raises:
            WeightSyncFailed: an engine did not finish in ``rollout.start_timeout_s``, or refused the file; the message
                names the engine and the stage.
            NoEngines: none is left.
        """
        with self._update_lock:
            with self._condition:
                before, self._update = self._update, update
                ready = [engine for engine in self._engines if engine.state == "ready"]
            versions: list[int] = []
            try:
                self._send(update, ready, versions)
            except WeightSyncFailed:
                if not versions:  # nobody took them: an engine that restarts must not try
                    self._update = before
                raise
            with self._condition:
                self._served = update.version
                self._condition.notify_all()  # engines that wait for a file
                while not versions:  # all were being restarted: they come back with these weights
                    versions = [update.version for engine in self._engines if engine.state == "ready"]
                    if all(engine.state == "lost" for engine in self._engines):
                        raise NoEngines(f"no rollout engine is left; the last one: {self._engines[-1].why}")
                    if not versions:
                        self._condition.wait(1.0)
            return versions

    def _send(
        self,
        update: WeightUpdate | ChannelUpdate,
        engines: Sequence[_Engine],
        versions: list[int],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Have engines load an update; what each holds then is added to `versions`. Those that die are restarted."""
        from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

        sent = [(engine, engine.actor.update_weights.remote(update)) for engine in engines]
        deadline = time.perf_counter() + self._config.start_timeout_s
        meanwhile()
        for engine, reference in sent:
            try:
                versions.append(_get(reference, max(deadline - time.perf_counter(), 0.0)))
            except GetTimeoutError:
                raise WeightSyncFailed(
                    f"weights {update.version}: engine {engine.index} did not finish within "
                    f"{self._config.start_timeout_s:g} s; {self._stage(engine)}"
                ) from None
            except (ActorDiedError, ActorUnavailableError, EngineFailed, StaleEngine) as error:
                self._recover(engine, f"{type(error).__name__}: {error}", kill=isinstance(error, EngineFailed))
            except Exception as error:
                raise WeightSyncFailed(f"weights {update.version}, engine {engine.index}: {error}") from error

    # Weights through a channel (`memento.rollout.weight_channel`).

    @property
    def workers_per_engine(self) -> int:
        """Processes of an engine that hold weights."""
        return self._config.tensor_parallel_size if self._gpus else 1

    def members(self) -> tuple[tuple[int, int], ...]:
        """The engines in service, each with how often it was restarted: who could be in a channel now."""
        with self._condition:
            return tuple((engine.index, engine.life) for engine in self._engines if engine.state == "ready")

    def join_channel(self, settings: ChannelSettings, members: Sequence[tuple[int, int]]) -> None:
        """Open the engines' ends of a channel, in the order of `members`. Returns when all ends are there.

        Raises:
            ChannelBroken: an engine could not; the message names it.
        """
        joins = [
            (
                index,
                self._engines[index].actor.join_channel.remote(
                    settings, settings.senders + i * self.workers_per_engine
                ),
            )
            for i, (index, _) in enumerate(members)
        ]
        deadline = time.perf_counter() + settings.timeout_s + INFO_TIMEOUT_S  # the ends themselves keep the first
        for index, reference in joins:
            try:
                _get(reference, max(deadline - time.perf_counter(), 0.0))
            except Exception as error:
                raise ChannelBroken(f"engine {index} did not join: {type(error).__name__}: {error}") from error

    def receive_weights(
        self, update: ChannelUpdate, members: Sequence[tuple[int, int]], send: Callable[[], None]
    ) -> list[int]:
        """As `update_weights`, through the channel that `members` have joined.

        Args:
            update: what comes.
            members: all ends but the learner's.
            send: called when all engines listen; sends, and returns.

        Returns:
            The version each engine holds that took them. The others are restarted, and wait for a file: see
            `lacks_weights`.

        Raises:
            ChannelBroken: the engines in service are not `members` any more; nothing was sent.
            WeightSyncFailed: see `update_weights`.
        """
        with self._update_lock:
            with self._condition:
                if self.members() != tuple(members):
                    raise ChannelBroken("an engine has come or gone since the channel was opened")
                ready = [self._engines[index] for index, _ in members]
                self._update = update
            versions: list[int] = []
            self._send(update, ready, versions, send)
            with self._condition:
                self._served = max(versions, default=self._served)
            return versions

    def lacks_weights(self) -> bool:
        """Whether an engine came back after weights had been sent through a channel: it waits for `update_weights`."""
        with self._condition:
            return any(engine.state == "waiting" for engine in self._engines)

    # Sharing GPUs with the learner.

    def sleep(self) -> None:
        """Have all engines leave their GPU's memory to the learner. No group may be running, and none start."""
        self._asleep = True
        self._tell_all("sleep")

    def wake(self, part: str) -> None:
        """Bring a part of `memento.rollout.engine.SLEEPING` back in all engines: ``weights`` before they are replaced,
        ``kv_cache`` after. Nothing happens where nobody sleeps."""
        if self._asleep:
            self._tell_all("wake", part)
        self._asleep = self._asleep and part != SLEEPING[-1]

    def _tell_all(self, method: str, *arguments: object) -> None:
        with self._condition:
            ready = [engine for engine in self._engines if engine.state == "ready"]
        told = [(engine, getattr(engine.actor, method).remote(*arguments)) for engine in ready]
        deadline = time.perf_counter() + self._config.start_timeout_s
        for engine, reference in told:
            try:
                _get(reference, max(deadline - time.perf_counter(), 0.0))
            except Exception as error:  # dead, stuck or half asleep: all are mended by starting it again
                self._recover(engine, f"{method}: {type(error).__name__}: {error}", kill=True)

    # Looking.

    def infos(self) -> list[EngineInfo | None]:
        """What each engine says about itself; None for one that does not answer."""

        def ask(engine: _Engine) -> EngineInfo | None:
            from ray.exceptions import RayError

            try:
                return self._info(engine) if engine.state == "ready" else None
            except RayError:
                return None

        with ThreadPoolExecutor(len(self._engines)) as threads:
            return list(threads.map(ask, self._engines))

    def metrics(self) -> dict[str, float]:
        """Numbers for the run's log. Those per second and ``preemptions`` cover the time since the last call."""
        infos = self.infos()
        tokens = busy_s = 0.0
        preemptions = active = 0
        with self._condition:
            for engine, info in zip(self._engines, infos, strict=True):
                if info is None:
                    continue
                if info.tokens < engine.tokens:  # restarted since: it counts from 0 again
                    engine.tokens, engine.busy_s, engine.preemptions = 0, 0.0, 0
                tokens += info.tokens - engine.tokens
                busy_s += info.busy_s - engine.busy_s
                preemptions += info.preemptions - engine.preemptions
                active += info.active
                engine.tokens, engine.busy_s, engine.preemptions = info.tokens, info.busy_s, info.preemptions
            now = time.perf_counter()
            wall_s, self._began_metrics = now - self._began_metrics, now
            states = [engine.state for engine in self._engines]
            return {
                "engine/tokens_per_s": tokens / wall_s if wall_s > 0 else 0.0,
                "engine/busy_tokens_per_s": tokens / busy_s if busy_s > 0 else 0.0,  # of one engine while it works
                "engine/busy_fraction": busy_s / (wall_s * len(states)) if wall_s > 0 else 0.0,
                "engine/running": float(active),
                "engine/preemptions": float(preemptions),
                "engine/ready": float(states.count("ready")),
                "engine/restarts": float(self._counts["restarts"]),
                "engine/requeued": float(self._counts["requeued"]),
                "engine/timeouts": float(self._counts["timeouts"]),
                "engine/hung": float(self._counts["hung"]),
                "engine/dropped": float(self._counts["dropped"]),
                "engine/version": float(self._served),
            }

    def close(self) -> None:
        """End all engines. Calls that still wait fail. Safe to call again."""
        import ray

        with self._condition:
            if self._closed:
                return
            self._closed = True
            self._condition.notify_all()
        if ray.is_initialized():
            for engine in self._engines:
                ray.kill(engine.actor, no_restart=True)

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_FIX = "Lower rollout.engines or rollout.cpus, or join a larger cluster."


def _next(stream: Any, deadline_s: float) -> Any:
    """The next item of a streaming call, or the actor's own exception, before `deadline_s` on `time.perf_counter`."""
    import ray
    from ray.exceptions import GetTimeoutError

    ready, _ = ray.wait([stream], timeout=max(deadline_s - time.perf_counter(), 0.0), fetch_local=False)
    if not ready:
        raise GetTimeoutError("no further trajectory")
    try:
        reference = next(stream)
    except StopIteration:
        raise EngineFailed("the engine ended a group before its last trajectory") from None
    return _get(reference, max(deadline_s - time.perf_counter(), 1.0))


def _get(reference: Any, timeout_s: float) -> Any:
    """`ray.get` that raises the actor's own exception instead of Ray's wrapper around it."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None


def _resources(amounts: Mapping[str, float], names: Iterable[str]) -> str:
    return ", ".join(f"{amounts.get(name, 0):g} {name}" for name in names)
