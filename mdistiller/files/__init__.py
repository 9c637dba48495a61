"""Files: downloads, safe extraction of archives, atomic writes, hashes, tables."""

from mdistiller.files.fetch import fetch
from mdistiller.files.hashes import file_hash
from mdistiller.files.unpack import Limits, move_in, unpacked

__all__ = ["Limits", "fetch", "file_hash", "move_in", "unpacked"]
