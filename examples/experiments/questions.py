"""Write tasks for lm-eval that need no network: sums, and which words come next in local texts.

    python examples/experiments/questions.py OUTPUT NAME=TEXTS.jsonl ...

    OUTPUT/sums.yaml    sums of two numbers below 50, after four examples
    OUTPUT/NAME.yaml    how a passage of these texts goes on, without examples

Each question has four choices, so chance is right with 25% of them.  Wrong words come from passages
near by in the same texts, and likelihoods are compared by character (acc_norm).  The same texts
give the same questions.  Evaluate with

    python tools/evaluate.py --model DIR --include-path OUTPUT --tasks sums NAME ...
"""

from __future__ import annotations

import json
import random
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from megatron_slm.analysis.evaluation.benchmarks import GROUPS
from megatron_slm.errors import UserError, exit_on_user_error
from megatron_slm.files import decode_json, write_whole

QUESTIONS, CHOICES, EXAMPLES = 100, 4, 4
PASSAGE, NEXT = 240, 80  # characters of a question and of its choices, at most
NEAR = 6  # passages before or after
TASK = """\
task: "{name}"
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}, train: {examples}}}}}
test_split: test
training_split: train
num_fewshot: {shots}
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
"""
Question = dict[str, Any]


def question(text: str, right: str, wrong: Sequence[str], draw: random.Random) -> Question:
    """Return a question whose right choice is at a random place."""
    choices = [right, *wrong]
    draw.shuffle(choices)
    return {"question": text, "choices": choices, "answer": choices.index(right)}


def sums(draw: random.Random) -> Iterator[Question]:
    """Yield sums without end; wrong answers are near the right one."""
    while True:
        one, other = draw.randrange(1, 50), draw.randrange(1, 50)
        near = [one + other + by for by in (-10, -2, -1, 1, 2, 10) if one + other + by > 0]
        wrong = map(str, draw.sample(near, CHOICES - 1))
        yield question(f"{one} + {other} =", str(one + other), [*wrong], draw)


def passages(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Cut texts into passages and what comes next, between words."""
    for text in texts:
        for start in range(0, len(text) - PASSAGE - NEXT, PASSAGE + NEXT):
            first, _, rest = text[start : start + PASSAGE].partition(" ")
            head, _, last = rest.rpartition(" ")
            after = last + text[start + PASSAGE : start + PASSAGE + NEXT]
            words = after.rpartition(" ")[0]
            if first and head and words.strip():
                yield head, words


def next_words(texts: Sequence[str], draw: random.Random) -> Iterator[Question]:
    """Yield, for passages in random order, which words come next."""
    found = list(passages(texts))
    for at in draw.sample(range(len(found)), len(found)):
        text, right = found[at]
        near = {words for _, words in found[max(0, at - NEAR) : at + NEAR + 1]} - {right}
        if len(near) >= CHOICES - 1:
            yield question(text, right, draw.sample(sorted(near), CHOICES - 1), draw)


def write_task(
    output: Path, name: str, questions: Iterator[Question], shots: int, metric: str
) -> None:
    """Write a task and its questions, of which the first ones are examples.

    Args:
        output: directory.
        name: the task's name.
        questions: at most as many as are wanted are taken.
        shots: number of examples before a question.
        metric: lm-eval's name of the metric.

    Raises:
        UserError: there are no questions.
    """
    found = list(islice(questions, shots + QUESTIONS))
    if len(found) <= shots:
        raise UserError(f"{name}: no text is long enough for a question")
    files = {}
    # Without examples one question stands for them, since a data set cannot be empty.
    for part, some in (("questions", found[shots:]), ("examples", found[: shots or 1])):
        path = (output / f"{name}-{part}.jsonl").resolve()
        write_whole(path, "".join(json.dumps(one) + "\n" for one in some).encode())
        files[part] = json.dumps(str(path))
    text = TASK.format(name=name, shots=shots, metric=metric, **files)
    write_whole(output / f"{name}.yaml", text.encode())
    print(f"  {name:10}{len(found) - shots:5} questions", flush=True)


class Text(msgspec.Struct):
    """A line of the texts; other fields are ignored."""

    text: str


def read_texts(path: Path) -> list[str]:
    """Read the texts of a jsonl file.

    Raises:
        UserError: a line is not an object with a text.
    """
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    return [
        decode_json(line, Text, f"{path}, line {number}").text
        for number, line in enumerate(lines, 1)
    ]


def named(text: str) -> tuple[str, Path]:
    """Split NAME=TEXTS.jsonl; some names stand for other tasks."""
    name, equals, path = text.partition("=")
    if not (name.isidentifier() and equals and name not in ("sums", *GROUPS)):
        raise ArgumentTypeError(
            f"{text} is not NAME=TEXTS.jsonl, where NAME is not sums, {' or '.join(GROUPS)}"
        )
    return name, Path(path)


def main(arguments: list[str]) -> None:
    """Write the tasks."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="directory")
    parser.add_argument("texts", type=named, nargs="*", metavar="NAME=TEXTS.jsonl")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    write_task(args.output, "sums", sums(random.Random(1)), EXAMPLES, "acc")
    for name, path in args.texts:
        words = next_words(read_texts(path), random.Random(1))
        write_task(args.output, name, words, 0, "acc_norm")


if __name__ == "__main__":
    import sys

    with exit_on_user_error():
        main(sys.argv[1:])
