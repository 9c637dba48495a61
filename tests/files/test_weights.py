"""Checkpoints that are well-formed and still not what they should be."""

import zipfile

import pytest
import torch

from mdistiller.registry import UserError
from mdistiller.weights import load_checkpoint, load_network


@pytest.mark.parametrize(
    "state",
    [
        {1: torch.ones(2), "weight": torch.ones(2)},
        {"weight": torch.ones(2), "epoch": 3},
        {"weight": torch.eye(2).to_sparse()},
        {"weight": torch.ones(2), "deep": {"bias": torch.ones(2)}},
    ],
    ids=["number as key", "number as value", "sparse", "nested"],
)
def test_what_is_no_state_dict_is_named(tmp_path, state):
    torch.save({"model": state}, tmp_path / "odd")
    with pytest.raises(
        UserError, match=r"odd is not a plain state dict: '?(1|epoch|weight|deep)'?"
    ):
        load_network(torch.nn.Linear(2, 2), tmp_path / "odd", "linear")


def test_a_file_that_unpacks_to_far_more_is_refused(tmp_path):
    torch.save({"model": {"w": torch.zeros(2_000_000)}}, tmp_path / "plain")
    with (
        zipfile.ZipFile(tmp_path / "plain") as plain,
        zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert load_checkpoint(tmp_path / "plain")["model"]["w"].numel() == 2_000_000
    with pytest.raises(UserError, match=r"bomb is refused: its \d+ bytes unpack to 8\d{6}"):
        load_checkpoint(tmp_path / "bomb")
