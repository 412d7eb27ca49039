"""One thread that owns a vLLM engine. Everything that touches vLLM happens on it.

    callers (event loop)                 the thread
    submit(requests) --+                 while running:
    abort(ids) --------+--> commands -->   carry out the commands that wait
    load_weights(...) -+                   engine.step()  --> futures of finished requests

A command therefore runs *between* two steps: nothing is in flight, which is what makes a weight update in the middle of
running requests exact. `memento.rollout.engine_process.EngineProcess` is the same to its callers, with the engine core
in a process of its own.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from memento.errors import RunFailed

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

T = TypeVar("T")


class EngineFailed(RunFailed):
    """The engine is unusable from here on: its process must be started again."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One completion, as vLLM takes it."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams


class EngineDriver(Protocol):
    """What `memento.rollout.engine.RolloutEngine` needs of an engine, wherever its core runs. Callable from any thread.

    Attributes:
        started: settled when the engine takes work, or did not start.
        steps, busy_s: engine steps so far, and the seconds spent in them. Work without steps is an engine that hangs.
    """

    started: Future[None]
    steps: int
    busy_s: float

    @property
    def active(self) -> int:
        """Requests that are waiting or running."""
        ...

    @property
    def failure(self) -> BaseException | None:
        """What made the engine unusable, else None."""
        ...

    def submit(self, requests: Sequence[EngineRequest]) -> list[Future[RequestOutput]]:
        """Start requests together. Cancelling a future aborts its request."""
        ...

    def load_weights(self, update: Mapping[str, Any], version: str, on_stage: Callable[[str], None]) -> Future[None]:
        """Replace the weights while nothing is in flight, and drop every key of the old ones.

        Args:
            update: what the worker's weight transfer takes.
            version: the label of every token sampled from then on.
            on_stage: told what it is at, for the error of whoever loses patience.

        The future fails with `EngineFailed` if the load broke half-way: the engine is unusable then.
        """
        ...

    def label(self, version: str) -> Future[None]:
        """Label every token sampled from now on with a weight version."""
        ...

    def join_channel(self, info: Mapping[str, Any]) -> Future[None]:
        """Open the workers' ends of a weight channel; `info` is `memento.rollout.weight_transfer.ChannelInitInfo`."""
        ...

    def sleep(self) -> Future[None]:
        """Move the weights to host memory and drop the KV pool (vLLM's sleep mode, level 1). Nothing may be running."""
        ...

    def wake(self, tag: str) -> Future[None]:
        """Bring back ``weights`` or ``kv_cache``; with both it takes work again."""
        ...

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the engine; requests that still run fail."""
        ...


class _Command(NamedTuple):
    run: Callable[[LLMEngine], None]
    futures: Sequence[Future[Any]]


class EngineThread:
    """Builds the engine, steps it, and answers with futures.

    Args:
        build: makes the engine; runs on the thread.
    """

    def __init__(self, build: Callable[[], LLMEngine]) -> None:
        self.started: Future[None] = Future()
        self.busy_s, self.steps = 0.0, 0
        self._build = build
        self._commands: SimpleQueue[_Command] = SimpleQueue()
        self._requests: dict[str, Future[RequestOutput]] = {}
        self._failure: BaseException | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """Requests that are waiting or running."""
        return len(self._requests)

    @property
    def failure(self) -> BaseException | None:
        """What made the engine unusable, else None."""
        return self._failure

    def submit(self, requests: Sequence[EngineRequest]) -> list[Future[RequestOutput]]:
        """Start requests together. Cancelling a future aborts its request."""
        futures: list[Future[RequestOutput]] = [Future() for _ in requests]

        def add(engine: LLMEngine) -> None:
            from vllm.inputs.engine import tokens_input

            for request, future in zip(requests, futures, strict=True):
                if future.cancelled():
                    continue
                try:
                    engine.add_request(request.request_id, tokens_input(request.prompt_ids), request.params)
                except Exception as error:  # vLLM refuses this request; the engine is as it was
                    settle(future, error=error)
                else:
                    self._requests[request.request_id] = future

        for request, future in zip(requests, futures, strict=True):
            future.add_done_callback(lambda f, i=request.request_id: self._abort(i) if f.cancelled() else None)
        self._send(add, futures)
        return futures

    def call(self, function: Callable[[LLMEngine], T], *, fatal: tuple[type[BaseException], ...] = ()) -> Future[T]:
        """Run `function` on the engine between two steps.

        Args:
            function: its result, or its exception, becomes the future's.
            fatal: exceptions after which the engine is unusable.
        """
        future: Future[T] = Future()

        def run(engine: LLMEngine) -> None:
            try:
                result = function(engine)
            except fatal as error:
                settle(future, error=error)
                raise
            except Exception as error:
                settle(future, error=error)
            else:
                settle(future, result)

        self._send(run, [future])
        return future

    def load_weights(self, update: Mapping[str, Any], version: str, on_stage: Callable[[str], None]) -> Future[None]:
        """See `EngineDriver`."""

        def load(engine: LLMEngine) -> None:
            try:
                on_stage("load")
                engine.collective_rpc("start_weight_update")
                engine.collective_rpc("update_weights", args=(dict(update),))
                engine.collective_rpc("finish_weight_update")
                on_stage("drop the old KV")
                if not engine.reset_prefix_cache(reset_running_requests=True):
                    raise EngineFailed("the prefix cache could not be reset; it holds keys of the old weights")
            except EngineFailed:
                raise
            except Exception as error:
                raise EngineFailed(f"weights {version} did not load: {type(error).__name__}: {error}") from error
            engine.set_weight_version(version)

        return self.call(load, fatal=(EngineFailed,))

    def label(self, version: str) -> Future[None]:
        """See `EngineDriver`."""
        return self.call(lambda engine: engine.set_weight_version(version))

    def join_channel(self, info: Mapping[str, Any]) -> Future[None]:
        """See `EngineDriver`."""

        def join(engine: LLMEngine) -> None:
            engine.collective_rpc("init_weight_transfer_engine", args=(dict(info),))

        return self.call(join)

    def sleep(self) -> Future[None]:
        """See `EngineDriver`."""
        return self.call(lambda engine: engine.sleep(level=1))

    def wake(self, tag: str) -> Future[None]:
        """See `EngineDriver`."""

        def wake(engine: LLMEngine) -> None:
            engine.wake_up([tag])

        return self.call(wake)

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread; requests that still run fail."""
        self._stopping = True
        self._commands.put(_Command(lambda _: None, ()))  # wakes it
        self._thread.join(timeout_s)

    def _abort(self, request_id: str) -> None:
        def abort(engine: LLMEngine) -> None:
            if self._requests.pop(request_id, None) is not None:
                engine.abort_request([request_id])

        self._commands.put(_Command(abort, ()))

    def _send(self, run: Callable[[LLMEngine], None], futures: Sequence[Future[Any]]) -> None:
        self._commands.put(_Command(run, futures))
        if self._failure is not None or self._stopping:  # perhaps nobody reads the queue any more
            self._refuse_commands()

    def _unusable(self) -> EngineFailed:
        return EngineFailed(f"{type(self._failure).__name__}: {self._failure}" if self._failure else "it was stopped")

    def _run(self) -> None:
        try:
            engine = self._build()
        except BaseException as error:
            self._failure = error
            self.started.set_exception(error)
            return
        self.started.set_result(None)
        try:
            while not self._stopping:
                self._carry_out_commands(engine)
                if engine.has_unfinished_requests():
                    began = time.perf_counter()
                    outputs = engine.step()
                    self.busy_s += time.perf_counter() - began
                    self.steps += 1
                    for output in outputs:
                        if output.finished and (future := self._requests.pop(output.request_id, None)) is not None:
                            settle(future, output)  # type: ignore[arg-type]
        except BaseException as error:  # whatever it was, the engine's state is unknown now
            self._failure = error
        while self._requests:
            settle(self._requests.popitem()[1], error=self._unusable())
        self._refuse_commands()

    def _carry_out_commands(self, engine: LLMEngine) -> None:
        command = self._commands.get() if not engine.has_unfinished_requests() else self._next_command()
        while command is not None and not self._stopping:
            command.run(engine)
            command = self._next_command()

    def _refuse_commands(self) -> None:
        while (command := self._next_command()) is not None:
            for future in command.futures:
                settle(future, error=self._unusable())

    def _next_command(self) -> _Command | None:
        try:
            return self._commands.get_nowait()
        except Empty:
            return None


def settle(future: Future[T], result: T | None = None, error: BaseException | None = None) -> None:
    """Settle a future that its caller may have cancelled meanwhile."""
    with contextlib.suppress(InvalidStateError):
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]
