"""A vLLM engine as a Ray actor: groups in, trajectories out, weights replaced in place.

`RolloutEngine` is a plain class; `memento.rollout.pool.RolloutPool` makes actors of it. It holds no vLLM call: those
all happen on its `EngineThread`. What is here is the meaning: seeds, stop tokens, log-probabilities, weight versions,
and the check that the engine evicted exactly what the tokens ask for.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memento.chat import encode_prompt
from memento.config import FormatConfig, RolloutConfig
from memento.errors import UserError
from memento.format import Eviction, MementoFormat, evictions
from memento.problems import Record
from memento.rollout.channel_records import ChannelSettings, ChannelUpdate, address_for
from memento.rollout.engine_thread import EngineDriver, EngineFailed, EngineRequest, EngineThread
from memento.rollout.weights import WeightUpdate, verify_weights
from memento.trajectory import FinishReason, RolloutRequest, Trajectory, VersionSpan, sample_seed

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

FIRST_VERSION = 0
"""The weights of the model folder."""

SLEEPING = ("weights", "kv_cache")
"""What an engine gives up when it sleeps, by vLLM's names."""

CPU_KV_CACHE_MIB = 1024
"""KV pool of an engine on CPU that names none: vLLM's own rule takes most of the machine's memory for each engine."""


class StaleEngine(RuntimeError):
    """The engine is younger than its caller thinks: it was restarted and lacks the current weights."""


class RolloutFault(RuntimeError):
    """An engine answered with something that cannot be trained on. It is never repaired with a made-up number."""


class EngineInfo(Record):
    """What an engine says about itself.

    Attributes:
        version: weights it samples from now; None before `RolloutEngine.start`.
        stage: what it is busy with besides sampling (``start``, ``update 12: load``, ...), or ``ready``.
        active: completions that wait or run.
        completions, tokens, preemptions, evictions: of finished completions, since the start.
        steps, busy_s: engine steps, and the seconds spent inside them.
        start_s: seconds from the request to start until it was ready.
        update_s: seconds of each stage of the last weight update.
        failure: why it is unusable, if it is.
    """

    index: int
    version: int | None
    stage: str
    active: int
    completions: int
    tokens: int
    preemptions: int
    evictions: int
    steps: int
    busy_s: float
    start_s: float
    update_s: dict[str, float]
    failure: str | None
    pid: int
    node: str


@dataclass(frozen=True, slots=True)
class _Model:
    """What the event loop needs to know about the model."""

    tokenizer: Any
    fmt: MementoFormat
    stop_ids: tuple[int, ...]
    max_model_len: int


