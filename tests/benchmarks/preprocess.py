"""Text to an indexed dataset, against Megatron-LM's own tools/preprocess_data.py, whose path is the
argument (or MEGATRON_PREPROCESS).  Both start from the command line and are held to one core; the
files they write must be the same, byte for byte.

    (default)   ours from jsonl.zst, theirs from jsonl, which is all they read; tokens a second of
                the whole command, and of processor time
    --workers   ours with one and two workers, not held
    --memory    the sum over all our processes on 2 GiB of jsonl, most at any moment

The corpus is the Python source of the packages in this environment.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import mistral_common
import zstandard

OURS = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
MODEL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
DOCUMENT = 4000  # characters; longer files are cut
FILES = 8


def write_corpus(directory: Path, size: int) -> tuple[Path, list[Path]]:
    """About `size` bytes of text as one .jsonl, and as FILES of .jsonl.zst."""
    lines: list[bytes] = []
    written = 0
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for at in range(0, len(text), DOCUMENT):
            lines.append(json.dumps({"text": text[at : at + DOCUMENT]}).encode() + b"\n")
            written += len(lines[-1])
        if written > size:
            break
    plain = directory / "corpus.jsonl"
    plain.write_bytes(b"".join(lines))
    packed = []
    share = -(-len(lines) // FILES)
    for at in range(FILES):
        packed.append(directory / f"{at}.jsonl.zst")
        part = b"".join(lines[at * share : (at + 1) * share])
        packed[-1].write_bytes(zstandard.ZstdCompressor().compress(part))
    return plain, packed


def run(command: Sequence[object], cores: set[int]) -> tuple[float, float]:
    """Seconds of a command, by the clock and of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(
        [str(word) for word in command],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(inputs: Sequence[Path], prefix: Path, workers: int) -> list[object]:
    command = [sys.executable, OURS, "--input", *inputs, "--output-prefix", prefix, "--workers"]
    return [*command, workers, "--tokenizer-model", MODEL, "--append-eod", "--shard-size", "4M"]


def theirs(script: str, source: Path, prefix: Path) -> list[object]:
    command = [sys.executable, script, "--input", source, "--output-prefix", prefix]
    command += ["--workers", 1, "--log-interval", 100_000, "--append-eod"]
    return [*command, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", MODEL]


def compare(script: str, directory: Path, size: int, rounds: int) -> None:
    """Print each round and the medians of its ratios."""
    plain, packed = write_corpus(directory, size)
    core, *_ = os.sched_getaffinity(0)
    ratios = []
    for number in range(rounds):
        mine, other = directory / f"ours{number}", directory / f"theirs{number}"
        fast = run(ours(packed, mine, 1), {core})
        slow = run(theirs(script, plain, other), {core})
        for suffix in ("bin", "idx"):
            files = [Path(f"{prefix}_text_document.{suffix}") for prefix in (mine, other)]
            assert files[0].read_bytes() == files[1].read_bytes(), "other ids"
        tokens = Path(f"{mine}_text_document.bin").stat().st_size // 2
        ratios.append((slow[0] / fast[0], slow[1] / fast[1]))
        line = f"round {number}: {tokens / 1e6:.1f} M tokens"
        for name, (clock, processor) in {"ours": fast, "Megatron-LM's": slow}.items():
            line += f"; {name} {tokens / clock / 1e6:.2f} M/s"
            line += f" ({tokens / processor / 1e6:.2f} a processor second)"
        print(f"{line}: {slow[0] / fast[0]:.2f}x ({slow[1] / fast[1]:.2f}x)", flush=True)
    clock, processor = (statistics.median(values) for values in zip(*ratios, strict=True))
    print(f"median {clock:.2f}x by the clock, {processor:.2f}x of processor time; same files")


def scale(directory: Path, size: int, rounds: int) -> None:
    """Print the gain of a second worker."""
    _, once = write_corpus(directory, size)
    packed = [*once]
    for number in range(3):  # so that starting counts for little
        copies = [path.with_name(f"{number}-{path.name}") for path in once]
        for path, copy in zip(once, copies, strict=True):
            shutil.copyfile(path, copy)
        packed += copies
    every = set(os.sched_getaffinity(0))
    ratios = []
    for number in range(rounds):
        prefixes = {workers: directory / f"{workers}of{number}" for workers in (1, 2)}
        one, two = (run(ours(packed, prefix, n), every) for n, prefix in prefixes.items())
        ratios.append((one[0] / two[0], two[1] / one[1]))
        print(
            f"one worker {one[0]:.2f} s ({one[1]:.2f} processor seconds), two {two[0]:.2f} s "
            f"({two[1]:.2f}): {one[0] / two[0]:.2f}x",
            flush=True,
        )
    clock, processor = (statistics.median(values) for values in zip(*ratios, strict=True))
    print(f"median: two workers {clock:.2f}x as fast, for {processor:.3f}x the processor time")


def measure_memory(directory: Path, size: int) -> None:
    """Print the peak of all processes' resident memory, without what they share counted twice."""
    plain, _ = write_corpus(directory, 1 << 27)
    large = directory / "large.jsonl"
    content = plain.read_bytes()
    with large.open("wb") as file:
        for _ in range(-(-size // len(content))):
            file.write(content)
    peak = 0
    process = subprocess.Popen(
        [str(word) for word in ours([large], directory / "large", 2)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    finished = threading.Event()
    threading.Thread(target=lambda: (process.wait(), finished.set()), daemon=True).start()
    while not finished.wait(0.1):
        peak = max(peak, sum(map(proportional_memory, descendants(process.pid))))
    assert process.returncode == 0
    print(f"{large.stat().st_size / 2**30:.2f} GiB of jsonl, 2 workers: peak {peak / 1024:.0f} MiB")


def descendants(pid: int) -> list[int]:
    found = [pid]
    for task in found:
        try:
            found += map(int, Path(f"/proc/{task}/task/{task}/children").read_text().split())
        except OSError:
            continue
    return found


def proportional_memory(pid: int) -> int:
    """KiB."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("script", nargs="?", default=os.environ.get("MEGATRON_PREPROCESS"))
    parser.add_argument("--size", type=int, default=1 << 27, help="Bytes of jsonl.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", action="store_true")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if args.memory:
            measure_memory(Path(name), 1 << 31)
        elif args.workers:
            scale(Path(name), args.size, args.rounds)
        elif args.script is not None:
            compare(args.script, Path(name), args.size, args.rounds)
        else:
            parser.error("give the path of Megatron-LM's tools/preprocess_data.py")


if __name__ == "__main__":
    main()
