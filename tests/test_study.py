"""benchmarks/study.py: flows that differ in one thing."""

import sys

import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import study
from judging import Row

import model


def test_differences_are_to_the_first_row_of_the_same_score():
    values = {
        ("a: places", "x"): (0.5, 0.7), ("a: places", "y"): (0.8, 0.8), ("a: whole", "x"): (0.1, 0.1),
        ("b: places", "x"): (0.7, 0.9), ("b: places", "y"): (0.9, 0.9), ("kNN", "x"): (0.3,),
        ("c: places", "x"): (0.6,),
    }  # fmt: skip
    rows = [Row(d, "made", c, seed, v) for (d, c), of in values.items() for seed, v in enumerate(of)]
    header, lines = study.make_table(rows)
    assert header == ["detector", "made", "- the first"]
    found = {line[0]: line[1:] for line in lines}
    assert found["a: places"] == ["0.7000 ± 0.0707", ""] and found["kNN"] == ["0.3000", ""]
    half = 12.706 * 0.05  # Student's t of two classes, whose differences are .2 and .1
    assert found["b: places"] == ["0.8500 ± 0.0707", f"+0.1500 ± {half:.4f}"]
    assert found["c: places"] == ["0.6000", "+0.1000"], "of the seed and the class that both have"


def test_a_changed_flow_sees_something_else():
    flow = model.build_flow(
        8, (2, 2), n_tokens=4, n_blocks=2, hidden=4, clamp=3.0, fusion="hilo",
        identity_start=False, alpha=0.5, window=2,
    )  # fmt: skip
    tokens, seen = torch.randn(3, 8), torch.randn(3, 4, 8)
    plain, rolled = (flow(tokens, [each])[0] for each in (seen, seen.roll(1, 0)))
    study.see_otherwise(flow, lambda each, _: each.roll(1, 0))
    z, log_det = flow(tokens, [seen])
    assert torch.equal(z, rolled) and log_det.shape == (3,)
    assert not torch.equal(z, plain)
