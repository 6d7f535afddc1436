"""Draw docs/method.png, the picture of the method in the README.

python tools/draw_method.py
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BOXES = {  # name -> (x, y, width, text, colour)
    "image": (0.0, 1.0, 1.3, "image", "#eeeeee"),
    "backbone": (1.9, 1.0, 1.7, "frozen\nbackbone", "#dde7f3"),
    "semantic": (4.3, 1.7, 2.1, "semantic token y\n+ low bands", "#fbe9cf"),
    "patches": (4.3, 0.3, 2.1, "patch tokens p", "#fbe9cf"),
    "fusion": (7.1, 0.3, 2.2, "multi-frequency\nfusion", "#dcefdc"),
    "flow": (7.1, 1.7, 2.2, "coupling layers\n(semantic flow)", "#dcefdc"),
    "rings": (4.3, 3.1, 2.1, "rings and peaks\nof frequency", "#fbe9cf"),
    "texture": (7.1, 3.1, 2.2, "coupling layers\n(texture flow)", "#dcefdc"),
    "score": (10.1, 2.4, 1.9, "latent z,\nlikelihood\n→ score", "#f3dede"),
}
ARROWS = [
    ("image", "backbone"),
    ("backbone", "semantic"),
    ("backbone", "patches"),
    ("backbone", "rings"),
    ("semantic", "flow"),
    ("patches", "fusion"),
    ("fusion", "flow"),
    ("rings", "texture"),
    ("flow", "score"),
    ("texture", "score"),
]
HEIGHT = 0.9


def main() -> None:
    figure = Figure((10, 3.6), layout="constrained")
    axes = figure.subplots()
    for x, y, width, text, colour in BOXES.values():
        box = FancyBboxPatch(
            (x, y), width, HEIGHT, boxstyle="round,pad=0.05", facecolor=colour, edgecolor="#555555"
        )
        axes.add_patch(box)
        axes.text(x + width / 2, y + HEIGHT / 2, text, ha="center", va="center", fontsize=11)
    for start, end in ARROWS:
        x, y, width = BOXES[start][:3]
        target_x, target_y = BOXES[end][:2]
        if start == "fusion":  # straight up
            ends = ((x + width / 2, y + HEIGHT + 0.05), (x + width / 2, target_y - 0.07))
        else:
            ends = ((x + width + 0.06, y + HEIGHT / 2), (target_x - 0.07, target_y + HEIGHT / 2))
        axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=13, color="#555555"))
    axes.set(xlim=(-0.2, 12.2), ylim=(0.0, 4.2))
    axes.axis("off")
    figure.savefig(Path(__file__).resolve().parents[1] / "docs" / "method.png", dpi=130)


if __name__ == "__main__":
    main()
