"""predict.py scores new images as the run scored them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow


ROOT = Path(__file__).resolve().parent.parent
RUN = [
    "--dataset",
    "folder",
    "--dataset_path",
    "images",
    "--extractor",
    "resnet18",
    "--weights_path",
    "random",
    "--img_size",
    "64",
    "--precision",
    "float32",
    "--workers",
    "0",
    "--threads",
    "1",
    "--hide_tqdm_bar",
    "--fc_internal",
    "16",
    "--class_name",
    "a",
]


def run(folder, *command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run with a held-out share and one without, on small random images."""
    folder = tmp_path_factory.mktemp("predict")
    rng = np.random.RandomState(0)
    for split, name in (("train", "a"), ("test", "a"), ("test", "b")):
        (folder / "images" / split / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.randint(0, 256, (48, 48, 3)).astype(np.uint8)).save(
                folder / "images" / split / name / f"{i}.png"
            )
    for name, options in (
        ("held", ["--holdout", "0.3", "--score", "latent_knn"]),
        ("plain", ["--score", "likelihood"]),
        ("spectrum", ["--holdout", "0.3", "--bands", "True", "--score", "spectrum", "--refit", "True"]),
    ):
        outcome = run(folder, ROOT / "train.py", *RUN, "--modelname", name, *options)
        assert outcome.returncode == 0, outcome.stderr
    return folder


@pytest.mark.parametrize("name", ["held", "plain", "spectrum"])
def test_scores_are_those_of_the_run(fitted, name):
    outcome = run(
        fitted, ROOT / "predict.py", f"runs/{name}/classes/a-seed0", "images/test", "--device", "cpu"
    )
    assert outcome.returncode == 0, outcome.stderr
    header, *lines = [line.split(",") for line in outcome.stdout.splitlines()]
    found = {line[-1]: float(line[0]) for line in lines}
    test = json.loads((fitted / f"runs/{name}/classes/a-seed0.json").read_text())["test"]
    wanted = dict(zip([f"images/test/{c}/{i}.png" for c in "ab" for i in range(10)], test["scores"]))
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose(
        [found[path] for path in wanted], list(wanted.values()), rtol=2e-3, atol=2e-3
    )  # the run's features went through a float16 file
    assert [float(line[0]) for line in lines] == sorted(found.values(), reverse=True)
    if name != "plain":
        held = json.loads((fitted / f"runs/{name}/classes/a-seed0.json").read_text())["held_out_scores"]
        assert len(held) == 3 and header == ["score", "anomalous", "image"]
        assert {line[-1]: line[1] == "yes" for line in lines} == {
            path: score > np.quantile(held, 0.95) for path, score in found.items()
        }
    else:
        assert header == ["score", "image"]


def test_mistakes_are_one_line(fitted):
    for arguments in (
        ["runs/held/classes/b-seed0", "images"],
        ["runs/held/classes/a-seed0", "nowhere"],
        ["runs/held/classes/a-seed0", "runs"],
    ):
        outcome = run(fitted, ROOT / "predict.py", *arguments)
        assert (
            outcome.returncode == 2
            and outcome.stderr.startswith("error: ")
            and outcome.stderr.count("\n") == 1
        )
