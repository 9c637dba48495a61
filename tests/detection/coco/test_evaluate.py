"""Average precision: what pycocotools says when it is asked directly, by any backend."""

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detections import noisy, nothing
from pycocotools import mask as masks_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from support import run_script
from synth import make_coco

from mdistiller.detection.batches import ValBatches
from mdistiller.detection.coco.dataset import CocoDetectionSet
from mdistiller.detection.coco.evaluate import CocoEvaluator, evaluate_detector
from mdistiller.detection.coco.packages import BACKENDS, STATISTICS, coco_api
from mdistiller.registry import UserError

NAMES = {3: "disc", 7: "box", 42: "triangle"}


@pytest.fixture(scope="module")
def synth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    return make_coco(folder, 24, split="val", objects=5, empty=3, crowds=8)


@pytest.fixture(scope="module")
def data(synth):
    return CocoDetectionSet(synth.images, synth.annotations, masks=True)


def collected(data, backend="pycocotools", find=noisy, masks=True):
    evaluator = CocoEvaluator(data, masks, backend)
    for index in range(len(data)):
        number = data.image_id(index)
        evaluator.add([{"image_id": number}], [find(data, number)])
    return evaluator


def directly(synth, data, find, kind):
    """The twelve numbers and AP by category id, by pycocotools and the result format alone."""
    records = []
    for index in range(len(data)):
        number = data.image_id(index)
        found = find(data, number)
        for k, label in enumerate(found["labels"].tolist()):
            record = {
                "image_id": number,
                "category_id": data.category_ids[label],
                "score": float(found["scores"][k]),
            }
            if kind == "bbox":
                x1, y1, x2, y2 = map(float, found["boxes"][k])
                record["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            else:
                pixels = np.asfortranarray(found["masks"][k].numpy())
                record["segmentation"] = masks_api.encode(pixels)
            records.append(record)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(synth.annotations))
        found = truth.loadRes(records)
        run = COCOeval(truth, found, kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
        ap = {}
        for category in truth.getCatIds():
            own = COCOeval(truth, found, kind)
            own.params.catIds = [category]
            own.evaluate()
            own.accumulate()
            own.summarize()
            ap[category] = own.stats[0]
    return dict(zip(STATISTICS, run.stats, strict=True)), ap


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_are_those_of_pycocotools_called_directly(synth, data, backend):
    """On crowds, images without objects and category ids with gaps; boxes and masks."""
    evaluator = collected(data, backend)
    numbers = evaluator.summarize()
    for kind in ("bbox", "segm"):
        stats, ap = directly(synth, data, noisy, kind)
        assert 0.05 < stats["AP"] < 0.9
        for name, value in stats.items():
            if value < 0:
                assert f"{kind}/{name}" not in numbers  # no large objects here
            else:
                assert numbers[f"{kind}/{name}"] == pytest.approx(100 * value, rel=1e-12), name
        for category, value in ap.items():
            key = f"{kind}/AP/{NAMES[category]}"
            assert numbers[key] == pytest.approx(100 * value, rel=1e-12)
    assert "bbox/APl" not in numbers
    assert len(numbers) == 2 * (10 + 3)


def test_masks_are_sorted_by_their_own_area(tmp_path):
    """Into small and medium: by its box, a thin mask would be medium."""
    synth = make_coco(tmp_path, 1, split="val", empty=0, crowds=0)
    synth.contents["annotations"] = synth.contents["annotations"][:1]
    x, y, w, h = 10.0, 10.0, 60.0, 60.0
    line = [x, y, x + w, y + h - 2, x + w, y + h]  # 60 pixels, in a box of 3600
    synth.contents["annotations"][0] |= {
        "bbox": [x, y, w, h],
        "segmentation": [line],
        "area": 60.0,
    }
    data = CocoDetectionSet(synth.save().images, synth.annotations, masks=True)
    evaluator = CocoEvaluator(data, masks=True)
    mask = COCO(str(synth.annotations)).annToMask(synth.contents["annotations"][0])
    found = {
        "boxes": torch.tensor([[x, y, x + w, y + h]]),
        "labels": torch.from_numpy(data.labels),
        "scores": torch.ones(1),
        "masks": torch.from_numpy(mask)[None],
    }
    evaluator.add([{"image_id": data.image_id(0)}], [found])
    numbers = evaluator.summarize()
    assert numbers["segm/APs"] == pytest.approx(100)
    assert "segm/APm" not in numbers


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_found_is_zero(data, backend):
    numbers = collected(data, backend, lambda data, number: nothing()).summarize()
    assert {name for name, value in numbers.items() if value != 0} == set()
    assert {"bbox/AP", "segm/AP", "bbox/AP/disc"} <= set(numbers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_truth_itself_is_all_right(data, backend):
    from mdistiller.detection.coco.dataset import View

    def truth(data, number):
        index = [data.image_id(i) for i in range(len(data))].index(number)
        height, width = data.annotations.sizes[index].tolist()
        _, target = data.item(View(index, min(height, width), max(height, width)))
        return {**target, "scores": torch.ones(len(target["labels"]))}

    numbers = collected(data, backend, truth).summarize()
    assert [numbers[f"{kind}/AP"] for kind in ("bbox", "segm")] == pytest.approx([100, 100])


def test_detections_within_crowds_are_ignored(synth, data):
    """Neither right nor wrong: they would cost precision were they wrong."""
    crowds = [a for a in synth.contents["annotations"] if a["iscrowd"]]

    def beside(data, number, place):
        found = noisy(data, number)
        regions = [a["bbox"] for a in crowds if a["image_id"] == number]
        for x, y, w, h in regions if place else ():
            x, y = (x + w / 2, y + h / 2) if place == "within" else (x + w + 9, y - 12)
            more = {
                "boxes": torch.tensor([[x, y, x + 5, y + 5]]),
                "labels": torch.tensor([1]),  # a disc, as the crowds are
                "scores": torch.tensor([0.8]),
            }
            found = {key: torch.cat([found[key], more[key]]) for key in more}
        return found

    ap = {
        place: collected(data, find=lambda d, n, p=place: beside(d, n, p), masks=False).summarize()
        for place in ("", "within", "outside")
    }
    assert ap["within"]["bbox/AP/disc"] == ap[""]["bbox/AP/disc"]
    assert ap["outside"]["bbox/AP/disc"] < ap[""]["bbox/AP/disc"]
    assert ap["outside"]["bbox/AP/box"] == ap[""]["bbox/AP/box"]


def test_labels_without_a_category_are_left_out(synth):
    """Of the 91 classes of a detector for COCO most may be foreign to the data."""
    data = CocoDetectionSet(synth.images, synth.annotations, label_space="coco91")
    evaluator = CocoEvaluator(data)
    found = {key: value[:3] for key, value in noisy(data, data.image_id(0)).items()}
    found["labels"] = torch.tensor([12, 3, 90])
    evaluator.add([{"image_id": data.image_id(0)}], [found])
    (records,) = evaluator.results.values()
    assert [record["category_id"] for record in records] == [3]
    same = CocoDetectionSet(synth.images, synth.annotations)
    other = collected(same, masks=False).summarize()
    assert collected(data, masks=False).summarize().keys() == other.keys()


def test_what_was_given_is_not_changed(data):
    found = noisy(data, data.image_id(0))
    found["boxes"] = found["boxes"].double()
    before = found["boxes"].clone()
    CocoEvaluator(data).add([{"image_id": data.image_id(0)}], [found])
    assert torch.equal(found["boxes"], before)


def test_curves_lie_behind_the_numbers(data):
    evaluator = collected(data)
    numbers = evaluator.summarize()
    for kind, found in evaluator.curves.items():
        assert found["ious"] == pytest.approx(np.arange(0.5, 1, 0.05))
        assert 100 * np.mean(found["ap"]) == pytest.approx(numbers[f"{kind}/AP"])
        assert 100 * found["ap"][5] == pytest.approx(numbers[f"{kind}/AP75"])
        assert 100 * np.mean(found["precision50"]) == pytest.approx(numbers[f"{kind}/AP50"])
        assert 100 * np.mean(found["precision75"]) == pytest.approx(numbers[f"{kind}/AP75"])
        assert len(found["recalls"]) == len(found["precision50"]) == 101
        assert list(found["classes"]) == list(NAMES.values())
        one = found["classes"]["box"]
        assert 100 * one["AP"] == pytest.approx(numbers[f"{kind}/AP/box"])
        assert np.mean(one["precision50"]) == pytest.approx(one["AP50"])
    json.dumps(evaluator.curves)


def test_a_class_without_objects_has_no_number(tmp_path):
    rare = (*NAMES.items(), (50, "unicorn"))
    synth = make_coco(tmp_path, 4, split="val", categories=rare)
    data = CocoDetectionSet(synth.images, synth.annotations)
    evaluator = collected(data, masks=False)
    numbers = evaluator.summarize()
    assert "bbox/AP/unicorn" not in numbers
    assert "bbox/AP/disc" in numbers
    assert not any(np.isnan(value) for value in numbers.values())


def test_files_without_area_and_iscrowd_are_measured(tmp_path):
    """By the area of masks, or of boxes."""
    synth = make_coco(tmp_path, 6, split="val", crowds=0)
    data = CocoDetectionSet(synth.images, synth.annotations, masks=True)
    whole = collected(data).summarize()
    for record in synth.contents["annotations"]:
        del record["area"], record["iscrowd"]
    bare = collected(CocoDetectionSet(synth.save().images, synth.annotations, masks=True))
    assert bare.summarize() == whole
    boxes = CocoDetectionSet(synth.images, synth.annotations)
    assert collected(boxes, masks=False).summarize()["bbox/AP"] == whole["bbox/AP"]


def test_fewer_images_are_measured_and_said(tmp_path, capsys):
    """The objects of images that were not looked at are not missed."""
    synth = make_coco(tmp_path, 5, split="val")
    data = CocoDetectionSet(synth.images, synth.annotations)
    number = data.image_id(0)
    numbers = []
    for _ in range(2):
        evaluator = CocoEvaluator(data)
        evaluator.add([{"image_id": number}], [noisy(data, number)])
        numbers.append(evaluator.summarize())
        said = capsys.readouterr().out
        assert ("measured on 1 of the 5 images" in said) == (len(data) == 5)
        contents = synth.contents
        contents["images"] = contents["images"][:1]
        kept = [a for a in contents["annotations"] if a["image_id"] == number]
        contents["annotations"] = kept
        data = CocoDetectionSet(synth.save().images, synth.annotations)
    assert numbers[0] == numbers[1]
    assert numbers[0]["bbox/AP"] > 0


def test_nothing_to_find_is_refused(tmp_path):
    synth = make_coco(tmp_path, 2, split="val", empty=2, crowds=0)
    data = CocoDetectionSet(synth.images, synth.annotations)
    with pytest.raises(UserError, match="there is no average precision"):
        CocoEvaluator(data)


@pytest.mark.parametrize(
    ("package", "backend", "words"),
    [
        ("pycocotools", "pycocotools", r"pip install mdistiller\[detection\]"),
        ("faster_coco_eval", "faster", r"pip install mdistiller\[faster-coco-eval\]"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, package, backend, words):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=words) as error:
        coco_api(backend)
    assert "\n" not in str(error.value)


def test_an_unknown_backend_is_refused():
    with pytest.raises(UserError, match=r"EVALUATOR 'fast' is unknown \(known: pycocotools, fa"):
        coco_api("fast")


class Head(torch.nn.Module):
    def __init__(self, masks):
        super().__init__()
        self.has_mask = lambda: masks


class Seer(torch.nn.Module):
    """A detector that knows the noisy truth of each image by its place in the order."""

    def __init__(self, data, masks):
        super().__init__()
        self.data, self.seen, self.sizes = data, 0, []
        self.roi_heads = Head(masks)

    def detect(self, images, original_sizes):
        assert not self.training
        self.sizes += original_sizes
        found = [noisy(self.data, self.data.image_id(self.seen + k)) for k in range(len(images))]
        self.seen += len(images)
        return found


@pytest.mark.parametrize("masks", [True, False])
def test_a_detector_is_measured_on_its_loader(data, masks):
    seer = Seer(data, masks).train()
    loader = ValBatches(data, 2, min_size=48)
    numbers = evaluate_detector(seer, loader, torch.device("cpu"))
    whole = collected(data).summarize()
    assert numbers == {k: v for k, v in whole.items() if masks or k.startswith("bbox")}
    assert seer.sizes == [tuple(size) for size in data.annotations.sizes.tolist()]


def test_results_are_saved_as_coco_reads_them(data, tmp_path):
    evaluator = collected(data)
    evaluator.save(tmp_path / "found.json", evaluator.gather())
    truth = COCO(str(data.annotations.path))
    found = truth.loadRes(str(tmp_path / "found.json"))
    assert len(found.anns) == sum(map(len, evaluator.results.values()))


@pytest.fixture(scope="module")
def processes(synth):
    """Three gloo processes; the second number files hold those of each process."""
    folder = synth.annotations.parent
    done = run_script(Path(__file__).with_name("evaluate_processes.py"), folder, 3)
    assert done.returncode == 0, done.stderr
    return folder


def test_processes_measure_what_one_does(processes, data):
    one = json.loads((processes / "numbers1_0.json").read_text())
    assert one == collected(data).summarize()
    for rank in range(3):
        assert json.loads((processes / f"numbers3_{rank}.json").read_text()) == one


def test_an_error_on_the_first_process_reaches_all(processes):
    for rank in range(3):
        assert "there is no annotation file" in (processes / f"error_{rank}").read_text()


USELESS = ({"bbox": [5, 5, 0, 7]}, {"bbox": None}, {"iscrowd": 1, "bbox": []})


def test_objects_of_no_use_are_no_truth(tmp_path):
    """Where they are left out, not refused; crowds as well."""
    synth = make_coco(tmp_path, 6, split="val", crowds=2)
    data = CocoDetectionSet(synth.images, synth.annotations, masks=True)
    whole = collected(data).summarize()
    template = synth.contents["annotations"][0]
    for number, changes in enumerate(USELESS):
        synth.contents["annotations"].append({**template, **changes, "id": 900 + number})
    mended = CocoDetectionSet(synth.save().images, synth.annotations, masks=True, mend=True)
    assert collected(mended).summarize() == whole


@pytest.mark.parametrize("area", [True, False])
def test_objects_without_masks_are_the_truth_about_boxes_alone(tmp_path, area):
    synth = make_coco(tmp_path, 6, split="val", crowds=1)
    data = CocoDetectionSet(synth.images, synth.annotations, masks=True)
    numbers = [data.image_id(index) for index in range(len(data))]
    detections = [noisy(data, number) for number in numbers]

    def measured(masks=True):
        mended = CocoDetectionSet(synth.images, synth.annotations, masks=masks, mend=True)
        evaluator = CocoEvaluator(mended, masks)
        evaluator.add([{"image_id": number} for number in numbers], detections)
        return evaluator.summarize()

    records = synth.contents["annotations"]
    for record in records:
        if not area:
            del record["area"]
    synth.save()
    whole = measured()
    for record in records:
        if record["category_id"] == 7:
            record["segmentation"] = []
    synth.save()
    without = measured()
    assert without["bbox/AP"] == measured(masks=False)["bbox/AP"] == whole["bbox/AP"] > 0
    assert without["bbox/AP/box"] == whole["bbox/AP/box"]
    assert "segm/AP/box" in whole
    assert "segm/AP/box" not in without
    assert without["segm/AP/disc"] == whole["segm/AP/disc"]


def test_parts_that_are_no_polygon_are_no_truth_about_masks(tmp_path):
    synth = make_coco(tmp_path, 4, split="val", crowds=0)
    whole = CocoDetectionSet(synth.images, synth.annotations, masks=True)
    synth.contents["annotations"][0]["segmentation"].insert(0, [1.0, 2.0, 9.0, 2.0])
    mended = CocoDetectionSet(synth.save().images, synth.annotations, masks=True, mend=True)
    assert collected(mended).summarize() == collected(whole).summarize()
