"""Layers (docs/architecture.md): a module imports only from its own folder or from floors below."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qmpfd

PACKAGE = Path(qmpfd.__file__).parent

#: Layers from the bottom; modules of one layer do not import each other.
FLOORS = [
    {"errors", "limits", "_version", "supervisor"},
    {"kernel"},
    {"policy", "fdsets"},
    {"protocol"},
    {"commands"},
    {"transport"},
    {"client"},
    {"server"},
    {"cli", "__main__", "testing"},
]
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}

#: Modules of cli/ that may import Trio: none of a verb that must start fast.
TRIO_IN_CLI = {"cli.daemon", "cli.notifications", "cli.tapping"}
TRIO = {"transport", "client", "server", "testing", *TRIO_IN_CLI}

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")
)


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())


def imports(module: str) -> Iterator[str]:
    """Yield every module that *module* imports, anywhere, also for the type checker only."""
    package = ["qmpfd", *module.split(".")[:-1]]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*base, *([node.module] if node.module else [])])
            if home == "qmpfd":
                yield from (f"qmpfd.{alias.name}" for alias in node.names)
            else:
                yield home


def room(module: str) -> str:
    """Return the folder or file directly under the package."""
    return module.split(".", maxsplit=1)[0]


def own(module: str) -> set[str]:
    """Return the folders and files of the package that *module* imports from."""
    names = {name.removeprefix("qmpfd.") for name in imports(module) if name.startswith("qmpfd.")}
    return {room(name) for name in names}


inner = [module for module in MODULES if module != "__init__"]


def test_the_list_names_every_module() -> None:
    assert {room(module) for module in inner} == set(FLOOR_OF)
    assert len(FLOOR_OF) == sum(map(len, FLOORS))


@pytest.mark.parametrize("module", inner)
def test_imports_only_from_below(module: str) -> None:
    here = room(module)
    others = own(module) - {here}
    assert others <= set(FLOOR_OF), "no module of the house"
    above = {other for other in others if FLOOR_OF[other] >= FLOOR_OF[here]}
    if module == "__main__":
        above -= {"cli"}  # its door
    assert not above


@pytest.mark.parametrize("module", MODULES)
def test_trio_on_the_top_floors_only(module: str) -> None:
    tops = {name.split(".")[0] for name in imports(module)}
    if "trio" in tops:
        assert room(module) in TRIO or module in TRIO


def test_a_restart_opens_nothing_before_the_numbers_are_given() -> None:
    """Since Python 3.14, the import of ctypes, as by Trio, leaves a descriptor open."""
    program = """
import sys
import qmpfd.cli.serve, qmpfd.cli.logs, qmpfd.cli.supervise, qmpfd.cli.takeover
import qmpfd.cli.spare, qmpfd.server.fdstore.fetch
import qmpfd.server.fdstore.recover, qmpfd.kernel.renumber
assert not {"ctypes", "trio"} & sys.modules.keys()
import qmpfd.cli.daemon
assert {"ctypes", "trio"} <= sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_trio_is_where_we_say() -> None:
    """The modules named above do import Trio: else the test before would check nothing."""
    users = {module for module in MODULES if "trio" in imports(module)}
    assert {room(module) for module in users} | TRIO_IN_CLI == {*TRIO, "cli"}


def calls_of_os_close(module: str) -> list[int]:
    lines = []
    for node in ast.walk(tree(module)):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr="close" | "closerange" | "fdopen"):
                lines.append(node.lineno)
            case ast.ImportFrom(module="os", names=names):
                lines += [node.lineno for alias in names if alias.name.startswith("close")]
    return lines


#: Numbers of calls of close(2) and close_range(2) in each module.
#: ``supervisor`` is a program of its own, which imports nothing of the package.
CLOSES = {"kernel.fd": 2, "supervisor.store": 1}


@pytest.mark.parametrize("module", [module for module in MODULES if module not in CLOSES])
def test_only_one_place_closes_descriptors(module: str) -> None:
    assert calls_of_os_close(module) == []


@pytest.mark.parametrize("module", sorted(CLOSES))
def test_that_place_is_one(module: str) -> None:
    assert len(calls_of_os_close(module)) == CLOSES[module]


