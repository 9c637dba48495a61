"""Images of any shape brought to one size, EXIF, 16 bits, and files of odd names."""

import io

import numpy as np
import pytest
import torch
from data_support import config, one_line, write_folders, write_image
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.functional import to_tensor
from worker_support import photo

from mdistiller.dataset import eval_preprocessing, load_data, load_test_loader
from mdistiller.dataset.files import corrupt as _corrupt
from mdistiller.dataset.files.images import read_image
from mdistiller.preprocessing import Preprocessing
from mdistiller.registry import UserError

RAW = {"MEAN": [0.0] * 3, "STD": [1.0] * 3, "NUM_WORKERS": 0}
LOADERS = pytest.mark.parametrize("loader", ["memory", "workers"])
OWN = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 24, "crop", 0.8, "bicubic")


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setattr(_corrupt, "_cache", {})


def photographs(root, sizes=((70, 90), (80, 60), (50, 50), (64, 100))):
    for split in ("train", "val"):
        for k, size in enumerate(sizes):
            write_image(root / split / "ab"[k % 2] / f"{k}.png", photo(k, size))
    return root


def originals(root):
    """The validation images in the order of the set."""
    return [Image.open(path).convert("RGB") for path in sorted((root / "val").rglob("*.*"))]


def evaluated(root, own=None, **keys):
    """The test set as it is evaluated, values from 0 to 1."""
    loader = load_test_loader(config("imagefolder", ROOT=root, **RAW, **keys), network=own).loader
    return torch.cat([image for image, _ in loader])


def as_bytes(image):
    """A network's input, of values from 0 to 1, as the pixels it is made of."""
    return (image * 255).round().byte()


@LOADERS
def test_photographs_are_cut_and_not_stretched(tmp_path, loader):
    root = photographs(tmp_path)
    cut = transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32)])
    ours = evaluated(root, IMAGE_SIZE=32, LOADER=loader)
    for image, original in zip(ours, originals(root), strict=True):
        assert (image - to_tensor(cut(original))).abs().max() <= 1.01 / 255


def test_crop_as_a_key_is_the_crop_that_auto_means(tmp_path):
    """For photographs 7/8; it was the whole shorter side."""
    root = photographs(tmp_path)
    auto = evaluated(root, IMAGE_SIZE=32)
    assert torch.equal(evaluated(root, IMAGE_SIZE=32, RESIZE="crop"), auto)
    assert not torch.equal(evaluated(root, IMAGE_SIZE=32, RESIZE="crop", CROP_PCT=1.0), auto)


@LOADERS
def test_square_images_stay_whole(tmp_path, loader):
    """Also for a network whose library would cut its own, larger images."""
    root = photographs(tmp_path, [(12, 12), (16, 16)])
    for own in (None, OWN):
        ours = evaluated(root, own, IMAGE_SIZE=14, LOADER=loader)
        for image, path in zip(ours, sorted((root / "val").rglob("*.*")), strict=True):
            plain = v2.functional.resize(read_image(path), [14, 14])
            assert torch.equal(as_bytes(image), plain)


@LOADERS
@pytest.mark.parametrize("key", ["stretch", "pad", "crop"])
def test_keys_choose_the_resize_the_ratio_and_the_interpolation(tmp_path, loader, key):
    root = photographs(tmp_path)
    bicubic = transforms.InterpolationMode.BICUBIC
    side = 40  # 32 / 0.8
    crop = transforms.CenterCrop(32)

    def expected(image):
        width, height = image.size
        scale = side / (min if key == "crop" else max)(width, height)
        size = (side, side) if key == "stretch" else (int(height * scale), int(width * scale))
        return crop(transforms.functional.resize(image, size, bicubic))

    keys = {"RESIZE": key, "CROP_PCT": 0.8, "INTERPOLATION": "bicubic", "LOADER": loader}
    ours = evaluated(root, OWN, IMAGE_SIZE=32, **keys)
    for image, original in zip(ours, originals(root), strict=True):
        assert torch.equal(as_bytes(image), as_bytes(to_tensor(expected(original))))


def test_a_networks_own_preprocessing_is_timms_to_the_pixel(tmp_path):
    create_transform = pytest.importorskip("timm.data").create_transform
    root = photographs(tmp_path)
    for ours, theirs in (("crop", "center"), ("stretch", "squash")):
        own = Preprocessing((0.5,) * 3, (0.5,) * 3, 24, ours, 0.9, "bicubic")
        view = create_transform(
            (3, 24, 24), crop_pct=0.9, crop_mode=theirs, interpolation="bicubic", mean=0, std=1
        )
        images = evaluated(root, own, LOADER="memory" if ours == "crop" else "workers")
        for image, original in zip(images, originals(root), strict=True):
            assert torch.equal(as_bytes(image), as_bytes(view(original)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"RESIZE": "squash"}, r"DATASET\.RESIZE must be auto, crop, stretch, pad, got 'squash'"),
        ({"INTERPOLATION": "lanczos"}, r"DATASET\.INTERPOLATION must be .*, got 'lanczos'"),
        ({"CROP_PCT": 87.5}, r"DATASET\.CROP_PCT 87\.5 must be from 0\.1 to 2"),
    ],
)
def test_keys_that_cannot_be_meant_are_one_line(tmp_path, keys, message):
    with pytest.raises(UserError, match=message) as error:
        eval_preprocessing(config("imagefolder", ROOT=photographs(tmp_path), **keys))
    one_line(error)


