"""Imports that wait until they are used: stand-ins for modules that a library imports and hardly ever needs."""

import contextlib
import importlib.abc
import importlib.machinery
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from calibration_store.errors import UserError


class MissingPackage(UserError):
    """A name is used whose package is not installed."""


class LazyName:
    """A name of a deferred module, whose attributes are such names, too.

    Calling it, inheriting from it or checking a type against it loads the module.
    """

    def __init__(self, path: str):
        self._path = path

    def __getattr__(self, name: str) -> "LazyName":
        if name.startswith("__"):
            raise AttributeError(name)
        return LazyName(f"{self._path}.{name}")

    def _load(self) -> Any:
        """Import and return the object of this name. Raises MissingPackage, which names the package to install."""
        package = self._path.split(".", 1)[0]
        try:
            return pkgutil.resolve_name(self._path)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            raise MissingPackage(f"{self._path}: {package} is not installed; pip install {package}") from None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Load the module and call the object. Raises MissingPackage."""
        return self._load()(*arguments, **options)

    def __mro_entries__(self, bases: tuple) -> tuple[type]:
        return (self._load(),)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self._load())

    def __or__(self, other: Any) -> Any:
        return Any  # only annotations use it


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A finder of the deferred modules: each is an empty module whose attributes are stand-ins."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a deferred module; None for any other."""
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if self.finds(name) else None

    def finds(self, name: str) -> bool:
        """Return whether a module is deferred."""
        return any(name == package or name.startswith(f"{package}.") for package in self.names)

    def exec_module(self, module: ModuleType) -> None:
        """Let every attribute of the module be a stand-in (PEP 562)."""
        vars(module)["__getattr__"] = LazyName(module.__name__).__getattr__


@contextlib.contextmanager
def deferred(*names: str, **replacements: ModuleType) -> Iterator[None]:
    """In the block, let imports of these packages give stand-ins, and imports of `replacements` the modules given.

    Packages that are already imported stay as they are. An import after the block gives the package itself. Only code
    that is imported in the block keeps stand-ins. A stand-in loads its package when it is called, inherited from or
    checked against; a package that is not installed is an error only then.
    """
    finder = _Finder(tuple(name for name in names if name not in sys.modules))
    before = {name: sys.modules.get(name) for name in replacements}
    sys.modules.update(replacements)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if finder.finds(name) or name in replacements]:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if module is not None})
