"""Areas, ids, image sizes and file names of annotation files: refused, or mended and counted."""

import json

import pytest
from detections import noisy
from PIL import Image
from synth import make_coco

from mdistiller.detection.coco.dataset import CocoDetectionSet
from mdistiller.detection.coco.evaluate import CocoEvaluator
from mdistiller.detection.coco.packages import BACKENDS
from mdistiller.registry import UserError


def coco_set(synth, mend=False, **options):
    return CocoDetectionSet(synth.images, synth.annotations, mend=mend, **options)


def refused(synth, **options):
    """The line that a set is refused with where nothing is mended."""
    with pytest.raises(UserError) as error:
        coco_set(synth.save(), **options)
    text = str(error.value)
    assert "\n" not in text
    assert "train.json" in text
    assert "BAD_ANNOTATIONS fix" in text
    return text


def mended(synth, capsys, **options):
    """The set under BAD_ANNOTATIONS fix, and what it prints."""
    capsys.readouterr()
    data = coco_set(synth.save(), mend=True, **options)
    return data, capsys.readouterr().err


def evaluator_of(data, detections, backend="pycocotools", masks=False):
    evaluator = CocoEvaluator(data, masks, backend)
    evaluator.add([{"image_id": data.image_id(k)} for k in range(len(data))], detections)
    return evaluator


def change_ids(contents, images=int, annotations=int, categories=int):
    """Write ids as these functions say, and what refers to them as well."""
    for kind, change in (
        ("images", images),
        ("annotations", annotations),
        ("categories", categories),
    ):
        for record in contents[kind]:
            record["id"] = change(record["id"])
    for record in contents["annotations"]:
        record["image_id"] = images(record["image_id"])
        record["category_id"] = categories(record["category_id"])


@pytest.fixture
def synth(tmp_path):
    return make_coco(tmp_path, 8, objects=4, empty=1, crowds=2)


@pytest.fixture
def found(synth):
    """Detections in each image, the same whatever its id becomes."""
    data = coco_set(synth, masks=True)
    return [noisy(data, data.image_id(k)) for k in range(len(data))]