class RolloutEngine:
    """One engine. All methods are coroutines and may run at the same time.

    Args:
        config: how the engine is built.
        model: Hugging Face folder or hub id.
        format: how the delimiters are used; their ids come from the model's tokenizer.
        index: which engine of the pool it is.
    """

    def __init__(self, config: RolloutConfig, model: str, format: FormatConfig, index: int) -> None:
        # Nothing is built here: a restarted actor must not look ready, and an error raised in a constructor reaches
        # the driver as "the actor died" instead of as itself.
        self._config, self._model_name, self._format, self._index = config, model, format, index
        self._thread: EngineDriver | None = None
        self._model: _Model | None = None
        self._version: int | None = None
        self._stage = "not started"
        self._start_s = 0.0
        self._update_s: dict[str, float] = {}
        self._completions = self._tokens = self._preemptions = self._evictions = 0
        self._serial = 0
        self._asleep: list[str] = []

    async def start(self, update: WeightUpdate | None = None) -> EngineInfo:
        """Build the engine; with `update`, load those weights before it is called ready.

        Raises:
            UserError: the model cannot be served as configured.
            EngineFailed: vLLM did not start.
        """
        if self._version is not None:
            return await self.info()
        began = time.perf_counter()
        self._stage = "start: load libraries and tokenizer"
        try:
            set_environment(self._config)
            self._model = await asyncio.to_thread(_read_model, self._model_name, self._format, self._config)
            self._stage = "start: build the vLLM engine"
            arguments = engine_arguments(self._config, self._model_name, self._model.fmt)
            self._thread = start_driver(arguments, self._config.engine_process)
            await asyncio.wrap_future(self._thread.started)
        except UserError:
            raise
        except ValueError as error:  # how vLLM answers to settings that do not go together
            raise UserError(f"vLLM refuses the rollout settings: {' '.join(str(error).split())}") from error
        except Exception as error:
            raise EngineFailed(f"engine {self._index} did not start: {type(error).__name__}: {error}") from error
        if update is None:
            await asyncio.wrap_future(self._thread.label(str(FIRST_VERSION)))
            self._version = FIRST_VERSION
        else:
            await self.update_weights(update)
        self._start_s = time.perf_counter() - began
        self._stage = "ready"
        return await self.info()

    async def info(self) -> EngineInfo:
        """Its state now. Answers even while the engine is busy or being built."""
        import socket

        thread = self._thread
        return EngineInfo(
            index=self._index,
            version=self._version,
            stage=self._stage,
            active=thread.active if thread else 0,
            completions=self._completions,
            tokens=self._tokens,
            preemptions=self._preemptions,
            evictions=self._evictions,
            steps=thread.steps if thread else 0,
            busy_s=thread.busy_s if thread else 0.0,
            start_s=self._start_s,
            update_s=self._update_s,
            failure=repr(thread.failure) if thread and thread.failure else None,
            pid=os.getpid(),
            node=socket.gethostname(),
        )

    async def generate(
        self, request: RolloutRequest, indices: Sequence[int] | None = None, at_least: int = FIRST_VERSION
    ) -> tuple[Trajectory, ...]:
        """Complete a group, or some of its samples.

        Args:
            request: the group.
            indices: sample indices, each in ``[0, group_size)``; null for all of them.
            at_least: the oldest weight version the caller accepts.

        Returns:
            One trajectory for each index, in that order.

        Raises:
            UserError: the prompt leaves no room for a completion. The engine goes on.
            StaleEngine: it holds older weights than `at_least`, or none yet.
            RolloutFault: a completion came back without a log-probability, or with other evictions than its tokens ask
                for.
            EngineFailed: the engine broke.
        """
        indices = range(request.group_size) if indices is None else indices
        done = {t.sample_index: t async for t in self.stream(request, indices, at_least)}
        return tuple(done[index] for index in indices)

    async def stream(
        self, request: RolloutRequest, indices: Sequence[int], at_least: int = FIRST_VERSION
    ) -> AsyncIterator[Trajectory]:
        """As `generate`, each trajectory as soon as it is finished. Whoever stops listening aborts the rest."""
        thread, model, version = self._thread, self._model, self._version
        if thread is None or model is None or version is None or version < at_least:
            raise StaleEngine(f"engine {self._index} holds weights {version}, {at_least} are current")
        prompt_ids = encode_prompt(model.tokenizer, request.problem.prompt)
        requests = [self._engine_request(request, index, prompt_ids, model) for index in indices]
        arrived = time.perf_counter()
        futures = [asyncio.wrap_future(future) for future in thread.submit(requests)]

        async def one(index: int, future: asyncio.Future[RequestOutput]) -> Trajectory:
            output = await future
            return self._trajectory(request, index, output, prompt_ids, time.perf_counter() - arrived, model)

        tasks = [asyncio.ensure_future(one(i, f)) for i, f in zip(indices, futures, strict=True)]
        try:
            for task in asyncio.as_completed(tasks):
                yield await task
        finally:
            for task in tasks:  # nothing happens to those that are done
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def join_channel(self, settings: ChannelSettings, first_rank: int) -> None:
        """Open this engine's ends of a weight channel, between two steps. Returns when all ends are there.

        Args:
            settings: of the channel.
            first_rank: in the channel, of this engine's first worker.
        """
        if self._thread is None:
            raise StaleEngine(f"engine {self._index} was not started")
        self._stage = "join the weight channel"
        try:
            host = address_for(settings.address)
            info = {"settings": settings.model_dump(mode="json"), "first_rank": first_rank, "host": host}
            await asyncio.wrap_future(self._thread.join_channel(info))
        finally:
            self._stage = "ready"

    async def sleep(self) -> None:
        """Leave the GPU's memory to somebody else until `wake`. Nothing may be running."""
        if self._thread is not None and not self._asleep:
            await asyncio.wrap_future(self._thread.sleep())
            self._asleep += SLEEPING
            self._stage = "asleep"

    async def wake(self, part: str) -> None:
        """Bring a part of `SLEEPING` back. An engine that is awake, because it was restarted, stays so."""
        if self._thread is not None and part in self._asleep:
            await asyncio.wrap_future(self._thread.wake(part))
            self._asleep.remove(part)
            self._stage = "ready" if not self._asleep else "asleep"

    async def update_weights(self, update: WeightUpdate | ChannelUpdate) -> int:
        """Replace the weights between two steps. Running completions go on under the new ones, exactly.

        They lose their KV and are computed again, evictions included, so that no key of the old weights is left; the
        prefix cache goes with it. A file of a version that is loaded already is not loaded again.

        Returns:
            The version the engine samples from now.

        Raises:
            WeightsCorrupt: the file is not what was written. The engine goes on with the weights it had.
            EngineFailed: the load broke half-way; the engine is unusable.
        """
        if self._thread is None:
            raise StaleEngine(f"engine {self._index} was not started")
        if self._version == update.version and isinstance(update, WeightUpdate):
            return update.version

        stages: list[tuple[str, float]] = []

        def on_stage(stage: str) -> None:
            self._stage = f"update {update.version}: {stage}"
            stages.append((stage, time.perf_counter()))

        try:
            on_stage("verify")  # while the engine goes on sampling
            if isinstance(update, WeightUpdate):
                await asyncio.to_thread(verify_weights, update)
            on_stage("wait for the current step")
            payload = {"update": update.model_dump(mode="json")}
            await asyncio.wrap_future(self._thread.load_weights(payload, str(update.version), on_stage))
        finally:
            self._stage = "ready"
        ends = [began for _, began in stages[1:]] + [time.perf_counter()]
        self._update_s = {stage: end - began for (stage, began), end in zip(stages, ends, strict=True)}
        self._version = update.version
        return update.version

    def _engine_request(
        self, request: RolloutRequest, index: int, prompt_ids: list[int], model: _Model
    ) -> EngineRequest:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if not 0 <= index < request.group_size:
            raise ValueError(f"sample index {index} is outside a group of {request.group_size}")
        room = model.max_model_len - len(prompt_ids)
        if room < 1:
            raise UserError(
                f"problem {request.problem.id!r}: its prompt has {len(prompt_ids)} tokens, and the engine takes "
                f"{model.max_model_len} tokens of prompt and completion together. Raise rollout.max_model_len, or "
                "leave the problem out."
            )
        sampling = request.sampling
        self._serial += 1
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=min(sampling.max_tokens, room),
            seed=sample_seed(request.seed, request.group_id, index),
            stop_token_ids=list(model.stop_ids),
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,  # once, at the end
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"memento": {"evict": request.evict, "prompt_len": len(prompt_ids)}},
        )
        return EngineRequest(f"{request.group_id}#{index}#{self._serial}", prompt_ids, params)

    def _trajectory(
        self,
        request: RolloutRequest,
        index: int,
        output: RequestOutput,
        prompt_ids: list[int],
        seconds: float,
        model: _Model,
    ) -> Trajectory:
        from memento.rollout.request_statistics import eviction_stats

        completion = output.outputs[0]
        what = f"{request.group_id}, sample {index}"
        if completion.finish_reason not in ("stop", "length"):
            reason = completion.stop_reason or completion.finish_reason
            raise UserError(f"{what}: the engine refused the request: {reason}.")
        completion_ids = list(completion.token_ids)
        logprobs = sampled_logprobs(completion.logprobs, completion_ids, what)
        spans = tuple(VersionSpan(span.start, span.end, int(span.version)) for span in completion.weight_versions or ())
        if not spans or spans[0].start != 0 or spans[-1].end != len(completion_ids):
            raise RolloutFault(f"{what}: weight versions {spans} do not cover its {len(completion_ids)} tokens")
        stats = eviction_stats(output)
        fmt = model.fmt if request.evict else model.fmt.without_eviction()
        token_ids = prompt_ids + completion_ids
        # The last sampled token is never computed, so an eviction that waits for it does not happen any more.
        expected = [Eviction(*e) for e in evictions(token_ids, fmt, len(prompt_ids)) if e[0] < len(token_ids) - 1]
        if list(stats.evictions) != expected:
            raise RolloutFault(f"{what}: the engine evicted {stats.evictions}, its tokens ask for {expected}")
        self._completions += 1
        self._tokens += len(completion_ids)
        self._preemptions += stats.preemptions
        self._evictions += len(stats.evictions)
        ended = completion_ids[-1] in model.stop_ids
        return Trajectory(
            problem_id=request.problem.id,
            group_id=request.group_id,
            sample_index=index,
            prompt_ids=tuple(prompt_ids),
            completion_ids=tuple(completion_ids),
            rollout_logprobs=logprobs,
            forced=stats.forced_positions,
            text=model.tokenizer.decode(completion_ids[:-1] if ended else completion_ids, skip_special_tokens=False),
            finish_reason=FinishReason(completion.finish_reason),
            weight_versions=spans,
            evictions=stats.evictions,
            evicted_tokens=stats.tokens_evicted,
            peak_kv_tokens=stats.peak_tokens,
            peak_kv_pages=stats.peak_pages,
            kv_area_tokens=stats.area,
            preemptions=stats.preemptions,
            seed=sample_seed(request.seed, request.group_id, index),
            temperature=request.sampling.temperature,
            evict=request.evict,
            engine=self._index,
            seconds=seconds,
        )


