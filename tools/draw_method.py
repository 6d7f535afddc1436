"""Draw docs/method.png, the picture of the method in the README.

python tools/draw_method.py
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OURS = "dashed"  # the edge of what is this repository's own, not the paper's
BOXES = {  # name -> (x, y, width, text, colour, edge)
    "image": (0.0, 1.7, 1.2, "image", "#eeeeee", "solid"),
    "backbone": (1.7, 1.7, 1.7, "frozen\nbackbone", "#dde7f3", "solid"),
    "token": (4.0, 3.1, 2.6, "semantic token y\n(accurate: each place)", "#fbe9cf", "solid"),
    "patches": (4.0, 1.7, 2.6, "patch tokens p (accurate:\nbands of other places)", "#fbe9cf", "solid"),
    "joint": (4.0, 0.3, 2.6, "semantic token,\nsub-band energies", "#fbe9cf", OURS),
    "flow": (7.2, 3.1, 2.4, "coupling layers", "#dcefdc", "solid"),
    "fusion": (7.2, 1.7, 2.4, "multi-frequency\nfusion", "#dcefdc", "solid"),
    "density": (7.2, 0.3, 2.4, "Gaussian or\nkernels", "#dcefdc", OURS),
    "latent": (10.2, 3.1, 2.0, "latent z,\nlikelihood", "#f3dede", "solid"),
    "score": (10.2, 1.7, 2.0, "score", "#f3dede", "solid"),
}
ARROWS = [
    ("image", "backbone"),
    ("backbone", "token"),
    ("backbone", "patches"),
    ("backbone", "joint"),
    ("token", "flow"),
    ("patches", "fusion"),
    ("joint", "density"),
    ("fusion", "flow"),
    ("flow", "latent"),
    ("latent", "score"),
    ("density", "score"),
]
HEIGHT, GAP = 0.9, 0.07


def ends(start: str, end: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where an arrow begins and ends: straight up or down between boxes of one column, else left to right."""
    x, y, width = BOXES[start][:3]
    target_x, target_y = BOXES[end][:2]
    if x == target_x:
        middle, up = x + width / 2, target_y > y
        return (middle, y + HEIGHT + GAP if up else y - GAP), (
            middle,
            target_y - GAP if up else target_y + HEIGHT + GAP,
        )
    return (x + width + GAP, y + HEIGHT / 2), (target_x - GAP, target_y + HEIGHT / 2)


def main() -> None:
    figure = Figure((10.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for x, y, width, text, colour, edge in BOXES.values():
        box = FancyBboxPatch(
            (x, y),
            width,
            HEIGHT,
            boxstyle="round,pad=0.05",
            facecolor=colour,
            edgecolor="#555555",
            linestyle=edge,
        )
        axes.add_patch(box)
        axes.text(x + width / 2, y + HEIGHT / 2, text, ha="center", va="center", fontsize=11)
    for pair in ARROWS:
        dashed = "joint" in pair or "density" in pair
        axes.add_patch(
            FancyArrowPatch(
                *ends(*pair),
                arrowstyle="-|>",
                mutation_scale=13,
                color="#555555",
                linestyle=OURS if dashed else "solid",
            )
        )
    axes.text(0, 0.3, "dashed: the preset accurate", fontsize=10, color="#555555")
    axes.set(xlim=(-0.2, 12.4), ylim=(0.0, 4.2))
    axes.axis("off")
    figure.savefig(Path(__file__).resolve().parents[1] / "docs" / "method.png", dpi=130)


if __name__ == "__main__":
    main()
