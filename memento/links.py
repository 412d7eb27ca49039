"""How `memento/rewards.py` and its like make a package of a linked folder without an `__init__.py` inside it.

The code folders lie at the top of the repository (`rewards/`, `rl/`, ...) and `memento/` links to them, so that
everything is imported as `memento.rewards`, `memento.rl`, ... An `__init__.py` inside such a folder would also make it
importable under its flat name, and a top-level package called `kernels` breaks `transformers` wherever Hugging Face's
own `kernels` is installed. So the package body lives one floor up, in `memento/rewards.py`; the folder itself holds
only modules and an `__init__.pyi` for type checkers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable


def package(file: str, **exports: str) -> tuple[list[str], Callable[[str], object]]:
    """The `__path__` and the lazy `__getattr__` of the package whose body is `file`.

    Args:
        file: ``__file__`` of the body, e.g. ``memento/rewards.py``; the folder beside it holds the modules.
        exports: public name -> the module that defines it, imported on first use, so that
            ``from memento.rewards import score`` costs nothing until somebody asks for it.
    """
    name = "memento." + file.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".py")

    def __getattr__(attribute: str) -> object:
        if attribute in exports:
            return getattr(importlib.import_module(exports[attribute]), attribute)
        raise AttributeError(f"module {name!r} has no attribute {attribute!r}")

    return [file.removesuffix(".py")], __getattr__
