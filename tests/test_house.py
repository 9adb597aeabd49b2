"""The house's own rules: what is exported is used, documented and frozen, and the stubs match the binary."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import pickle
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import tdpmmu
from conftest import ROOT
from tdpmmu import _native, errors

PACKAGE = ROOT / "python" / "tdpmmu"
BINDINGS = ROOT / "rust" / "py" / "src"


def exports() -> list[str]:
    return [name for name in dir(_native) if not name.startswith("__")]


def test_every_native_export_is_used_by_the_face() -> None:
    text = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in exports():
        # Names with an underscore exist for the tests of the boundary itself.
        assert re.search(rf"_native\.{name}\b", tests if name.startswith("_") else text), name


def test_every_native_class_is_frozen() -> None:
    found = 0
    for path in BINDINGS.rglob("*.rs"):
        for match in re.finditer(r"#\[pyclass(\((?P<options>[^\]]*)\))?\]", path.read_text()):
            found += 1
            assert re.search(r"\bfrozen\b", match["options"] or ""), f"{path.name}: {match[0]}"
    classes = [name for name in exports() if inspect.isclass(getattr(_native, name))]
    assert found == len(classes)


def test_no_native_method_takes_a_mutable_self() -> None:
    for path in BINDINGS.rglob("*.rs"):
        text = path.read_text()
        for block in re.findall(r"#\[pymethods\]\nimpl \w+ \{\n(.*?)\n\}\n", text, re.DOTALL):
            assert "&mut self" not in block, path.name


def public() -> Iterator[tuple[str, object]]:
    """Every public name of the package, and every public method of its classes."""
    for name in tdpmmu.__all__:
        value = getattr(tdpmmu, name)
        if isinstance(value, str):
            continue
        yield name, value
        inside = getattr(value, "__all__", ()) if isinstance(value, types.ModuleType) else ()
        for inner in inside:
            yield f"{name}.{inner}", getattr(value, inner)
        if inspect.isclass(value) and value.__module__.startswith("tdpmmu"):
            # Methods of a base class, too: a big class is a file each part.
            bases = [base for base in value.__mro__ if base.__module__.startswith("tdpmmu")]
            members = {name: member for base in reversed(bases) for name, member in vars(base).items()}
            for inner, member in members.items():
                if not inner.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
                    yield f"{name}.{inner}", getattr(value, inner)


NAMES = dict(public())
# A word that says in which unit a number is, or that there is no number with a unit.
UNIT = re.compile(
    r"\bns\b|nanosecond|second|\bbytes?\b|KiB|GiB|\bgfns?\b|pages?\b|JSON|size|count|scaled|unit|text|names?\b|object"
)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_name_has_a_docstring(name: str) -> None:
    text = inspect.getdoc(NAMES[name])
    assert text, f"{name} has no docstring"
    assert len(text) > 20, name


@pytest.mark.parametrize(
    "name", sorted(n for n, v in NAMES.items() if inspect.isfunction(v) and v.__module__.startswith("tdpmmu"))
)
def test_every_public_function_says_its_units_and_its_errors(name: str) -> None:
    function = NAMES[name]
    text = inspect.getdoc(function) or ""
    if inspect.signature(function).parameters.keys() - {"self", "cls"}:  # type: ignore[arg-type]
        assert UNIT.search(text), f"{name}: no unit"
    tree = ast.parse(_source(function))
    raises = [node for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    if raises:
        assert "Raises:" in text or "rrors" in text, f"{name} raises, and does not say what"


def _source(function: object) -> str:
    return textwrap.dedent(inspect.getsource(function))  # type: ignore[arg-type]


def test_every_error_is_a_tdpmmu_error_and_a_builtin_one() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.TdpMmuError)
        if kind is not errors.TdpMmuError:
            builtin = [base for base in kind.__mro__ if base.__module__ == "builtins"]
            assert builtin[0] not in (Exception, BaseException, object), name


def test_errors_survive_pickling_with_their_message() -> None:
    for name in errors.__all__:
        error = pickle.loads(pickle.dumps(getattr(errors, name)("why")))
        assert type(error).__name__ == name
        assert str(error) == "why"


def test_results_are_frozen() -> None:
    kinds = [value for value in NAMES.values() if dataclasses.is_dataclass(value)]
    assert kinds
    for kind in kinds:
        assert kind.__dataclass_params__.frozen, kind  # type: ignore[attr-defined]


def test_the_stubs_match_the_binary(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy.stubtest", "tdpmmu._native"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["units", "vm", "bench", "results", "student"])
def test_the_examples_in_docstrings_are_true(name: str) -> None:
    module = importlib.import_module(f"tdpmmu.{name}")
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_no_name_of_a_machine_or_a_registry_is_committed() -> None:
    places = ("pyproject.toml", "run", "test", "scripts", ".ci", "python", "tests", "rust", "benches", "docs")
    places += ("README.md", "Cargo.toml", "Cargo.lock")
    pattern = re.compile("/(work|home|root)/|python[h]osted|127[.]0[.]0[.]1")
    for place in places:
        root = ROOT / place
        for path in [root] if root.is_file() else root.rglob("*"):
            if path.is_file() and path.suffix not in (".so", ".pyc", ".gz", ".png"):
                assert not pattern.search(path.read_text()), path


def test_the_page_of_kernel_profiles_is_current() -> None:
    from tdpmmu.profiles import Policies

    policies = Policies(tdpmmu.policies())
    assert (ROOT / "docs" / "profiles.md").read_text() == policies.markdown(), "write it again: see its head"
    for switch in policies.raw["switches"]:
        assert len(switch["text"]) > 20, switch["switch"]
        assert set(switch["values"]) == set(policies.raw["profiles"])


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(tdpmmu.__file__).parent / "py.typed").exists()


def test_importing_the_package_starts_no_thread_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, threading, os, tdpmmu;"
        "print(sorted({'numpy','matplotlib','pyarrow','rich','click'} & set(sys.modules)),"
        " len(os.listdir('/proc/self/task')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] 1"


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        tdpmmu.nothing_of_the_kind  # noqa: B018
    assert set(tdpmmu.__all__) <= set(dir(tdpmmu))


def test_the_version_is_the_crates() -> None:
    assert f'version = "{tdpmmu.__version__}"' in (ROOT / "Cargo.toml").read_text()


def test_the_build_says_what_it_is() -> None:
    build = tdpmmu.build_info()
    assert build["profile"] in ("debug", "release")
    assert build["git"]
    assert set(build) == {"version", "profile", "git", "target", "debug_assertions"}
