"""README's first commands run as they are printed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from launch import REPOSITORY, recipe_environment


def test_first_commands(tmp_path: Path) -> None:
    """From text to a reference and a policy that trains by it."""
    section = (REPOSITORY / "README.md").read_text().split("\n## Train\n")[1]
    block = section.split("```bash\n")[1].split("```")[0]
    for name in ("examples", "tools"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        env=recipe_environment(1, PYTHONPATH=REPOSITORY),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for name in ("reference", "policy"):
        tracker = tmp_path / "runs" / "first" / name / "latest_checkpointed_iteration.txt"
        assert tracker.read_text() == "20"
    ratios = re.findall(r"selected ratio: (\S+)", run.stdout)
    assert ratios and all(abs(float(ratio) - 0.6) < 0.001 for ratio in ratios[-4:])
