"""What is said of each data set whose files are missing, in the wrong place or cut off: docs/messages.md.

python tools/messages.py docs/messages.md

The files are written in their published form, by the writers of tests/test_published.py and
tests/test_layouts.py, into a folder that the table calls DATA; the network counts as unreachable."""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "tests")]

import pytest
import test_layouts
import test_published
from conftest import tree
from test_datasets import MVTEC

import utils
from config import UserError
from datasets import SPLITS, load_images

BINARY = (
    "cifar10 python",
    "cifar10 binary",
    "CIFAR100 python",
    "CIFAR100 binary",
    "fashion gz",
    "fashion raw",
    "STL10 folder",
)
MVTEC_STYLE = tuple(f"bottle/{name}" for name in MVTEC)
TILES = (*(f"MT_Free/Imgs/{i}.jpg" for i in range(5)), "MT_Crack/Imgs/1.jpg")
PETS = tuple(f"train/{name}.{i}.jpg" for name in ("cat", "dog") for i in range(5))
OWN = ("train/a/1.png", "train/a/2.png", "test/a/1.png")
FOLDERS = {
    "folder": OWN,
    "lbot": OWN,
    "mvtec": MVTEC_STYLE,
    "BTAD": MVTEC_STYLE,
    "VisA": (),
    "MTD": TILES,
    "CatsvsDogs": PETS,
}
SILENT = "read without a word"
HEAD = """# What is said of files that are missing, misplaced or cut off

Made by `python tools/messages.py docs/messages.md` from small files in each published form. DATA is the
folder given as `--dataset_path`; the network is unreachable; "deep/" and "a/" are folders that the files
were put into by mistake. Each line ends a script with exit status 2. Cut off is the first file, to half of
its bytes; an extraction names all such pictures at its end and keeps the rest, or leaves them out
(`--unreadable skip`).

"""


def told(dataset: str, root: Path, data: Path) -> str:
    """The line that is said when a set is read, all its images included; ``data`` is called DATA in it."""
    try:
        images = load_images(dataset, str(root))
        for split in SPLITS:
            for row in range(len(images.labels.split(split).names)):
                images.read(split, row)
    except UserError as mistake:
        return str(mistake).replace(str(data), "DATA")
    return SILENT


def three(dataset: str, put: Callable[[Path], Path], deep: str) -> list[str]:
    """The lines for a set that is missing, in the wrong place and cut off. ``put`` writes the set into a
    folder -> the file of it to cut."""
    lines = []
    for trial in ("missing", "misplaced", "cut"):
        with tempfile.TemporaryDirectory() as temporary:
            data = Path(temporary)
            if trial == "missing":
                lines.append(told(dataset, data / "x", data))
                continue
            victim = put(data / deep if trial == "misplaced" else data)
            if trial == "cut":
                content = victim.read_bytes()
                victim.write_bytes(content[: len(content) // 2])
            lines.append(told(dataset, data, data))
    return lines


def of_binary(form: str) -> list[str]:
    """A row of the table for one of test_published.TRUE_FORMS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "reachable", lambda url: False)
        files, _, _ = test_published.TRUE_FORMS[form](patch)

        def put(root: Path) -> Path:
            test_published.written(root, files)
            return root / next(iter(files))

        return [form, *three(form.split()[0], put, "deep")]


def of_folders(dataset: str) -> list[str]:
    """A row of the table for a set of image files."""

    def put(root: Path) -> Path:
        if dataset == "VisA":
            return root / test_layouts.visa(root)[0]["image"]
        return tree(root, *FOLDERS[dataset]) / FOLDERS[dataset][0]

    return [dataset, *three(dataset, put, "a/deep")]


def page() -> str:
    """docs/messages.md."""
    rows = [of_binary(form) for form in BINARY] + [of_folders(dataset) for dataset in FOLDERS]
    text = HEAD
    for name, *lines in rows:
        text += f"## {name}\n\n"
        for trial, line in zip(("missing", "in the wrong place", "cut off"), lines):
            text += f"- {trial}: `{line}`\n"
        text += "\n"
    return text.rstrip("\n") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the Markdown file to write")
    arguments = parser.parse_args()
    with utils.whole_file(arguments.output) as partial:
        partial.write_text(page())


if __name__ == "__main__":
    main()
