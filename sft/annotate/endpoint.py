"""Asking an OpenAI-compatible endpoint: bounded concurrency, retries with backoff, every answer remembered and counted.

    request ──> in the journal? ── yes ──> that answer, nothing is sent
                     │ no
                     v
                a free slot ──> POST ──> answer ──> journal ──> caller
                     ^            │ 408, 409, 429, 5xx, time-out, broken connection
                     └─ wait ─────┘ (Retry-After, else doubling with jitter)

An answer that cannot be used (no JSON, wrong length) is an answer all the same: it was paid for, and is remembered. The
caller asks again with the next ``attempt``, which makes it another request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

from memento.errors import UserError
from memento.sft.annotate.journal import Answer, Journal, request_key

Result = TypeVar("Result")

RETRIED_STATUS = frozenset({408, 409, 425, 429})
"""Beside all of 500 and above."""


class NoAnswer(Exception):
    """The endpoint gave no answer, or none that can be used, as often as was allowed. The text says why."""


class Malformed(Exception):
    """An answer that does not have the form that was asked for."""


class BudgetSpent(Exception):
    """The limit on cost is reached; no further request is sent."""


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """How the endpoint is asked.

    Attributes:
        model: name at the endpoint.
        base_url: e.g. ``http://localhost:8000/v1``; None for the `openai` client's own rule (OPENAI_BASE_URL).
        api_key: None for OPENAI_API_KEY; a local server takes any.
        concurrency: requests at the same time.
        timeout_s: for one request.
        retries: further attempts after one that failed, and after an answer that cannot be used.
        backoff_s: wait before the first of them; doubles each time, up to `longest_wait_s`.
        temperature, max_tokens: of the answers.
        price_in, price_out: dollars for a million tokens.
        budget: dollars, after which nothing more is sent; None for no limit.
        body: further fields of the request, e.g. ``{"chat_template_kwargs": {"enable_thinking": false}}``.
    """

    model: str
    base_url: str | None = None
    api_key: str | None = None
    concurrency: int = 32
    timeout_s: float = 300.0
    retries: int = 6
    backoff_s: float = 1.0
    longest_wait_s: float = 60.0
    temperature: float = 0.0
    max_tokens: int = 4096
    price_in: float = 0.0
    price_out: float = 0.0
    budget: float | None = None
    body: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Usage:
    """What was asked and what it cost; answers of earlier runs count in `remembered` and in the tokens.

    Attributes:
        answered: answers received in this run.
        remembered: answers taken from the journal.
        failures: reason -> attempts without an answer (``429``, ``timeout``, ``connection``, ...).
        malformed: kind of request -> answers that could not be used.
        prompt_tokens, completion_tokens: of all answers, remembered ones too.
        seconds: summed over requests answered in this run.
    """

    answered: int = 0
    remembered: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    malformed: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def cost(self, settings: EndpointSettings) -> float:
        """Dollars for all answers."""
        return (self.prompt_tokens * settings.price_in + self.completion_tokens * settings.price_out) / 1e6


class Endpoint:
    """One endpoint for one event loop. Use `ask`; close with `close`."""

    def __init__(self, settings: EndpointSettings, journal: Journal, seed: int = 0) -> None:
        from openai import AsyncOpenAI, OpenAIError

        self.settings, self.journal, self.usage = settings, journal, Usage()
        try:
            # Retries are ours: they are counted, and an answer is remembered before anybody can lose it.
            self._client = AsyncOpenAI(
                base_url=settings.base_url,
                api_key=settings.api_key or ("none" if settings.base_url else None),
                timeout=settings.timeout_s,
                max_retries=0,
            )
        except OpenAIError as error:
            raise UserError(
                f"no API key: set OPENAI_API_KEY, or give --base-url of a local server ({error})."
            ) from error
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._random = Random(seed)
        self._used: set[str] = set()
        self._asked: dict[str, asyncio.Lock] = {}

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def ask(self, kind: str, system: str, user: str, read: Callable[[str], Result]) -> Result:
        """Ask until an answer can be read.

        Args:
            kind: of request, for the counts.
            system, user: the messages.
            read: makes the result of the answer's text; raises `Malformed` with the reason where it cannot.

        Raises:
            NoAnswer: no usable answer after all retries, or a request that the endpoint refuses (a prompt too long).
            BudgetSpent: the cost limit is reached.
            UserError: the endpoint knows neither key nor model: no other request would do better.
        """
        reason = ""
        for attempt in range(self.settings.retries + 1):
            answer = await self._answer(system, user, attempt)
            try:
                if answer.finish_reason == "length":
                    raise Malformed(f"cut off at {answer.completion_tokens} tokens")
                return read(answer.text)
            except Malformed as error:
                reason = str(error)
                self.usage.malformed[kind] = self.usage.malformed.get(kind, 0) + 1
        raise NoAnswer(f"{kind}: no usable answer in {self.settings.retries + 1} attempts, the last was {reason}")

    async def _answer(self, system: str, user: str, attempt: int) -> Answer:
        """The answer to one request, remembered or received."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        request = {
            "model": self.settings.model,
            "messages": messages,
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
            **self.settings.body,
        }
        if attempt:
            request["seed"] = attempt  # another draw where the server takes a seed, and another name in any case
        key = request_key(request)
        answer = self.journal.answers.get(key)
        if answer is None:
            # Two traces may ask the same at the same time: the second waits for the answer to the first.
            async with self._asked.setdefault(key, asyncio.Lock()), self._slots:
                answer = self.journal.answers.get(key) or await self._receive(key, request)
            self._asked.pop(key, None)
        elif key not in self._used:
            self.usage.remembered += 1
        if key not in self._used:  # the same words may be asked about twice; they are paid for once
            self._used.add(key)
            self.usage.prompt_tokens += answer.prompt_tokens
            self.usage.completion_tokens += answer.completion_tokens
        return answer

    async def _receive(self, key: str, request: dict[str, Any]) -> Answer:
        if self.settings.budget is not None and self.usage.cost(self.settings) >= self.settings.budget:
            raise BudgetSpent(f"the limit of ${self.settings.budget:g} is reached")
        for failures in range(self.settings.retries + 1):
            started = time.monotonic()
            try:
                response = await self._send(request)
            except _Failed as failed:
                self.usage.failures[failed.reason] = self.usage.failures.get(failed.reason, 0) + 1
                if failures == self.settings.retries:
                    raise NoAnswer(f"{failed.reason} in {failures + 1} attempts: {failed.detail}") from failed
                await asyncio.sleep(self._wait(failures, failed.retry_after))
                continue
            seconds = time.monotonic() - started
            choice, usage = response.choices[0], response.usage
            answer = Answer(
                text=choice.message.content or "",
                finish_reason=choice.finish_reason or "",
                prompt_tokens=usage.prompt_tokens if usage else 0,
                completion_tokens=usage.completion_tokens if usage else 0,
                seconds=round(seconds, 3),
                failures=failures,
            )
            self.journal.add(key, answer)
            self.usage.answered += 1
            self.usage.seconds += seconds
            return answer
        raise AssertionError("unreachable")

    async def _send(self, request: dict[str, Any]) -> Any:
        import openai

        own = {
            name: request[name]
            for name in ("model", "messages", "temperature", "max_tokens", "seed")
            if name in request
        }
        extra = {name: value for name, value in request.items() if name not in own}
        try:
            # The whole request has one deadline; httpx's own only limits the silence between two bytes.
            async with asyncio.timeout(self.settings.timeout_s):
                response = await self._client.chat.completions.create(**own, extra_body=extra or None)
        except (openai.APITimeoutError, TimeoutError) as error:
            raise _Failed("timeout", f"no answer within {self.settings.timeout_s:g} s") from error
        except openai.APIConnectionError as error:
            raise _Failed("connection", str(error)) from error
        except openai.APIStatusError as error:
            status = error.status_code
            if status in RETRIED_STATUS or status >= 500:
                raise _Failed(str(status), error.message, _retry_after(error)) from error
            if status in (401, 403, 404):
                raise UserError(
                    f"{self._client.base_url} answers {status} to a request for model {self.settings.model!r}: "
                    f"{error.message}. Check --base-url, --model and OPENAI_API_KEY."
                ) from error
            raise NoAnswer(f"the endpoint refuses the request ({status}): {error.message}") from error
        except (openai.APIError, ValueError) as error:  # a body that is no answer: broken JSON, missing fields
            raise _Failed("broken answer", str(error)) from error
        if not getattr(response, "choices", None):
            raise _Failed("broken answer", "no choices in it")
        return response

    def _wait(self, failures: int, asked: float | None) -> float:
        longest = min(self.settings.longest_wait_s, self.settings.backoff_s * 2**failures)
        wait = longest * (0.5 + 0.5 * self._random.random())
        return max(wait, min(asked, self.settings.longest_wait_s)) if asked is not None else wait


class _Failed(Exception):
    """One attempt brought no answer, and another may."""

    def __init__(self, reason: str, detail: str, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.retry_after = reason, detail, retry_after


def _retry_after(error: Any) -> float | None:
    try:
        return float(error.response.headers.get("retry-after"))
    except (TypeError, ValueError):
        return None
