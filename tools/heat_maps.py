"""Compare the kinds of heat map on an MVTec-style set whose defects have masks: a Markdown table.

python tools/textures.py data/textures
python main.py --preset accurate --extractor efficientnet_lite0 --dataset mvtec \\
    --dataset_path data/textures --modelname textures
python tools/heat_maps.py runs/textures data/textures
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import datasets
import utils
from backbone.token_grid import place_grid_of
from detector import heat_map, pictures
from detector.class_data import Features
from detector.picture_detector import PictureDetector, load_picture_detector

KINDS = ("places", "occlusion")


def heat(detector: PictureDetector, kind: str, pixels: np.ndarray) -> np.ndarray:
    if kind == "occlusion":
        return heat_map.by_occlusion(detector.score, pixels)
    rows = next(iter(detector.backbone.rows([pixels])))
    assert not isinstance(rows, pictures.Unreadable)
    values = detector.fitted.place_map(Features.of(rows).places)[0]
    return heat_map.of_places(values, place_grid_of(detector.backbone.features), pixels.shape[:2])


def chosen(images: datasets.ImageSet, number: int, per_kind: int) -> list[int]:
    """The first test images of every kind of defect of a category, and twice as many good ones."""
    split = images.labels.test
    rows = np.flatnonzero(split.category == number)
    kinds = sorted({split.kind[row] for row in rows})
    own = {kind: [int(row) for row in rows if split.kind[row] == kind] for kind in kinds}
    return [row for kind in kinds for row in own[kind][: per_kind * (1 if split.defect[own[kind][0]] else 2)]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("dataset_path")
    parser.add_argument("--per_kind", type=int, default=2, help="pictures per kind of defect [2]")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"[{','.join(KINDS)}]")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    device = utils.set_up("cpu", arguments.threads)
    images = datasets.load_images("mvtec", arguments.dataset_path)
    print("| class | pictures | kind | pixel AUROC | AUPRO | seconds a picture |\n|---|---|---|---|---|---|")
    for number, name in enumerate(images.labels.classes):
        detector = load_picture_detector(arguments.run / "classes" / f"{name}-seed0", device)
        rows = chosen(images, number, arguments.per_kind)
        pixels = [images.read("test", row) for row in rows]
        masks = [images.mask(row) for row in rows]
        whole = [np.zeros(p.shape[:2], bool) if m is None else m for p, m in zip(pixels, masks)]
        for kind in arguments.kinds.split(","):
            if kind != "occlusion" and not detector.fitted.uses_places:
                continue
            start = time.perf_counter()
            maps = [heat(detector, kind, picture) for picture in pixels]
            seconds = (time.perf_counter() - start) / len(rows)
            found = heat_map.localisation(maps, whole)
            values = f"{found['pixel_auroc']:.4f} | {found['aupro']:.4f} | {seconds:.2f}"
            print(f"| {name} | {len(rows)} | {kind} | {values} |", flush=True)


if __name__ == "__main__":
    main()
