"""Annotation against an endpoint that fails, stalls, truncates and rate-limits: everything finishes, nothing twice."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner

from memento.cli import app
from memento.errors import UserError
from memento.sft.annotate.endpoint import EndpointSettings, Malformed
from memento.sft.annotate.journal import Journal, request_key
from memento.sft.annotate.mementos import MementoSettings
from memento.sft.annotate.messages import read_object
from memento.sft.annotate.pipeline import (
    AnnotationSettings,
    Outcome,
    annotate_rows,
    approximate_tokens,
    read_annotations,
)
from memento.sft.rows import Row, check_response, read_rows

TRACES = 500


@dataclass
class Manners:
    """Probabilities of what happens to a request, and of what is wrong with an answer."""

    rate_limit: float = 0.0
    server_error: float = 0.0
    stall: float = 0.0
    disconnect: float = 0.0
    broken_body: float = 0.0
    broken_content: float = 0.0
    cut_off: float = 0.0
    stall_s: float = 4.0
    first_score: float = 6.0
    """What the judge gives a memento that has not been revised; revised ones get 10."""


BAD = Manners(
    rate_limit=0.06,
    server_error=0.05,
    stall=0.01,
    disconnect=0.02,
    broken_body=0.02,
    broken_content=0.05,
    cut_off=0.02,
)


@dataclass
class StubEndpoint:
    """An OpenAI-compatible endpoint on this machine that may behave badly, in a thread. Use as a context manager."""

    manners: Manners = field(default_factory=Manners)
    seed: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    """Request key -> how often it was answered in full."""
    requests: Counter[str] = field(default_factory=Counter)
    troubles: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    most_in_flight: int = 0
    port: int = 0
    _runner: Any = None

    def __enter__(self) -> StubEndpoint:
        self._random = Random(self.seed)
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        async def start() -> None:
            app = web.Application()
            app.router.add_post("/v1/chat/completions", self._serve)
            self._runner = web.AppRunner(app, handler_cancellation=True)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await site.start()
            self.port = self._runner.addresses[0][1]
            started.set()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(start())
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        key = request_key(body)
        self.requests[key] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._answer(request, body, key)
        finally:
            self.in_flight -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any], key: str) -> web.StreamResponse:
        if body["model"] != "stub":
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        manners, draw = self.manners, self._random.random()
        for trouble in ("rate_limit", "server_error", "stall", "disconnect", "broken_body"):
            draw -= getattr(manners, trouble)
            if draw >= 0:
                continue
            self.troubles[trouble] += 1
            if trouble == "rate_limit":
                return web.json_response(
                    {"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "0.05"}
                )
            if trouble == "server_error":
                return web.json_response({"error": {"message": "oops"}}, status=self._random.choice([500, 502, 503]))
            if trouble == "stall":
                await asyncio.sleep(manners.stall_s)
                return web.json_response({})
            if trouble == "disconnect":
                assert request.transport is not None
                request.transport.close()
                return web.Response()
            return web.Response(text='{"id": "x", "choices": [{"mess', content_type="application/json")
        text = self.content(body["messages"][-1]["content"])
        finish = "stop"
        if self._random.random() < manners.broken_content or "POISON" in text:
            self.troubles["broken_content"] += 1
            text = text[: len(text) // 2] if text.startswith("{") else ""
        elif self._random.random() < manners.cut_off:
            self.troubles["cut_off"] += 1
            finish = "length"
        self.answered[key] += 1
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice]}
        return web.json_response({**answer, "usage": usage})

    def content(self, prompt: str) -> str:
        """What a polite model would say."""
        if "boundaries" in prompt and '{"scores"' in prompt:
            count = re.search(r"exactly (\d+) whole numbers", prompt)
            assert count is not None
            return json.dumps({"scores": [(7 * i) % 4 for i in range(int(count[1]))]})
        block = re.search(r"<block>\n(.*?)\n</block>", prompt, re.DOTALL)
        assert block is not None
        if "Give points" in prompt:
            memento = re.search(r"<memento>\n(.*?)\n</memento>", prompt, re.DOTALL)
            assert memento is not None
            score = 10.0 if "revised" in memento[1] else self.manners.first_score
            points: dict[str, float] = {
                "formulas": 3,
                "values": 2,
                "methods": 2,
                "validation": 1,
                "faithful": 1,
                "result": 1,
            }
            points["formulas"] -= min(3, 10 - score)
            points["values"] -= min(2, max(0, 10 - score - 3))
            poison = " POISON" if "POISON" in block[1] else ""
            return json.dumps({**points, "feedback": "name the method" + poison})
        words = " ".join(block[1].split()[:4]).replace("POISON", "poison")
        return f"revised: {words}" if "A judge gave it" in prompt else f"memento: {words}"


def trace(index: int, sentences: int) -> Row:
    numbers = range(index, index + sentences)
    thinking = " ".join(f"Now we add the number {n} to the sum of all that came before it." for n in numbers)
    if index == 13:
        thinking += " POISON is in this one, and nobody can judge it."
    return Row(
        f"Problem {index}?", f"<think>\n{thinking}\n</think>\n{index}", ("math", "code")[index % 2], "test", index
    )


def settings(url: str, **changes: Any) -> EndpointSettings:
    chosen: dict[str, Any] = {
        "model": "stub",
        "base_url": url,
        "concurrency": 24,
        "timeout_s": 30.0,
        "retries": 8,
        "backoff_s": 0.01,
        "longest_wait_s": 0.1,
        "price_in": 1.0,
        "price_out": 10.0,
    }
    return EndpointSettings(**chosen | changes)


def run(url: str, rows: list[Row], out: Path, annotation: AnnotationSettings | None = None, **changes: Any) -> Outcome:
    return annotate_rows(rows, out, settings(url, **changes), annotation)


@pytest.fixture
def polite() -> Iterator[StubEndpoint]:
    with StubEndpoint() as endpoint:
        yield endpoint


@pytest.mark.slow
def test_500_traces_through_a_bad_endpoint_and_a_kill(tmp_path: Path) -> None:
    # Most traces are one block; every 50th has windows to score and several blocks.
    rows = [trace(i, 100 if i % 50 == 1 else 4) for i in range(TRACES)]
    data, out = tmp_path / "traces.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows))
    with StubEndpoint(BAD) as endpoint:
        command = [sys.executable, "-m", "memento.cli", "annotate", str(data), "--out", str(out), "--model", "stub"]
        command += ["--base-url", endpoint.url, "--concurrency", "24", "--timeout", "2", "--retries", "8"]
        command += ["--backoff", "0.01", "--longest-wait", "0.1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 120
            while sum(endpoint.answered.values()) < 500 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        journal = Journal(out / "journal.jsonl")
        journal.close()
        known = set(journal.answers)
        before = {a.id for a in read_annotations(out / "annotated.jsonl")}
        assert len(known) > 300 and 0 < len(before) < TRACES
        requests = endpoint.requests.copy()

        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        asked_again = {key for key in known if endpoint.requests[key] > requests[key]}
        assert not asked_again, "what was answered before the kill is not asked for again"
        lines = (out / "journal.jsonl").read_text().splitlines()
        assert len({json.loads(line)["key"] for line in lines}) == len(lines), "nothing was received twice"
        assert endpoint.most_in_flight <= 24 + 8  # a client that gave up may be served a moment longer
        assert set(endpoint.troubles) >= {"rate_limit", "server_error", "stall", "disconnect", "broken_body"}

    finished = list(read_annotations(out / "annotated.jsonl"))
    ids = [a.id for a in finished]
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert len(ids) == len(set(ids)) == TRACES - 1 and before <= set(ids)
    assert [f["problem"] for f in failed] == ["Problem 13?"]
    assert "judge: no usable answer in 9 attempts, the last was" in failed[0]["reason"]
    report = json.loads((out / "report.json").read_text())
    assert report["malformed"]["judge"] >= 9
    assert report["failures"] == {"judge": 1}
    assert report["remembered"] >= 1
    assert report["pass_rate_by_round"] == [0.0, 1.0]
    for name in ("default", "full"):
        assert len(list(read_rows(out / f"{name}.jsonl"))) == TRACES - 1


def test_the_output_is_what_training_takes_in_both_schemas(polite: StubEndpoint, tmp_path: Path) -> None:
    outcome = run(polite.url, [trace(1, 200), trace(2, 3)], tmp_path, AnnotationSettings(windows=(16, 11)))
    assert (outcome.done, outcome.failed, outcome.stopped) == (2, 0, "")
    default = [json.loads(line) for line in (tmp_path / "default.jsonl").read_text().splitlines()]
    assert [set(row) for row in default] == [{"problem", "response", "domain", "source", "difficulty"}] * 2
    assert [check_response(row["response"], blocks=True) for row in default] == [None, None]
    full = [json.loads(line) for line in (tmp_path / "full.jsonl").read_text().splitlines()]
    long = max(full, key=lambda row: len(row["sentences"]))
    assert long["problem"] == "Problem 1?" and long["difficulty"] == 1 and long["domain"] == "code"
    assert "".join(long["sentences"]) == trace(1, 200).response.split("<think>")[1].split("</think>")[0].strip()
    assert len(long["blocks"]) == len(long["block_summaries"]) > 3
    assert [b[0] for b in long["blocks"]] == [0, *(b[1] + 1 for b in long["blocks"][:-1])]
    assert all(m.startswith("revised: ") for m in long["block_summaries"])
    # 200 sentences have 199 boundaries: 13 + 19 windows; each block one memento, one revision, two judgements.
    blocks = sum(len(row["blocks"]) for row in full)
    assert sum(polite.answered.values()) == 32 + 4 * blocks == outcome.usage.answered
    assert outcome.usage.prompt_tokens == 100 * outcome.usage.answered
    assert outcome.quality is not None
    assert outcome.quality.cost == pytest.approx(outcome.usage.answered * (100 * 1 + 10 * 10) / 1e6)
    assert [d.domain for d in outcome.quality.domains] == ["code", "math", "all"]


def test_a_second_run_asks_nothing_and_new_traces_only_their_own(polite: StubEndpoint, tmp_path: Path) -> None:
    rows = [trace(i, 4) for i in range(5)]
    run(polite.url, rows[:3] + rows[:1], tmp_path)
    asked = sum(polite.requests.values())
    again = run(polite.url, rows[:3], tmp_path)
    assert (again.done, again.skipped, sum(polite.requests.values())) == (0, 3, asked)
    (tmp_path / "annotated.jsonl").unlink()
    redone = run(polite.url, rows[:3], tmp_path)
    assert (redone.done, sum(polite.requests.values())) == (3, asked), "answers come from the journal"
    assert redone.usage.remembered == asked
    assert run(polite.url, rows, tmp_path).done == 2
    with pytest.raises(UserError, match="was made with min_block_tokens = 200, not 50"):
        run(polite.url, rows, tmp_path, AnnotationSettings(min_block_tokens=50))


def test_what_two_traces_ask_alike_is_asked_once(polite: StubEndpoint, tmp_path: Path) -> None:
    same = trace(1, 4).response
    rows = [Row("The same problem?", same + f", or {i}") for i in range(6)]
    outcome = run(polite.url, rows, tmp_path)
    assert outcome.done == 6
    assert set(polite.requests.values()) == {1}
    assert outcome.usage.prompt_tokens == 100 * len(polite.requests), "and paid for once"


def test_a_broken_last_line_is_cut_off(polite: StubEndpoint, tmp_path: Path) -> None:
    rows = [trace(i, 4) for i in range(3)]
    run(polite.url, rows, tmp_path)
    for name in ("annotated.jsonl", "journal.jsonl"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text[:-30])
    before = sum(polite.requests.values())
    assert run(polite.url, rows, tmp_path).done == 1
    assert sum(polite.requests.values()) - before == 1, "only the answer that was lost is asked for"
    (tmp_path / "journal.jsonl").write_text("broken\n{}\n")
    with pytest.raises(UserError, match=r"journal\.jsonl, line 1 is no JSON"):
        run(polite.url, rows, tmp_path)


def test_rounds_stop_when_accepted_or_after_the_last(tmp_path: Path) -> None:
    with StubEndpoint(Manners(first_score=8.0)) as good:
        outcome = run(good.url, [trace(1, 4)], tmp_path / "a")
        assert outcome.quality is not None and outcome.quality.pass_rate_by_round == (1.0,)
    with StubEndpoint(Manners(first_score=7.0)) as strict:
        never = AnnotationSettings(mementos=MementoSettings(accept=11.0, rounds=2))
        outcome = run(strict.url, [trace(1, 4)], tmp_path / "b", never)
        assert outcome.quality is not None and outcome.quality.pass_rate_by_round == (0.0, 0.0, 0.0)
        (annotation,) = read_annotations(tmp_path / "b" / "annotated.jsonl")
        assert [r.score for r in annotation.rounds[0]] == [7.0, 10.0, 10.0]
        assert annotation.mementos[0].startswith("revised"), "the best round is kept"
        required = AnnotationSettings(mementos=MementoSettings(accept=11.0), require_pass=True)
        assert run(strict.url, [trace(1, 4)], tmp_path / "c", required).failed == 1


def test_what_cannot_work_stops_and_what_is_spent_stops(polite: StubEndpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="answers 404 to a request for model 'other'"):
        run(polite.url, [trace(1, 4)], tmp_path / "a", model="other")
    outcome = run(polite.url, [trace(i, 4) for i in range(50)], tmp_path / "b", budget=0.004, concurrency=1)
    assert "limit of $0.004" in outcome.stopped
    assert outcome.usage.answered == 20, "each answer costs $0.0002"
    assert run(polite.url, [trace(i, 4) for i in range(50)], tmp_path / "b").done > 0
    rows = [Row("p", "<think> </think> 2"), Row("p", "<think>a <|block_start|> b</think>")]
    failed = run(polite.url, rows, tmp_path / "c")
    assert failed.failed == 2 and failed.quality is not None
    assert set(failed.quality.failures) == {"the trace has no reasoning", "the trace holds memento delimiters already"}
    silent = run("http://127.0.0.1:9/v1", [trace(1, 4)], tmp_path / "d", retries=1)
    assert silent.failed == 1 and silent.usage.failures == {"connection": 2}


def test_answers_of_any_dressing_are_read() -> None:
    assert read_object('{"a": 1}') == {"a": 1}
    assert read_object('<think>{"a": 0}</think>Sure:\n```json\n{"a": 1}\n```') == {"a": 1}
    assert read_object(r'{"a": "\alpha and \\beta and \"q\""}') == {"a": r'\alpha and \beta and "q"'}
    for text in ("nothing", '{"a": 1', "[1, 2]", ""):
        with pytest.raises(Malformed):
            read_object(text)


def test_tokens_without_a_tokenizer_are_in_the_right_range() -> None:
    assert approximate_tokens("Now we add the number 12 to the sum.") in range(8, 13)
    assert approximate_tokens("") == 1


def test_the_command_reports_and_refuses(polite: StubEndpoint, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(trace(1, 4)._asdict()) + "\n")
    common = [str(data), "--out", str(tmp_path / "out"), "--model", "stub", "--base-url", polite.url]
    result = CliRunner().invoke(app, ["annotate", *common])
    assert result.exit_code == 0, result.output
    assert "1 traces annotated, 0 failed" in result.output and "mementos by round" in result.output
    assert CliRunner().invoke(app, ["annotate", *common]).exit_code == 0
    absent = CliRunner().invoke(app, ["annotate", str(tmp_path / "none.jsonl"), *common[1:]])
    assert isinstance(absent.exception, UserError)
