"""Who may import whom. The import graph is read from the source, so an import inside a function counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "vllm", "ray", "transformers", "deepspeed", "trl", "wandb", "datasets", "accelerate"}
FOLDERS = {"kernels", "rewards", "rollout", "sft", "rl"}
MAY_IMPORT = {
    "kernels": set(),
    "rewards": set(),
    "rollout": {"kernels"},
    "sft": {"kernels"},
    "rl": {"kernels", "rewards", "rollout"},
}
"""Beside the vocabulary, which everybody reads."""
FRONT = {"cli", "quickstart", "preflight", "doctor"}
"""Modules of memento/ that stand before everything and may reach for anything, when they run."""


def imports(file: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; those under ``if TYPE_CHECKING`` do not run and do not count."""
    nodes: list[ast.AST] = list(ast.parse(file.read_text(encoding="utf-8")).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            nodes += ast.iter_child_nodes(node)


def ours(file: Path) -> set[str]:
    """The code folders that a module imports from."""
    parts = (name.split(".") for name in imports(file))
    return {p[1] for p in parts if p[0] == "memento" and len(p) > 1 and p[1] in FOLDERS}


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folder_imports_only_what_lies_below_it(folder: str) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        forbidden = ours(file) - MAY_IMPORT[folder] - {folder}
        assert not forbidden, f"{file.relative_to(ROOT)} imports memento.{sorted(forbidden)[0]}"


def test_the_vocabulary_stands_on_nothing_of_ours_and_is_light() -> None:
    files = [f for f in (ROOT / "memento").glob("*.py") if f.stem not in FRONT | FOLDERS]
    assert len(files) > 5
    for file in files:
        assert not ours(file), f"{file.name} imports memento.{sorted(ours(file))[0]}"
        heavy = {name.split(".")[0] for name in imports(file, top_level_only=True)} & HEAVY
        assert not heavy, f"{file.name} imports {sorted(heavy)[0]} at module level"


@pytest.mark.parametrize("modules", ["memento.config, memento.format, memento.cli", "memento.run, memento.preflight"])
def test_what_answers_at_once_loads_no_torch(modules: str) -> None:
    code = f"import sys, {modules}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.split() == []


def test_show_loads_no_torch() -> None:
    config = next((ROOT / "configs").rglob("*.yaml"))
    code = (
        "import sys\nfrom memento.cli import main\n"
        f"try: main(['show', {str(config)!r}])\nexcept SystemExit as e: assert not e.code, e.code\n"
        f"assert not ({HEAVY!r} & set(sys.modules)), sorted({HEAVY!r} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_an_engines_actor_reads_its_environment_before_torch_does() -> None:
    """`rollout.engine.set_environment` is too late for whatever was imported before it."""
    code = "import sys, memento.rollout.engine; print(*sorted({'torch', 'vllm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
