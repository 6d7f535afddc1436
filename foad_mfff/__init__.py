"""The detector from any folder, beside a project that has a utils.py or a config.py of its own:

pip install -e FOLDER_OF_THIS_REPOSITORY           # or: sys.path.append("FOLDER_OF_THIS_REPOSITORY")
from foad_mfff import Detector

The repository's modules have plain names; here they are loaded without being left under those names, so
that neither side takes the other's. May import detector and config; nothing here imports it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
            sys.modules[f"{__name__}.{name}"] = sys.modules.pop(name)
        sys.modules.update(theirs)


with _names_lent():
    from config import UserError
    from detector.picture_detector import PictureDetector as Detector

__all__ = ["Detector", "UserError"]
