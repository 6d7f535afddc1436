"""The detector from any folder, beside a project that has a utils.py or a config.py of its own:

pip install -e FOLDER_OF_THIS_REPOSITORY           # or: sys.path.append("FOLDER_OF_THIS_REPOSITORY")
from foad_mfff import Detector

The repository's modules have plain names; here they are foad_mfff.config and so on, which pickle finds, too.
May import detector and config; nothing here imports it."""

import builtins
import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
OWN = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
__path__ = [str(ROOT)]


def _import(name: str, globals=None, locals=None, fromlist=(), level: int = 0) -> ModuleType:
    """What ``import name`` is in a module of the repository: ``import utils`` is foad_mfff.utils there."""
    if name.partition(".")[0] not in OWN:
        return builtins.__import__(name, globals, locals, fromlist, level)
    found = builtins.__import__(f"{__name__}.{name}", globals, locals, fromlist, level)
    return found if fromlist else getattr(found, name.partition(".")[0])


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = vars(builtins) | {"__import__": _import}
        super().exec_module(module)


class _Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None) -> ModuleSpec | None:
        spec = super().find_spec(name, path, target) if name.startswith(f"{__name__}.") else None
        if spec and spec.origin:
            spec.loader = _Loader(name, spec.origin)
        return spec


sys.meta_path.insert(0, _Finder)

from foad_mfff.config import UserError  # noqa: E402
from foad_mfff.detector.picture_detector import PictureDetector as Detector  # noqa: E402

__all__ = ["Detector", "UserError"]
