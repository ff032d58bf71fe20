"""Start-up: what DiffusionKit imports and hardly uses comes when it is used."""

import subprocess
import sys
from pathlib import Path

import pytest

from w4a8.model.deferred import deferred

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "coremltools", "transformers"}

LIBRARY = """
import heavy
import heavy.part as part
from heavy.deep.er import Thing, make
from typing import Optional

DEFAULT = heavy.Kind.FIRST

def annotated(x: heavy.Thing | None, y: Optional[heavy.part.Thing] = None) -> part.Thing | None:
    return make(x)

def inherit():
    class Own(Thing):
        pass
    return Own

def is_thing(x):
    return isinstance(x, Thing)
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package that takes note of being loaded, and a module that imports it deferred."""
    package = tmp_path / "heavy"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("LOADED = True\n")
    (package / "part.py").write_text("")
    (package / "deep" / "__init__.py").write_text("")
    (package / "deep" / "er.py").write_text("class Thing:\n    pass\n\ndef make(x):\n    return [x]\n")
    (tmp_path / "light.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    with deferred("heavy"):
        import light
    yield light
    for name in [name for name in sys.modules if name.startswith(("heavy", "light"))]:
        del sys.modules[name]


def test_nothing_is_loaded_until_it_is_used(library):
    assert not any(name.startswith("heavy") for name in sys.modules)
    assert library.annotated(3) == [3]
    assert "heavy.deep.er" in sys.modules


def test_classes_can_be_inherited_and_checked(library):
    own = library.inherit()
    import heavy.deep.er

    assert own.__mro__[1] is heavy.deep.er.Thing
    assert library.is_thing(own()) and not library.is_thing(3)


def test_others_get_the_package_itself(library):
    import heavy

    assert heavy.LOADED


def test_a_name_that_is_not_there_is_an_error(library):
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        library.heavy.nowhere()


def test_a_package_that_is_loaded_already_stays(library):
    import heavy

    with deferred("heavy"):
        import heavy as again
    assert again is heavy


@pytest.mark.parametrize(
    "module", [f"w4a8.{m}" for m in ("generation", "rounding.jobs", "evaluation.sampling", "passes")]
)
def test_stages_import_none_of_the_heavy_ones(module):
    code = (
        f"import sys, {module}; found = {HEAVY} & set(sys.modules); assert not found, found; "
        "import torch; assert torch.tensor([1]).item() == 1"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
