"""The student in 8 bits: what the file holds, its accuracy, and when it is refused."""

import re

import numpy as np
import onnx
import pytest
from support import REPO, TOY, unpadded, write_config

from mdistiller.cli import eval as eval_command
from mdistiller.cli import export as export_command
from mdistiller.cli import predict as predict_command
from mdistiller.cli import train as train_command
from mdistiller.export import quantize

WORDS = ("--formats", "onnx", "--int8", "--calibration", "40", "--no-latency")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("int8")
    config = write_config(folder, epochs=2)
    assert train_command.main(["--cfg", str(config)]) == 0
    return folder / "out" / "toy" / "run"


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    """Its files, which may lose any accuracy, and the training images that calibrated."""
    out, seen = tmp_path_factory.mktemp("files"), []
    quantized = quantize._quantize

    def spy(source, path, images):
        seen.extend(images)
        quantized(source, path, iter(seen))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "_quantize", spy)
        assert export_command.main([str(run), "--out", str(out), *WORDS, "--max-drop", "99"]) == 0
    return out, seen


def test_weights_are_int8_per_channel_and_logits_float(files):
    out, seen = files
    assert sum(len(images) for images in seen) == 40
    assert min(images.min() for images in seen) >= 0  # not normalised, as the file takes them
    graph = onnx.load(out / "student_int8.onnx").graph
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    weights = {name: value for name, value in constants.items() if value.dtype == np.int8}
    kernels = [value for value in weights.values() if value.ndim == 4]
    assert len(kernels) == 9  # of resnet8
    scales = [node.input[1] for node in graph.node if node.input and node.input[0] in weights]
    assert {len(kernel) for kernel in kernels} <= {constants[name].size for name in scales}
    (last,) = (node for node in graph.node if "logits" in node.output)
    assert last.op_type == "Gemm"
    small, large = (out / name for name in ("student_int8.onnx", "student.onnx"))
    assert small.stat().st_size < 0.45 * large.stat().st_size


def test_eval_measures_the_accuracies_of_the_card(files, capsys):
    out, _ = files
    text = unpadded((out / "README.md").read_text())
    assert "Top-1 on the test set. int8: weights per channel" in text
    rows = re.findall(r"\| `(student\w*.onnx)` \| (?:float32|int8) \| [\d.]+ \| ([\d.]+)", text)
    assert [name for name, _ in rows] == ["student.onnx", "student_int8.onnx"]
    assert "### student_int8.onnx" in text
    paths = [str(out / name) for name, _ in rows]
    capsys.readouterr()
    assert eval_command.main([*paths, "-d", "toy", "--import", TOY]) == 0
    printed = re.findall(
        r"resnet8, \S+, on toy \(60 images\): top-1 ([\d.]+)", capsys.readouterr().out
    )
    assert printed == [top1 for _, top1 in rows]
    for words, message in (
        (["--features"], "gives logits without features"),
        (["DATASET.CLASSES", "[1,0,2,3,4,5,6,7,8,9]"], "must be the same in the same order"),
        (["-m", "resnet8"], "states its network"),
    ):
        assert eval_command.main([paths[1], "-d", "toy", "--import", TOY, *words]) == 2
        assert message in capsys.readouterr().err


def test_a_file_that_loses_too_much_is_not_left_behind(run, tmp_path, capsys, monkeypatch):
    """The float file, here of a fixed batch and opset, is written all the same."""
    (tmp_path / "student_int8.onnx").write_bytes(b"of other weights")
    monkeypatch.setattr(quantize, "_compare", lambda *_: ((90.0, 88.5), 0.1))
    words = [*WORDS, "--force", "--no-dynamic-batch", "--opset", "21"]
    assert export_command.main([str(run), "--out", str(tmp_path), *words]) == 2
    assert "top-1 on the test set is 88.50 %, 1.50 points below" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "student.onnx"]
    assert "`student.onnx`: one image at a time" in (tmp_path / "README.md").read_text()
    model = onnx.load(tmp_path / "student.onnx")
    assert model.opset_import[0].version == 21
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    image = str(REPO / "docs" / "images" / "demo.png")
    assert predict_command.main([str(tmp_path / "student.onnx"), image, image]) == 0
    assert capsys.readouterr().out.count("demo.png") == 2


def test_what_cannot_be_quantised_is_one_line(run, tmp_path, capsys):
    for words, message in (
        (["--opset", "3"], "cannot export resnet8 for ONNX opset 3"),
        (["--int8", "--formats", "torch"], "add onnx to --formats"),
        (["--int8", "--calibration", "0"], "--calibration must be at least 1"),
        (["--int8", "-m", "resnet8"], "--int8 needs a run folder"),
    ):
        words = ["--out", str(tmp_path), "--formats", "onnx", "--no-latency", *words]
        assert export_command.main([str(run), *words]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
