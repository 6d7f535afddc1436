"""The detector from any folder, beside a project that has a utils.py or a config.py of its own:

pip install -e FOLDER_OF_THIS_REPOSITORY           # or: sys.path.append("FOLDER_OF_THIS_REPOSITORY")
from foad_mfff import Detector

The repository's modules have plain names; here they are loaded and then named foad_mfff.config and so on, so
that neither side takes the other's, and what is made of their classes can be pickled. May import detector and
config; nothing here imports it."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OWN = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}


def _loaded() -> list[str]:
    """The loaded modules under names that this repository has, whoever's they are."""
    return [name for name in sys.modules if name.partition(".")[0] in OWN - {__name__}]


@contextmanager
def _names_lent() -> Iterator[None]:
    """In the block ``import utils`` is the repository's; before and after, it is the caller's."""
    theirs = {name: sys.modules.pop(name) for name in _loaded()}
    sys.path.insert(0, str(ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT))
        for name in _loaded():
            _rename(sys.modules.pop(name), f"{__name__}.{name}")
        sys.modules.update(theirs)


def _rename(module: ModuleType, name: str) -> None:
    """Let a module, and what is made in it, be found under another name, as pickle does."""
    _tell_module(vars(module), module.__name__, name)
    module.__name__ = name
    sys.modules[name] = module


def _tell_module(made: Mapping[str, Any], before: str, name: str) -> None:
    for each in made.values():
        each = getattr(each, "__func__", each)  # of a static method
        if isinstance(each, (type, FunctionType)) and each.__module__ == before:
            each.__module__ = name
            if isinstance(each, type):
                _tell_module(vars(each), before, name)


with _names_lent():
    from config import UserError
    from detector.picture_detector import PictureDetector as Detector

__all__ = ["Detector", "UserError"]
