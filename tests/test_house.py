"""The shape of the house: who imports whom, and the rules that hold in every room."""

import ast
import graphlib
import inspect
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import jrope

PACKAGE = Path(jrope.__file__).parent
REPOSITORY = Path(__file__).parents[1]  # or a folder that holds a copy of the tests
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*|__all__")
MUTABLE = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
MUTABLE_CALLS = {"dict", "list", "set", "bytearray", "defaultdict", "deque", "Counter"}

# package: what it may import from jrope.  A new one has to be drawn in here; inside a
# package modules import each other, without cycles.
ARROWS = {
    "errors": "",
    "locks": "errors",
    "numerics": "",
    "tree": "",
    "rope": "errors numerics",
    "sharding": "errors numerics tree",
    "model": "errors numerics tree rope sharding",
    "weights": "errors numerics tree sharding model",
    "hf": "errors numerics tree rope sharding model weights",
    "generation": "errors tree sharding model",
    "parity": "errors tree rope model hf sharding",
    "bench": "errors numerics tree rope sharding model weights hf generation forms "
    "batch",
    "plan": "errors model weights generation bench sharding",
    "lab": "errors locks tree rope sharding model generation",
    "forms": "errors sharding model",
    "batch": "errors locks numerics tree rope sharding model hf generation forms",
    "cli": "errors tree rope sharding model weights hf generation parity bench plan "
    "lab batch",
    "integrations": "errors tree model weights hf generation batch cli",
}


def module_name(path):
    """jrope/cli/x.py -> cli.x, jrope/x.py -> x, jrope/cli/__init__.py -> cli."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}
every_module = pytest.mark.parametrize("name", MODULES)


def imports(name):
    """The modules of jrope that a module imports, wherever in it, lazily or not."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            where = node.module or ""
            names = [f"{where}.{alias.name}" for alias in node.names]
            inner = [n for n in names if n.removeprefix("jrope.") in MODULES]
            found |= {*inner} if inner else {where}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {
        full.removeprefix("jrope").removeprefix(".")
        for full in found
        if full.split(".")[0] == "jrope"
    }


def run_python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or done.stderr


def repository(*parts):
    path = REPOSITORY.joinpath(*parts)
    if not path.exists():
        pytest.skip(
            f"{'/'.join(parts)} is not beside the tests: this is the wheel's run"
        )
    return path


def package_of(name):
    return name.split(".")[0]


def test_every_package_is_drawn_and_every_drawn_package_exists():
    assert {package_of(name) for name in MODULES if name} == {*ARROWS}
    assert max(name.count(".") for name in MODULES) == 1, "one level of packages"


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_follow_the_arrows(name):
    assert imports(name) <= {*MODULES}, "a module that does not exist"
    more = {package_of(i) for i in imports(name)} - {package_of(name)}
    more -= {*ARROWS[package_of(name)].split()}
    assert not more, f"jrope/{name}.py may not import {sorted(more)}"


def test_arrows_have_no_cycle():
    drawn = {name: allowed.split() for name, allowed in ARROWS.items()}
    assert {*graphlib.TopologicalSorter(drawn).static_order()} == {*ARROWS}
    modules = {name: imports(name) for name in MODULES if name}
    assert {*graphlib.TopologicalSorter(modules).static_order()} >= {*modules}