@pytest.mark.parametrize("module", [module for module in inner if room(module) == "supervisor"])
def test_the_supervisor_stands_alone(module: str) -> None:
    """The supervisor imports nothing of the package: a fault there must not end it."""
    assert own(module) <= {"supervisor"}
    tops = {name.split(".")[0] for name in imports(module)} - {"qmpfd"}
    assert not tops & {"json", "argparse", "threading", "subprocess", "logging", "re"}
    assert tops <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", [module for module in inner if room(module) == "fdsets"])
def test_the_store_knows_no_json_and_no_system(module: str) -> None:
    tops = {name.split(".")[0] for name in imports(module)}
    assert not tops & {"msgspec", "json", "trio", "os", "socket", "select", "asyncio", "outcome"}


@pytest.mark.parametrize(
    "module", [module for module in inner if room(module) in ("protocol", "commands")]
)
def test_the_middle_does_no_io(module: str) -> None:
    tops = {name.split(".")[0] for name in imports(module)}
    assert not tops & {"trio", "socket", "selectors", "asyncio", "threading", "subprocess"}


TESTS = Path(__file__).parent
NAMED_BY_TESTS = {
    name
    for path in TESTS.rglob("test_*.py")
    for name in re.findall(r"[\w/]+\.py", ast.get_docstring(ast.parse(path.read_text())) or "")
}

#: Modules that every test of the command line runs.
RUN_BY_ALL = {"__main__", "_version", "supervisor.__main__"}


@pytest.mark.parametrize("module", [each for each in inner if not each.endswith("__init__")])
def test_the_tests_of_a_module_are_found_by_its_name(module: str) -> None:
    path = Path(f"{module.replace('.', '/')}.py")
    own_file = TESTS / path.parent / f"test_{path.name}"
    assert own_file.exists() or str(path) in NAMED_BY_TESTS or module in RUN_BY_ALL


def module_imports(module: str) -> set[str]:
    """Return the modules of the package that *module* imports, also for the type checker only."""
    found = set()
    package = ["qmpfd", *module.split(".")[:-1]]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                member, here = (
                    {local, f"{local}.__init__"} & set(MODULES)
                    for local in (f"{home}.{alias.name}".removeprefix("qmpfd."), home[6:])
                )
                found |= member or here
    return found - {module}


#: Modules for a system call that Python lacks.
SYSTEM_CALLS = {"fcntl", "ctypes", "termios", "resource"}


@pytest.mark.parametrize(
    "module", [module for module in inner if room(module) not in ("kernel", "supervisor")]
)
def test_system_calls_are_in_kernel(module: str) -> None:
    tops = {name.split(".")[0] for name in imports(module)}
    assert not tops & SYSTEM_CALLS


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Return the modules in import cycles: those left after removing leaves repeatedly."""
    edges = {name: needed & set(edges) for name, needed in edges.items()}
    while True:
        leaves = {name for name, needed in edges.items() if not needed & set(edges)}
        used = set().union(*edges.values()) if edges else set()
        free = leaves | (set(edges) - used)
        if not free:
            return sorted(edges)
        edges = {n: needed - free for n, needed in edges.items() if n not in free}


#: Known import cycles; this set may only shrink.
KNOWN_CIRCLES: set[str] = set()


def test_no_circle_between_modules() -> None:
    """There is no import cycle, imports for the type checker included."""
    edges = {m: module_imports(m) for m in inner}
    assert set(circles(edges)) == KNOWN_CIRCLES


def folder(module: str) -> str:
    """Return the folder of a module; a file directly under the package counts as a folder."""
    return module.rpartition(".")[0] or module


#: Known import cycles between folders; this set may only shrink.
KNOWN_FOLDER_CIRCLES: set[str] = set()


def test_no_circle_between_folders() -> None:
    """There is no import cycle between folders; a folder and its parent count as one."""
    edges: dict[str, set[str]] = {}
    for module in inner:
        here = folder(module)
        needed = edges.setdefault(here, set())
        for other in map(folder, module_imports(module)):
            if not f"{other}.".startswith(f"{here}.") and not f"{here}.".startswith(f"{other}."):
                needed.add(other)
    assert set(circles(edges)) == KNOWN_FOLDER_CIRCLES
