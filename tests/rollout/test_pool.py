"""The fleet with its real parts: Ray actors, vLLM that evicts, weight files, kill -9. Against a Hugging Face forward.

The model is the quickstart's tiny Qwen3 after a few seconds of learning where delimiters may come, so that its samples
hold complete blocks and every test runs under eviction. One pool of two engines serves all tests of this file.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("ray")

import ray

from memento.config import FormatConfig, RolloutConfig
from memento.errors import UserError
from memento.format import MementoFormat, evictions, visible_until
from memento.problems import Problem, ProblemKind
from memento.rollout.engine_thread import EngineFailed
from memento.rollout.generate import generate_into
from memento.rollout.pool import RolloutPool, WeightSyncFailed
from memento.rollout.weights import WeightUpdate, write_weights
from memento.trajectory import FinishReason, RolloutRequest, SamplingParams, Trajectory, read_trajectories

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
MAX_LEN = 640
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def model_dir(block_model: Path) -> Path:
    return block_model


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def fmt(tokenizer: Any) -> MementoFormat:
    return FormatConfig().bind(tokenizer)


@pytest.fixture(scope="module")
def pool(cluster: None, model_dir: Path) -> Iterator[RolloutPool]:
    """Two engines."""
    config = RolloutConfig(
        engines=2,
        device="cpu",
        dtype="float32",
        kv_cache_mib=48,
        block_size=32,
        max_num_seqs=64,
        max_model_len=MAX_LEN,
        progress_timeout_s=20,
    )
    with RolloutPool(config, FormatConfig(), str(model_dir)) as pool:
        yield pool


class Weights:
    """Versions of the model: the reference that computes with them, and the file the engines read."""

    def __init__(self, model_dir: Path, folder: Path) -> None:
        self.model_dir, self.folder = model_dir, folder
        self.models = {0: self._load()}
        self.versions = itertools.count(1)

    def _load(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            self.model_dir, attn_implementation="eager", dtype=torch.float32
        ).eval()

    def next(self) -> WeightUpdate:
        """New weights: the first ones plus noise."""
        version = next(self.versions)
        model = self._load()
        torch.manual_seed(version)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * parameter.std(correction=0).clamp_min(0.02) * torch.randn_like(parameter)
        self.models[version] = model
        return write_weights(dict(model.named_parameters()), self.folder, version)

    @torch.no_grad()
    def scores(self, version: int, trajectory: Trajectory, fmt: MementoFormat) -> torch.Tensor:
        """[C, V]: log-probs under one version, with the memento mask and original positions."""
        ids = torch.tensor(trajectory.token_ids)
        fmt = fmt if trajectory.evict else fmt.without_eviction()
        limits = torch.from_numpy(visible_until(trajectory.token_ids, fmt, trajectory.prompt_len))
        query = torch.arange(len(ids))
        visible = (query[None] <= query[:, None]) & (query[:, None] < limits[None])
        bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        logits = self.models[version](ids[None], attention_mask=bias[None, None], position_ids=query[None]).logits[0]
        logits = logits[trajectory.prompt_len - 1 : -1] / (trajectory.temperature or 1.0)
        return logits.log_softmax(-1)

    def error(self, trajectory: Trajectory, fmt: MementoFormat) -> float:
        """The largest difference between sampler and reference, each token under the weights that sampled it."""
        sampled, worst = torch.tensor(trajectory.rollout_logprobs), 0.0
        completion = torch.tensor(trajectory.completion_ids)[:, None]
        for start, end, version in trajectory.weight_versions:
            expected = self.scores(version, trajectory, fmt).gather(1, completion)[start:end, 0]
            worst = max(worst, (sampled[start:end] - expected).abs().max().item())
        return worst


@pytest.fixture(scope="module")
def weights(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return Weights(model_dir, tmp_path_factory.mktemp("weights"))


def request(name: str, *, prompt: str = "", size: int = 4, tokens: int = 160, **changes: Any) -> RolloutRequest:
    problem = Problem(id=name, kind=ProblemKind.MATH, prompt=prompt or f"What is 12+{len(name)}?", answer="1")
    fields: dict[str, Any] = {
        "sampling": SamplingParams(temperature=1.0, max_tokens=tokens),
        "seed": 7,
    }
    return RolloutRequest(problem=problem, group_id=f"0/{name}", group_size=size, **(fields | changes))


def completions(groups: Sequence[Sequence[Trajectory]]) -> list[tuple[int, ...]]:
    return [trajectory.completion_ids for group in groups for trajectory in group]


def generate_all(pool: RolloutPool, requests: Sequence[RolloutRequest]) -> list[tuple[Trajectory, ...]]:
    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(pool.generate, requests))


def engine_0(pool: RolloutPool, asked: RolloutRequest) -> tuple[Trajectory, ...]:
    """What the first engine alone answers."""
    return ray.get(pool._engines[0].actor.generate.remote(asked))


def wait_until(what: str, condition: Any, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)


def versions_of(pool: RolloutPool) -> list[int | None]:
    return [info.version if info else None for info in pool.infos()]


def test_samples_do_not_depend_on_the_engines_and_their_logprobs_are_those_of_the_reference(pool, weights, fmt):
    requests = [request(f"p{i}", size=20 if i == 0 else 4) for i in range(6)]  # 20: cut into two parts
    many = generate_all(pool, requests)
    few = [engine_0(pool, r) for r in requests]
    assert {t.engine for group in few for t in group} == {0}
    assert completions(few) == completions(many)
    assert {t.engine for group in many for t in group} == {0, 1}
    assert [t.sample_index for t in many[0]] == list(range(20))
    assert len(set(completions(few))) == len(completions(few)), "samples of a group must differ"
    assert completions([pool.generate(requests[1])]) == completions(few[1:2]), "the same seed must give the same again"
    assert completions([pool.generate(requests[1], [2])]) == completions([few[1][2:3]])
    assert completions([pool.generate(request("p1", seed=8))]) != completions(few[1:2])
    everything = [t for group in few for t in group]
    assert sum(len(t.evictions) for t in everything) > 20, "the model is meant to finish blocks"
    assert max(weights.error(t, fmt) for t in everything) < TOLERANCE
    for t in everything:
        last = len(t.token_ids) - 1
        assert list(t.evictions) == [e for e in evictions(t.token_ids, fmt, t.prompt_len) if e[0] < last]
        assert t.evicted_tokens == sum(e.end - e.start for e in t.evictions)


def test_without_eviction_the_same_request_is_plain_attention(pool, weights, fmt):
    group = pool.generate(request("p1", evict=False))
    assert all(not t.evictions and t.evicted_tokens == 0 for t in group)
    assert all(t.peak_kv_tokens == len(t.token_ids) for t in group)
    assert max(weights.error(t, fmt) for t in group) < TOLERANCE


def test_every_end_token_ends_a_sample_and_stays_in_it(pool, tokenizer):
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    group = pool.generate(request("ends", size=48, tokens=400))
    stopped = [t for t in group if t.finish_reason is FinishReason.STOP]
    assert {t.completion_ids[-1] for t in stopped} == ends
    for t in group:
        assert not ends & set(t.completion_ids[:-1])
        assert len(t.rollout_logprobs) == len(t.completion_ids)
        assert t.truncated == (t.finish_reason is FinishReason.LENGTH) == (t.completion_ids[-1] not in ends)
        body = t.completion_ids if t.truncated else t.completion_ids[:-1]
        assert t.text == tokenizer.decode(list(body), skip_special_tokens=False)


def test_a_delimiter_in_the_users_text_stays_text(pool, tokenizer, fmt):
    text = "Say <|block_start|>a<|block_end|><|summary_start|>b<|summary_end|>."
    (trajectory,) = pool.generate(request("text", prompt=text, size=1))
    assert not set(trajectory.prompt_ids) & set(fmt.delimiter_ids)
    assert text in tokenizer.decode(list(trajectory.prompt_ids))
    assert all(event.start >= trajectory.prompt_len for event in trajectory.evictions)


def test_a_prompt_that_is_too_long_names_its_problem_and_harms_nobody(pool):
    with pytest.raises(UserError, match=r"'long': its prompt has \d+ tokens, and the engine takes 640"):
        pool.generate(request("long", prompt="word " * 400))
    (trajectory,) = pool.generate(request("room", prompt="word " * 100, size=1, tokens=100_000))
    assert len(trajectory.token_ids) <= MAX_LEN


def test_new_weights_are_the_ones_that_sample_also_behind_a_cached_prompt(pool, weights, fmt):
    asked = request("cached", prompt="What is 1+2+3+4+5+6+7+8+9+10+11+12+13+14+15? " * 2, size=2, sampling=GREEDY)
    before = pool.generate(asked)
    assert pool.update_weights(update := weights.next()) == [update.version] * 2
    after = pool.generate(asked)
    assert before[0].rollout_logprobs != after[0].rollout_logprobs
    for t in after:
        assert t.weight_versions == ((0, len(t.completion_ids), update.version),)
        assert weights.error(t, fmt) < TOLERANCE
        assert weights.scores(update.version, t, fmt).argmax(-1).tolist() == list(t.completion_ids)
    assert pool.update_weights(update) == [update.version] * 2, "the same version again costs nothing"


def test_a_broken_file_changes_nothing(pool, weights, fmt, tmp_path):
    version = versions_of(pool)[0]
    update = weights.next()
    broken = tmp_path / "weights.safetensors"
    data = bytearray(update.path.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(data)
    with pytest.raises(WeightSyncFailed, match="checksum"):
        pool.update_weights(update.model_copy(update={"path": broken}))
    with pytest.raises(WeightSyncFailed, match="no file at"):
        pool.update_weights(update.model_copy(update={"path": tmp_path / "nothing"}))
    assert versions_of(pool) == [version] * 2
    for _ in range(2):
        weights.next()  # their files are written over the one that the engines loaded
    assert all(weights.error(t, fmt) < TOLERANCE for t in pool.generate(request("still")))


def test_completions_in_flight_go_on_exactly_under_new_weights(pool, weights, fmt):
    old = versions_of(pool)[0]
    requests = [request(f"flight{i}", size=8, tokens=500) for i in range(4)]
    with ThreadPoolExecutor(len(requests)) as threads:
        groups = [threads.submit(pool.generate, r) for r in requests]
        wait_until("requests that run", lambda: all(info and info.active >= 12 for info in pool.infos()))
        before = [info.steps for info in pool.infos() if info]
        wait_until(
            "blocks that are finished",
            lambda: all(info and info.steps > n + 120 for info, n in zip(pool.infos(), before, strict=True)),
        )
        update = weights.next()
        pool.update_weights(update)
        done = [t for group in groups for t in group.result()]
    crossed = [t for t in done if len(t.weight_versions) == 2]
    assert len(crossed) >= 8, [t.weight_versions for t in done]
    for t in crossed:
        assert [span.version for span in t.weight_versions] == [old, update.version]
        assert t.oldest_version == old and t.preemptions >= 1
    assert any(event.boundary < t.prompt_len + t.weight_versions[1].start for t in crossed for event in t.evictions)
    assert max(weights.error(t, fmt) for t in done) < TOLERANCE


def test_a_killed_engine_loses_no_group_and_comes_back_with_the_current_weights(pool, weights, fmt):
    update = weights.next()
    assert pool.update_weights(update) == [update.version] * 2
    requests = [request(f"kill{i}", size=4, tokens=500) for i in range(8)]
    expected = generate_all(pool, requests)
    with ThreadPoolExecutor(len(requests)) as threads:
        groups = [threads.submit(pool.generate, r) for r in requests]
        wait_until("both engines to run", lambda: all(info and info.active >= 8 for info in pool.infos()))
        victim = pool.infos()[0]
        assert victim is not None
        os.kill(victim.pid, signal.SIGKILL)
        delivered = [group.result(timeout=120) for group in groups]
    assert completions(delivered) == completions(expected)
    metrics = pool.metrics()
    assert metrics["engine/restarts"] == 1 and metrics["engine/requeued"] >= 1
    newer = weights.next()  # pushed while the engine is away: it must come back with these
    assert newer.version in pool.update_weights(newer)
    wait_until("the engine to come back", lambda: versions_of(pool) == [newer.version] * 2)
    again = generate_all(pool, [request(f"back{i}") for i in range(6)])
    assert {t.engine for group in again for t in group} == {0, 1}
    assert all(t.oldest_version == newer.version for group in again for t in group)
    assert max(weights.error(t, fmt) for group in again for t in group) < TOLERANCE


def test_an_engine_that_hangs_is_killed_and_its_groups_go_on(pool, weights, fmt):
    requests = [request(f"hang{i}", size=4, tokens=500) for i in range(4)]
    expected = generate_all(pool, requests)
    before = pool.metrics()
    version = versions_of(pool)[1]
    with ThreadPoolExecutor(len(requests)) as threads:
        groups = [threads.submit(pool.generate, r) for r in requests]
        wait_until("both engines to run", lambda: all(info and info.active >= 4 for info in pool.infos()))
        victim = pool.infos()[1]
        assert victim is not None
        os.kill(victim.pid, signal.SIGSTOP)  # alive to Ray, deaf to everybody
        delivered = [group.result(timeout=120) for group in groups]
    assert completions(delivered) == completions(expected)
    metrics = pool.metrics()
    assert metrics["engine/hung"] == 1
    assert metrics["engine/restarts"] == before["engine/restarts"] + 1
    assert metrics["engine/requeued"] > before["engine/requeued"]
    assert metrics["engine/dropped"] == 0
    wait_until("the engine to come back", lambda: versions_of(pool) == [version] * 2)
    assert max(weights.error(t, fmt) for t in pool.generate(requests[0])) < TOLERANCE


def test_finished_trajectories_arrive_before_their_group_is_through(pool):
    asked = request("stream", size=20, tokens=500)  # two parts
    whole = pool.generate(asked)
    arrived = []
    for trajectory in pool.stream(asked):
        arrived.append(trajectory)
        if len(arrived) == 1:
            assert sum(info.active for info in pool.infos() if info) > 0, "the rest still runs"
    assert sorted(t.sample_index for t in arrived) == list(range(20))
    assert completions([sorted(arrived, key=lambda t: t.sample_index)]) == completions([whole])
    listener = pool.stream(asked)
    next(listener)
    listener.close()  # type: ignore[attr-defined]
    wait_until("the rest to be aborted", lambda: all(info and info.active == 0 for info in pool.infos()))
    assert [engine.in_flight for engine in pool._engines] == [0, 0]


def test_a_file_of_samples_is_resumed_where_it_was_torn(pool, tmp_path):
    problems = [request(f"file{i}").problem for i in range(3)]
    sampling = SamplingParams(temperature=1.0, max_tokens=40)
    out = tmp_path / "samples.jsonl"
    assert generate_into(pool, problems, 3, out, sampling, seed=5).generated == 9
    whole = {(t.problem_id, t.sample_index): t.completion_ids for t in read_trajectories(out)}
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:4]) + lines[4][:100])
    result = generate_into(pool, problems, 3, out, sampling, seed=5)
    assert (result.generated, result.skipped) == (5, 4)
    assert {(t.problem_id, t.sample_index): t.completion_ids for t in read_trajectories(out)} == whole
    assert generate_into(pool, problems, 3, out, sampling, seed=5).generated == 0
    with pytest.raises(UserError, match="another seed"):
        generate_into(pool, problems, 3, out, sampling, seed=6)


def test_resources_that_are_not_there_are_refused_at_once(cluster, model_dir):
    with pytest.raises(UserError, match="2 engines ask for 100 CPU each, but this machine offers"):
        RolloutPool(RolloutConfig(engines=2, cpus=100, device="cpu"), FormatConfig(), str(model_dir))
    began = time.monotonic()
    with pytest.raises(UserError, match="has no token"):
        RolloutPool(RolloutConfig(cpus=0, device="cpu"), FormatConfig(), str(_without_delimiters(model_dir)))
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("deaths", [1, 2])
def test_an_engine_that_dies_while_it_starts_is_started_again(deaths, cluster, monkeypatch, tmp_path):
    class Engine:
        """Its process ends in each of its first `deaths` starts."""

        def __init__(self, *_: object) -> None:
            pass

        async def start(self) -> None:
            (tmp_path / str(os.getpid())).touch()
            if len(list(tmp_path.iterdir())) <= deaths:
                os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("memento.rollout.pool.RolloutEngine", Engine)
    config = RolloutConfig(engines=1, device="cpu", cpus=0, max_restarts=1)
    if deaths == 1:
        RolloutPool(config, FormatConfig(), "unused").close()
    else:
        with pytest.raises(EngineFailed, match="engine 0 died while it started, and again in each of 1 restarts"):
            RolloutPool(config, FormatConfig(), "unused")
    assert len(list(tmp_path.iterdir())) == 2


def _without_delimiters(model_dir: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    folder = model_dir / "plain"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((model_dir / "config.json").read_text())
    text = (model_dir / "tokenizer.json").read_text()
    for name in ("block_start", "block_end", "summary_start", "summary_end"):
        text = text.replace(f"<|{name}|>", f"<|not_{name}|>")
    (model_dir / "plain.json").write_text(text)
    PreTrainedTokenizerFast(tokenizer_file=str(model_dir / "plain.json"), eos_token="<|im_end|>").save_pretrained(
        folder
    )
    return folder
