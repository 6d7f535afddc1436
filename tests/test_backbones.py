"""Backbones of several kinds go the whole course (tools/backbones.py has them all)."""

import pytest

from tools.backbones import BACKBONES, course, described

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "label, preset, ending",
    [("vit_tiny", "paper", ".pt2"), ("levit", "accurate", None), ("mobilenetv3", "accurate", None)],
)
def test_the_whole_course(tmp_path, label, preset, ending):
    assert course(*BACKBONES[label], preset, tmp_path, ending) == "works"


def test_a_refusal_is_told_with_its_step(tmp_path):
    assert course("dinov3_b", 60, "paper", tmp_path).startswith("fit: extractor dinov3_b cannot take 60x60")


def test_what_the_table_says():
    """At the backbone's own size."""
    assert described("deit") == (
        "384 x 384", "24 x 24", "class token (1 other prefix token dropped)", "2, 5, 8, 11 of 12"
    )  # fmt: skip
    assert described("resnet18") == ("224 x 224", "7 x 7", "mean of the map", "1, 2, 3, 4 of 5")
    assert described("vit_base_patch16_siglip_224")[2] == "mean of the patches"
