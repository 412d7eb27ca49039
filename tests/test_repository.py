"""The shape of the repository: links, names, and what a wheel holds."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "rewards", "rollout", "sft", "rl")


@pytest.mark.parametrize("name", [*FOLDERS, "configs"])
def test_links_are_relative_and_lead_to_the_folders(name: str) -> None:
    link = ROOT / "memento" / name
    assert link.is_symlink() and link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name and link.is_dir()


@pytest.mark.parametrize("name", FOLDERS)
def test_code_folders_are_no_packages_under_their_flat_name(name: str) -> None:
    assert not (ROOT / name / "__init__.py").exists()
    assert (ROOT / "memento" / f"{name}.py").is_file(), "the package body lives one floor up"


def test_no_module_is_named_like_a_library() -> None:
    known = set(sys.stdlib_module_names) | set(packages_distributions())
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            if file.stem not in ("__init__", "__main__"):
                assert file.stem not in known, f"{file.relative_to(ROOT)} has the name of a library"


def test_a_wheel_holds_memento_alone_with_real_files(tmp_path: Path) -> None:
    hatchling = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(hatchling, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert all(info.external_attr >> 28 != 0o12 for info in archive.infolist()), "a link in the wheel"
        held = archive.read("memento/config.py")
    assert {name.split("/")[0].split("-")[0] for name in names} == {"memento", "memento_rl"}
    assert held == (ROOT / "memento" / "config.py").read_bytes()
    for folder in (*FOLDERS, "configs"):
        tracked = [
            f.relative_to(ROOT / folder)
            for f in (ROOT / folder).rglob("*")
            if f.is_file() and f.suffix in (".py", ".pyi", ".yaml", ".json")
        ]
        assert tracked, folder
        for file in tracked:
            assert f"memento/{folder}/{file}" in names
