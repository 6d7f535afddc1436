"""A whole run on a cluster."""

import csv

import pytest
from conftest import make_folder, script

SMALL = (
    "--dataset folder --dataset_path images --extractor test_resnet --weights_path random --img_size 32 "
    "--precision float32 --fc_internal 16 --fusion none --threads 1"
).split()


@pytest.mark.slow
def test_a_cluster_comes_to_the_table_of_one_process(cluster, tmp_path):
    """From the images on; workers know nothing of the script's folder."""
    make_folder(tmp_path / "images", n_train=12, n_test=6)
    cluster.add(2)
    tables, shared = [], ("--feature_path", "shared", "--cluster", cluster.file)
    for name, options in (("by-two", shared), ("alone", ())):
        done = script("main.py", *SMALL, "--modelname", name, *options, cwd=tmp_path, timeout=500)
        assert done.returncode == 0, done.stderr
        lines = csv.DictReader((tmp_path / f"runs/{name}/results.csv").read_text().splitlines())
        tables.append([line | {"seconds": "", "run": ""} for line in lines])
    assert tables[0] == tables[1] and len(tables[0]) > 3
