"""COCO-format sets: label spaces, checks of annotation files, boxes and masks of views."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from synth import make_coco

from mdistiller.detection.coco.annotations import Packed
from mdistiller.detection.coco.dataset import (
    CocoDetectionSet,
    View,
    resized_shape,
)
from mdistiller.detection.coco.labels import class_advice
from mdistiller.detection.data import check_same_classes
from mdistiller.registry import UserError


def coco_set(synth, **options):
    return CocoDetectionSet(synth.images, synth.annotations, **options)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A set that no test changes."""
    return make_coco(tmp_path_factory.mktemp("shared"), 7, empty=2, crowds=2)


@pytest.fixture
def synth(tmp_path):
    """A set to be damaged."""
    return make_coco(tmp_path, 3, empty=0, crowds=1)


def test_labels_are_contiguous_or_the_ids(shared):
    data = coco_set(shared)
    assert (data.num_classes, data.category_ids) == (4, {1: 3, 2: 7, 3: 42})
    assert data.class_names == ["background", "disc", "box", "triangle"]
    raw = coco_set(shared, label_space="coco91")
    assert (raw.num_classes, raw.category_ids) == (91, {3: 3, 7: 7, 42: 42})
    assert [raw.class_names[k] for k in (0, 1, 3, 42)] == ["background", "", "disc", "triangle"]
    ids = {annotation["category_id"] for annotation in shared.contents["annotations"]}
    assert set(raw.labels.tolist()) == ids
    assert [data.category_ids[k] for k in data.labels.tolist()] == raw.labels.tolist()


def test_targets_are_what_the_file_says(shared):
    """Images in the order of their ids, crowds left out, boxes as corners."""
    data, coco = coco_set(shared, masks=True), COCO(str(shared.annotations))
    assert [data.image_id(i) for i in range(len(data))] == sorted(coco.getImgIds())
    crowds = 0
    for index in range(len(data)):
        number = data.image_id(index)
        record = coco.loadImgs(number)[0]
        size = (record["height"], record["width"])
        image, target = data.item(View(index, min(size), max(size)))
        with Image.open(shared.images / record["file_name"]) as file:
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(file))
        truth = coco.loadAnns(coco.getAnnIds(number))
        crowds += sum(a["iscrowd"] for a in truth)
        truth = [a for a in truth if not a["iscrowd"]]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in truth)]
        assert target["boxes"].tolist() == boxes
        assert target["boxes"].shape == (len(truth), 4)
        assert (target["boxes"].dtype, target["labels"].dtype) == (torch.float32, torch.int64)
        labels = [data.category_ids[k] for k in target["labels"].tolist()]
        assert labels == [a["category_id"] for a in truth]
        masks = [coco.annToMask(a) for a in truth]
        assert target["masks"].shape == (len(truth), *size)
        assert np.array_equal(target["masks"].numpy(), np.reshape(masks, (-1, *size)))
        assert (target["image_id"], target["size"]) == (number, size)
    assert crowds == 2
    assert data.annotations.counts["crowd regions"] == 2


def test_the_order_of_the_file_does_not_matter(synth):
    """Labels and positions follow the ids."""
    before = coco_set(synth)
    for records in synth.contents.values():
        records.reverse()
    after = coco_set(synth.save())
    assert after.category_ids == before.category_ids
    for index in range(len(before)):
        (image, target), (other, again) = (d.item(View(index, 96, 200)) for d in (before, after))
        assert torch.equal(image, other)
        assert all(torch.equal(target[k], again[k]) for k in ("boxes", "labels"))


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_and_masks_go_with_the_pixels(shared, flip):
    """In a resized, flipped image a box holds the object's colour, and its mask fills the box."""
    data = coco_set(shared, masks=True)
    checked = 0
    for index in range(len(data)):
        image, target = data.item(View(index, 150, 400, flip))
        assert min(image.shape[1:]) == 150
        covered = target["masks"].sum(0)
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            x1, y1, x2, y2 = box.round().int().tolist()
            assert mask.sum() == mask[max(y1 - 1, 0) : y2 + 1, max(x1 - 1, 0) : x2 + 1].sum()
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.allclose(drawn, box, atol=2.1)
            alone = (mask > 0) & (covered == 1)
            spread = image[:, alone].float().amax(0) - image[:, alone].float().amin(0)
            checked += alone.sum()
            assert spread.median() > 80  # coloured; the noise behind has less
    assert checked > 1000


