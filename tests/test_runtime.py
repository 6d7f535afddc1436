"""Full batches of larger jobs on a CPU are computed by OpenVINO: what it gives is what PyTorch gives."""

import numpy as np
import pytest
import torch
from test_extractor import job_of, settings
from torch import nn

import datasets
from backbone.runtime import Compiled


def rows_of(job, count: int) -> dict[str, torch.Tensor]:
    """Of so many images of noise."""
    noise = np.random.RandomState(1).randint(0, 256, (count, *job.img_size, 3), np.uint8)
    parts = list(job.features(list(map(datasets.RawImage, noise))))
    return {name: torch.cat([rows[name] for rows in parts]).float() for name in parts[0]}


@pytest.mark.parametrize(
    "name, size, options",
    [
        ("test_resnet", (64, 96), {"bands": True, "places": 4, "mirror": True}),
        ("test_vit", (64, 96), {"bands": True, "places": 3, "token_grid": "2"}),
        ("test_efficientnet", (64, 64), {"token_grid": "1", "workers": 0}),
    ],
    ids=str,
)
def test_gives_what_pytorch_gives(name, size, options):
    """Seven images in batches of three: two by OpenVINO, the rest not."""
    job = job_of(settings(name, size, **{"extract_batch": 3, "workers": 2} | options))
    plain = rows_of(job, 7)
    job.compile()
    found = rows_of(job, 7)
    assert isinstance(job.full_batch, Compiled)
    for array, wanted in plain.items():
        assert (found[array] - wanted).norm() < 1e-3 * wanted.norm(), array


class Factored(nn.Module):
    """A backbone's stand-in that OpenVINO has no rule for."""

    def forward(self, images):
        return (torch.linalg.qr(images.float().mean(1))[0].half(),)


class Changing(nn.Module):
    """Gives something else once it is traced."""

    def forward(self, images):
        return (images.float().mean((1, 2, 3)) * (2 if torch.jit.is_tracing() else 1),)


@pytest.mark.parametrize(
    "module, told", [(Factored(), "No conversion rule"), (Changing(), "it computes other numbers")], ids=str
)
def test_a_backbone_that_it_cannot_run_goes_to_pytorch(capsys, module, told):
    job = job_of(settings("test_resnet", (32, 32), extract_batch=3))
    module.rows = lambda values: {"tokens": values[0]}
    job.module = module
    job.compile()
    job.compile()
    assert len(rows_of(job, 7)["tokens"]) == 7
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and told in line
    assert line.startswith("OpenVINO cannot run test_resnet (")
