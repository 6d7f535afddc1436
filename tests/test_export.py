"""One file from pixels to score and p-value: it says what the detector says."""

import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import make_folder
from fabricated import JOINED, small_run
from PIL import Image

import export
import train
from backbone.resizing import resize_like_pillow
from config import UserError
from detector import calibration
from detector.picture_detector import PictureDetector

RUN = {"class_name": "leaf", "img_size": (48, 48)}
OPTIONS = {
    "joined": JOINED | {"places": 4, "centre_pool": 0.1, "feature_path": "features/joined"},
    "latent": {"precision": "bfloat16", "mirror": True},
}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    path = str(make_folder(folder / "images", n_train=20, n_test=4))
    for name, options in OPTIONS.items():
        train.main(small_run(**RUN | options | {"holdout": 0.3}, dataset_path=path, modelname=name))
    yield folder
    patch.undo()


def exported(name: str, output, *options) -> PictureDetector:
    """What export.py does on the command line -> the detector of the run, in float32."""
    path = f"runs/{name}/classes/leaf-seed0"
    arguments = [path, str(output), "--threads", "1", "--false_alarms", "0.2", *map(str, options)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "No complete tensor")
        export.main(export.parse_arguments(arguments))
    return PictureDetector.load(path, "cpu", 1, 0.2, precision="float32")


def assert_equal(folder, detector: PictureDetector, outputs_of, size: tuple[int, int]) -> None:
    """On pictures of a leaf, and of the sky, which is no leaf."""
    files = [folder / f"images/test/{c}/0{i}.png" for c in ("leaf", "sky") for i in range(3)]
    images = np.stack([np.asarray(Image.open(file).resize(size[::-1])) for file in files])
    score, p_value, anomalous = outputs_of(images)
    pixels = resize_like_pillow(torch.from_numpy(images).permute(0, 3, 1, 2), (48, 48)).to(torch.uint8)
    wanted = detector.score(pixels.permute(0, 2, 3, 1).numpy())
    assert np.abs(score - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert p_value == pytest.approx(calibration.p_values(detector.held_out.astype(np.float32), score))
    assert np.array_equal(anomalous, detector.verdict(wanted) == "anomalous") and anomalous[3:].any()


@pytest.mark.slow
def test_an_onnx_file_is_the_detector(fitted, tmp_path, monkeypatch, capsys):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    threads, kept = [], runtime.InferenceSession

    def session(model, options=None, **others):
        threads.append(options and options.intra_op_num_threads)
        return kept(model, options, **others)

    monkeypatch.setattr(runtime, "InferenceSession", session)
    path = tmp_path / "x.onnx"
    detector = exported("joined", path, "--size", "32x40")
    assert list(tmp_path.iterdir()) == [path] and threads == [1], "as many as --threads says"
    assert "images (n, 32, 40, 3) uint8" in capsys.readouterr().out and detector.fitted.uses_places
    made = kept(path.read_bytes(), providers=["CPUExecutionProvider"])
    assert "INFERENCE_PRECISION_HINT f32" in made.get_modelmeta().custom_metadata_map["precision"]
    assert_equal(fitted, detector, lambda images: made.run(export.OUTPUTS, {"images": images}), (32, 40))


@pytest.mark.slow
def test_a_torch_file_is_the_detector_whose_p_values_rest_on_its_own_arithmetic(
    fitted, tmp_path, monkeypatch, capsys
):
    """A fit in bfloat16 is warned of; with --calibrate the held-out scores are the exported file's."""
    path, good = tmp_path / "x.pt2", fitted / "images/test/leaf"
    with monkeypatch.context() as patch:  # a file takes seconds
        patch.setattr(export, "write", lambda _, output, size: float(output.write_bytes(b"")))
        exported("latent", path)
    assert "held-out scores in bfloat16, the file computes in float32" in capsys.readouterr().err
    detector = exported("latent", path, "--calibrate", good)
    assert "held-out scores" not in capsys.readouterr().err
    detector.calibrate(sorted(good.iterdir()))
    module = torch.export.load(path).module()
    graphs = [each.graph for each in module.modules() if isinstance(each, torch.fx.GraphModule)]
    operations = " ".join(str(node.target) for graph in graphs for node in graph.nodes)
    assert "aten.linear" in operations and "mkldnn" not in operations, "nothing of this machine's alone"
    assert module.held_out.numpy() == pytest.approx(detector.held_out, rel=1e-6)

    def outputs_of(images):
        return [out.numpy() for out in module(torch.from_numpy(images))]

    assert_equal(fitted, detector, outputs_of, (48, 48))


def test_file_that_says_something_else_is_refused():
    """Of each picture alone, or of all together."""
    wanted, images = np.array([1.0, -8.0, 2.0]), np.zeros((3, 2, 2, 3))
    for together, alone in ((1.001, 1.0), (1.0, 1.001)):

        def run(part, together=together, alone=alone):
            return [wanted * together if len(part) > 1 else wanted[1:2] * alone]

        with pytest.raises(UserError, match="differ from the detector's by .* of the largest"):
            export.compare(wanted, run, images)


@pytest.mark.slow
def test_mistakes(fitted, tmp_path, monkeypatch):
    for output, options, told in (
        ("x.tflite", (), r"\.onnx or \.pt2"),
        ("x.pt2", ("--size", "big"), "img_size"),
        ("x.pt2", ("--size", "auto"), "size: "),
        ("x.pt2", ("--size", "0x4"), "size: "),
        ("x.pt2", ("--false_alarms", "2"), "false_alarms: "),
        ("x.pt2", ("--calibrate", "no"), "the folder no cannot be read"),
    ):
        with pytest.raises(UserError, match=told):
            exported("latent", tmp_path / output, *options)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        export.write_onnx(None, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
