"""The house's rules: where imports stand, who may know what, how large a file may be, and that MLX is fast whoever comes first."""

import ast
import dataclasses
import graphlib
import importlib
import importlib.util
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from conftest import ROOT

from w4a8 import options

STAGES = sorted(path for path in ROOT.glob("*.py") if "\ndef main(" in path.read_text())
PACKAGE = sorted((ROOT / "w4a8").rglob("*.py"))
STORE = sorted((ROOT / "calibration_store").rglob("*.py"))
SIDE_SCRIPTS = sorted(path for folder in ("benchmarks", "tools") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
EVERYTHING = [*ROOT.glob("*.py"), *PACKAGE, *STORE, *SIDE_SCRIPTS, *TESTS]
HEAVY = (
    "mlx",
    "numpy",
    "torch",
    "diffusionkit",
    "matplotlib",
    "skimage",
    "PIL",
    "transformers",
    "msgspec",
    "safetensors",
)
MAX_LINES = 400


def is_import(node: ast.AST) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of everything that a tree imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def imports_in_functions(path: Path) -> list[tuple[str, int]]:
    """Return (function, line) of every import inside a function that the rule does not allow.

    A script's `run` (or `main`) may begin with one block of imports, and import a figure's module under `if options.with_plot:`.
    """
    found = []
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        inside = [node for node in ast.walk(function) if is_import(node)]
        if path not in PACKAGE + STORE and function.name in ("run", "main"):
            body = function.body[1:] if ast.get_docstring(function) else function.body
            head = next((i for i, node in enumerate(body) if not is_import(node)), len(body))
            plots = [n for n in body if isinstance(n, ast.If) and ast.unparse(n.test) == "options.with_plot"]
            allowed = {id(node) for node in body[:head]} | {id(n) for p in plots for n in ast.walk(p) if is_import(n)}
            inside = [node for node in inside if id(node) not in allowed]
        found += [(function.name, node.lineno) for node in inside]
    return found


def offenders(paths: Iterable[Path], fault: Callable[[Path], object]) -> dict[str, object]:
    """Return {file: what is wrong with it} of the files that break a rule."""
    return {str(path.relative_to(ROOT)): found for path in paths if (found := fault(path))}


def test_imports_stand_at_the_head():
    assert offenders([*ROOT.glob("*.py"), *PACKAGE, *STORE, *SIDE_SCRIPTS], imports_in_functions) == {}


def test_a_stage_is_a_story():
    def fault(path):
        text = path.read_text()
        functions = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        return functions if functions != ["main", "run"] else not 50 <= len(text.splitlines()) <= 225

    assert len(STAGES) == 10 and offenders(STAGES, fault) == {}


def test_a_story_fits_on_a_screen():
    """`run` takes its stage's options as one object, and has at most 65 lines beside its imports."""

    def fault(path):
        (run,) = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == "run"]
        imports = sum(node.end_lineno - node.lineno + 1 for node in run.body if is_import(node))
        names = [argument.arg for argument in run.args.args]
        return names if names != ["options"] else run.end_lineno - run.lineno + 1 - imports > 65

    assert offenders(STAGES, fault) == {}


@pytest.mark.slow
def test_help_loads_nothing_heavy_and_is_fast():
    assert offenders(STAGES, fault_of_help) == {}


