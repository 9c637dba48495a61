#!/usr/bin/env bash
# yacs 0.1.8, PyYAML 6.0.3, Python 3.11.
#
# Quotes in a YAML file do not keep a value a string: yacs reads the string that PyYAML hands it as Python source
# once more. A run named "2024" is refused as an integer, one named "1_0" as 10, a class list "1,2" as a tuple. One
# value passes silently: "None" becomes None, and since None fits every type, a key of any type loses its value.
# Inside a list nothing is read again: ["1e-3"] stays text, and a later `lr * 0.1` fails. Output seen:
#   NAME: "2024"      Type mismatch (<class 'str'> vs. <class 'int'>) with values (x vs. 2024) for config key: NAME
#   NAME: "1_0"       Type mismatch (<class 'str'> vs. <class 'int'>) with values (x vs. 10) for config key: NAME
#   NAME: "1,2"       Type mismatch (<class 'str'> vs. <class 'tuple'>) with values (x vs. (1, 2)) for config key: NAME
#   NAME: "None"      NAME = None
#   LR: "None"        LR = None
#   LR: 1e-3          LR = 0.001
#   RATES: [1e-3]     RATES = ['1e-3']
#
# Runs outside CI; needs a package index. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q yacs==0.1.8 pyyaml==6.0.3
cd "$work"
cat > merge.py <<'PY'
from pathlib import Path

from yacs.config import CfgNode

DEFAULTS = {"NAME": "x", "LR": 0.1, "RATES": [0.1]}
NUMBER, TEN, PAIR = "<class 'int'>) with values (x vs. 2024)", "(x vs. 10)", "(x vs. (1, 2))"


def merge(text):
    Path("run.yaml").write_text(text)
    config = CfgNode(DEFAULTS)
    try:
        config.merge_from_file("run.yaml")
        key = text.split(":")[0]
        outcome = f"{key} = {config[key]!r}"
    except ValueError as error:
        outcome = str(error)
    print(f"{text:17} {outcome}")
    return outcome


for text, seen in (
    ('NAME: "2024"', NUMBER),
    ('NAME: "1_0"', TEN),
    ('NAME: "1,2"', PAIR),
    ('NAME: "None"', "NAME = None"),
    ('LR: "None"', "LR = None"),
    ("LR: 1e-3", "LR = 0.001"),
    ("RATES: [1e-3]", "RATES = ['1e-3']"),
):
    assert seen in merge(text), "the behaviour changed"
PY
"$work/venv/bin/python" merge.py
