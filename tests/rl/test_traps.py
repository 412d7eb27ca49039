"""The table of known traps in docs/architecture.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
TABLE = (TESTS.parent / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Known traps")[2]
NAMED = re.findall(r"`([\w/]+\.py)::(test_\w+)`", TABLE.partition("\n## ")[0])


def test_every_trap_has_its_test() -> None:
    assert len(NAMED) > 35
    missing = [f"{file}::{name}" for file, name in NAMED if f"def {name}(" not in (TESTS / file).read_text("utf-8")]
    assert not missing
