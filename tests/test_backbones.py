"""Backbones of several kinds go the whole course, from images to scores, untrained."""

import pytest
from conftest import make_folder

pytestmark = pytest.mark.slow
SMALL = (
    "--weights_path random --img_size 64 --dataset folder --dataset_path images --class_name apple "
    "--fc_internal 32 --least_steps 4 --batch_size 8 --holdout 0.25 --device cpu --threads 1 --workers 0"
).split()


@pytest.mark.parametrize("extractor, preset", [("test_vit", "paper"), ("test_efficientnet", "accurate")])
def test_the_whole_course(run_script, tmp_path, extractor, preset):
    make_folder(tmp_path / "images", n_train=16, n_test=3)
    small = [*SMALL, *(["--places", 4] if preset == "accurate" else [])]
    given = ("--preset", preset, "--extractor", extractor, "--modelname", "small")
    done = run_script("train.py", *given, *small, timeout=500)
    assert done.returncode == 0, done.stderr
    done = run_script("predict.py", "runs/small", "images/test", "--device", "cpu", "--threads", 1)
    assert done.returncode == 0 and done.stdout.count(".png") == 9, done.stdout + done.stderr
