"""predict.py scores new pictures as the run scored them, and so do three lines in a notebook."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import processes
import pytest
import timm
import torch
from browser import FAULTS, in_browser
from conftest import script, write_image
from fabricated import small_run
from PIL import Image
from safetensors.torch import save_file

import main
import predict
import train
from config import UserError
from detector.checkpoints import find_checkpoints
from detector.picture_detector import PictureDetector
from images import watch
from reporting import scores
from shell.files import file_name, write_text
from shell.signals import guarded

pytestmark = pytest.mark.slow


RUN = {"dataset_path": "images", "extractor": "test_resnet"}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run with a held-out share and one without, on small random images."""
    folder = tmp_path_factory.mktemp("predict")
    rng = np.random.RandomState(0)
    for place in ("train/a", "train/b", "test/a", "test/b"):
        for i in range(10):
            pixels = rng.randint(0, 256, (48, 48, 3)).astype(np.uint8)
            write_image(folder / "images" / place / f"{i}.png", pixels)
    with contextlib.chdir(folder):
        for name, options in (
            ("held", {"holdout": 0.3, "score": "latent"}),
            ("plain", {"holdout": 0.0, "score": "likelihood"}),
            ("joined", {"holdout": 0.3, "bands": True, "score": "joined", "places": 4, "least_steps": 9}),
        ):
            train.main(small_run(**RUN, class_name="a", modelname=name, **options))
        main.main(small_run(**RUN, class_name="a,b", modelname="two", holdout=0.3, keep="weights"))
    return folder


TESTED = [f"images/test/{c}/{i}.png" for c in "ab" for i in range(10)]


@pytest.fixture
def here(fitted, monkeypatch):
    monkeypatch.chdir(fitted)
    return fitted


def predicted(capsys, *arguments) -> tuple[list[dict], str, int]:
    """The rows, what was said beside them, and the exit status."""
    given = [*map(str, arguments), "--device", "cpu", "--threads", "1"]
    status = predict.main(predict.parse_arguments(given))
    captured = capsys.readouterr()
    return list(csv.DictReader(io.StringIO(captured.out))), captured.err, status


def record_of(name: str, class_name: str = "a") -> dict:
    return json.loads(Path(f"runs/{name}/classes/{class_name}-seed0.json").read_text())


@pytest.mark.parametrize("name", ["held", "plain", "joined"])
def test_scores_are_those_of_the_run(here, capsys, name):
    rows, said, status = predicted(capsys, f"runs/{name}/classes/a-seed0", "images/test")
    assert status == 0 and [row["image"] for row in rows] == TESTED, "a row for each, in order"
    record = record_of(name)
    found = np.array([float(row["score"]) for row in rows])
    # the run's features went through a float16 file
    np.testing.assert_allclose(found, record["test"]["scores"], rtol=2e-3, atol=2e-3)
    held = np.array(record["held_out_scores"])
    if name == "plain":
        assert {(row["p_value"], row["verdict"]) for row in rows} == {("", "")} and "--calibrate" in said
        return
    assert len(held) == 3 and "needs 19" in said, "three pictures are few"
    for row, score in zip(rows, found):
        assert float(row["p_value"]) == (1 + (held >= score).sum()) / 4
        assert row["verdict"] == ("anomalous" if score > held.max() else "normal")


def test_three_lines_in_a_notebook(here):
    loaded = PictureDetector.load("runs/held/classes/a-seed0", device="cpu", threads=1)
    wanted = record_of("held")["test"]["scores"]
    arrays = [np.asarray(Image.open(path)) for path in TESTED]
    score = loaded.score(TESTED[3])
    assert isinstance(score, float) and score == pytest.approx(wanted[3], rel=2e-3)
    for same in (Path(TESTED[3]), Image.open(TESTED[3]), arrays[3]):
        assert loaded.score(same) == pytest.approx(score, rel=1e-5)
    for several in (TESTED, arrays, np.stack(arrays), iter(TESTED)):
        assert loaded.score(several) == pytest.approx(np.array(wanted), rel=2e-3)
    gray = arrays[0][..., 0]
    assert loaded.score(gray) == pytest.approx(loaded.score(np.stack([gray] * 3, 2)), rel=1e-5)
    assert loaded.score([]).shape == (0,)
    with pytest.raises(UserError, match="float64"):
        loaded.score(arrays[0] / 255)
    for ask in (loaded.score, loaded.heat_map):
        with pytest.raises(UserError, match="no image nowhere.png"):
            ask("nowhere.png")
    top = max(loaded.held_out)
    assert loaded.p_value(top + 1) == 0.25 and loaded.verdict(top + 1) == "anomalous"
    assert loaded.verdict([top, top + 1]).tolist() == ["normal", "anomalous"]
    with pytest.raises(UserError, match="no normal pictures"):
        loaded.calibrate([])
    assert loaded.threshold.score == top
    assert loaded.calibrate(arrays[:10]).n == 10 and loaded.p_value(1e9) == pytest.approx(1 / 11)