def sampled_logprobs(logprobs: Any, token_ids: Sequence[int], what: str) -> tuple[float, ...]:
    """The sampled tokens' log-probabilities from vLLM's flat record.

    Raises:
        RolloutFault: one is missing, belongs to another token, or is not finite.
    """
    if logprobs is None or len(logprobs.start_indices) != len(token_ids):
        there = 0 if logprobs is None else len(logprobs.start_indices)
        raise RolloutFault(f"{what}: {len(token_ids)} tokens but {there} log-probabilities")
    if [logprobs.token_ids[start] for start in logprobs.start_indices] != list(token_ids):
        raise RolloutFault(f"{what}: the log-probabilities belong to other tokens")
    values = tuple(logprobs.logprobs[start] for start in logprobs.start_indices)
    for position, value in enumerate(values):
        if not math.isfinite(value):
            raise RolloutFault(f"{what}: the log-probability of completion token {position} is {value}")
    return values


def set_environment(config: RolloutConfig) -> None:
    """Set this process's environment for one engine. Must run before vLLM or torch is imported in it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if config.engine_process else "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the eviction plugin extends the V1 runner
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its dozen warnings at each start hide ours
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("vllm").setLevel(logging.ERROR)  # until vLLM reads its own level, it warns by Python's default
    os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    if config.device != "cuda":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # several engines share the cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(config.cpus)))
        if config.enforce_eager:
            # vLLM compiles one helper of the sampler even so: 16 s, and a C++ compiler, for no gain here.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"


def engine_arguments(config: RolloutConfig, model: str, fmt: MementoFormat) -> dict[str, Any]:
    """Keyword arguments of ``vllm.EngineArgs`` for a rollout engine."""
    from memento.rollout.plugin import eviction_args

    arguments: dict[str, Any] = {
        "model": model,
        "dtype": config.dtype,
        "skip_tokenizer_init": True,  # ids in, ids out
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "tensor_parallel_size": config.tensor_parallel_size if config.device == "cuda" else 1,
        # Inside of a placement group vLLM would hand its workers to Ray, which has no room for them in there.
        "distributed_executor_backend": "mp" if config.device == "cuda" and config.tensor_parallel_size > 1 else None,
        "enforce_eager": config.enforce_eager,
        "enable_sleep_mode": config.sleep and config.device == "cuda",  # vLLM refuses it elsewhere
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": {"backend": "memento"},
        "worker_extension_cls": "memento.rollout.weight_transfer.WorkerExtension",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **eviction_args(fmt, restart=config.restart),
    }
    pool_mib = config.kv_cache_mib
    if pool_mib is None and config.device != "cuda":
        pool_mib = CPU_KV_CACHE_MIB
    if pool_mib is not None:
        arguments["kv_cache_memory_bytes"] = pool_mib << 20
    if config.block_size is not None:
        arguments["block_size"] = config.block_size
    return arguments


def start_driver(arguments: dict[str, Any], engine_process: bool) -> EngineDriver:
    """Start an engine whose core runs on a thread of this process, or in a process of its own."""
    if not engine_process:
        return EngineThread(lambda: build_engine(arguments))
    from memento.rollout.engine_process import EngineProcess

    return EngineProcess(arguments)


def build_engine(arguments: dict[str, Any]) -> LLMEngine:
    """Build the engine in this process (and, with tensor parallelism, its worker processes)."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine.from_engine_args(EngineArgs(**arguments))


def _read_model(model: str, format: FormatConfig, config: RolloutConfig) -> _Model:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        hf_config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"model {model}: {str(error).splitlines()[0]}") from error
    try:
        stop = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # the file is optional
        stop = None
    stop = hf_config.eos_token_id if stop is None else stop
    stop = tokenizer.eos_token_id if stop is None else stop
    if stop is None:
        raise UserError(f"model {model} names no end token: set eos_token_id in its generation_config.json.")
    limit = config.max_model_len or getattr(hf_config, "max_position_embeddings", None)
    if limit is None:
        raise UserError(f"model {model} does not say how long its context is: set rollout.max_model_len.")
    return _Model(tokenizer, format.bind(tokenizer), tuple(stop) if isinstance(stop, list) else (stop,), limit)
