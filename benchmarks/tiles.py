"""What tiles gain and cost: generated surfaces with small defects, whole and in tiles.

python benchmarks/tiles.py > results/tiles.md
python benchmarks/tiles.py --size 2048 --tiles 0,512,256 --train 30 --good 20 --defect 10"""

import argparse
import contextlib
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
import utils  # noqa: E402
from config import make_config  # noqa: E402
from detector.picture_detector import PictureDetector  # noqa: E402
from tools import textures  # noqa: E402

TEXTURES = ("grain", "brushed")  # whose structure has a size in pixels, not in parts of the picture


def write(folder: Path, texture: str, kinds: dict[str, int], rng: np.random.Generator) -> None:
    """Surfaces of a texture: so many of each kind, good or a defect of textures.DEFECTS."""
    for kind, count in kinds.items():
        for i in range(count):
            image = textures.surface(texture, rng)
            if kind in textures.DEFECTS:
                image, _ = textures.damage(image, kind, rng)
            textures.save(textures.photograph(image, rng), folder / kind / f"{i:03d}.png")


def measure(folder: Path, name: str, side: int, threads: int) -> tuple[float, float, float]:
    """Fit the good pictures in tiles of a side (0: whole), score the others -> their AUROC, the seconds of
    the fit with its extraction, and those to score a picture."""
    knobs = {
        "preset": "accurate", "extractor": "efficientnet_lite0", "mirror": False, "dataset": "folder",
        "dataset_path": str(folder / "train"), "modelname": name, "tiles": side, "threads": threads,
    }  # fmt: skip
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        train.main(make_config(knobs))
    fitted = time.perf_counter()
    detector = PictureDetector.load(f"runs/{name}/classes/train-seed0", threads=threads)
    files = sorted((folder / "test").rglob("*.png"))
    detector.score(files[0])  # loads the backbone
    loaded = time.perf_counter()
    scores = detector.score(files)
    seconds = (time.perf_counter() - loaded) / len(files)
    anomalous = np.array([path.parent.name != "good" for path in files])
    return utils.auroc(anomalous, scores), fitted - start, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024, help="pixels of the surfaces' side [1024]")
    parser.add_argument("--tiles", default="0,512,256", help="sides to compare [0,512,256]")
    parser.add_argument("--train", type=int, default=16, help="good training pictures [16]")
    parser.add_argument("--good", type=int, default=12, help="good test pictures [12]")
    parser.add_argument("--defect", type=int, default=2, help="test pictures of each kind of defect [2]")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    textures.set_size(args.size)
    versions = utils.versions()
    print(f"# Tiles\n\n`python benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`, commit")
    print(f"{versions['commit']}, {versions['machine']}, torch {versions['torch']}.\n")
    defective = args.defect * len(textures.DEFECTS)
    print(
        f"Of each surface {args.train} good pictures to fit, {args.good} good and {defective} defective ones "
        f"to score, {args.size} x {args.size} pixels; defects of 6 to 28 pixels; {args.threads} threads.\n"
    )
    print("| surface | tiles | AUROC | fit, s | a picture, s |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        for number, texture in enumerate(TEXTURES):
            rng, folder = np.random.default_rng([0, number]), Path(texture)
            write(folder, texture, {"train": args.train}, rng)
            write(folder / "test", texture, {"good": args.good}, rng)
            write(folder / "test", texture, dict.fromkeys(textures.DEFECTS, args.defect), rng)
            for side in map(int, args.tiles.split(",")):
                auroc, fit, seconds = measure(folder, f"{texture}{side}", side, args.threads)
                print(
                    f"| {texture} | {side or 'none'} | {auroc:.3f} | {fit:.0f} | {seconds:.2f} |", flush=True
                )


if __name__ == "__main__":
    main()