def written(path: Path) -> list[dict]:
    """The rows of a table."""
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def test_output_files(here, capsys, tmp_path):
    """Rows in a file, whatever the pictures' names; those that cannot be read are listed and make the status
    1."""
    target, odd, broken = tmp_path / "x.csv", tmp_path / 'a, "b".png', tmp_path / "broken.png"
    Image.open(TESTED[0]).save(odd)
    broken.write_bytes(b"no picture")
    shown, _, status = predicted(capsys, "runs/held", odd, TESTED[1])
    assert status == 0
    rows, said, status = predicted(capsys, "runs/held", odd, broken, TESTED[1], "--output", target)
    assert rows == [] and status == 1
    assert "skipped: " in said and str(broken) in said and ", 1 unreadable" in said.splitlines()[-1]
    rows = written(target)
    assert [row["image"] for row in rows] == [str(odd), TESTED[1]]
    wanted = [float(row["score"]) for row in shown]
    assert [float(row["score"]) for row in rows] == pytest.approx(wanted, rel=1e-4)
    assert {*tmp_path.iterdir()} == {target, odd, broken}, "no partial file stays"


def test_globs_and_lists(here, capsys, monkeypatch):
    given = "\r\n \r\n".join([*TESTED[:3], "nowhere.png"]).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    rows, said, status = predicted(capsys, "runs/held", "-", "images/test/b/*.png")
    assert [row["image"] for row in rows] == TESTED[:3] + TESTED[10:]
    assert status == 1 and "skipped: no image nowhere.png: there is no such file" in said.splitlines()


def test_calibrate_on_fresh_pictures(here, capsys):
    asked = ["images/test/b", "--calibrate", "images/test/a", "--class_name", "a"]
    rows, said, _ = predicted(capsys, "runs/plain", *asked, "--false_alarms", "0.2")
    fresh = np.array(record_of("plain")["test"]["scores"][:10])
    for row in rows:
        above = (fresh >= float(row["score"])).sum()
        assert float(row["p_value"]) == pytest.approx((1 + above) / 11, abs=1e-6)
        assert (row["verdict"] == "anomalous") == (float(row["p_value"]) <= 0.2)
    assert "from 10 held-out" in said and "warning" not in said


def test_a_run_scores_by_every_class(here, capsys):
    arguments = ["images/test/a/0.png", "images/test/b/0.png"]
    rows, _, _ = predicted(capsys, "runs/two", *arguments)
    assert [(row["image"], row["class"]) for row in rows] == [(i, c) for i in arguments for c in ("a", "b")]
    for name in "ab":
        wanted = record_of("two", name)["test"]["scores"]
        mine = [float(row["score"]) for row in rows if row["class"] == name]
        assert mine == pytest.approx([wanted[0], wanted[10]], rel=2e-3)
    (row,), _, _ = predicted(capsys, "runs/two", "--class_name", "B", arguments[0])
    assert row["class"] == "b", "options stand where they like, a name is spelt as it likes"


