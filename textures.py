"""Generate a texture set in MVTec layout: five textures, five kinds of local defect, the same images from the same seed.

python textures.py data/textures
python main.py --dataset mvtec --dataset_path data/textures --extractor efficientnet_lite0
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

SIZE = 224  # pixels
Y, X = np.mgrid[:SIZE, :SIZE] / SIZE


# ---------------------------------------------------------------- textures: rng -> (SIZE, SIZE) in [0, 1]
def smooth_noise(rng, sigma):
    """Gaussian noise blurred over ``sigma`` pixels, scaled to [0, 1]."""
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((SIZE, SIZE))) * blur_spectrum(sigma)).real
    return (noise - noise.min()) / (noise.max() - noise.min())


def blur_spectrum(sigma):
    frequency = np.fft.fftfreq(SIZE)
    return np.exp(-2 * (np.pi * sigma) ** 2 * (frequency[:, None] ** 2 + frequency[None] ** 2))


def weave(rng):
    phase = rng.uniform(0, 2 * np.pi, 2)
    return 0.5 + 0.25 * np.sin(2 * np.pi * 18 * X + phase[0]) + 0.25 * np.sin(2 * np.pi * 18 * Y + phase[1])


def stripes(rng):
    angle = np.deg2rad(30 + rng.uniform(-3, 3))
    return 0.5 + 0.5 * np.sin(2 * np.pi * 14 * (X * np.cos(angle) + Y * np.sin(angle)) + rng.uniform(0, 2 * np.pi))


def grain(rng):
    return smooth_noise(rng, 2.0)


def bricks(rng):
    dx, dy = rng.uniform(0, 1, 2)
    row = np.floor(8 * (Y + dy))
    joint = (np.mod(8 * (Y + dy), 1) < 0.12) | (np.mod(4 * (X + dx) + 0.5 * np.mod(row, 2), 1) < 0.06)
    return np.where(joint, 0.8, 0.35)


def dots(rng):
    dx, dy = rng.uniform(0, 1, 2)
    return np.where(np.hypot(np.mod(10 * (X + dx), 1) - 0.5, np.mod(10 * (Y + dy), 1) - 0.5) < 0.28, 0.85, 0.25)


TEXTURES = {"weave": weave, "stripes": stripes, "grain": grain, "bricks": bricks, "dots": dots}
TINTS = {"weave": (0.9, 0.8, 0.6), "stripes": (0.6, 0.75, 0.9), "grain": (0.8, 0.8, 0.8), "bricks": (0.9, 0.55, 0.45), "dots": (0.65, 0.85, 0.6)}


# ---------------------------------------------------------------- defects: image (SIZE, SIZE, 3), rng -> image
def place(rng, radius):
    """A disc somewhere inside the image: distances (SIZE, SIZE) from its centre, in units of its radius (pixels)."""
    centre = rng.uniform(radius, SIZE - radius, 2)
    return np.hypot(Y * SIZE - centre[0], X * SIZE - centre[1]) / radius


def scratch(image, rng):
    angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.2, 0.2)
    across = (X - 0.5) * np.cos(angle) + (Y - 0.5) * np.sin(angle) - offset
    along = -(X - 0.5) * np.sin(angle) + (Y - 0.5) * np.cos(angle)
    line = (np.abs(across) < 0.007) & (np.abs(along - rng.uniform(-0.2, 0.2)) < 0.15)
    return np.where(line[..., None], 1.0, image)


def spot(image, rng):
    return image * np.clip(place(rng, 14), 0.15, 1)[..., None]


def blurred(image, rng):
    soft = Image.fromarray((image * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(6))
    return np.where((place(rng, 28) < 1)[..., None], np.asarray(soft) / 255, image)


def shifted(image, rng):
    return np.where((place(rng, 28) < 1)[..., None], np.roll(image[::-1], rng.integers(5, 40), axis=1), image)


def stain(image, rng):
    weight = 0.6 * np.exp(-2 * place(rng, 24) ** 2)[..., None]
    return image * (1 - weight) + weight * np.array([0.75, 0.15, 0.15])


DEFECTS = {"scratch": scratch, "spot": spot, "blurred": blurred, "shifted": shifted, "stain": stain}


def render(texture: str, rng) -> np.ndarray:
    """A good image: the texture in its tint, with uneven light and sensor noise -> (SIZE, SIZE, 3) in [0, 1]."""
    light = 0.9 + 0.1 * smooth_noise(rng, 40)
    image = (0.25 + 0.75 * TEXTURES[texture](rng))[..., None] * np.array(TINTS[texture]) * light[..., None]
    return np.clip(image + 0.02 * rng.standard_normal((SIZE, SIZE, 3)), 0, 1)


def save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8)).save(path)


def generate(root: Path, n_train: int, n_good: int, n_defect: int, seed: int) -> int:
    """Write the whole set -> the number of images."""
    count = 0
    for number, texture in enumerate(TEXTURES):
        rng = np.random.default_rng([seed, number])
        for kind, total in (("train/good", n_train), ("test/good", n_good), *((f"test/{defect}", n_defect) for defect in DEFECTS)):
            for i in range(total):
                image, defect = render(texture, rng), kind.split("/")[1]
                save(DEFECTS[defect](image, rng) if defect in DEFECTS else image, root / texture / kind / f"{i:03d}.png")
                count += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; must not exist")
    parser.add_argument("--train", type=int, default=120, help="good training images per texture [120]")
    parser.add_argument("--good", type=int, default=40, help="good test images per texture [40]")
    parser.add_argument("--defect", type=int, default=20, help="test images per texture and kind of defect [20]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder.exists():
        print(f"error: {args.folder} exists; give a folder that does not", file=sys.stderr)
        return 2
    partial = args.folder.with_name(args.folder.name + ".partial")
    count = generate(partial, args.train, args.good, args.defect, args.seed)
    partial.rename(args.folder)
    print(f"{count} images of {len(TEXTURES)} textures in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
