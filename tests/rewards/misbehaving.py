"""Handlers that do in a worker what verifiers do at their worst."""

import os
import signal
import time
from pathlib import Path


def act(what: str, flag: str = "") -> dict[str, object]:
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "die once":
        if not Path(flag).exists():
            Path(flag).touch()
            os._exit(3)
        return {"survived": True}
    if what == "hang":
        time.sleep(3600)
    if what == "raise":
        raise ValueError("no")
    if what == "memory":
        return {"n": len(bytearray(1 << 40))}
    if what == "print":
        print("this must not reach the protocol", flush=True)
        os.write(1, b"nor this\n")
    return {"pid": os.getpid()}
