"""References of every kind: streamed from the host, in larger batches, several, moving averages."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.test_layouts import LAYOUTS
from distributed.test_score_cache import RUN, TAGS, records, resume, run_arguments, train
from torch import Tensor

import oracle
from forked_jobs import Server
from jobs import STEPS, Checkpoints, Corpus, from_own_checkpoint, write_dataset
from launch import pretrain
from megatron_slm.data.token_dump import read_dumps
from real_text import docstrings


@pytest.mark.parametrize("layout", ["one rank", "pp2", "tp2 sp"])
def test_how_it_is_scored_does_not_matter(
    layout: str, corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """Weights that come from the host, batches of two micro-batches: the same training."""
    ranks, flags = LAYOUTS[layout]
    of = f"--slm-reference-load {untied.reference} {flags}"
    plain = train(corpus, untied, tmp_path / "plain", of, ranks)
    streamed = train(corpus, untied, tmp_path / "host", f"{of} --slm-reference-offload", ranks)
    larger = "--slm-reference-offload --slm-reference-micro-batch-size 6"
    joined = train(corpus, untied, tmp_path / "joined", f"{of} {larger}", ranks)
    for tag in TAGS:
        assert streamed.scalars(tag) == plain.scalars(tag)
        assert joined.scalars(tag) == pytest.approx(plain.scalars(tag), rel=1e-5, abs=1e-5)
    shares = plain.scalars("reference time share")
    assert len(shares) == 5 and all(0.0 < share < 1.0 for share in shares.values())
    assert "reference time share" in plain.outputs[-1]


def test_several_references(corpus: Corpus, untied: Checkpoints, tmp_path: Path) -> None:
    """The mean of all, or for each dataset of a blend its own; the policy is one of them."""
    prefix = tmp_path / "email_text_document"
    write_dataset(prefix, docstrings(["argparse", "email/message", "email/policy"]))
    blend = Corpus(corpus.prefix)
    arguments = blend.arguments
    at = arguments.index("--data-path")
    arguments[at + 1 : at + 2] = ["0.5", str(corpus.prefix), "0.5", str(prefix)]
    first, second = untied.reference, untied.policy

    def said(name: str, references: str) -> list[dict[str, Any]]:
        # The slice of domains, which is random selection's and costs no pass, is not of interest.
        line = [*arguments, *untied.without_reference, *RUN.split(), "--slm-token-ratio", "0.6"]
        line += ["--slm-domain-ratio", "email=0.5", "--slm-reference-load", *references.split()]
        module = "recorded_pretrain"
        return records(pretrain(1, line, tmp_path / name, module=module))

    of_first = said("first", f"{first}")
    of_second = said("second", f"{second}")
    of_both = said("both", f"{first} {second}")
    by_domain = said("by domain", f"{corpus.prefix.name}={first} email={second}")
    seen = set()
    # The first step, in which the policy is still the same.
    for one, two, both, own in zip(
        *(x[:4] for x in (of_first, of_second, of_both, by_domain)), strict=True
    ):
        assert not torch.equal(one["reference"], two["reference"])
        mean = (one["reference"] + two["reference"]) / 2
        torch.testing.assert_close(both["reference"], mean, rtol=0.0, atol=1e-6)
        for row, domain in enumerate(own["domains"].tolist()):
            expected = (one, two)[domain]["reference"][row]
            assert torch.equal(own["reference"][row], expected)
            seen.add(domain)
    assert seen == {0, 1}


def weights(checkpoint: Path) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        model = oracle.llama(checkpoint, Path(scratch), heads=4, groups=2, tied=False)
    return model.state_dict()


@pytest.mark.parametrize("layout", ["one rank", "dp2", "tp2 sp", "pp2"])
def test_moving_average(layout: str, corpus: Corpus, untied: Checkpoints, tmp_path: Path) -> None:
    """What is saved is the average of the weights before each step; a resumed run goes on with it
    bit for bit."""
    decay, steps = 0.8, 4
    ranks, flags = LAYOUTS[layout]
    saved = tmp_path / "saved"
    line = f"--slm-reference ema:{decay} --save {saved} --save-interval 1 {flags}"
    # With dumps beside the checkpoints; the resumed run has none, and goes on the same.
    straight = train(corpus, untied, tmp_path / "straight", f"{line} --slm-dump-interval 1", ranks)
    learning = [dump.reference_losses for dump in read_dumps(saved / "dump")]
    assert len(learning) == STEPS + 1
    assert all(one.mean() > other.mean() for one, other in itertools.pairwise(learning[1:]))
    average = weights(untied.policy / "iter_0000002")
    for step in range(1, steps):
        current = weights(saved / f"iter_{step:07d}")
        average = {
            name: decay * value + (1.0 - decay) * current[name] for name, value in average.items()
        }
        now = weights(saved / "ema" / f"iter_{step + 1:07d}")
        for name, value in now.items():
            torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-7)
    files = list((saved / "ema" / "iter_0000004").glob("*.distcp"))
    written = [
        sum(file.stat().st_size for file in files if file.name[2] == str(rank))
        for rank in range(ranks)
    ]
    assert min(written) > sum(written) / (2 * ranks)  # replicas share out the writing
    # The average lags behind the policy, which is getting better.
    assert straight.scalars("excess loss")[4] < straight.scalars("excess loss")[1]
    (saved / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = resume(corpus, untied, saved, tmp_path / "resumed", line, ranks=ranks)
    for tag in TAGS:
        assert resumed.scalars(tag) == {i: v for i, v in straight.scalars(tag).items() if i > 3}


def test_an_earlier_checkpoint_of_the_same_run(
    corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """As any other reference, while the run saves beside it."""
    saved = tmp_path / "saved"
    line = f"--save {saved} --save-interval 2"
    extra = f"--slm-reference-load {untied.reference} {line} --exit-interval 2"
    train(corpus, untied, tmp_path / "began", extra)
    extra = f"--slm-reference-load {saved} --slm-reference-ckpt-step 2 {line}"
    run = resume(corpus, untied, saved, tmp_path / "resumed", extra)
    assert run.scalars("excess loss")[5] < run.scalars("excess loss")[3]
    # The policy itself, so far.
    (first, *_) = records(run)
    assert (first["scores"] == 0.0).all()


@pytest.mark.parametrize("layout", ["dp2", "tp2 dp2", "moving average"])
def test_ranks_share_out_the_reading(
    layout: str, server: Server, corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """With Megatron's flag, replicas read different parts of the reference, and load the same
    values as if each had read all of its own."""
    extra = "--ckpt-fully-parallel-load --train-iters 1 --eval-iters 0"
    if layout == "moving average":
        # Any checkpoint can be an average: here it is the policy that the run resumes from.
        where = tmp_path / "saved" / "ema"
        where.parent.mkdir()
        where.symlink_to(untied.policy)
        for path in untied.policy.iterdir():
            (where.parent / path.name).symlink_to(path)
        arguments = run_arguments(corpus, untied, f"{extra} --slm-reference ema:0.9")
        arguments = from_own_checkpoint(arguments, where.parent)
        arguments += "--no-load-optim --no-load-rng --train-iters 3".split()
    else:
        where = untied.reference
        arguments = run_arguments(corpus, untied, f"{extra} --slm-reference-load {where}")
    width = 1
    if layout == "tp2 dp2":
        arguments += "--tensor-model-parallel-size 2".split()
        arguments += "--ckpt-fully-parallel-load-process-group ep_dp".split()
        width = 2
    server.run("record reads", 2 * width, arguments, tmp_path)
    found = []
    for rank in range(2 * width):
        loads = json.loads((tmp_path / "reads" / f"rank{rank}.json").read_text())
        (reference,) = [one for one in loads if Path(one["directory"]).is_relative_to(where)]
        found.append(reference)
    for one, other in zip(found[:width], found[width:], strict=True):
        assert one["alone"] == other["alone"] == sorted(one["own"] + other["own"])
        assert min(len(one["own"]), len(other["own"])) > len(one["alone"]) / 4
