"""tools/convert_checkpoint.py with no room for what the last rank writes."""

from __future__ import annotations

import os
import resource
import runpy

from launch import REPOSITORY

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    runpy.run_path(str(REPOSITORY / "tools" / "convert_checkpoint.py"), run_name="__main__")
