"""tools/convert_checkpoint.py, and the memory that it had at most, by the kernel's account."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from launch import REPOSITORY

if __name__ == "__main__":
    runpy.run_path(str(REPOSITORY / "tools" / "convert_checkpoint.py"), run_name="__main__")
    peak = re.search(r"VmHWM:\s+(\d+ kB)", Path("/proc/self/status").read_text())
    assert peak is not None
    print(f"peak memory: {peak[1]}")
