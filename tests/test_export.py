"""One file from pixels to score and p-value: it says what the detector says."""

import re
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import make_folder
from PIL import Image

import export
import train
from backbone.resizing import resize_like_pillow
from config import Config, UserError
from detector import calibration, exporting
from detector.picture_detector import PictureDetector

pytestmark = pytest.mark.slow
RUN = {
    "dataset": "folder", "class_name": "leaf", "extractor": "resnet10t", "weights_path": "random",
    "img_size": (64, 64), "precision": "float32", "workers": 0, "threads": 1,
    "fc_internal": 16, "n_coupling_blocks": 2, "device": "cpu", "holdout": 0.3,
}  # fmt: skip
OPTIONS = {
    "joined": {  # as the preset accurate puts the method together, on the backbone that works offline
        "extractor": "efficientnet_lite0",
        "weights_path": None,
        "bands": True,
        "places": 6,
        "score": "joined",
        "centre_pool": 0.1,
        "fusion": "bands",
        "least_steps": 20,
        "identity_start": True,
        "mirror": True,
        "feature_path": "features/joined",
    },
    "latent_knn": {"score": "latent_knn"},
    "unfused": {"fusion": "none", "score": "likelihood"},
}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    path = str(make_folder(folder / "images", n_train=20, n_test=4, size=48))
    for name, options in OPTIONS.items():
        train.main(Config(**RUN | options, dataset_path=path, modelname=name))
    yield folder
    patch.undo()


def loaded(name: str):
    return exporting.load(f"runs/{name}/classes/leaf-seed0", false_alarms=0.2)


@pytest.mark.parametrize(
    "name, ending, size",
    [("joined", "onnx", (48, 48)), ("latent_knn", "pt2", None), ("unfused", "pt2", None)],
)
def test_exported_file_is_the_detector(fitted, tmp_path, monkeypatch, name, ending, size):
    if ending == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        threads, kept = [], runtime.InferenceSession

        def session(model, options=None, **others):
            threads.append(options and options.intra_op_num_threads)
            return kept(model, options, **others)

        monkeypatch.setattr(runtime, "InferenceSession", session)
    detector, path = loaded(name), tmp_path / f"x.{ending}"
    assert detector.fitted.uses_places == (name == "joined")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "No complete tensor")
        assert exporting.export(detector, path, size) <= 1e-4 and list(tmp_path.iterdir()) == [path]
    if ending == "onnx":
        assert threads == [torch.get_num_threads()], "as many as --threads says"
    files = [fitted / f"images/test/{c}/0{i}.png" for c in ("leaf", "sky") for i in range(3)]
    pictures = [Image.open(file).resize(size or (64, 64)) for file in files]
    images = np.stack([np.asarray(picture) for picture in pictures])
    if ending == "onnx":
        session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        score, p_value, anomalous = session.run(["score", "p_value", "anomalous"], {"images": images})
        assert "INFERENCE_PRECISION_HINT f32" in session.get_modelmeta().custom_metadata_map["precision"]
    else:
        module = torch.export.load(path).module()
        score, p_value, anomalous = (out.numpy() for out in module(torch.from_numpy(images)))
    pixels = resize_like_pillow(torch.from_numpy(images).permute(0, 3, 1, 2), (64, 64)).to(torch.uint8)
    wanted = detector.score(pixels.permute(0, 2, 3, 1).numpy())
    assert np.abs(score - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert p_value == pytest.approx(calibration.p_values(detector.held_out.astype(np.float32), score))
    assert np.array_equal(anomalous, detector.verdict(wanted) == "anomalous")
    assert anomalous[3:].any(), "the sky is no leaf"


def test_p_values_rest_on_the_files_own_arithmetic(fitted, tmp_path, capsys):
    """A fit in bfloat16 is warned of; with --calibrate the held-out scores are the exported file's."""
    patch = {"precision": "bfloat16", "modelname": "bf", "feature_path": "features/bf"}
    train.main(Config(**RUN | OPTIONS["latent_knn"] | patch, dataset_path=str(fitted / "images")))
    arguments = ["runs/bf/classes/leaf-seed0", str(tmp_path / "x.pt2"), "--threads", "1"]
    told = exporting.warning(exporting.load("runs/bf/classes/leaf-seed0", 0.2), calibrated=False)
    assert "held-out scores in bfloat16, the file computes in float32" in told
    good = fitted / "images/test/leaf"
    export.main(export.parse_arguments([*arguments, "--calibrate", str(good)]))
    assert "warning" not in capsys.readouterr().err
    held_out = torch.export.load(tmp_path / "x.pt2").module().held_out.numpy()
    scores = [
        detector.score(sorted(good.iterdir()))
        for detector in (
            exporting.load("runs/bf/classes/leaf-seed0", 0.2),
            PictureDetector.load("runs/bf/classes/leaf-seed0", "cpu", 1),
        )
    ]
    assert held_out == pytest.approx(scores[0], rel=1e-6) and held_out != pytest.approx(scores[1], rel=1e-3)
    with pytest.raises(UserError, match="the folder no cannot be read"):
        export.main(export.parse_arguments([*arguments, "--calibrate", "no"]))


def test_file_that_says_something_else_is_not_kept(fitted, tmp_path, monkeypatch):
    def wrong(program, path):
        path.write_bytes(b"x")
        return lambda images: [out.numpy() * 1.001 for out in program.module()(torch.from_numpy(images))]

    monkeypatch.setitem(exporting.WRITERS, ".pt2", wrong)
    largest = max(exporting.detector_scores(loaded("latent_knn"), exporting.examples(5, (64, 64))))
    told = rf"differ from the detector's by 1.0e-03 .* at a score of {re.escape(f'{largest:.3g}')} "
    with pytest.raises(UserError, match=told):
        exporting.export(loaded("latent_knn"), tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


def test_mistakes(fitted, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"\.onnx or \.pt2"):
        exporting.export(loaded("latent_knn"), tmp_path / "x.tflite")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        exporting.write_onnx(None, tmp_path / "x.onnx")
    with pytest.raises(UserError, match="img_size"):
        export.main(export.parse_arguments(["runs/latent_knn/classes/leaf-seed0", "x.pt2", "--size", "big"]))
    for option, value in (
        ("--size", "auto"),
        ("--size", "0x4"),
        ("--false_alarms", "2"),
        ("--threads", "-1"),
    ):
        with pytest.raises(UserError, match=f"{option[2:]}: "):
            arguments = ["runs/latent_knn/classes/leaf-seed0", "x.pt2", option, value]
            export.main(export.parse_arguments(arguments))
