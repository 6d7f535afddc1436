"""What tiles gain and cost on categories in MVTec layout: AUROC of the pictures in test, fit to train/good.

python tools/textures.py data/large --size 1024 --train 16 --good 12 --defect 2
python benchmarks/tiles.py data/large/grain data/large/brushed --tiles 0,512,256
python benchmarks/tiles.py data/surfaces/kolektor --tiles 0,192,128

The table goes to results/tiles.md."""

import argparse
import shlex
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
import utils
from config import make_config
from detector.picture_detector import PictureDetector
from reporting.tables import as_markdown
from shell.command_line import OneLineParser
from shell.files import write_text
from shell.signals import guarded


def measure(category: Path, side: int, threads: int) -> tuple[float, float, float]:
    """Fit in tiles of a side (0: whole) -> AUROC, the seconds of the fit with its extraction, and those to
    score a picture."""
    name, knobs = f"tiles-{category.name}{side}", {"preset": "accurate", "extractor": "efficientnet_lite0"}
    knobs |= {"dataset": "folder", "dataset_path": str(category / "train" / "good"), "modelname": name}
    start = time.perf_counter()
    train.main(make_config(knobs | {"tiles": side, "mirror": False, "threads": threads, "restart": True}))
    fitted = time.perf_counter()
    (checkpoint,) = Path(f"runs/{name}/classes").glob("*.safetensors")
    detector = PictureDetector.load(checkpoint, threads=threads)
    files = sorted(path for path in (category / "test").rglob("*") if path.is_file())
    detector.score(files[0])  # loads the backbone
    loaded = time.perf_counter()
    scores = detector.score(files)
    seconds = (time.perf_counter() - loaded) / len(files)
    anomalous = np.array([path.parent.name != "good" for path in files])
    return utils.auroc(anomalous, scores), fitted - start, seconds


def main(args: argparse.Namespace) -> None:
    rows = []
    for category in args.categories:
        for side in map(int, args.tiles.split(",")):
            auroc, fit, seconds = measure(category, side, args.threads)
            rows.append([category.name, str(side or "none"), f"{auroc:.3f}", f"{fit:.0f}", f"{seconds:.2f}"])
            print(*rows[-1], flush=True)
    table = as_markdown(["category", "tiles", "AUROC", "fit, s", "a picture, s"], rows)
    versions = utils.versions()
    command = f"`{shlex.join(['python', 'benchmarks/tiles.py', *sys.argv[1:]])}`, preset accurate"
    about = ", ".join(f"{name} {versions[name]}" for name in ("commit", "torch", "timm", "machine"))
    write_text(args.out, f"# Tiles\n\n{table}\n\n{command}, {args.threads} threads,\n{about}.\n")


if __name__ == "__main__":
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("categories", type=Path, nargs="+", help="folders with train/good and test/KIND")
    parser.add_argument("--tiles", default="0,512,256", help="sides to compare, 0: whole [0,512,256]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/tiles.md"))
    guarded(main, parser.parse_args())
