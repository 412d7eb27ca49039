r"""The last ``\boxed{...}`` of a text: where answer keys and completions alike keep the final answer."""

from __future__ import annotations

import re

_BOX_OR_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s{}$\\]{1,200})")


def last_boxed(text: str) -> str | None:
    r"""Content of the closed, non-empty ``\boxed{...}`` that opens last. Braces nest; ``\{`` does not count.

    ``\boxed{\boxed{3}}`` gives ``3``; a box cut off by the length limit is not an answer. Also ``\fbox{}`` and the
    brace-less ``\boxed 3``. Linear in the length of the text.
    """
    open_braces: list[int | None] = []  # where the content of each open box starts; None for a plain brace
    best: tuple[int, int] | None = None
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if match["box"]:
            open_braces.append(match.end())
        elif token == "{":
            open_braces.append(None)
        elif token == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (best is None or start > best[0]) and text[start : match.start()].strip():
                best = (start, match.start())
    if best is not None:
        return text[best[0] : best[1]].strip()
    bare = [match[1].rstrip(".,;") for match in _BARE_BOX.finditer(text)]
    return (bare[-1] or None) if bare else None
