"""Hold a preprocessing run's settings, and check and prepare all it needs before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from megatron_slm.corpus.cleaning.contamination import Contamination, read_evaluation_sets
from megatron_slm.corpus.cleaning.shingles import SHINGLES_VERSION
from megatron_slm.corpus.preprocessing.output_paths import OutputPaths
from megatron_slm.corpus.preprocessing.shard import shard_prefix
from megatron_slm.corpus.progress import announce
from megatron_slm.corpus.reading.chat import chat_renderer
from megatron_slm.corpus.reading.documents import Wanted
from megatron_slm.corpus.reading.input_files import find_files
from megatron_slm.corpus.reading.inputs import Task, import_for, plan_tasks
from megatron_slm.corpus.tokenizers.engines import check_engine
from megatron_slm.corpus.tokenizers.tokenizer_file import TokenizerFile, open_tokenizer
from megatron_slm.data.manifest_types import ReadingOptions, ShardOptions, TokenizerIdentity
from megatron_slm.errors import UserError
from megatron_slm.files import sha256_of

STAGES = ("all", "fingerprint", "duplicates", "tokenize")


@dataclass(frozen=True)
class PreprocessingSettings:
    """The command line of tools/preprocess_data.py, where every option is described."""

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer_model: str
    tokenizer_type: str | None = None
    json_keys: tuple[str, ...] = ("text",)
    filters: tuple[tuple[str, str], ...] = ()
    chat_template: str | None = None
    domain: str | None = None
    append_eod: bool = False
    prepend_bos: bool = False
    special_ids: bool = False
    engine: str = "auto"
    dedup: Literal["exact", "near"] | None = None
    decontaminate: tuple[str, ...] = ()
    max_reject_fraction: float = 1e-4
    workers: int = 1
    shard_size: int = 1 << 28
    merge: bool = True
    stage: str = "all"
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1 or self.shard_size < 1:
            raise UserError("--workers and --shard-size must be at least 1")
        if len(set(self.json_keys)) < len(self.json_keys):
            raise UserError("--json-keys names a key twice; each key makes one dataset")
        for key in self.json_keys:
            if "/" in key:
                raise UserError(
                    f"--json-keys {key}: a key is part of its dataset's file names, which cannot "
                    "have a slash: give the field another name in the input"
                )
        if not 0 <= self.max_reject_fraction <= 1:
            raise UserError("--max-reject-fraction is a part of all documents, from 0 to 1")
        if not 0 <= self.rank < self.world_size:
            raise UserError("--rank counts from 0 to --world-size - 1")
        if self.world_size > 1 and self.stage == "all":
            raise UserError("--world-size needs --stage: every rank does its part of one stage")
        if "-" in self.inputs and self.stage != "all":
            raise UserError(
                "--input -: stages and ranks do not share standard input; write it to a file"
            )
        if self.stage in ("fingerprint", "duplicates") and self.dedup is None:
            raise UserError(f"--stage {self.stage} needs --dedup")


@dataclass(frozen=True)
class Setup:
    """What a run knows before it starts."""

    settings: PreprocessingSettings
    layout: OutputPaths
    tasks: list[Task]
    file: TokenizerFile
    contamination: Contamination | None
    options: ShardOptions
    """Options that manifests record."""

    @property
    def own(self) -> list[Task]:
        """This rank's tasks."""
        return self.tasks[self.settings.rank :: self.settings.world_size]


def prepare(settings: PreprocessingSettings, layout: OutputPaths) -> Setup:
    """Read the inputs' names, the tokenizer and the evaluation sets, and check the options.

    Raises:
        UserError: one of them is wrong, or does not fit the others.
    """
    layout.remove_leftovers()
    if settings.dedup == "near":
        import_for("--dedup near", "rensa")
    inputs = [layout.spool_stdin() if name == "-" else name for name in settings.inputs]
    aside = [settings.tokenizer_model, settings.chat_template, *settings.decontaminate]
    files = find_files(inputs, settings.output_prefix, [path for path in aside if path])
    tasks = plan_tasks(files, settings.shard_size)
    if not settings.merge:
        refuse_spaces(layout, tasks)
    file = open_tokenizer(settings.tokenizer_model, settings.tokenizer_type)
    check_engine(settings.engine, file, settings.special_ids)
    if settings.append_eod and file.eod is None:
        raise UserError("--append-eod: the tokenizer has no end-of-document token")
    if settings.prepend_bos and file.bos is None:
        raise UserError("--prepend-bos: the tokenizer has no token that begins a document")
    if not settings.append_eod and file.eod is not None and settings.stage in ("all", "tokenize"):
        announce("no --append-eod: no token marks where a document ends and the next begins")
    contamination = read_evaluation_sets(settings.decontaminate) if settings.decontaminate else None
    if contamination is not None and contamination.too_short:
        announce(f"{contamination.too_short} evaluation texts are too short to be looked for")
    name = Path(settings.tokenizer_model).name
    options = ShardOptions(
        **msgspec.structs.asdict(reading_options(settings)),
        tokenizer=TokenizerIdentity(name, file.sha256, file.vocab_size),
        domain=settings.domain,
        append_eod=file.eod if settings.append_eod else None,
        prepend_bos=file.bos if settings.prepend_bos else None,
        special_tokens_in_text="ids" if settings.special_ids else "text",
        decontaminate=None if contamination is None else contamination.sha256,
    )
    return Setup(settings, layout, tasks, file, contamination, options)


def refuse_spaces(layout: OutputPaths, tasks: Sequence[Task]) -> None:
    """Refuse spaces in paths of a list for Megatron, before hours of work make it.

    Raises:
        UserError: a path would have a space.
    """
    for task in tasks:
        for key in layout.keys:
            path = str(shard_prefix(layout.shards, task.name, key))
            if path.split() != [path]:
                raise UserError(
                    f"--no-merge: {path} would have a space, which Megatron takes for the end of a "
                    "path: rename the input file, the key or the output, or merge"
                )


def reading_options(settings: PreprocessingSettings) -> ReadingOptions:
    """Return the options that decide which texts are read."""
    template = settings.chat_template
    wanted_of(settings)  # raises an error if the template is wrong
    words = settings.dedup == "near" or settings.decontaminate
    return ReadingOptions(
        json_keys=list(settings.json_keys),
        filters=list(settings.filters),
        chat_template=None if template is None else sha256_of(Path(template)),
        dedup=settings.dedup,
        words=SHINGLES_VERSION if words else None,
    )


def wanted_of(settings: PreprocessingSettings) -> Wanted:
    """Return which records to take, and which texts in them."""
    template = settings.chat_template
    render = None if template is None else chat_renderer(template)
    return Wanted(settings.json_keys, settings.filters, render)
