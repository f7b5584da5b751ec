"""The public names: three equal lists, and documentation for each name."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, is_typeddict

import msgspec
import pytest

import qmpfd

#: Parameters that callers do not pass.
CONVENTIONS = {"self", "cls", "task_status"}

NAMES = sorted(set(qmpfd.__all__) - {"__version__"})


def typing_imports(package: ModuleType) -> dict[str, str]:
    """Return the imports for the type checker: names and their modules."""
    assert package.__file__ is not None
    found: dict[str, str] = {}
    for node in ast.parse(Path(package.__file__).read_text()).body:
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            continue
        for statement in node.body:
            assert isinstance(statement, ast.ImportFrom)
            for alias in statement.names:
                assert alias.asname == alias.name, "only X as X is re-exported"
                assert alias.name not in found
                found[alias.name] = "." * statement.level + (statement.module or "")
    return found


def lazy_packages() -> list[ModuleType]:
    """Return the packages that load names on first use."""
    names = [m.name for m in pkgutil.iter_modules(qmpfd.__path__, "qmpfd.") if m.ispkg]
    return [p for p in map(importlib.import_module, ["qmpfd", *names]) if hasattr(p, "_HOMES")]


LAZY = lazy_packages()


@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_all_three_lists_agree(package: ModuleType) -> None:
    homes: dict[str, str] = package._HOMES
    assert homes
    assert typing_imports(package) == homes
    listed = set(package.__all__) - {"__version__"}
    assert listed == set(homes)
    assert len(set(package.__all__)) == len(package.__all__)


@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_no_name_is_that_of_a_module(package: ModuleType) -> None:
    """No exported name is that of a submodule, which would replace it when loaded."""
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert not modules & set(package._HOMES)


def test_all() -> None:
    assert qmpfd in LAZY
    assert sorted(qmpfd.__all__) == sorted([*qmpfd._HOMES, "__version__"])
    assert dir(qmpfd) == sorted(qmpfd.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_what_its_home_exports(name: str) -> None:
    home = importlib.import_module(qmpfd._HOMES[name], "qmpfd")
    assert getattr(qmpfd, name) is getattr(home, name)
    if hasattr(home, "__all__"):
        assert name in home.__all__


def test_names_that_there_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'qmpfd' has no attribute 'nonesuch'"):
        _ = qmpfd.nonesuch


def test_nothing_is_loaded_before_it_is_used() -> None:
    code = "import qmpfd, sys; print(sorted({'trio', 'msgspec'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
    code = "import qmpfd, sys; qmpfd.serve; print('trio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize("package", ["commands", "fdsets"])
def test_what_a_folder_exports_is_there(package: str) -> None:
    module = importlib.import_module(f"qmpfd.{package}")
    assert sorted(module.__all__, key=str.lower) == sorted(set(module.__all__), key=str.lower)
    for name in module.__all__:
        assert hasattr(module, name)


# -- documentation ---------------------------------------------------------------------------------


def parameters(thing: Any) -> list[str]:
    """Return the parameters of *thing*, or the fields of a struct or dataclass."""
    if inspect.isclass(thing):
        if issubclass(thing, msgspec.Struct):
            return list(thing.__struct_fields__)
        if is_typeddict(thing):
            return list(thing.__annotations__)
        if issubclass(thing, tuple):
            return list(getattr(thing, "_fields", ()))
        if "__init__" not in vars(thing):
            return []  # documented by its base class
    names = inspect.signature(thing).parameters
    return [name for name in names if name not in CONVENTIONS]


def documented(thing: Any) -> list[str]:
    """Return the names in the docstring's section "Args"."""
    doc = inspect.cleandoc(thing.__doc__ or "")
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", doc, re.MULTILINE)
    if section is None:
        return []
    return re.findall(r"^    (\w+): ", section[1], re.MULTILINE)


def public_things() -> Iterator[tuple[str, Any]]:
    for name in NAMES:
        thing = getattr(qmpfd, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue  # an alias of types
        yield name, thing
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                if not member.startswith("_") and inspect.isfunction(value):
                    yield f"{name}.{member}", value
                elif not member.startswith("_") and isinstance(value, property):
                    yield f"{name}.{member}", value.fget


THINGS = dict(public_things())


@pytest.mark.parametrize("name", THINGS)
def test_documented(name: str) -> None:
    thing = THINGS[name]
    doc = thing.__doc__
    assert doc, "no docstring"
    assert doc.splitlines()[0].strip(), "the first line says what it is"
    names = parameters(thing)
    if "." in name and len(names) == 1 and not documented(thing):
        return  # the first line may describe a method's single argument
    assert documented(thing) == names


def test_the_check_sees_something() -> None:
    assert parameters(qmpfd.Limits) == documented(qmpfd.Limits) != []
    assert parameters(THINGS["Client.add_fd"]) == ["fd", "fdset_id", "opaque"]

    def undocumented(number: int) -> None:
        """Does things."""

    assert parameters(undocumented) == ["number"]
    assert documented(undocumented) == []


def test_error_classes_are_the_specifications() -> None:
    """The package has an exception for each error class of both dialects, and no others."""
    classes = {
        name
        for name in NAMES
        if inspect.isclass(thing := getattr(qmpfd, name)) and issubclass(thing, qmpfd.QMPError)
    }
    assert classes == {
        "QMPError",
        "GenericError",
        "CommandNotFound",
        "FdExists",
        "FdNotFound",
        "FdNotSupplied",
        "InvalidParameterValue",
        "PermissionDenied",
    }


# -- signatures ------------------------------------------------------------------------------------

#: Other names that a signature may have: of the standard library, of Trio, and bounds of an int.
FOREIGN = {
    *("Any", "Callable", "Int64", "Literal", "None", "Path", "PathLike", "Self", "Unpack"),
    *("AsyncGenerator", "AsyncIterator", "Iterable", "Iterator", "Mapping", "Sequence"),
    *("Annotated", "ForwardRef", "INT64_MAX", "Meta", "Right", "TaskStatus", "Event"),
}


#: Methods for internal use; still to be separated from those for users.
INTERNAL = {name for name in THINGS if name.startswith("Policy.")}


@pytest.mark.parametrize("name", sorted(set(THINGS) - INTERNAL))
def test_public_signatures_name_public_things(name: str) -> None:
    annotations = inspect.get_annotations(THINGS[name]).values()
    words = {word for each in annotations for word in re.findall(r"\b[A-Z]\w*", str(each))}
    assert words <= {*NAMES, *FOREIGN}
