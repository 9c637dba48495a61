"""The names under which files of other projects import the contract and the tables."""

from mdistiller.models.staged import StagedNet
from mdistiller.models.zoo import ModelEntry, register_model

__all__ = ["ModelEntry", "StagedNet", "register_model"]
