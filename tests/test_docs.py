"""The documentation: it builds without a warning, what is printed from the code is current, its commands are real."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from memento.cli import app
from memento.config import load_config
from memento.reference import FILES, REFERENCES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PROGRAMS = (
    "memento",
    "make",
    "ray",
    "git",
    "cd",
    "pip",
    "python",
    "pytest",
    "docker",
    "kubectl",
    "sbatch",
    "tensorboard",
)
PROGRAMS += ("wandb", "lm_eval", "lighteval", "curl", "export", "source", "vllm")


def parts(line: str) -> list[str]:
    """The commands of a line, without its comment."""
    return [part.strip() for part in re.sub(r"\s{2,}#.*$", "", line.strip()).split(" && ")]


def is_command(part: str) -> bool:
    """Whether a program of ours or of others stands at its beginning, behind variables perhaps, with an argument."""
    words = re.sub(r"^([A-Z_]+=\S+ )+", "", part).split()
    return len(words) > 1 and words[0] in PROGRAMS


def blocks(page: Path) -> Iterator[tuple[bool, str]]:
    """The lines of a page's code blocks, continued ones joined: whether the block is a shell's, and the line."""
    fence, text = None, page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("```"):
            fence = (line[3:].strip() or "plain") if fence is None else None
        elif fence in ("bash", "sh"):
            yield True, line
        elif fence is None and line.startswith("    "):
            yield False, line


def commands(page: Path) -> Iterator[str]:
    """The command lines in a page's code blocks, fenced or indented, chained commands taken apart."""
    for _, line in blocks(page):
        yield from (part for part in parts(line) if is_command(part) and not part.startswith("cd "))


