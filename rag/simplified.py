"""Traditional Chinese characters -> simplified, one for one, so that offsets stay what they are.

Only what is searched and compared goes through here; the text that is shown stays as it was written.
The table is OpenCC's (the package opencc-python-reimplemented), the first choice of each character.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files


@lru_cache(maxsize=1)
def _table() -> dict[int, str]:
    lines = files("opencc").joinpath("dictionary", "TSCharacters.txt").read_text(encoding="utf-8")
    pairs = (line.split("\t") for line in lines.splitlines() if line)
    return {ord(traditional): simplified.split(" ")[0] for traditional, simplified in pairs}


def simplify(text: str) -> str:
    """The text in simplified characters, each in its old place. ASCII comes back at once."""
    return text if text.isascii() else text.translate(_table())
