"""The command line of a training program: ``python -m memento.rl.train CONFIG [a.b=c ...] [--resume]`` and so on.

It is a program of its own, beside `memento rl`, because `ray job submit` takes one, and the quickstart starts its
phases as processes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from memento.config import load_config
from memento.errors import RunFailed, UserError, disk_is_full, full_disk_message
from memento.run import RunStopped


def run_config(
    kind: Literal["rl", "sft"], what: str, train: Callable[..., object], arguments: Sequence[str] | None = None
) -> int:
    """Load a config of this kind, train, and turn what happens into an exit code.

    Args:
        kind: of the config, and the package whose ``train`` module this is.
        what: one sentence for ``--help``.
        train: called with the config and ``resume=``.
        arguments: the command line; None takes the process's.

    Returns:
        0 done, 1 failed with a reason, 2 bad input, 128 + signal when stopped. Errors are one paragraph on stderr.
    """
    parser = argparse.ArgumentParser(prog=f"python -m memento.{kind}.train", description=what)
    parser.add_argument("config", help=f"a YAML file, e.g. configs/{kind}/{_EXAMPLE[kind]}.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="e.g. lr=1e-4 (sft) or learner.lr=1e-4 (rl)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run folder")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        if config.kind != kind:
            raise UserError(f"{options.config} describes a {config.kind} run. `memento {config.kind}` runs it.")
        train(config, resume=options.resume)
    except UserError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except RunStopped as stopped:
        return int(stopped.code or 1)
    except Exception as error:
        if not disk_is_full(error):
            raise
        way_out = "or save less (save_rollouts=sample, checkpoint.keep=1), and go on with --resume."
        print(full_disk_message(error, way_out), file=sys.stderr)
        return 1
    return 0


def plain(error: UserError) -> Any:
    """The error itself: out of a Ray task it arrives wrapped, with a remote traceback as its text."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, UserError) else error


_EXAMPLE = {"rl": "quickstart", "sft": "quickstart_stage1"}
