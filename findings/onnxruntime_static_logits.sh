#!/usr/bin/env bash
# onnxruntime 1.32.0, onnx 1.23.2, numpy 2.2.6, Python 3.11.
#
# `quantize_static` rounds a model's outputs as well as its layers' inputs: a classifier's logits come out on one
# grid of at most 256 values over the range that calibration saw. With 1,000 classes several of them then share the
# highest value, argmax takes the first, and whatever is above the range is clipped. Top-1 accuracy falls, and
# confidences lose their meaning, for a reason that has nothing to do with the weights. Name the node that makes the
# output in `nodes_to_exclude`, at the price of its weights in float, or take the last QuantizeLinear and
# DequantizeLinear out of the graph. Output seen (512 samples, 1,000 classes):
#   float            510188 values, 0.0 % of the samples have a tie at the top
#   int8                242 values, 7.2 %
#   int8, excluded   510188 values, 0.0 %
#
# Runs outside CI; needs a package index. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.2.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
cat > logits.py <<'PY'
import logging

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static

logging.disable()
rng = np.random.default_rng(0)
weight = numpy_helper.from_array(rng.normal(size=(64, 1000)).astype(np.float32), "weight")
node = helper.make_node("MatMul", ["features", "weight"], ["logits"], name="classifier")
given, made = (
    helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
    for name, size in (("features", 64), ("logits", 1000))
)
graph = helper.make_graph([node], "network", [given], [made], [weight])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
onnx.save(model, "float.onnx")
features = rng.normal(size=(512, 64)).astype(np.float32)


class Reader(CalibrationDataReader):
    def __init__(self):
        self.batches = iter([{"features": features}])

    def get_next(self):
        return next(self.batches, None)


def measure(title, path):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = session.run(None, {"features": features})[0]
    ties = 100 * ((logits == logits.max(axis=1, keepdims=True)).sum(axis=1) > 1).mean()
    values = len(np.unique(logits))
    print(f"{title:15} {values:7} values, {ties:.1f} % of the samples have a tie at the top")
    return values, ties


assert measure("float", "float.onnx")[1] == 0
quantize_static("float.onnx", "int8.onnx", Reader(), per_channel=True)
values, ties = measure("int8", "int8.onnx")
assert values <= 256 and ties > 1, "the logits are no longer rounded"
excluded = ["classifier"]
quantize_static("float.onnx", "kept.onnx", Reader(), per_channel=True, nodes_to_exclude=excluded)
assert measure("int8, excluded", "kept.onnx")[1] == 0
PY
"$work/venv/bin/python" logits.py
