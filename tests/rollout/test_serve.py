"""`memento serve`: vLLM's own parser understands the command line, and reads from it what `eviction_args` says."""

from __future__ import annotations

from memento.format import MementoFormat
from memento.rollout import eviction_args
from memento.rollout.serve import serve_command


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