IDS = {
    "annotations up to 0": {"annotations": lambda n: 1 - n if n > 1 else -40},
    "large annotations": {"annotations": lambda n: n + 2**62},
    "images from 2**53": {"images": lambda n: 2**53 + (n - 101) // 7},
    "images below 0": {"images": lambda n: n - 130},
    "categories from 2**53": {"categories": lambda n: 2**53 + {3: 0, 7: 1, 42: 2}[n]},
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_evaluators_measure_the_same_whatever_the_ids_are(synth, found, backend):
    whole = evaluator_of(coco_set(synth, masks=True), found, masks=True).summarize()
    assert whole["bbox/AP"] > 5
    original = json.dumps(synth.contents)
    for name, changes in IDS.items():
        synth.contents = json.loads(original)
        change_ids(synth.contents, **changes)
        data = coco_set(synth.save(), masks=True)
        numbers = evaluator_of(data, found, backend, masks=True).summarize()
        assert numbers == pytest.approx(whole, rel=1e-12), name


AREAS = (-1, 1e11, 14000, None, "90", [90], True, float("nan"), float("inf"))


def test_areas_that_cannot_be_are_refused_or_computed(synth, found, capsys):
    """They would sort objects out of COCO's sizes: an object of area -1 is not to be detected."""
    records = synth.contents["annotations"]
    for record in records[::2]:
        del record["area"]
    bare = evaluator_of(coco_set(synth.save()), found).summarize()
    for area in AREAS:
        for record in records[::2]:
            record["area"] = area
        assert f"annotation 1 of image 101: area {area!r} is not" in refused(synth)
        data, said = mended(synth, capsys)
        assert f"{len(records[::2])} areas recomputed" in said
        for backend in BACKENDS:
            assert evaluator_of(data, found, backend).summarize() == pytest.approx(bare), area
    for area in (0, 96 * 128):
        records[0]["area"] = area
        for record in records[1:]:
            record.pop("area", None)
        assert "areas recomputed" not in mended(synth, capsys)[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_objects_of_gigapixel_images_count(synth, found, backend):
    """COCO's largest area is 1e10 pixels; the backends take no notice if larger ones are missed."""
    data = coco_set(synth)
    whole = evaluator_of(data, found, backend).summarize()
    for record in synth.contents["images"]:
        record |= {"height": 150_000, "width": 150_000}
    number = len(synth.contents["annotations"]) + 1
    for k, image in enumerate(synth.contents["images"]):
        box = [2000, 2000, 120_000, 100_000]
        one = {"id": number + k, "image_id": image["id"], "category_id": 3, "iscrowd": 0}
        synth.contents["annotations"].append(one | {"bbox": box, "area": box[2] * box[3]})
    data = coco_set(synth.save())
    numbers = evaluator_of(data, found, backend).summarize()
    assert numbers["bbox/AR100"] < whole["bbox/AR100"] - 5


HUGE = 10**400  # JSON has whole numbers of any length; a float cannot hold this one
UNUSABLE = {
    "area": ({"area": HUGE}, "is not a number from 0"),
    "bbox": ({"bbox": [0, 0, HUGE, 3]}, "is not .x, y, width, height"),
    "polygon": ({"segmentation": [[1, 2, HUGE, 3, 4, 5]]}, "neither polygons"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_numbers_beyond_any_float_are_refused_or_mended(synth, found, capsys, case):
    change, message = UNUSABLE[case]
    synth.contents["annotations"][0] |= change
    with pytest.raises(UserError, match=message):
        coco_set(synth.save(), masks=True)
    data, _ = mended(synth, capsys, masks=True)
    assert evaluator_of(data, found, masks=True).summarize()["bbox/AP"] > 5


def test_a_file_name_that_is_no_text_of_a_file_system_is_refused(synth):
    synth.contents["images"][0]["file_name"] = "\ud800.png"
    with pytest.raises(UserError, match="image 101 has no usable file_name"):
        coco_set(synth.save(), mend=True)


def test_an_area_is_that_of_the_mask_where_masks_are_measured(synth, found, capsys):
    whole = evaluator_of(coco_set(synth, masks=True), found, masks=True).summarize()
    synth.contents["annotations"][0]["area"] = -1
    data, _ = mended(synth, capsys, masks=True)
    assert evaluator_of(data, found, masks=True).summarize() == pytest.approx(whole)


TEXTS = {
    "digits": ({"images": str, "annotations": str, "categories": str}, 101, "101"),
    "names": (
        {
            "images": "img_{:04d}".format,
            "annotations": "a{}".format,
            "categories": "c{:02d}".format,
        },
        1,
        "img_0101",
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_ids_that_are_text_are_read_or_numbered(synth, found, capsys, tmp_path, case):
    changes, number, written = TEXTS[case]
    whole = evaluator_of(coco_set(synth), found).summarize()
    change_ids(synth.contents, **changes)
    assert "has no whole number as id" in refused(synth)
    data, said = mended(synth, capsys)
    assert "8 image ids renumbered" in said
    assert (data.image_id(0), data.written_id(0)) == (number, written)
    assert data.class_names[1:] == ["disc", "box", "triangle"]
    evaluator = evaluator_of(data, found)
    assert evaluator.summarize() == pytest.approx(whole)
    evaluator.save(tmp_path / "found.json", evaluator.gather())
    saved = json.loads((tmp_path / "found.json").read_text())
    for key in ("image_id", "category_id"):
        known = {record[key] for record in synth.contents["annotations"]}
        assert {record[key] for record in saved if record[key] in known} == known


def test_text_ids_of_two_files_get_the_same_numbers_in_any_order(synth, capsys):
    """Else the labels of a training and a validation file would differ."""
    change_ids(synth.contents, categories="c{:02d}".format)
    first, _ = mended(synth, capsys)
    synth.contents["categories"].reverse()
    second, _ = mended(synth, capsys)
    assert second.class_names == first.class_names
    assert second.category_ids == first.category_ids


def test_references_may_be_text_where_the_ids_are_numbers(synth, found, capsys):
    whole = evaluator_of(coco_set(synth), found).summarize()
    for record in synth.contents["annotations"]:
        record["image_id"] = str(record["image_id"])
    with pytest.raises(UserError, match="has image_id '101', which is not"):
        coco_set(synth.save())
    data, said = mended(synth, capsys)
    assert "image_id entries given as text" in said
    assert evaluator_of(data, found).summarize() == whole


def test_ids_that_become_the_same_are_refused(synth):
    synth.contents["images"][1]["id"] = "101"
    with pytest.raises(UserError, match="image id '101' is given twice"):
        coco_set(synth.save(), mend=True)


def test_an_annotation_id_of_0_is_renumbered(synth, found, capsys):
    whole = evaluator_of(coco_set(synth), found).summarize()
    synth.contents["annotations"][0]["id"] = 0
    assert "annotation id 0 is not allowed" in refused(synth)
    data, said = mended(synth, capsys)
    assert "1 annotation ids renumbered" in said
    assert evaluator_of(data, found).summarize() == whole


@pytest.mark.parametrize("size", [-1, 0, None, "128", 128.0, 2**31])
def test_sizes_are_read_from_the_images(synth, capsys, size):
    sizes = coco_set(synth).annotations.sizes.tolist()
    for record in synth.contents["images"][:3]:
        record["width"] = size
    assert f"is 96 high and {size!r} wide" in refused(synth)
    for record in synth.contents["images"][3:]:
        del record["width"], record["height"]
    data, said = mended(synth, capsys)
    assert "8 image sizes read from the files" in said
    assert data.annotations.sizes.tolist() == sizes


def test_sizes_follow_the_exif_orientation(synth, capsys):
    record, exif = synth.contents["images"][0], Image.Exif()
    exif[0x0112] = 6
    with Image.open(synth.images / record["file_name"]) as file:
        file.save(synth.images / "turned.jpg", exif=exif)
    record |= {"file_name": "turned.jpg", "width": -1}
    for upright in (True, False):
        data, _ = mended(synth, capsys, exif=upright)
        assert data.annotations.sizes[0].tolist() == ([128, 96] if upright else [96, 128])
        assert data.image(0).shape[1:] == tuple(data.annotations.sizes[0])


def test_an_image_without_size_or_file_is_refused_or_left_out(synth, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    synth.contents["images"][0]["height"] = -1
    (synth.images / "0000.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"is -1 high and 128 wide.*0000\.png cannot be read"):
        coco_set(synth.save(), mend=True)
    data, said = mended(synth, capsys, skip_corrupt=True)
    assert "1 unreadable images" in said
    assert len(data) == 7


def test_separators_of_windows_lead_to_the_files(synth, capsys):
    (synth.images / "part").mkdir()
    for record in synth.contents["images"][:2]:
        name = record["file_name"]
        (synth.images / name).rename(synth.images / "part" / name)
        record["file_name"] = f"part\\{name}"
    assert "part\\0000.png; get it" in refused(synth)
    data, said = mended(synth, capsys)
    assert "2 file names with \\ for /" in said
    assert data.path(0) == synth.images / "part" / "0000.png"
    assert data.image(0).shape == (3, 96, 128)
    odd = synth.images / "a\\b.png"  # a name that Linux allows stays
    data.path(0).rename(odd)
    synth.contents["images"][0]["file_name"] = odd.name
    data, said = mended(synth, capsys)
    assert "1 file names" in said
    assert data.path(0) == odd
