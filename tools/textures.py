"""Generate a texture set in MVTec layout: five textures, six kinds of local defect with their masks, the same
images from the same seed.

python tools/textures.py data/textures
python main.py --preset accurate --dataset mvtec --dataset_path data/textures --extractor efficientnet_lite0

Good images differ as photographs of one material do: turned and scaled a little, lit from another side, in
and out of focus, with the noise of a camera. Defects come in sizes from a few pixels to a quarter of the
side, and in contrasts from faint to plain."""

import argparse
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import UserError
from shell.command_line import OneLineParser
from shell.files import whole_file
from shell.signals import guarded

SIZE = 224  # pixels
ROWS, COLUMNS = np.mgrid[:SIZE, :SIZE].astype(float)


def set_size(size: int) -> None:
    """Have all that follows make pictures of so many pixels a side; defects keep their size in pixels."""
    global SIZE, ROWS, COLUMNS
    SIZE = size
    ROWS, COLUMNS = np.mgrid[:size, :size].astype(float)


# ---------------------------------- textures: coordinates in units of the side, rng -> (SIZE, SIZE) in [0, 1]
def smooth_noise(rng, sigma):
    """Gaussian noise blurred over ``sigma`` pixels (one number, or one per axis), scaled to [0, 1]."""
    noise = gaussian_filter(rng.standard_normal((SIZE, SIZE)), sigma, mode="wrap")
    return (noise - noise.min()) / (noise.max() - noise.min())


def weave(x, y, rng):
    return 0.5 + 0.25 * np.sin(2 * np.pi * 18 * x) + 0.25 * np.sin(2 * np.pi * 18 * y)


def stripes(x, y, rng):
    return 0.5 + 0.5 * np.sin(2 * np.pi * 14 * (x * np.cos(0.5) + y * np.sin(0.5)))


def grain(x, y, rng):
    return smooth_noise(rng, rng.uniform(1.7, 2.3))


def bricks(x, y, rng):
    row = np.floor(8 * y)
    joint = (np.mod(8 * y, 1) < 0.12) | (np.mod(4 * x + 0.5 * np.mod(row, 2), 1) < 0.06)
    return np.where(joint, 0.8, 0.35)


def brushed(x, y, rng):
    return 0.3 + 0.4 * smooth_noise(rng, (0.7, 18.0))


TEXTURES = {  # and their tints
    "weave": (weave, (0.9, 0.8, 0.6)), "stripes": (stripes, (0.6, 0.75, 0.9)),
    "grain": (grain, (0.8, 0.8, 0.8)), "bricks": (bricks, (0.9, 0.55, 0.45)),
    "brushed": (brushed, (0.75, 0.75, 0.78)),
}  # fmt: skip


def surface(texture, rng):
    """A spotless surface, turned by up to 10 degrees, scaled by up to 10 % and moved at random -> (SIZE,
    SIZE, 3) in [0, 1]."""
    angle, scale, shift = np.deg2rad(rng.uniform(-10, 10)), rng.uniform(0.9, 1.1), rng.uniform(0, 1, 2)
    x, y = scale * COLUMNS / SIZE, scale * ROWS / SIZE
    turned_x = x * np.cos(angle) - y * np.sin(angle) + shift[0]
    turned_y = x * np.sin(angle) + y * np.cos(angle) + shift[1]
    pattern, tint = TEXTURES[texture]
    return (0.25 + 0.6 * pattern(turned_x, turned_y, rng))[..., None] * np.array(tint)


def photograph(image, rng):
    """What a camera makes of a surface: slanted light, a little blur, shot and sensor noise. (SIZE, SIZE, 3)
    in [0, 1] -> the same."""
    direction, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.3)
    across = (COLUMNS / SIZE - 0.5) * np.cos(direction) + (ROWS / SIZE - 0.5) * np.sin(direction)
    light = rng.uniform(0.85, 1.1) * (1 + slope * across) * (0.95 + 0.1 * smooth_noise(rng, 40))
    image = gaussian_filter(image * light[..., None], (*[rng.uniform(0, 0.7)] * 2, 0))
    noise = np.sqrt(0.015**2 + 0.0006 * np.clip(image, 0, 1))
    return np.clip(image + noise * rng.standard_normal(image.shape), 0, 1)


# ----------------------------- defects: surface, size, contrast, rng -> opacity (SIZE, SIZE), what lies there
def distance(rng, radius):
    """Distances (SIZE, SIZE) from a random centre, in units of ``radius`` pixels; the disc lies inside the
    image."""
    centre = rng.uniform(radius, SIZE - radius, 2)
    squeeze, angle = rng.uniform(0.6, 1), rng.uniform(0, np.pi)
    u, v = COLUMNS - centre[0], ROWS - centre[1]
    along, across = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
    return np.hypot(along, across / squeeze) / radius


def edge(d, softness):
    """Opacity of a disc with a soft edge at distance 1."""
    return np.clip((1 - d) / softness, 0, 1)


