"""The same engine with its core in a process of its own: vLLM's `AsyncLLM`, driven by an event loop on one thread.

    callers (event loop)        the thread: an event loop, AsyncLLM         the core's process
    submit(requests) ---------> a task for each request          <--ZMQ-->  scheduler, model
    load_weights(...) --------> pause, load, drop old KV, resume <--ZMQ-->  (between two steps)

Python of the core and Python of the actor no longer share one interpreter lock, for a second process and a message a
step. `memento.rollout.engine_thread.EngineDriver` says what its callers rely on.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from memento.rollout.engine_thread import EngineFailed, EngineRequest, settle

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

PARENT_VARIABLE = "MEMENTO_ENGINE_PARENT"
"""The process id of the actor, for the core: it ends when the actor does (`memento.rollout.weight_transfer`)."""


class EngineProcess:
    """Starts the core, and answers with futures.

    Args:
        arguments: keyword arguments of ``vllm.AsyncEngineArgs``.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.started: Future[None] = Future()
        self.steps, self.busy_s = 0, 0.0
        self._arguments = dict(arguments)
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[Future[Any], asyncio.Task[None]] = {}
        self._llm: AsyncLLM | None = None
        self._failure: BaseException | None = None
        self._active = 0
        self._last_step_s: float | None = None  # while there is work
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """See `EngineDriver`."""
        return self._active

    @property
    def failure(self) -> BaseException | None:
        """See `EngineDriver`; a core that died is noticed here even if nobody asked it for anything."""
        if self._failure is None and self._llm is not None and self._llm.errored:
            self._failure = EngineFailed("the process of the engine core is gone")
        return self._failure

    def submit(self, requests: Sequence[EngineRequest]) -> list[Future[RequestOutput]]:
        """See `EngineDriver`."""
        return [self._start(self._generate(request)) for request in requests]

    def load_weights(self, update: Mapping[str, Any], version: str, on_stage: Callable[[str], None]) -> Future[None]:
        """See `EngineDriver`."""
        return self._start(self._load(update, version, on_stage))

    def label(self, version: str) -> Future[None]:
        """See `EngineDriver`."""
        return self._start(self._label(version))

    def join_channel(self, info: Mapping[str, Any]) -> Future[None]:
        """See `EngineDriver`."""
        return self._start(self._join(info))

    def sleep(self) -> Future[None]:
        """See `EngineDriver`."""
        return self._start(self._sleep())

    def wake(self, tag: str) -> Future[None]:
        """See `EngineDriver`."""
        return self._start(self._wake(tag))

    def stop(self, timeout_s: float = 10.0) -> None:
        """See `EngineDriver`."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)

    # On the thread.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        os.environ[PARENT_VARIABLE] = str(os.getpid())
        try:
            self._llm = self._loop.run_until_complete(self._build())
        except BaseException as error:
            self._failure = error
            self.started.set_exception(error)
            return
        self.started.set_result(None)
        self._loop.run_forever()
        self._failure = self._failure or EngineFailed("it was stopped")
        self._llm.shutdown()

    async def _build(self) -> AsyncLLM:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments: dict[str, Any] = self._arguments | {"disable_log_stats": False}  # the loggers count the steps
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[self._step_counter()])

    def _step_counter(self) -> Any:
        from vllm.v1.metrics.loggers import StatLoggerBase

        driver = self

        class StepCounter(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

            def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
                now = time.perf_counter()
                driver.steps += 1
                if driver._last_step_s is not None:
                    driver.busy_s += now - driver._last_step_s
                waits = scheduler_stats is None or scheduler_stats.num_running_reqs or scheduler_stats.num_waiting_reqs
                driver._last_step_s = now if waits else None

            def log_engine_initialized(self) -> None: ...

        return StepCounter

    def _start(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run a coroutine on the thread's loop; its result, or error, becomes the future's."""
        future: Future[Any] = Future()
        if self.failure is not None:
            work.close()
            settle(future, error=self._unusable())
            return future

        def begin() -> None:
            if not future.cancelled():
                self._tasks[future] = self._loop.create_task(self._answer(work, future))
            else:
                work.close()

        self._loop.call_soon_threadsafe(begin)
        future.add_done_callback(lambda f: self._loop.call_soon_threadsafe(self._cancel, f) if f.cancelled() else None)
        return future

    def _cancel(self, future: Future[Any]) -> None:
        if (task := self._tasks.get(future)) is not None:
            task.cancel()

    async def _answer(self, work: Coroutine[Any, Any, Any], future: Future[Any]) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            settle(future, await work)
        except asyncio.CancelledError:
            pass
        except (EngineDeadError, EngineGenerateError, EngineFailed) as error:
            self._failure = self._failure or error
            settle(future, error=self._unusable())
        except Exception as error:  # vLLM refuses this request; the engine is as it was
            settle(future, error=error)
        finally:
            self._tasks.pop(future, None)

    def _unusable(self) -> EngineFailed:
        return EngineFailed(f"{type(self._failure).__name__}: {self._failure}")

    async def _generate(self, request: EngineRequest) -> RequestOutput:
        from vllm.inputs.engine import tokens_input

        assert self._llm is not None
        self._last_step_s = self._last_step_s or time.perf_counter()
        self._active += 1
        prompt = tokens_input(request.prompt_ids)
        try:
            outputs = [o async for o in self._llm.generate(prompt, request.params, request.request_id)]
        finally:
            self._active -= 1
        if not outputs or not outputs[-1].finished:
            raise EngineFailed(f"request {request.request_id} ended without an output")
        return outputs[-1]

    async def _load(self, update: Mapping[str, Any], version: str, on_stage: Callable[[str], None]) -> None:
        llm = self._llm
        assert llm is not None
        on_stage("pause")
        await llm.pause_generation(mode="keep", clear_cache=False)
        try:
            on_stage("load")
            await llm.collective_rpc("start_weight_update")
            await llm.collective_rpc("update_weights", args=(dict(update),))
            await llm.collective_rpc("finish_weight_update")
            on_stage("drop the old KV")
            if not await llm.reset_prefix_cache(reset_running_requests=True):
                raise EngineFailed("the prefix cache could not be reset; it holds keys of the old weights")
            await llm.update_weight_version(version)
            on_stage("resume")
            await llm.resume_generation()
        except EngineFailed:
            raise
        except Exception as error:
            raise EngineFailed(f"weights {version} did not load: {type(error).__name__}: {error}") from error

    async def _label(self, version: str) -> None:
        assert self._llm is not None
        await self._llm.update_weight_version(version)

    async def _join(self, info: Mapping[str, Any]) -> None:
        assert self._llm is not None
        await self._llm.collective_rpc("init_weight_transfer_engine", args=(dict(info),))

    async def _sleep(self) -> None:
        assert self._llm is not None
        await self._llm.sleep(level=1)

    async def _wake(self, tag: str) -> None:
        assert self._llm is not None
        await self._llm.wake_up([tag])
