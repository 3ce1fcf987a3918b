"""The score of one's own that docs/when-slm-helps.md shows, and the options that it is run with."""

from __future__ import annotations

import re
from pathlib import Path

from launch import REPOSITORY

SCORE, OPTION = "my_scores:surprise", "power=2"


def write_documented_score(directory: Path) -> None:
    """Write my_scores.py, word for word as the page has it."""
    page = (REPOSITORY / "docs/when-slm-helps.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?@token_score.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert f"--slm-score {SCORE}" in page and f"--slm-score-option {OPTION}" in page
    (directory / "my_scores.py").write_text(block)
