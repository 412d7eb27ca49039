"""`memento serve`: the command line that vLLM's parser understands, and a real server under a stock OpenAI client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memento.config import FormatConfig
from memento.errors import UserError
from memento.format import MementoFormat, evictions
from memento.rollout import eviction_args
from memento.rollout.serve import check_port, serve_command


def test_the_command_line_says_what_eviction_args_says() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    fmt = MementoFormat(1, 2, 3, 4, evict_delimiters=True, keep_last_n=1, max_block_tokens=64)
    command = serve_command("some/model", fmt, ["--port", "8123", "--max-model-len", "2048"])
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(command[3:])
    assert parsed is not None
    assert (parsed.model, parsed.port, parsed.max_model_len) == ("some/model", 8123, 2048)
    arguments = AsyncEngineArgs.from_cli_args(parsed)
    for name, value in eviction_args(fmt).items():
        assert getattr(arguments, name) == value, name


def test_a_port_in_use_is_said_before_a_model_is_loaded() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for flags in (["--port", port], [f"--port={port}", "--host", "127.0.0.1", "--max-model-len", "64"]):
            with pytest.raises(UserError, match=f"port {port} is in use.*--port"):
                check_port(flags)
        check_port(["--uds", "/tmp/socket", "--port", port])
    check_port(["--port", port, "--enforce-eager"])


REQUESTS = 64
TOKENS = 120
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 640,
    "max_num_seqs": REQUESTS,
    "block_size": 32,
    "kv_cache_memory_bytes": 16 << 20,
}

OFFLINE = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
from memento.config import FormatConfig
from memento.preflight import load_tokenizer
from memento.rollout import eviction_args, eviction_stats
model, requests = sys.argv[1], json.load(sys.stdin)
fmt = FormatConfig().bind(load_tokenizer(model))
llm = LLM(model, enforce_eager=True, **json.loads(sys.argv[2]), **eviction_args(fmt))
outputs = llm.generate(
    [{"prompt_token_ids": request["prompt_ids"]} for request in requests],
    [SamplingParams(temperature=0, max_tokens=request["tokens"], frequency_penalty=request["penalty"],
                    skip_special_tokens=False, extra_args=request["control"]) for request in requests],
    use_tqdm=False,
)
print("RESULT " + json.dumps([
    {"text": o.outputs[0].text, "ids": list(o.outputs[0].token_ids), "finish": o.outputs[0].finish_reason,
     "evictions": len(eviction_stats(o).evictions), "peak": eviction_stats(o).peak_tokens}
    for o in outputs
]), flush=True)
os._exit(0)
"""


def question(index: int) -> str:
    return f"What is the remainder when {index}+{index * index} is divided by 10?"


