"""A trained student as files that run elsewhere, each verified, and a card that describes them."""

from mdistiller.export.backbone import export_backbone
from mdistiller.export.card import Latency, model_card, write_card
from mdistiller.export.files import FORMATS, Exported
from mdistiller.export.source import from_checkpoint, from_run, recorded_side
from mdistiller.export.student import Student
from mdistiller.export.write import export_student

__all__ = [
    "FORMATS",
    "Exported",
    "Latency",
    "Student",
    "export_backbone",
    "export_student",
    "from_checkpoint",
    "from_run",
    "model_card",
    "recorded_side",
    "write_card",
]
