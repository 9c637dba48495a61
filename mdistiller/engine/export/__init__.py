"""A trained student as files that run elsewhere, each verified, and a card that describes them."""

from mdistiller.engine.export.card import Latency, model_card, write_card
from mdistiller.engine.export.files import FORMATS, Exported
from mdistiller.engine.export.source import from_checkpoint, from_run
from mdistiller.engine.export.student import Student
from mdistiller.engine.export.write import export_student

__all__ = [
    "FORMATS",
    "Exported",
    "Latency",
    "Student",
    "export_student",
    "from_checkpoint",
    "from_run",
    "model_card",
    "write_card",
]