def test_run_lengths_are_resized_to_the_nearest_pixel(synth):
    """Of an object other than a crowd region; compressed by pycocotools or not."""
    from pycocotools import mask as api

    for record in synth.contents["annotations"]:
        record["iscrowd"] = 0
    crowd = next(a for a in synth.contents["annotations"] if isinstance(a["segmentation"], dict))
    data, (x, y, w, h) = coco_set(synth.save(), masks=True), crowd["bbox"]
    where = [data.image_id(i) for i in range(len(data))].index(crowd["image_id"])
    _, target = data.item(View(where, 192, 400))
    mask = target["masks"][-1]
    assert mask.sum() == 4 * w * h
    assert mask[2 * y : 2 * (y + h), 2 * x : 2 * (x + w)].all()
    rle = crowd["segmentation"]
    packed = api.frPyObjects(rle, *rle["size"])
    crowd["segmentation"] = {"size": rle["size"], "counts": packed["counts"].decode()}
    _, again = coco_set(synth.save(), masks=True).item(View(where, 192, 400))
    assert torch.equal(again["masks"], target["masks"])


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((480, 640), (800, 1067)),  # 1066.67
        ((640, 480), (1067, 800)),
        ((400, 1000), (533, 1333)),  # the longer side decides; 533.2
        ((10, 4000), (3, 1333)),
    ],
)
def test_sizes_are_rounded_as_in_detectron2(size, shape):
    assert resized_shape(*size, 800, 1333) == shape


def test_exif_orientation_turns_the_image_or_does_not(synth):
    """An upright camera: the file is landscape, its annotation portrait."""
    record = synth.contents["images"][0]
    upright = Image.open(synth.images / record["file_name"]).rotate(90, expand=True)
    stored = upright.rotate(90, expand=True)  # orientation 6: to be turned by 270
    exif = Image.Exif()
    exif[0x0112] = 6
    record["file_name"], (record["width"], record["height"]) = "turned.jpg", upright.size
    stored.save(synth.images / "turned.jpg", exif=exif, quality=95)
    synth.contents["annotations"] = []
    data = coco_set(synth.save())
    with Image.open(synth.images / "turned.jpg") as file:
        expected = np.array(ImageOps.exif_transpose(file))
    assert np.array_equal(data.image(0).permute(1, 2, 0).numpy(), expected)
    with pytest.raises(UserError, match=r"set DETECTION\.DATA\.EXIF True") as error:
        coco_set(synth, exif=False).image(0)
    assert "128x96 pixels" in one_line(error)
    record["width"], record["height"] = stored.size
    assert coco_set(synth.save(), exif=False).image(0).shape == (3, 96, 128)
    with pytest.raises(UserError, match=r"set DETECTION\.DATA\.EXIF False"):
        coco_set(synth).image(0)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA"])
def test_every_image_becomes_rgb(synth, mode):
    name = "odd.png" if mode in ("P", "RGBA") else "odd.jpg"
    with Image.open(synth.images / synth.contents["images"][0]["file_name"]) as file:
        file.convert(mode).save(synth.images / name)
    synth.contents["images"][0]["file_name"] = name
    image = coco_set(synth.save()).image(0)
    assert (image.shape, image.dtype) == ((3, 96, 128), torch.uint8)
    with Image.open(synth.images / name) as file:
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(file.convert("RGB")))


def first(contents, kind, **changes):
    """Change the first record of a list; None removes a key."""
    for key, value in changes.items():
        contents[kind][0][key] = value
        if value is None:
            del contents[kind][0][key]