@pytest.mark.parametrize("output", [None, "x.csv"])
def test_rows_flow_and_what_ctrl_c_ends_is_whole_or_not_there(here, capsys, monkeypatch, output):
    """What was scored is out before the next pictures are looked at; a file is whole or not there."""
    real, seen = scores.rows_of, []

    def interrupted(*arguments):
        for number, part in enumerate(real(*arguments)):
            seen.append(capsys.readouterr().out)
            if number == 2:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(scores, "rows_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predicted(capsys, "runs/held", *TESTED, *(["--output", output] if output else []))
    if output:
        assert seen == ["", "", ""] and not list(here.glob("*x.csv*"))
    else:
        assert [text.count("\n") for text in seen] == [1, 1, 1], "the header, then each picture's row"


def test_pictures_are_scored_as_they_arrive(here, capsys, tmp_path, monkeypatch):
    """A row each, as without --watch, in the file at once; one that is written in two halves waits for the
    second, a pause between them; what stays unreadable is told of once; SIGTERM is one line."""
    shots, table, out, said = (tmp_path / name for name in ("shots", "table", "out", "said"))
    wanted, _, _ = predicted(capsys, "runs/held", *TESTED[:2])
    whole, half = Path(TESTED[1]).read_bytes(), shots / "1.png"
    shots.mkdir()
    shutil.copy(TESTED[0], shots / "0.png")
    (shots / "bad.png").write_bytes(b"no picture")
    monkeypatch.setattr(watch, "PATIENCE", 4.0)
    options = ["--watch", str(shots), "--output", str(table), "--threads", "1"]
    arguments = predict.parse_arguments(["runs/held", *options])
    process = processes.start(lambda: guarded(lambda: sys.exit(predict.main(arguments))), out, said)

    def wait_for(path: Path, words: str, count: int = 1) -> None:
        end = time.monotonic() + 120
        while not path.exists() or path.read_text().count(words) < count:
            assert time.monotonic() < end, said.read_text()
            time.sleep(0.05)

    wait_for(table, "\n", 2)
    with open(half, "wb") as stream:
        stream.write(whole[: len(whole) // 2])
        stream.flush()
        time.sleep(2.5 * watch.SETTLED)  # it has stayed as it is, and was tried
        stream.write(whole[len(whole) // 2 :])
    wait_for(table, "\n", 3)
    wait_for(said, "bad.png")
    assert processes.signalled(process, 0, signal.SIGTERM) == 1, "as of any run with an unreadable picture"
    lines = said.read_text().splitlines()
    assert lines[-1].startswith("2 pictures scored, ") and f", 1 unreadable; rows in {table}" in lines[-1]
    assert sum("skipped: " in line for line in lines) == 1
    found = written(table)
    assert [row["image"] for row in found] == [str(shots / "0.png"), str(half)]
    for row, same in zip(found, wanted):
        assert float(row["score"]) == pytest.approx(float(same["score"]), rel=1e-4)
        assert row["verdict"] == same["verdict"]


MOVED = """(window, document) => [...document.querySelectorAll("section")].map((section) => {
  const [slider, told] = section.querySelectorAll("input, output"), seen = [];
  const cards = [...section.querySelectorAll("figure")];
  const second = JSON.parse(section.dataset.limits).indexOf(Number(cards[1].dataset.score));
  for (const value of [slider.value, slider.max, second]) {
    slider.value = value;
    slider.dispatchEvent(new window.Event("input"));
    seen.push([section.querySelectorAll(".anomalous").length, told.textContent]);
  }
  return [cards.map((card) => card.querySelector("figcaption").textContent.split(" ").at(-1)), seen];
})"""


def test_page_of_verdicts(here, capsys, tmp_path):
    """Pictures by score, of each class; the threshold moves; nothing is fetched."""
    page = tmp_path / "verdicts.html"
    rows, _, status = predicted(capsys, "runs/two", *TESTED[:4], *TESTED[10:14], "--page", page)
    assert status == 0 and in_browser(page, FAULTS) == [[], [], 2 * 8]
    for name, (shown, seen) in zip("ab", in_browser(page, MOVED), strict=True):
        mine = sorted((row for row in rows if row["class"] == name), key=lambda row: -float(row["score"]))
        assert shown == [row["image"] for row in mine]
        anomalous = sum(row["verdict"] == "anomalous" for row in mine)
        assert [count for count, _ in seen] == [anomalous, 0, 1]
        assert seen[0][1].endswith(f" {anomalous} of 8 pictures anomalous, 0 of 3 held-out normal ones")


MISTAKES = [
    "held/classes/a-seed0 images --class_name a", "held/classes/a-seed0 images --seed 0",
    "held/classes/b-seed0 images", "held/classes/a-seed0 nowhere", "held images --class_name zebra",
    "held images --seed 7", "held images --false_alarms 2", "held images --calibrate nowhere",
    f"held {TESTED[0]} --heat_maps {TESTED[1]}", "../images images", "held --watch nowhere",
    "held --watch images --page x.html", "two images --calibrate images/test/a",
    # maps that would take the place of pictures, or be scored as pictures the next time
    "held images/test --heat_maps images/test/maps", f"held {TESTED[0]} --heat_maps images/test/a",
    "held images/test/a/*.png --heat_maps images/test/a",
    "held images --page runs", "held images --output runs",
]  # fmt: skip


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_are_one_line(here, capsys, arguments):
    with pytest.raises((UserError, OSError)) as told:
        predicted(capsys, *f"runs/{arguments}".split())
    assert "\n" not in str(told.value) and capsys.readouterr().out == ""


def test_classes_of_any_name_can_be_named(tmp_path):
    """One with a comma alone; files carry the names as file_name has them."""
    names = ["a,b", "plain", "-odd\tname"]
    for name in names:
        write_text(tmp_path / "classes" / f"{file_name(name)}-seed0.json", "{}")
    for asked in (["a,b"], names[1:]):
        found = find_checkpoints(tmp_path, ",".join(asked), None)
        assert [path.name for path in found] == [f"{file_name(name)}-seed0.json" for name in asked]
    assert len(find_checkpoints(tmp_path, None, None)) == len(find_checkpoints(tmp_path, "all", None)) == 3


def test_a_second_watch_adds_to_the_table(tmp_path):
    """A name that is no text is written all the same."""
    for name in ("M\udcfcller.png", "b.png"):
        with scores.table(tmp_path / "x.csv", at_once=True) as put:
            put(scores.Row(name, "a", 1.0, 0.5, "normal"))
    assert [row["image"] for row in written(tmp_path / "x.csv")] == ["M\\udcfcller.png", "b.png"]


def test_the_script_ends_with_a_line_and_a_status(fitted):
    for arguments in (["nowhere"], [], ["x", "--treads", "1"], ["x", "--watch", "y"]):
        outcome = script("predict.py", "runs/held", *arguments, cwd=fitted)
        assert outcome.returncode == 2
        assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1
    no_picture = "runs/held/classes/a-seed0.json"
    outcome = script("predict.py", "runs/held", TESTED[0], no_picture, "--threads", "1", cwd=fitted)
    assert outcome.returncode == 1 and outcome.stdout.count("\n") == 2
    assert no_picture in outcome.stderr


def test_a_weights_file_is_found_by_its_hash_wherever_it_lies(here, tmp_path, monkeypatch):
    """Where it was, or where --weights_path says; another file is refused."""
    monkeypatch.chdir(tmp_path)
    os.symlink(here / "images", "images")
    other, kept, name = Path("other.safetensors"), Path("kept.safetensors"), "mobilenetv3_small_050"
    for seed, path in enumerate((other, kept)):
        torch.manual_seed(seed)
        save_file(timm.create_model(name).state_dict(), path)
    options = {"extractor": name, "weights_path": str(kept), "img_size": (32, 32), "class_name": "a"}
    train.main(small_run(**RUN | options, modelname="file", holdout=0.3))

    def score(weights=None):
        loaded = PictureDetector.load("runs/file/classes/a-seed0", "cpu", 1, weights_path=weights)
        return loaded.score(TESTED[0])

    wanted, moved = score(), kept.rename(tmp_path / "moved.safetensors")
    for place, told in ((None, "weights_path: no file kept"), (other, "weights file, sha256 .*now")):
        with pytest.raises(UserError, match=told):
            score(place)
    assert score(moved) == wanted


def test_a_backbone_that_gives_something_else_is_refused(here, monkeypatch):
    """Of the same name, weights and shapes: as of another version of timm."""
    wanted = timm.models.ResNet.forward_features
    monkeypatch.setattr(timm, "__version__", "9.9")
    monkeypatch.setattr(timm.models.ResNet, "forward_features", lambda *_: wanted(*_).tanh())
    loaded = PictureDetector.load("runs/held/classes/a-seed0", device="cpu", threads=1)
    with pytest.raises(UserError, match=r"with timm [0-9.]+ the backbone gave other.*timm 9.9 now"):
        loaded.score(TESTED[0])
