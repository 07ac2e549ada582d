# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Models of one's own: a class in a Python file (``model:FILE.py``) or in an installed module (``model:PACKAGE.MODULE:CLASS``).

Rule of this file: whoever names a file runs it, with the rights of this process, as with any program.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path

from .base import Model

_Stamp = tuple[int, int, int]


class ModelCode:
    """The class that *place* names, which can be loaded anew when its file changes."""

    def __init__(self, place: str) -> None:
        """*place* is ``FILE.py``, ``FILE.py:CLASS`` or ``PACKAGE.MODULE:CLASS``."""
        self.place = place
        self._where, _, self._name = place.partition(":")
        self._stamp: _Stamp | None = None

    @staticmethod
    def names(place: str) -> bool:
        """Whether *place* names code, and not a model of this package."""
        return ":" in place or place.endswith(".py")

    @property
    def changed(self) -> bool:
        """Whether the file is another than the one that was loaded last; modules that are not a file's never change."""
        return self._stamp is not None and self._look() not in (None, self._stamp)

    def load(self) -> type[Model]:
        """Run the file and return its class. OSError when it cannot be read, ValueError for whatever is wrong in it."""
        try:
            if self._where.endswith(".py"):
                self._stamp = self._look()
                found = self._run(Path(self._where))
            else:
                found = vars(importlib.import_module(self._where))
        except OSError:
            raise
        except Exception as error:  # anything can happen in somebody's file
            raise ValueError(f"{self._where} does not load: {type(error).__name__}: {error}{_line(error, self._where)}") from error
        return self._choose(found)

    def _look(self) -> _Stamp | None:
        try:
            seen = os.stat(self._where)
        except OSError:
            return None  # being replaced, by an editor
        return seen.st_mtime_ns, seen.st_size, seen.st_ino

    def _run(self, path: Path) -> dict[str, object]:
        name = f"vdpa_bridge_model_{path.stem}"
        spec = importlib.util.spec_from_loader(name, None, origin=str(path))
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        module.__file__ = str(path)
        code = compile(path.read_bytes(), str(path), "exec")  # not by a loader: it would take stale bytecode of the same second
        before = sys.modules.get(name)
        sys.modules[name] = module
        sys.path.insert(0, directory := str(path.absolute().parent))  # as for a script: it may import its neighbours
        try:
            exec(code, module.__dict__)
        except BaseException:
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before
            raise
        finally:
            sys.path.remove(directory)
        return {key: value for key, value in vars(module).items() if getattr(value, "__module__", None) == name}

    def _choose(self, found: dict[str, object]) -> type[Model]:
        models = {
            name: value for name, value in found.items() if isinstance(value, type) and issubclass(value, Model) and not inspect.isabstract(value)
        }
        if self._name in models:
            return models[self._name]
        choices = ", ".join(sorted(models)) or "none"
        if self._name or len(models) != 1:
            wanted = f"no model {self._name}" if self._name else "no single model"
            raise ValueError(f"{self._where} has {wanted}; there is: {choices}{'' if self._name else f'; write {self._where}:CLASS'}")
        return next(iter(models.values()))


def _line(error: BaseException, path: str) -> str:
    """`` (line 12)``: where in that file it went wrong, if it did there."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f" (line {error.lineno})"
    lines = [frame.lineno for frame in inspect.getinnerframes(error.__traceback__) if frame.filename == path] if error.__traceback__ else []
    return f" (line {lines[-1]})" if lines else ""
