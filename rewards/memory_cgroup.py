"""A memory cgroup of one sandbox zygote, where the machine lets us make one (version 1 and 2)."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

PREFIX = "memento-sandbox-"


class MemoryCgroup:
    """A cgroup below (or, where version 2 forbids that, beside) our own, with one process tree in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._version = 2 if (folder / "memory.max").exists() else 1
        self._limit_mib: int | None = None
        self._kills_seen = 0

    @classmethod
    def create(cls, name: str, pid: int) -> MemoryCgroup | None:
        """A new cgroup that holds process `pid`, or None where we may not make one."""
        for parent in _parents():
            folder = parent / f"{PREFIX}{name}"
            try:
                _remove_abandoned(parent)
                folder.mkdir()
            except OSError:
                continue
            try:
                if (folder / "memory.max").exists() or (folder / "memory.limit_in_bytes").exists():
                    (folder / "cgroup.procs").write_text(str(pid))
                    return cls(folder)
            except OSError:
                pass
            with contextlib.suppress(OSError):
                folder.rmdir()
        return None

    def limit(self, mib: int) -> None:
        """Let all of it together use so much; without swap."""
        if mib == self._limit_mib:
            return
        names = ("memory.max",) if self._version == 2 else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        if self._limit_mib is not None and mib > self._limit_mib:
            names = names[::-1]  # version 1: memory and swap together is never less than memory
        for name in names:
            with contextlib.suppress(FileNotFoundError, PermissionError):  # no swap accounting
                (self._folder / name).write_text(str(mib << 20))
        if self._version == 2:
            with contextlib.suppress(OSError):
                (self._folder / "memory.swap.max").write_text("0")
        self._limit_mib = mib

    def was_exceeded(self) -> bool:
        """Whether the kernel has killed something in it since the last question."""
        file = self._folder / ("memory.events" if self._version == 2 else "memory.oom_control")
        counts = dict(line.split() for line in file.read_text().splitlines())
        kills, self._kills_seen = int(counts.get("oom_kill", 0)), self._kills_seen
        exceeded, self._kills_seen = kills > self._kills_seen, kills
        return exceeded

    def remove(self) -> None:
        """Remove it. Its processes have been killed; the kernel may need a moment to see them off."""
        for _ in range(100):
            try:
                self._folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.01)
            else:
                return


def _parents() -> list[Path]:
    """Folders in which a cgroup with a memory controller may be made, the best first."""
    try:
        ours = Path("/proc/self/cgroup").read_text().splitlines()
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return []
    parents: list[Path] = []
    for line in ours:
        _, controllers, path = line.split(":", 2)
        for words in mounts:
            root, mounted, kind = words[3], words[4], words[words.index("-") + 1]
            options = words[-1].split(",")
            version_1 = kind == "cgroup" and "memory" in options and "memory" in controllers.split(",")
            if version_1 or (kind == "cgroup2" and controllers == ""):
                inside = os.path.relpath(path, root) if path.startswith(root) else "."
                own = Path(mounted, inside)
                parents += [own] if version_1 else [own, own.parent]
    return [parent for parent in parents if os.access(parent, os.W_OK)]


def _remove_abandoned(parent: Path) -> None:
    """Those of processes that were killed before they could remove theirs; a cgroup in use stays."""
    for folder in parent.glob(f"{PREFIX}*"):
        owner = folder.name.removeprefix(PREFIX).split("-")[0]
        if not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()
