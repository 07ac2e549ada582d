# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import vdpa_bridge
from tests.support.programs import capabilities, descriptor
from vdpa_bridge.cli.programs import PROGRAMS
from vdpa_bridge.models import KINDS

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "vdpa_bridge"
LONGEST = 500
SPDX = "SPDX-License-Identifier: "
LEFT_BY_TOOLS = {".git", "build", "dist", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
SOURCE_SUFFIXES = {".py", ".pyi", ".pyx", ".pxd", ".c", ".h", ".sh", ".toml"}
SOURCE_NAMES = {"Makefile", "Kbuild"}


def files() -> list[Path]:
    """What belongs to the project."""
    found = []
    for directory, names, leaves in os.walk(REPO):
        names[:] = [name for name in names if name not in LEFT_BY_TOOLS and not name.endswith(".egg-info")]
        found += [Path(directory, leaf) for leaf in leaves if not leaf.endswith((".so", ".o", ".ko", ".pyc"))]
    return sorted(found)


def is_source(path: Path) -> bool:
    """Programs, by name or by their first line."""
    return path.suffix in SOURCE_SUFFIXES or path.name in SOURCE_NAMES or path.read_bytes()[:2] == b"#!"


SOURCES = [path for path in files() if is_source(path)]


def test_there_are_sources() -> None:
    assert len(SOURCES) > 60


def test_every_source_says_its_licence() -> None:
    """On the first line, or the second behind ``#!``; the kernel's end is GPL-2.0-only, the rest is free of it."""
    wrong = []
    for path in SOURCES:
        head = path.read_text().split("\n", 2)[:2]
        expected = "GPL-2.0-only" if path.parent == REPO / "kernel" else "Apache-2.0 OR BSD-3-Clause"
        line = head[1] if head[0].startswith("#!") and len(head) > 1 else head[0]
        if not line.rstrip(" */->").endswith(SPDX + expected):
            wrong.append(f"{path.relative_to(REPO)}: {line}")
    assert not wrong


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(REPO)): path.read_text().count("\n") for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_no_trailing_blanks_and_one_newline_at_the_end() -> None:
    wrong = [str(path) for path in SOURCES if path.read_text() and (re.search(r"[ \t]$", path.read_text(), re.MULTILINE) or not path.read_text().endswith("\n"))]
    assert not wrong


