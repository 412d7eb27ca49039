"""Runs shipped SFT configs for a step or two on tiny twins: ``python dry_run.py DATA OUT CONFIG=MODEL [...]``.

Importing the libraries takes longer than a run, so each config runs in a fork of one process that has them.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

import deepspeed  # noqa: F401
import trl.trainer.sft_trainer  # noqa: F401

from memento.config import SftConfig, load_config
from memento.sft.train import train


def run(data: str, out: Path, config: str, model: str) -> None:
    overrides = [
        f"data={data}",
        f"model={model}",
        f"out={out / Path(config).stem}",
        f"cache={out / 'cache'}",
        "batch_size=4",
        "epochs=1",
        "max_length=512",
        "micro_batch_tokens=800",
        "threads=1",
        "streaming=false",
        "tracking.mode=disabled",
        "checkpoint_steps=null",
    ]
    loaded = load_config(config, overrides)
    assert isinstance(loaded, SftConfig)
    train(loaded)


if __name__ == "__main__":
    data, out, *pairs = sys.argv[1:]
    failed = 0
    for pair in pairs:
        config, _, model = pair.partition("=")
        child = os.fork()
        if child == 0:
            try:
                run(data, Path(out), config, model)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        failed += os.waitpid(child, 0)[1] != 0
    sys.exit(failed)