@dataclass
class Server:
    """A running `memento serve`, and what the offline engine says to the same requests."""

    url: str
    client: Any
    model: str
    offline: list[dict[str, Any]]
    fmt: MementoFormat
    prompts: list[list[int]]

    def metrics(self) -> dict[str, float]:
        """Prometheus samples of eviction, summed over labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        values: dict[str, float] = {}
        for line in lines:
            if "memento" in line and not line.startswith("#"):
                name, value = line.split("{")[0].split(" ")[0], float(line.rsplit(" ", 1)[1])
                values[name] = values.get(name, 0.0) + value
        return values


CONTROLS: list[dict[str, Any]] = [
    {},
    {"memento_evict": 0},
    {"memento_keep_last_n": 1},
    {"memento_max_block_tokens": 5},
]


def penalty(index: int) -> float:
    """On repeated tokens, so that greedy texts differ; the larger one makes some of them end."""
    return 1.0 if index % 5 == 0 else 0.3


def control(index: int) -> dict[str, Any]:
    """Most requests leave everything to the server."""
    return CONTROLS[index % len(CONTROLS)] if index % 3 == 0 else {}


@pytest.fixture(scope="module")
def server(grammar_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("vllm")
    from openai import OpenAI
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(grammar_model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny", "--enforce-eager"]
    for name, value in ENGINE.items():
        flags += ["--" + name.replace("_", "-"), str(value)]
    environment = os.environ | ENVIRONMENT
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "memento.cli", "serve", str(grammar_model), *flags],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question(index)}], add_generation_prompt=True, return_dict=False
            )
            for index in range(REQUESTS)
        ]
        asked = [
            {"prompt_ids": prompt, "tokens": TOKENS, "penalty": penalty(index), "control": control(index) or None}
            for index, prompt in enumerate(prompts)
        ]
        done = subprocess.run(
            [sys.executable, "-c", OFFLINE, str(grammar_model), json.dumps(ENGINE)],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        answers = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert answers, done.stderr[-4000:]
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process, log)
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)
        fmt = FormatConfig().bind(tokenizer)
        yield Server(url, client, "tiny", json.loads(answers[0].removeprefix("RESULT ")), fmt, prompts)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)


def ask(server: Server, index: int, *, stream: bool, **extra: Any) -> tuple[str, str]:
    """Text and finish reason of a chat completion."""
    body = {"skip_special_tokens": False, "vllm_xargs": control(index) or None} | extra
    arguments: dict[str, Any] = {
        "model": server.model,
        "messages": [{"role": "user", "content": question(index)}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "frequency_penalty": penalty(index),
        "extra_body": {key: value for key, value in body.items() if value is not None},
    }
    if not stream:
        choice = server.client.chat.completions.create(**arguments).choices[0]
        return choice.message.content, choice.finish_reason
    text, reason, pieces = "", "", 0
    for chunk in server.client.chat.completions.create(**arguments, stream=True):
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
            pieces += 1
    assert pieces > 10
    return text, reason


@pytest.mark.slow
def test_64_concurrent_chats_say_what_the_offline_engine_says(server: Server) -> None:
    before = server.metrics()
    with ThreadPoolExecutor(REQUESTS) as threads:
        answers = list(threads.map(lambda i: ask(server, i, stream=i % 2 == 0), range(REQUESTS)))
    assert answers == [(expected["text"], expected["finish"]) for expected in server.offline]
    assert len({text for text, _ in answers}) > REQUESTS / 2 and {reason for _, reason in answers} == {"stop", "length"}
    done = 0
    for prompt, expected, index in zip(server.prompts, server.offline, range(REQUESTS), strict=True):
        settings = control(index)
        fmt = MementoFormat(*server.fmt.delimiter_ids, False, keep_last_n=settings.get("memento_keep_last_n", 0))
        fmt = fmt if settings.get("memento_evict", 1) else fmt.without_eviction()
        trace = prompt + expected["ids"]
        assert expected["evictions"] == len([e for e in evictions(trace, fmt) if e[0] < len(trace) - 1])
        done += expected["evictions"]
    assert done > REQUESTS, "the model is meant to finish blocks"
    after = server.metrics()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["memento:request_evictions_total"] == done, grown
    assert grown["memento:requests_total"] == REQUESTS, grown


@pytest.mark.slow
def test_a_request_controls_its_own_eviction_and_its_errors_are_its_own(server: Server) -> None:
    from openai import APIError, APIStatusError

    plain, kept = (
        ask(server, 0, stream=False, vllm_xargs={}),
        ask(server, 0, stream=True, vllm_xargs={"memento_evict": 0}),
    )
    assert plain[0] != kept[0], "without eviction the model sees something else"
    for index, wrong in enumerate(
        [
            {"memento_keep_last": 1},
            {"memento_keep_last_n": -2},
            {"memento_max_block_tokens": 0},
            {"memento_evict": "no"},
        ]
    ):
        with pytest.raises(APIError) as refused:
            ask(server, 0, stream=index % 2 == 0, vllm_xargs=wrong)
        # A stream has begun by then, and carries its error as an event.
        assert not isinstance(refused.value, APIStatusError) or refused.value.status_code == 400, wrong
        assert next(iter(wrong)).removeprefix("memento_") in str(refused.value), refused.value
    with pytest.raises(APIStatusError) as caught:  # over the logical bound
        server.client.completions.create(model=server.model, prompt="1+" * 700, max_tokens=8)
    assert caught.value.status_code == 400
    assert ask(server, 0, stream=False, vllm_xargs={}) == plain, "the server goes on"