# Layers ----------------------------------------------------------------------------------------------------------------------------


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file of the package imports, and of what it takes from them."""
    package = list(path.relative_to(REPO).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def modules(*folders: str) -> list[Path]:
    """The files of some sub-packages."""
    found = [path for folder in folders for path in sorted((PACKAGE / folder).rglob("*.py"))]
    assert found
    return found


TRANSPORTS = re.compile(r"vdpa_bridge\.(backends\.(vhost|model|trace)|vhost_user|vduse|_ioctl)|socket$|fcntl$|ioctl_opt")


@pytest.mark.parametrize("path", modules("drivers"), ids=lambda p: p.name)
def test_drivers_know_device_and_nothing_below(path: Path) -> None:
    assert [name for name in imports(path) if TRANSPORTS.match(name) or name.startswith("vdpa_bridge.backends")] == []


@pytest.mark.parametrize("path", modules("models"), ids=lambda p: p.name)
def test_models_know_chains_and_nothing_of_transports(path: Path) -> None:
    allowed = {"fcntl"}  # the size of a block device
    assert [name for name in imports(path) if name not in allowed and (TRANSPORTS.match(name) or name.startswith("vdpa_bridge.backends"))] == []


@pytest.mark.parametrize("path", modules("cli"), ids=lambda p: p.name)
def test_commands_know_targets_and_no_transport(path: Path) -> None:
    """What they serve with is an exporter; where a device lives they leave to targets."""
    assert [name for name in imports(path) if name.startswith("vdpa_bridge.backends.vhost")] == []


@pytest.mark.parametrize("path", modules("drivers", "models"), ids=lambda p: p.name)
def test_drivers_and_models_name_no_transport(path: Path) -> None:
    """Not in code, that is: comments may say what is not there."""
    tree = ast.parse(path.read_text())
    words = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)] + [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert [word for word in words if re.search(r"vhost|socket|ioctl", word, re.IGNORECASE)] in ([], ["ioctl"])


@pytest.mark.parametrize("path", [p for p in modules(".") if p.name != "_ioctl.py"], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_one_door_to_ioctl_numbers(path: Path) -> None:
    assert "ioctl_opt" not in set(imports(path))


def test_sans_io() -> None:
    """The protocol core imports no sockets; server, connection and channel are its shells."""
    core = [PACKAGE / "vhost_user" / f"{name}.py" for name in ("messages", "vdpa_mode", "session", "legacy_server", "legacy_life")]
    assert [(p.name, name) for p in core for name in imports(p) if name in ("socket", "select", "threading")] == []
    framing = (PACKAGE / "vhost_user" / "framing.pyx").read_text()
    assert re.findall(r"^\s*(?:from|c?import)\s.*\b(socket|select|threading|poll)\b", framing, re.MULTILINE) == []


# The package -----------------------------------------------------------------------------------------------------------------------

MODULES = sorted(["vdpa_bridge", *(info.name for info in pkgutil.walk_packages(vdpa_bridge.__path__, "vdpa_bridge."))])


@pytest.mark.parametrize("name", MODULES)
def test_every_module_can_be_imported_and_keeps_its_promises(name: str) -> None:
    module = importlib.import_module(name)
    for promised in getattr(module, "__all__", ()):
        assert hasattr(module, promised), f"{name}.__all__ names {promised}, which is not there"


def run(*command: str | Path, cwd: Path = REPO, **environment: str) -> str:
    """What a program says, whose failure is ours."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=110, env=os.environ | environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tool(name: str) -> list[str]:
    """How to start a tool of this interpreter."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}: pip install -e '.[test]'")
    return [sys.executable, "-m", name]


def test_ruff() -> None:
    run(*tool("ruff"), "check", ".")


def test_mypy() -> None:
    run(*tool("mypy"))


def test_documents_are_fresh() -> None:
    run(sys.executable, REPO / "tools" / "render", "--check")


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_says_what_stays_open_in_a_sandbox(kind: str) -> None:
    page = (REPO / "docs" / "sandbox.md").read_text()
    assert re.search(rf"^\|[^|]*`{kind}`[^|]*\|", page.partition("## What stays open")[2], re.MULTILINE)


@pytest.mark.parametrize("name", [p.name for p in files() if p.parent == REPO / "tools" and os.access(p, os.X_OK)])
def test_tools_explain_themselves(name: str) -> None:
    assert len(run(REPO / "tools" / name, "--help").splitlines()) >= 3


def test_archives_hold_what_they_must(tmp_path: Path) -> None:
    """The source archive is complete, as the wheel is built from it; what the wheel installs works away from the sources."""
    for name in ("Cython", "setuptools"):
        tool(name)
    tree = tmp_path / "tree"
    for path in files():
        copy = tree / path.relative_to(REPO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    build = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    archive = tmp_path / run(sys.executable, "-W", "ignore", "-c", build, "build_sdist", tmp_path, cwd=tree).splitlines()[-1]
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tmp_path / "sdist", filter="data")
    for wanted in ("userspace/include", "userspace/src", "kernel/build", "tools/test", "tests/conftest.py", "vdpa_bridge/vhost_user/framing.pyx", "README.md"):
        assert any(name.startswith(wanted) for name in names), wanted
    unpacked = next((tmp_path / "sdist").iterdir())
    wheel = tmp_path / run(sys.executable, "-W", "ignore", "-c", build, "build_wheel", tmp_path, cwd=unpacked, CFLAGS="-O0").splitlines()[-1]
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    assert {"vdpa_bridge/py.typed", "vdpa_bridge/_virtqueue.pyi", "vdpa_bridge/vhost_user/framing.pyi", "vdpa_bridge/ops.py", "vdpa_bridge/cli/__init__.py"} <= names
    assert not [name for name in names if name.endswith((".pyx", ".c", ".h")) or name.startswith(("tests", "tools"))]
    prefix = tmp_path / "prefix"
    run(*tool("pip"), "install", "--quiet", "--no-index", "--no-deps", "--ignore-installed", "--prefix", prefix, wheel)
    (site,) = (path.parent for path in prefix.rglob("vdpa_bridge"))
    check = "import vdpa_bridge; print(vdpa_bridge.__file__); print(vdpa_bridge.connect('model:blk?size=1M').identify().device_id)"
    where, answer = run(sys.executable, "-c", check, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert (Path(where).parent.parent, answer) == (site, "2")
    run(prefix / "bin/vdpa-bridge", "descriptors", "--install", cwd=tmp_path, PYTHONPATH=str(site))
    written = [descriptor(path.read_text()) for path in (prefix / "share/qemu/vhost-user").iterdir()]
    undescribed = {prefix / "bin" / program.name for program in PROGRAMS.values() if not program.described}
    assert {Path(each["binary"]) for each in written} | undescribed == set((prefix / "bin").glob("vhost-user-vdpa-*"))
    for each in written:
        assert capabilities(run(each["binary"], "--print-capabilities", cwd=tmp_path, PYTHONPATH=str(site)))["type"] == each["type"]
