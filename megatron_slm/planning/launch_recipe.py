"""Read what a recipe starts: a shell script that prints its command under DRY_RUN=1."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import subprocess
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.errors import UserError

MODULE = "megatron_slm.pretrain"
LIBRARIES = ("CUDA_", "GLOO_", "NCCL_", "OMP_", "PET_", "PYTORCH_", "TORCH_", "UCX_")


@dataclass(frozen=True)
class LaunchRecipe:
    """What a recipe starts."""

    arguments: list[str]
    """Arguments of megatron_slm.pretrain."""

    ranks: int
    """Number of ranks of the whole job."""


def read_launch_recipe(script: Path, settings: dict[str, str]) -> LaunchRecipe:
    """Run a script under examples/ with DRY_RUN=1 and read the command that it prints.

    Args:
        script: the recipe.
        settings: values of the script's variables that differ from its defaults.

    Raises:
        UserError: the script has no such variable, would start the job, fails, or prints no command
            that trains.
    """
    texts = _texts(script)
    if texts and not any(re.search(r"DRY_RUN|^[^#\n]*\.sh\b", text, re.M) for text in texts):
        raise UserError(
            f"{script} does not look at DRY_RUN, so it would start the job: let it print its "
            "command, as examples/launch.sh does, if DRY_RUN is 1"
        )
    known = _variables(texts)
    for name in settings:
        if known and name not in known and not name.startswith(LIBRARIES):
            close = difflib.get_close_matches(name, known, 1)
            hint = (
                f"did you mean {close[0]}?"
                if close
                else "see the top of the script and of launch.sh"
            )
            raise UserError(f"{script} has no variable {name}: {hint}")
    # The plan is for the job that was asked for, not for the one that this may run in.
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", str(script)],
        env=own | settings | {"DRY_RUN": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"DRY_RUN=1 bash {script} failed: {done.stderr.strip()}")
    for line in done.stdout.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # prose with an apostrophe
            words = []
        if MODULE in words:
            at = words.index(MODULE)
            return LaunchRecipe(words[at + 1 :], _ranks(words[:at], script))
        if any(word.endswith("score_reference.py") for word in words):
            raise UserError(
                f"{script} scores with these settings, which takes less than training, since only "
                "the reference is in memory; leave out SCORE and CACHE to plan the training"
            )
    raise UserError(f"DRY_RUN=1 bash {script} prints no command that runs {MODULE}")


def _ranks(launcher: Sequence[str], script: Path) -> int:
    """Return how many ranks torchrun starts in all, given what comes before the module.

    Raises:
        UserError: the number depends on the machine, or is not positive.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nnodes", default="1")
    parser.add_argument("--nproc-per-node", "--nproc_per_node", default="1")
    args, _ = parser.parse_known_args(launcher)
    nodes = args.nnodes.split(":")[-1]  # the most of an elastic job
    for flag, number in (("--nnodes", nodes), ("--nproc-per-node", args.nproc_per_node)):
        if not re.fullmatch(r"0*[1-9]\d*", number):
            raise UserError(f"{script} starts torchrun with {flag} {number}: give it a number")
    return int(nodes) * int(args.nproc_per_node)


def _texts(script: Path) -> list[str]:
    """Return the text of a script, and those of the scripts beside it that it sources."""
    found = list[str]()
    unread, read = [script], set[Path]()
    while unread:
        path = unread.pop()
        if path in read or not path.is_file():
            continue
        read.add(path)
        text = path.read_text(errors="replace")
        found.append(text)
        unread += [script.parent / name for name in re.findall(r"source .*?([\w.-]+\.sh)", text)]
    return found


def _variables(texts: Sequence[str]) -> set[str]:
    """Return the variables that scripts read."""
    found = set[str]()
    for text in texts:
        found |= set(re.findall(r"\$\{([A-Z][A-Z0-9_]*):?[-=?]", text))
        found |= set(re.findall(r'"\$\{?([A-Z][A-Z0-9_]*)', text))
    return {name for name in found if not name.startswith(("SLURM_", "BASH_", "SLM_"))}
