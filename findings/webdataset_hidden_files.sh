#!/usr/bin/env bash
# webdataset 1.0.2, numpy 2.2.6, Python 3.11.
#
# tar on macOS packs an AppleDouble file `._0.jpg` before each `0.jpg` that has extended attributes.
# At the top of a shard webdataset leaves such names out; in a folder it takes `train/._0.jpg` for the
# file `_0.jpg` of a sample `train/`, since the part before the first dot of the file name is empty and
# the pattern then takes the folder. The sample of another key ends the one before: `0.jpg` and `0.cls`
# arrive as two samples, one without class and one without image, and nothing warns. Output seen:
#   at the top  : [('0', ['cls', 'jpg']), ('1', ['cls', 'jpg'])]
#   in a folder : [('train/', ['_0.jpg']), ('train/0', ['jpg']), ('train/', ['_0.cls']), ('train/0', ['cls']), ...
# So pass select_files to tarfile_to_samples, or pack with COPYFILE_DISABLE=1.
#
# Runs outside CI; needs a package index. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.2.6 webdataset==1.0.2
cd "$work"
cat > hidden.py <<'PY'
import io
import tarfile

import webdataset as wds


def samples(folder):
    with tarfile.open("shard.tar", "w") as shard:
        for k in range(2):
            for name in (f"._{k}.jpg", f"{k}.jpg", f"._{k}.cls", f"{k}.cls"):
                entry = tarfile.TarInfo(folder + name)
                entry.size = 4
                shard.addfile(entry, io.BytesIO(b"data"))
    pipeline = wds.DataPipeline(wds.SimpleShardList(["shard.tar"]), wds.tarfile_to_samples())
    return [
        (sample["__key__"], sorted(key for key in sample if not key.startswith("__")))
        for sample in pipeline
    ]


top, below = samples(""), samples("train/")
print("at the top  :", top)
print("in a folder :", below)
assert top == [("0", ["cls", "jpg"]), ("1", ["cls", "jpg"])], "the top of a shard has changed"
assert ("train/0", ["jpg"]) in below, "hidden files in folders no longer split samples"
assert ("train/0", ["cls"]) in below
PY
"$work/venv/bin/python" hidden.py
