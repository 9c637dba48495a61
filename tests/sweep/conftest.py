"""Sweep files and studies for the tests."""

import pytest
from support import write_config
from sweep_runs import IMPORTS

from mdistiller.sweep.plan import read_plan
from mdistiller.sweep.study import Study


@pytest.fixture
def sweep(tmp_path):
    """Writes a sweep file beside a config of a tiny network; gives its path and the output."""

    def write(text, name="s.yaml", **config):
        settings = {"method": "LOGGED", "student": "Dot", **config}
        write_config(tmp_path, IMPORTS + f"LOGGED:\n  LOG: {tmp_path / 'log'}\n", **settings)
        path = tmp_path / name
        path.write_text(f"SWEEP: s\nCONFIG: toy.yaml\n{text}")
        return path

    write.folder, write.out = tmp_path, tmp_path / "sweep"
    return write


@pytest.fixture
def study(sweep):
    plan = read_plan(sweep("SEEDS: 2\n"), out=sweep.out)
    return Study(plan, f"sqlite:///{sweep.folder / 'study.db'}")