def scratch(image, size, contrast, rng):
    """A straight bright or dark line."""
    angle, centre, length = rng.uniform(0, np.pi), rng.uniform(0.2, 0.8, 2) * SIZE, 3 * size
    across = (COLUMNS - centre[0]) * np.cos(angle) + (ROWS - centre[1]) * np.sin(angle)
    along = (ROWS - centre[1]) * np.cos(angle) - (COLUMNS - centre[0]) * np.sin(angle)
    opacity = np.clip(rng.uniform(0.8, 1.6) - np.abs(across) + 0.5, 0, 1) * (np.abs(along) < length)
    return opacity, image + rng.choice([-1, 1]) * contrast


def crack(image, size, contrast, rng):
    """A dark line that wanders."""
    angle, point, opacity = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.8, 2) * SIZE, np.zeros((SIZE, SIZE))
    for _ in range(int(5 * size)):
        angle += 0.35 * rng.standard_normal()
        point = point + [np.cos(angle), np.sin(angle)]
        if not (1 < point.min() and point.max() < SIZE - 2):
            break
        opacity[int(point[0]) : int(point[0]) + 2, int(point[1]) : int(point[1]) + 2] = 1
    return np.clip(1.5 * gaussian_filter(opacity, 0.6), 0, 1), image - contrast


def spot(image, size, contrast, rng):
    """A dark or bright spot with a soft edge."""
    return edge(distance(rng, size), 0.4), image * (1 + rng.choice([-1, 1]) * 1.2 * contrast)


def blurred(image, size, contrast, rng):
    """A patch whose fine structure is rubbed off."""
    sigma = 2 + 8 * contrast
    return edge(distance(rng, 1.7 * size), 0.15), gaussian_filter(image, (sigma, sigma, 0), mode="wrap")


def shifted(image, size, contrast, rng):
    """A patch taken from elsewhere, turned over: the structure is right, its place is not."""
    opacity = edge(distance(rng, 1.7 * size), 0.1)
    return opacity, np.roll(image[::-1, ::-1].transpose(1, 0, 2), rng.integers(5, 40, 2), axis=(0, 1))


def stain(image, size, contrast, rng):
    """A faint coloured cloud."""
    d = distance(rng, 1.5 * size)
    opacity = np.clip(1.2 * contrast * np.exp(-2 * d**2) * (d < 1.5), 0, 1)
    return opacity, np.broadcast_to(rng.uniform(0.1, 0.8, 3), image.shape)


DEFECTS = {each.__name__: each for each in (scratch, crack, spot, blurred, shifted, stain)}


def damage(image, defect, rng):
    """A surface with a defect -> (SIZE, SIZE, 3), mask (SIZE, SIZE) bool. Sizes 6 to 28 pixels, contrasts .12
    to .5, both log-uniform."""
    size = np.exp(rng.uniform(np.log(6), np.log(28)))
    contrast = np.exp(rng.uniform(np.log(0.12), np.log(0.5)))
    opacity, inside = DEFECTS[defect](image, size, contrast, rng)
    return image + opacity[..., None] * (np.clip(inside, 0, 1) - image), opacity > 0.05


# ---------------------------------------------------------------- the set on disk
def new_set(folder: Path, seed: int) -> AbstractContextManager[Path]:
    """``whole_file`` of a folder, for a set that ``seed`` decides. Raises UserError where the folder exists,
    and on a seed below 0."""
    if folder.exists():
        raise UserError(f"{folder} exists; give a folder that does not")
    if seed < 0:
        raise UserError(f"--seed: expected a whole number from 0, got {seed}")
    return whole_file(folder)


def save(image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * 255).round().astype(np.uint8)).save(path)


def generate(root: Path, n_train: int, n_good: int, n_defect: int, seed: int) -> None:
    """Write the whole set, masks of the defects included."""
    for number, texture in enumerate(TEXTURES):
        rng = np.random.default_rng([seed, number])
        kinds = [("train", "good", n_train), ("test", "good", n_good)]
        kinds += [("test", defect, n_defect) for defect in DEFECTS]
        for split, kind, total in kinds:
            for i in range(total):
                image = surface(texture, rng)
                if kind in DEFECTS:
                    image, mask = damage(image, kind, rng)
                    save(mask.astype(float), root / texture / "ground_truth" / kind / f"{i:03d}_mask.png")
                save(photograph(image, rng), root / texture / split / kind / f"{i:03d}.png")


def main(args: argparse.Namespace) -> None:
    set_size(args.size)
    with new_set(args.folder, args.seed) as partial:
        generate(partial, args.train, args.good, args.defect, args.seed)
    count = len(TEXTURES) * (args.train + args.good + len(DEFECTS) * args.defect)
    print(f"{count} images of {len(TEXTURES)} textures in {args.folder}")


if __name__ == "__main__":
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; must not exist")
    parser.add_argument("--train", type=int, default=120, help="good training images per texture [120]")
    parser.add_argument("--good", type=int, default=40, help="good test images per texture [40]")
    parser.add_argument("--defect", type=int, default=20, help="test images per texture and defect [20]")
    parser.add_argument("--size", type=int, default=SIZE, help=f"pixels of the pictures' side [{SIZE}]")
    parser.add_argument("--seed", type=int, default=0, help="of the set [0]")
    guarded(main, parser.parse_args())
