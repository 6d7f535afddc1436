"""What machines do to an extraction, done for real in processes of their own: tools/faults.py, and whole
scripts."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, script

SMALL = (
    *("--dataset", "digits", "--extractor", "resnet10t", "--weights_path", "random", "--img_size", "32"),
    *("--threads", "1", "--feature_path", "kept"),
)


def test_kills_and_the_other_faults():
    """Nothing lost, nothing wrong; how long a machine takes to obey a signal is not this test's matter."""
    done = script("tools/faults.py", "--times", "4", "--longest", "30", cwd=ROOT, timeout=600)
    rows = re.findall(r"^\| (.+) \| (\d+) \| (\d+) \| (\d+) \|$", done.stdout, re.M)
    assert done.returncode == 0 and len(rows) >= 5, done.stdout + done.stderr
    assert {(lost, wrong) for _, _, lost, wrong in rows} == {("0", "0")}, done.stdout


SHARDS_OF_100 = """import sys
from backbone import storing
storing.SHARD_ROWS = 100
sys.argv.pop(0)
__file__ = sys.argv[0]
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))"""  # as the program itself, no guest of one


def started(*arguments, cwd: Path, code: str = "", **environment) -> subprocess.Popen:
    command = [sys.executable, *(["-c", code] if code else []), str(ROOT / "extractor.py"), *arguments]
    environment = {"PATH": "", "PYTHONPATH": str(ROOT) if code else "", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_signal_ends_an_extraction_with_one_line(tmp_path):
    """Which says what is kept and how to go on; what it names does so."""
    number = signal.SIGTERM
    running = started(*SMALL, cwd=tmp_path, code=SHARDS_OF_100)
    while not list(tmp_path.glob("kept/resnet10t-*/*/record.json")):
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    line = r"interrupted: (\d+) of 1797 images are kept in kept/resnet10t-\S+; to go on: python (.+)\n"
    told = re.fullmatch(line, errors)
    assert running.returncode == 128 + number and told, errors
    assert 100 * len(list(tmp_path.glob("kept/resnet10t-*/*/record.json"))) == int(told[1]) >= 100
    assert not list(tmp_path.glob("kept/*/.*"))
    name, *arguments = told[2].split()
    done = script(name, *arguments, cwd=tmp_path)
    assert done.returncode == 0 and f"extracting {1797 - int(told[1])} images" in done.stdout


def test_a_signal_while_modules_are_imported(tmp_path):
    """A stub that takes its time stands in for torch."""
    (tmp_path / "numpy.py").write_text("import time; print('importing', flush=True); time.sleep(60)\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        running = started(*SMALL, cwd=tmp_path, PYTHONPATH=str(tmp_path))
        assert running.stdout.readline() == "importing\n"
        running.send_signal(number)
        _, errors = running.communicate(timeout=60)
        assert (running.returncode, errors) == (-number, "")


def test_nohup_is_respected(tmp_path):
    """A hang-up that is ignored when the script starts stays ignored."""
    (tmp_path / "numpy.py").write_text(
        "import signal; print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN); raise SystemExit\n"
    )
    command = f"trap '' HUP; exec {sys.executable} {ROOT / 'extractor.py'} --dataset digits"
    done = subprocess.run(
        ["/bin/sh", "-c", command], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout == "True\n"
