"""What DiffusionKit imports and hardly uses is imported when it is used, and need not be installed."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from w4a8.backend.lazy_imports import MissingPackage, deferred

ROOT = Path(__file__).resolve().parent.parent

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
    """Return a package that takes note of being loaded, and a module that imports it deferred."""
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


def test_a_replacement_is_imported_in_the_block_alone(tmp_path, monkeypatch):
    """Also where the package itself is imported already: whoever has it keeps it."""
    (tmp_path / "wanted.py").write_text("WHOSE = 'the package'")
    (tmp_path / "reader.py").write_text("from wanted import WHOSE")
    monkeypatch.syspath_prepend(tmp_path)
    import wanted

    with deferred(wanted=SimpleNamespace(WHOSE="ours")):
        import reader
    assert reader.WHOSE == "ours" and sys.modules["wanted"] is wanted
    del sys.modules["wanted"], sys.modules["reader"]


def test_a_package_that_is_not_installed_is_named_when_it_is_used():
    with deferred("nobody_has_this"):
        from nobody_has_this.deep import Thing
    with pytest.raises(MissingPackage) as error:
        Thing()
    assert (
        error.value.message
        == "nobody_has_this.deep.Thing: nobody_has_this is not installed; pip install nobody_has_this"
    )


EVERY_STAGE = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in {"torch", "coremltools", "transformers"}, f"{name} is imported"

sys.meta_path.insert(0, Blocker())
folder = sys.argv[1]
run = ["--calib-dir", f"{folder}/run"]
for script, *arguments in (
    ("generate_calibration_data", "--model", "sd3-emoji", "--num-images", "2", "--num-steps", "2", *run),
    ("cache_adaround_data", "--num-images", "2", *run),
    ("collect_layer_activations", "--num-images", "2", *run),
    ("analyze_activations", *run),
    ("analyze_activations_multitier", *run),
    ("optimize_adaround", "--iters", "10", "--batch-size", "1", "--unit", "block", "--blocks", "mm0", *run),
    ("export_quantized_model", "--weights", "w4-rtn", *run),
    ("evaluate_quantization", "--num-images", "1", "--num-steps", "1", "--variants", "w4-rtn,a8", *run),
    ("report_calibration", *run),
    ("draw_images", "rocket", "--num-steps", "1", "--output", f"{folder}/drawn"),
):
    try:
        importlib.import_module(script).main(arguments)
    except SystemExit as end:
        assert not end.code, script
"""


@pytest.mark.slow
def test_no_script_imports_torch_coremltools_or_transformers(tmp_path):
    """Every stage to its end, in one process that refuses these imports; DiffusionKit's own import of them included."""
    done = subprocess.run([sys.executable, "-c", EVERY_STAGE, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "drawn/0000.png").exists() and (tmp_path / "run/report/index.html").exists()