def fault_of_help(path: Path) -> object:
    """Return the heavy modules that `-h` loads, or its processor seconds where it is slow; None for a good script."""
    code = (
        f"import sys; sys.argv = ['{path.name}', '-h']\n"
        f"import atexit; atexit.register(lambda: print('LOADED', *sys.modules))\n"
        f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    text, _, loaded = done.stdout.rpartition("LOADED")
    if "Usage:" not in text:
        return done.stderr
    seconds = []
    while not seconds or (min(seconds) >= 0.5 and len(seconds) < 4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, str(path), "-h"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {name.split(".")[0] for name in loaded.split()} & set(HEAVY) or (min(seconds) >= 0.5 and seconds)


def test_no_file_is_too_long():
    assert offenders(EVERYTHING, lambda path: len(path.read_text().splitlines()) > MAX_LINES) == {}


def imports_of(names: set[str]) -> Callable[[Path], set[str]]:
    return lambda path: imported(ast.parse(path.read_text())) & names


def test_nobody_imports_a_script():
    scripts = {stage.stem for stage in STAGES}
    assert offenders([*PACKAGE, *STORE, *SIDE_SCRIPTS, *TESTS], imports_of(scripts)) == {}


def test_the_store_knows_no_command_line_and_no_mlx():
    assert offenders(STORE, imports_of({"click", "mlx", "torch", "diffusionkit", "w4a8", "hooks"})) == {}


def modules_imported(path: Path) -> set[str]:
    """Return the modules of the packages that a file imports, with the names that it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_only_scripts_import_the_command_line():
    below = [path for path in PACKAGE if path.parent.name != "cli"]
    assert (
        offenders(
            [*below, *STORE], lambda path: {name for name in modules_imported(path) if name.startswith("w4a8.cli")}
        )
        == {}
    )


def test_packages_import_each_other_in_no_circle():
    """A package is a folder of w4a8, a module beside these folders, hooks.py or calibration_store."""

    def package(module: str) -> str:
        return ".".join(module.split(".")[: 2 if module.startswith("w4a8.") else 1])

    arrows: dict[str, set[str]] = {}
    for path in [*PACKAGE, *STORE, ROOT / "hooks.py"]:
        own = package(".".join(path.relative_to(ROOT).with_suffix("").parts))
        found = {
            package(module)
            for module in modules_imported(path)
            if module.startswith(("w4a8.", "calibration_store", "hooks"))
        }
        arrows.setdefault(own, set()).update(found - {own})
    list(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError, which names a circle


def test_one_public_name_has_one_meaning():
    """No two modules of the packages define the same public name, constants included; api.py has readers by another argument."""
    owners: dict[str, set[str]] = {}
    for path in [*PACKAGE, *(path for path in STORE if path.name != "api.py")]:
        for node in ast.parse(path.read_text()).body:
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            names += [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            for name in names:
                if not name.startswith("_"):
                    owners.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    assert {name: sorted(paths) for name, paths in owners.items() if len(paths) > 1} == {}


def test_every_option_is_a_field_and_every_field_an_option():
    """Scripts declare what w4a8/options.py has: the same names; the defaults stand there alone."""
    location = {"model", "local_checkpoint", "loras"}  # the field `location`, beside --model of stages that choose one

    def fault(path):
        text = path.read_text()
        kind = getattr(options, re.search(r"@cli\.stage\((\w+)\)", text)[1])
        fields = {field.name: field.default for field in dataclasses.fields(kind) if field.name != "given"}
        command = importlib.import_module(path.stem).main
        declared = {parameter.name: parameter.default for parameter in command.params}
        given = set(declared) - location | ({"location"} if "location" in fields else location & set(fields))
        wrong = {name for name, default in declared.items() if name in fields and default != fields[name]}
        return (given ^ set(fields)) | wrong | set(re.findall(r"\bdefault=.*", text))

    assert offenders(STAGES, fault) == {}


def test_only_the_store_knows_keys_and_names():
    """No file name, no NPZ key and no part of a layer's name is put together or taken apart elsewhere."""
    parts = r'split\("(?:\.|__)"\)|partition\("(?:\.|__)"\)|replace\("\.", "_"\)|endswith\("\.(?:mlp|attn)'

    def fault(path):
        text = path.read_text()
        return re.findall(parts, text) + ([] if "cli" in path.parts else re.findall(r'"[a-z_]+\.(?:npz|json)"', text))

    assert offenders([*PACKAGE, ROOT / "hooks.py"], fault) == {}


def test_public_functions_are_typed():
    known = {"pipeline", "mmdit", "writer", "bar", "paths"}

    def fault(path):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        public = [node for node in functions if not node.name.startswith("_")]
        return [(f.name, a.arg) for f in public for a in f.args.args if a.annotation is None and a.arg in known]

    assert offenders([*ROOT.glob("*.py"), *PACKAGE, *SIDE_SCRIPTS], fault) == {}


FAST_BLAS = """
import sys, time
import w4a8.evaluation.drawn_images
import mlx.core as mx
import numpy as np

def best(work):
    marks = []
    for _ in range(6):
        start = time.perf_counter()
        work()
        marks.append(time.perf_counter() - start)
    return min(marks)

a = np.random.default_rng(0).standard_normal((768, 768), np.float32)
b = mx.array(a)
print(best(lambda: a @ a) / best(lambda: mx.eval(b @ b)))
"""


@pytest.mark.slow
def test_matrix_products_are_fast():
    """Compare MLX with NumPy. MLX's own BLAS is 60 times slower; w4a8/backend/blas.py replaces it with one that is as fast."""
    done = subprocess.run([sys.executable, "-c", FAST_BLAS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.1


def test_streams_are_set_up_before_anything_is_evaluated():
    """MLX reads how wide it walks a graph once, at its first evaluation: later one core would do all the work of 3W."""
    (run,) = [
        node
        for node in ast.parse((ROOT / "optimize_adaround.py").read_text()).body
        if getattr(node, "name", "") == "run"
    ]
    first = next(
        node
        for node in run.body
        if not isinstance(node, (ast.ImportFrom, ast.Expr))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    )
    assert ast.unparse(first) == "run_cpu_streams_side_by_side()"


def test_types_are_checked_everywhere():
    """mypy runs on both packages, hooks.py and every script (`make check`), and no module is kept from it."""
    text = (ROOT / "pyproject.toml").read_text()
    assert 'files = ["w4a8", "calibration_store", "*.py"]' in text and "ignore_errors" not in text
    assert "\t$(PY) -m mypy\n" in (ROOT / "Makefile").read_text()