def mentions(page: Path) -> Iterator[str]:
    """Commands within a sentence or a table."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    yield from (found for found in re.findall(r"`([^`\n]+)`", text) if is_command(found))


DESCRIBED = [page for page in PAGES if page.name not in ("LOG.md", "commands.md")]
ALL = sorted({command for page in DESCRIBED for command in commands(page)})
MENTIONED = sorted({command for page in DESCRIBED for command in mentions(page)} - set(ALL))


def rows() -> list[tuple[list[str], str]]:
    """The table of docs/commands.md: patterns, and what runs them."""
    found = []
    for line in (ROOT / "docs" / "commands.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            left, right = line.strip("| ").split(" | ", 1)
            found.append((re.findall(r"`([^`]+)`", left), right))
    return found


@pytest.mark.parametrize("name", REFERENCES)
def test_printed_pages_are_current(name: str) -> None:
    committed = (ROOT / FILES[name]).read_text(encoding="utf-8")
    assert committed == REFERENCES[name](), f"run: memento reference {name} > {FILES[name]}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    page = (tmp_path / "site" / "concepts.html").read_text()
    assert "images/visible.svg" in page and (tmp_path / "site" / "images" / "visible.svg").is_file()
    assert "fonts.googleapis" not in page, "a page loads nothing from elsewhere"


def test_links_out_of_the_repository_are_whole() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if target.startswith("http"):
                assert re.fullmatch(r"https://[\w.-]+\.\w+(/[\w./%#-]*)?", target), f"{page.name}: {target}"
            elif page.name == "README.md":
                assert (ROOT / target.split("#")[0]).exists(), f"README.md: {target}"


def test_there_is_something_to_check() -> None:
    assert len(ALL) > 60 and {"make install", "memento quickstart --out runs/quickstart"} <= set(ALL)
    assert any(command.startswith("memento annotate") and "--tokenizer" in command for command in ALL), (
        "an indented one"
    )
    assert len(MENTIONED) > 30


def test_every_line_for_a_shell_is_a_command_that_we_know() -> None:
    for page in DESCRIBED:
        for shell, line in blocks(page):
            if shell and line.strip() and not line.startswith("#"):
                assert all(is_command(part) for part in parts(line)), f"{page.name}: {line}"


@pytest.mark.parametrize("command", [*ALL, *MENTIONED])
def test_every_command_has_a_row(command: str) -> None:
    assert any(fnmatchcase(command + end, p) for end in ("", " ") for patterns, _ in rows() for p in patterns), (
        f"{command}: say in docs/commands.md which test runs it, or what it needs"
    )


def test_every_row_is_of_use() -> None:
    for patterns, _ in rows():
        for p in patterns:
            assert any(fnmatchcase(c + end, p) for c in (*ALL, *MENTIONED) for end in ("", " ")), f"no page has {p}"


def test_every_row_names_a_test_that_is_there() -> None:
    for patterns, text in rows():
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
        for file, name in named:
            assert (ROOT / file).is_file(), f"{patterns}: there is no {file}"
            assert not name or f"def {name}(" in (ROOT / file).read_text(), f"{patterns}: {file} has no {name}"
        for subcommand in {p.split()[1] for p in patterns if p.startswith("memento ")}:
            sources = [(ROOT / file).read_text() for file, _ in named]
            assert any(f'"{subcommand}"' in source for source in sources), f"none of {named} runs memento {subcommand}"


@pytest.mark.parametrize("command", [c for c in MENTIONED if c.startswith("memento ")])
def test_commands_within_a_sentence_exist(command: str) -> None:
    _, name, *words = command.split()
    cli: Any = typer.main.get_command(app)
    assert name in cli.commands, command
    known = {option for parameter in cli.commands[name].params for option in parameter.opts}
    passes_on = cli.commands[name].context_settings.get("ignore_unknown_options")
    assert passes_on or {word for word in words if word.startswith("--")} <= known, command


@pytest.mark.parametrize("command", [c for c in ALL if c.startswith("memento ")])
def test_flags_and_configurations_of_our_commands_exist(command: str) -> None:
    words = shlex.split(command.split(" > ")[0])[1:]
    cli: Any = typer.main.get_command(app)
    assert words[0] in cli.commands, command
    subcommand = cli.commands[words[0]]
    context = subcommand.make_context(words[0], words[1:])  # raises for an unknown flag or a missing argument
    config = context.params.get("config")
    if config is not None and (ROOT / str(config)).is_file():
        load_config(ROOT / str(config), [o for o in context.params.get("overrides") or () if "..." not in o])


def test_the_cluster_files_are_well_formed() -> None:
    folder = ROOT / "configs" / "ray"
    # Ray's launcher: its own schema.
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load((folder / "cluster.yaml").read_text())
    validate_config(prepare_config(cluster))
    # KubeRay.
    job = yaml.safe_load((folder / "rayjob.yaml").read_text())
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    words = shlex.split(spec["entrypoint"])
    assert words[:3] == ["python", "-m", "memento.rl.train"] and words[-1] == "--resume"
    config = load_config(ROOT / "configs" / words[3].split("configs/")[1], words[4:-1])
    assert Path(config.out).is_absolute()
    workers = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    pod = workers["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    from memento.preflight import check_resources

    assert config.kind == "rl"
    check_resources(config, [{"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}])
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    import ray

    assert spec["rayClusterSpec"]["rayVersion"] == ray.__version__
    # Slurm.
    assert subprocess.run(["bash", "-n", str(folder / "slurm.sh")], check=False).returncode == 0
    refused = subprocess.run(["bash", str(folder / "slurm.sh")], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "usage: sbatch" in refused.stderr


@pytest.mark.parametrize("profile", ["cpu", "cuda"])
def test_dockerfiles_copy_what_is_there_and_install_their_profile(profile: str) -> None:
    text = (ROOT / "docker" / f"{profile}.Dockerfile").read_text(encoding="utf-8")
    steps = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line and not line.startswith("#")]
    words = {step.split()[0] for step in steps}
    assert words <= {"FROM", "ARG", "RUN", "ENV", "WORKDIR", "COPY", "CMD"} and steps[-1].startswith("CMD")
    for step in steps:
        if step.startswith("COPY"):
            assert all((ROOT / source).exists() for source in step.split()[1:-1]), step
        if "install.sh" in step and step.startswith("RUN"):
            assert f"MEMENTO_PROFILE={profile}" in step
    image = next(step for step in steps if step.startswith(("ARG BASE=", "FROM python")))
    assert re.search(r"[:=][\w./-]+:\d|python:\d", image), "the base has a version"
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored) and "memento" not in ignored