@every_module
def test_imports_name_the_whole_module(name):
    relative = [
        node.lineno
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_import_brings_neither_torch_nor_transformers():
    heavy = ["torch", "transformers", "tensorflow", "orbax", "optax", "huggingface_hub"]
    heavy += ["lm_eval", "ray"]
    modules = "jrope, jrope.integrations.lm_eval, jrope.integrations.ray"
    code = f"import {modules}, sys; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_import_does_not_start_a_backend():
    code = (
        "import jrope; from jax._src import xla_bridge;"
        "print(xla_bridge.backends_are_initialized())"
    )
    assert run_python(code) == "False"


@every_module
def test_errors_are_raised_not_asserted(name):
    lines = [n.lineno for n in ast.walk(TREES[name]) if isinstance(n, ast.Assert)]
    assert lines == []


@every_module
def test_modules_hold_no_state(name):
    for node in TREES[name].body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and is_mutable(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in map(ast.unparse, targets):
                assert CONSTANT.fullmatch(target), f"{name}: {target}"
    kept = [n.lineno for n in ast.walk(TREES[name]) if isinstance(n, ast.Global)]
    assert kept == []


def is_mutable(value):
    """Whether an expression makes a dict, list, set or the like."""
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).split(".")[-1] in MUTABLE_CALLS
    return isinstance(value, MUTABLE)


@every_module
def test_tables_stay_as_they_are_written(name):
    tables = {
        ast.unparse(target)
        for node in TREES[name].body
        if isinstance(node, ast.Assign | ast.AnnAssign) and is_mutable(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Subscript) and isinstance(
            node.ctx, ast.Store | ast.Del
        ):
            assert ast.unparse(node.value) not in tables, f"line {node.lineno}"


@every_module
def test_files_stay_short(name):
    assert len(MODULES[name].read_text("utf-8").splitlines()) <= 400


@every_module
def test_everything_public_says_what_it_does(name):
    tree = TREES[name]
    silent = [] if ast.get_docstring(tree) else ["the module"]
    for node, path in public_definitions(tree):
        if not ast.get_docstring(node):
            silent.append(path)
    assert silent == []


def public_definitions(tree, above=""):
    """Public classes, functions and their public methods, with their names."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_") or is_overload(node):
            continue
        yield node, above + node.name
        if isinstance(node, ast.ClassDef):
            yield from public_definitions(node, f"{above}{node.name}.")


def is_overload(node):
    return any(ast.unparse(d).endswith("overload") for d in node.decorator_list)


def test_public_names_are_listed_in_order():
    entries = [
        (node.module, alias.name, alias.asname)
        for node in TREES[""].body
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "jrope"
        for alias in node.names
    ]
    assert all(name == alias for _, name, alias in entries)
    assert entries == sorted(entries)


def test_public_names_have_docstrings():
    listed = [alias for node in TREES[""].body for alias in getattr(node, "names", ())]
    names = [a.asname for a in listed if a.asname]
    assert len(names) >= 15
    silent = [name for name in names if not inspect.getdoc(getattr(jrope, name))]
    assert silent == []


def test_version_is_the_installed_one():
    installed = metadata.version("jrope")
    assert jrope.__version__ == installed, "install again: pip install -e ."
    text = (PACKAGE / "CHANGELOG.md").read_text("utf-8")
    assert f"\n## {jrope.__version__}\n" in text, "say in CHANGELOG.md what is new"


def test_command_is_installed():
    (command,) = metadata.entry_points(group="console_scripts", name="jrope")
    assert callable(command.load())


def test_types_are_announced():
    assert (PACKAGE / "py.typed").is_file()


def test_converters_are_scripts():
    folder = repository("convert")
    assert not (folder / "__init__.py").exists()
    for script in folder.glob("[!_]*.py"):
        assert '__name__ == "__main__"' in script.read_text("utf-8"), script.name


def test_hooks_run_the_pinned_tools():
    project = tomllib.loads(repository("pyproject.toml").read_text("utf-8"))["project"]
    tests = project["optional-dependencies"]["test"]
    hooks = repository(".pre-commit-config.yaml").read_text("utf-8")
    pins = {pin for pin in tests if pin.startswith(("ruff", "pyright"))}
    assert {*re.findall(r'\["(.*?==.*?)"\]', hooks)} == pins


def test_torch_is_installed_in_the_version_the_tests_name():
    project = tomllib.loads(repository("pyproject.toml").read_text("utf-8"))["project"]
    (pin,) = (
        p for p in project["optional-dependencies"]["test"] if p.startswith("torch")
    )
    assert pin in repository("Makefile").read_text("utf-8")