BROKEN = {
    "no list": (lambda c: c.pop("annotations"), "has no list 'annotations'"),
    "no images": (lambda c: c.update(images=[], annotations=[]), "has no images"),
    "image id twice": (lambda c: c["images"].append(c["images"][0]), "image id 101 is given twice"),
    "annotation id twice": (
        lambda c: c["annotations"].append(c["annotations"][0]),
        "annotation id 1 is given twice",
    ),
    "category id twice": (
        lambda c: c["categories"].append(c["categories"][0]),
        "category id 3 is given twice",
    ),
    "category name twice": (
        lambda c: first(c, "categories", name="box"),
        "categories 3 and 7 have the same name 'box'",
    ),
    "no id": (lambda c: first(c, "annotations", id=None), "annotation number 1 of the list"),
    "id of half": (lambda c: first(c, "images", id=10.5), "no whole number as id (10.5)"),
    "unknown image": (lambda c: first(c, "annotations", image_id=5), "has image_id 5, which is"),
    "unknown category": (
        lambda c: first(c, "annotations", category_id=4),
        "annotation 1 has category_id 4, which is not among the file's 3 category ids",
    ),
    "no file name": (
        lambda c: first(c, "images", file_name=None),
        "image 101 has no usable file_name",
    ),
    "iscrowd": (lambda c: first(c, "annotations", iscrowd=3), "annotation 1 has iscrowd 3"),
    "record": (lambda c: c["images"].append(7), "image number 4 of the list has no"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_in_a_line(synth, case):
    damage, message = BROKEN[case]
    damage(synth.contents)
    for mend in (False, True):
        with pytest.raises(UserError) as error:
            coco_set(synth.save(), mend=mend)
        assert message in one_line(error)
        assert "train.json" in one_line(error)


@pytest.mark.parametrize("text", ['{"images": [', "", "[1, 2]", "[" * 100_000, b"\xff\xfe\x00"])
def test_what_is_no_json_is_refused_in_a_line(synth, text):
    synth.annotations.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"train\.json (is|has)") as error:
        coco_set(synth)
    one_line(error)


def test_files_that_are_missing_are_named_with_their_key(synth, tmp_path):
    with pytest.raises(UserError, match=r"TRAIN_ANNOTATIONS: there is no annotation file .*none"):
        CocoDetectionSet(synth.images, tmp_path / "none.json", split="TRAIN")
    with pytest.raises(UserError, match=r"no image folder .*set DETECTION.DATA.VAL_IMAGES"):
        CocoDetectionSet(tmp_path / "none", synth.annotations)
    (synth.images / "0001.png").unlink()
    with pytest.raises(UserError, match=r"image 108 of .*train.json is missing.*0001.png") as error:
        coco_set(synth)
    assert "DATASET.SKIP_CORRUPT True" in one_line(error)


WRONG = {
    "zero width": ({"bbox": [5, 5, 0, 9]}, "it has no area", "box"),
    "negative": ({"bbox": [5, 5, -4, 9]}, "it has no area", "box"),
    "outside": ({"bbox": [500, 5, 20, 9]}, "outside the image of 128x96 pixels", "box"),
    "sticks out": ({"bbox": [100, 5, 40, 9]}, "128x96 pixels by 12;", "clipped"),
    "sticks out above": ({"bbox": [100, -5, 4, 9]}, "128x96 pixels by 5;", "clipped"),
    "not finite": ({"bbox": [float("nan"), 5, 20, 9]}, "is not [x, y, width, height]", "box"),
    "no numbers": ({"bbox": [5, 5, 20]}, "is not [x, y, width, height]", "box"),
    "no polygon": ({"segmentation": [[1, 2, 3, 4]]}, "neither polygons", "mask"),
    "half a polygon": (
        {"segmentation": [[1, 2, 9, 2, 9, 9], [1, 2, 3]]},
        "a polygon has less than 3 points",
        "clipped",
    ),
    "no mask": ({"segmentation": []}, "no segmentation", "mask"),
    "foreign RLE": (
        {"segmentation": {"size": [4, 4], "counts": [16]}},
        "its RLE mask is [4, 4]",
        "mask",
    ),
    "wrong counts": (
        {"segmentation": {"size": [96, 128], "counts": [16]}},
        "its RLE mask does not fill the image",
        "mask",
    ),
    "packed nonsense": (
        {"segmentation": {"size": [96, 128], "counts": "zzzz9z"}},
        "its RLE mask does not fill the image",
        "mask",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_objects_are_refused_or_mended_and_counted(synth, case, capsys):
    changes, message, outcome = WRONG[case]
    before = len(coco_set(synth, masks=True).labels)
    first(synth.contents, "annotations", **changes)
    with pytest.raises(UserError) as error:
        coco_set(synth.save(), masks=True)
    assert message in one_line(error)
    assert "train.json: annotation 1 of image 101: " in one_line(error)
    assert "BAD_ANNOTATIONS fix" in one_line(error)
    capsys.readouterr()
    data = coco_set(synth, masks=True, mend=True)
    assert len(data.labels) == before - (outcome != "clipped")
    what = "1 objects mended" if outcome == "clipped" else f"1 objects without {outcome}, "
    assert what in capsys.readouterr().err
    boxes = coco_set(synth, mend=True)  # to whom the state of masks is nothing
    assert len(boxes.labels) == before - (outcome == "box")
    for index in range(len(data)):
        image, target = data.item(View(index, 96, 200))
        boxes, (height, width) = target["boxes"], image.shape[1:]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()


def test_boxes_that_stick_out_by_rounding_are_clipped(synth):
    first(synth.contents, "annotations", bbox=[100.2, 5, 28.5, 9])
    _, target = coco_set(synth.save()).item(View(0, 96, 200))
    assert target["boxes"][0].tolist() == pytest.approx([100.2, 5, 128, 14])


def test_images_without_objects_are_left_out_on_demand(shared, capsys):
    assert len(coco_set(shared)) == 7
    capsys.readouterr()
    data = coco_set(shared, keep_empty=False)
    assert len(data) == 5
    assert "2 images without objects" in capsys.readouterr().err
    assert all(len(data.item(View(i, 96, 200))[1]["labels"]) for i in range(5))
    for record in shared.contents["annotations"]:
        assert record["bbox"][2] > 0


def test_a_set_of_crowds_alone_teaches_nothing(synth):
    for record in synth.contents["annotations"]:
        record["iscrowd"] = 1
    with pytest.raises(UserError, match="every object is a crowd region"):
        coco_set(synth.save(), keep_empty=False)


def test_images_that_cannot_be_read_are_refused_or_left_out(synth, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (synth.images / "0000.png").write_bytes(b"no image")
    (synth.images / "0002.png").unlink()
    synth.contents["images"].pop()
    known = {record["id"] for record in synth.contents["images"]}
    kept = [a for a in synth.contents["annotations"] if a["image_id"] in known]
    synth.contents["annotations"] = kept
    with pytest.raises(UserError, match=r"0000\.png cannot be read as an image"):
        coco_set(synth.save()).image(0)
    data = coco_set(synth, skip_corrupt=True)
    assert [data.image_id(i) for i in range(len(data))] == [108]
    assert "1 unreadable images" in capsys.readouterr().err
    assert data.image(0).shape == (3, 96, 128)


def test_an_image_of_another_size_is_refused(synth):
    first(synth.contents, "images", width=130)
    with pytest.raises(UserError, match=r"0000.png is 128x96 pixels, but .* says 130x96") as error:
        coco_set(synth.save()).image(0)
    assert "EXIF" not in one_line(error)


def test_label_space_names_are_checked(shared, tmp_path):
    with pytest.raises(UserError, match="did you mean 'coco91'"):
        coco_set(shared, label_space="coco90")
    large = make_coco(tmp_path, 2, categories=((3, "disc"), (91, "box"), (2, "triangle")))
    with pytest.raises(UserError, match=r"category id 91 is not in 1\.\.90.*contiguous"):
        coco_set(large, label_space="coco91")


@pytest.mark.parametrize(
    ("network", "data", "advice"),
    [
        (91, 81, "LABEL_SPACE coco91"),
        (81, 91, "LABEL_SPACE contiguous"),
        (91, 4, "NEW_HEAD"),
        (81, 4, "NEW_HEAD"),
    ],
)
def test_advice_on_other_class_counts(network, data, advice):
    assert advice in class_advice(network, data, "DETECTION.TEACHER")


def test_training_and_validation_name_the_same_classes(shared, tmp_path):
    other = make_coco(tmp_path, 2, categories=((3, "disc"), (8, "box"), (42, "triangle")))
    check_same_classes(coco_set(shared), coco_set(shared))
    with pytest.raises(UserError, match="id 7 is 'box' and None"):
        check_same_classes(coco_set(shared), coco_set(other))


def test_packed_values_come_back():
    items = [[[0.1, 2.5]], {"size": [1, 2], "counts": "a\u00e4"}, [], None]
    packed = Packed(items)
    assert [packed[i] for i in range(len(packed))] == items


def test_a_list_of_files_stays_small_in_workers(shared):
    """What is sent to a worker process: arrays, not one object for each annotation."""
    import pickle

    data = coco_set(shared, masks=True)
    buffer = io.BytesIO()
    pickle.dump(data, buffer)
    assert len(buffer.getvalue()) < 3 * len(json.dumps(shared.contents)) + 4000