def test_no_training_images_are_needed_where_the_constants_are_stated(tmp_path):
    root = photographs(tmp_path)
    for path in sorted((root / "train").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (root / "train").rmdir()
    data = load_test_loader(config("imagefolder", ROOT=root, NUM_WORKERS=0), network=OWN)
    assert (data.mean, data.std, data.image_size) == (OWN.mean, OWN.std, (24, 24))
    assert data.preprocessing == OWN
    with pytest.raises(UserError, match=r"has no folder train/.*DATASET\.MEAN"):
        load_test_loader(config("imagefolder", ROOT=root, IMAGE_SIZE=24))


@LOADERS
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_images_are_turned_as_exif_says(tmp_path, loader, suffix):
    for k in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = k
        for split in ("train", "val"):
            path = tmp_path / split / "ab"[k % 2] / f"{k}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo(k, (40, 60))).save(path, exif=exif, quality=98, subsampling=0)
    for turned in (True, False):
        ours = evaluated(tmp_path, IMAGE_SIZE=32, EXIF=turned, RESIZE="stretch", LOADER=loader)
        files = sorted((tmp_path / "val").rglob(f"*.{suffix}"))
        for image, path in zip(ours, files, strict=True):
            original = Image.open(path)
            original = ImageOps.exif_transpose(original) if turned else original
            small = to_tensor(original.resize((32, 32), Image.Resampling.BILINEAR))
            assert (image - small).abs().max() <= 3.01 / 255


def test_photographs_of_one_stored_size_and_two_orientations_are_cut(tmp_path):
    root = photographs(tmp_path, [(40, 60), (40, 60)])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(0, (40, 60))).save(root / "val" / "a" / "0.png", exif=exif)
    with pytest.raises(UserError, match=r"40x60 pixels but .* is 60x40"):
        evaluated(root)
    assert evaluated(root, IMAGE_SIZE=32).shape == (2, 3, 32, 32)


def test_files_of_all_names_are_read_or_counted(tmp_path, capsys):
    root = write_folders(tmp_path)
    pictures = {"gif": "GIF", "jfif": "JPEG", "JPE": "JPEG"}
    for suffix, kind in pictures.items():
        Image.fromarray(photo(1, (8, 8))).save(root / "val" / "cat" / f"x.{suffix}", kind)
    Image.fromarray(photo(1, (8, 8))).save(root / "val" / "cat" / "plain", "PNG")
    for name in ("notes.txt", "more.txt", "photo.heic", "README", ".hidden"):
        (root / "val" / "cat" / name).write_text("not an image")
    loader = load_test_loader(config("imagefolder", ROOT=root, **RAW)).loader
    assert loader.num_data == 6 + 4
    lines = [line for line in capsys.readouterr().err.splitlines() if "are skipped" in line]
    counts = "4 files do not have an image suffix and are skipped (2 x .txt, 1 x .heic, 1 x no"
    assert len(lines) == 1
    assert f"{root}/val: {counts} suffix)" in lines[0]


def sixteen_bits(kind="PNG"):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue(), torch.from_numpy(values / 65535).float()


@LOADERS
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_refused_left_out_or_scaled(tmp_path, capsys, loader, kind):
    root = write_folders(tmp_path)
    data, values = sixteen_bits(kind)
    (root / "val" / "dog" / f"9.{kind.lower()}").write_bytes(data)
    with pytest.raises(UserError, match=r"9\.\w+ has more than 8 bits.*SCALE_16_BIT True"):
        evaluated(root, LOADER=loader)
    assert len(evaluated(root, LOADER=loader, SKIP_CORRUPT=True)) == 6
    assert "1 of 7 images cannot be read" in capsys.readouterr().err
    found = evaluated(root, LOADER=loader, SCALE_16_BIT=True, SKIP_CORRUPT=True)[-1]
    assert (found - values).abs().max() <= 0.51 / 255


def test_a_run_records_what_is_done_to_its_images(tmp_path):
    data = load_data(config("imagefolder", ROOT=photographs(tmp_path), IMAGE_SIZE=32, **RAW))
    mean, std = (0.0,) * 3, (1.0,) * 3
    assert data.preprocessing == Preprocessing(mean, std, 32, "crop", 0.0, "bilinear")


def test_a_networks_crop_ratio_belongs_to_its_own_resize(tmp_path):
    cfg = config("imagefolder", ROOT=photographs(tmp_path), RESIZE="stretch")
    assert eval_preprocessing(cfg, OWN).crop_pct == 0
    cfg.DATASET.RESIZE = "crop"
    assert eval_preprocessing(cfg, OWN).crop_pct == OWN.crop_pct
