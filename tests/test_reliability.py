"""A whole run on a cluster, and scripts that are asked to end before they have begun."""

import csv
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, make_folder, script

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


def test_a_signal_while_modules_are_imported(tmp_path):
    """A stub that takes its time stands in for NumPy."""
    (tmp_path / "numpy.py").write_text("import time; print('importing', flush=True); time.sleep(60)\n")
    command, pipes = [sys.executable, ROOT / "extractor.py"], {"stdout": -1, "stderr": -1, "text": True}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        running = subprocess.Popen(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, **pipes)
        assert running.stdout.readline() == "importing\n"
        running.send_signal(number)
        _, errors = running.communicate(timeout=300)
        assert (running.returncode, errors) == (-number, "")
