"""Fine-tuning on conversations, against transformers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launch import REPOSITORY, Run, pretrain, recipe_environment
from megatron_slm.data.token_dump import read_dumps
from megatron_slm.model.conversion.import_hf import import_hugging_face
from megatron_slm.selection import kept_by_goldfish
from real_text import docstrings

SEQUENCE = 96


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Llama with a byte-level tokenizer of its own."""
    directory = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(docstrings(["argparse"]), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=384,  # a multiple of 128: no padding takes part in the softmax
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    import_hugging_face(directory, directory / "megatron", 128)
    return directory


def write_conversations(file: Path, conversations: list[list[dict[str, str]]]) -> None:
    file.write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations))


def finetune(
    llama: Path,
    conversations: list[list[dict[str, str]]],
    directory: Path,
    extra: str = "--sft-tokenizer-prompt-format identity",
) -> Run:
    directory.mkdir(exist_ok=True)
    data = directory / "data.jsonl"
    write_conversations(data, conversations)
    arguments = f"""
        --load {llama / "megatron"} --finetune --use-checkpoint-args --sft
        --tokenizer-type SFTTokenizer --tokenizer-model {llama}
        --train-data-path {data} --valid-data-path {data} {extra}
        --seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --micro-batch-size 1
        --global-batch-size {len(conversations)} --train-iters 1 --lr 1e-3 --eval-iters 1
        --eval-interval 100 --log-interval 1 --num-workers 0
    """
    return pretrain(1, arguments.split(), directory / "run", check=False)


SAID = [("What is 2 + 3?", "<s>5</s>"), ("def f(x): what does it do?", "<s>nothing</s>")]
CONVERSATIONS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in SAID
]


def mean_loss(llama: Path, packed: bool = False, goldfish: tuple[int, int] | None = None) -> float:
    """Of all tokens of the conversations, by transformers, each by itself; if they are packed, of
    the label that crosses from one to the next as well; without those that a hash leaves out."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    model = LlamaForCausalLM.from_pretrained(llama)
    total, count = 0.0, 0
    of_each = [torch.tensor(tokenizer.encode(question + answer)) for question, answer in SAID]
    for number, ids in enumerate(of_each):
        after = of_each[number + 1][:1] if packed and number + 1 < len(SAID) else ids[:0]
        labels = torch.cat([ids[1:], after])
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        losses = cross_entropy(logits[: len(labels)], labels, reduction="none")
        counted = labels != tokenizer.unk_token_id
        if goldfish is not None:
            counted &= kept_by_goldfish(labels[None], *goldfish)[0]
        total += losses[counted].sum().item()
        count += int(counted.sum())
    return total / count


def test_loss_of_conversations(llama: Path, tmp_path: Path) -> None:
    run = finetune(llama, CONVERSATIONS, tmp_path)
    assert run.codes == [0], run.outputs[0][-3000:]
    assert run.scalars("lm loss")[1] == pytest.approx(mean_loss(llama), rel=1e-5)


def test_the_recipe(llama: Path, tmp_path: Path) -> None:
    """examples/finetune_tora.sh, in bfloat16 and tensor-parallel, of an epoch a step."""
    write_conversations(tmp_path / "data.jsonl", CONVERSATIONS)
    own = {"DATA": tmp_path / "data.jsonl", "HF": llama, "BASE": llama / "megatron", "TP": 2}
    own |= {"SAVE": tmp_path / "save", "SAMPLES": 2, "BATCH": 2, "MICRO_BATCH": 1, "LR": 0.01}
    own |= {"SEQUENCE": SEQUENCE, "EXTRA": "--num-workers 0 --log-interval 1"}
    done = subprocess.run(
        ["bash", str(REPOSITORY / "examples" / "finetune_tora.sh")],
        env=recipe_environment(2, **own),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = Run(tmp_path / "save", [], []).scalars("lm loss")
    assert sorted(losses) == [1, 2, 3]
    assert losses[1] == pytest.approx(mean_loss(llama), rel=0.01)
    assert losses[3] < losses[2] == losses[1]  # the warm-up begins at 0
    assert (tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_packed_conversations(llama: Path, tmp_path: Path) -> None:
    """Several on a line do not see each other; system messages, here empty, start them."""
    begin = {"role": "system", "content": ""}
    packed = [message for one in CONVERSATIONS for message in (begin, *one)]
    extra = "--sft-tokenizer-prompt-format identity --slm-leave-out goldfish=3:4"
    run = finetune(llama, [packed], tmp_path, extra)
    assert run.codes == [0], run.outputs[0][-3000:]
    expected = mean_loss(llama, packed=True, goldfish=(3, 4))
    assert expected != pytest.approx(mean_loss(llama, packed=True), rel=1e-3)
    assert run.scalars("lm loss")[1] == pytest.approx(expected, rel=1e-5)


def test_dumps_have_the_tokens_of_prompts(llama: Path, tmp_path: Path) -> None:
    """Which Megatron masks by labels of -100."""
    extra = "--sft-tokenizer-prompt-format nemotron-nano-v2 --slm-token-ratio 0.5"
    extra += " --slm-score policy --slm-dump-interval 1 --slm-dump-dir dump --slm-dump-samples 2"
    system = {"role": "system", "content": "be brief"}
    run = finetune(llama, [[system, *one] for one in CONVERSATIONS], tmp_path, extra)
    assert run.codes == [0], run.outputs[0][-3000:]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    for tokens, (question, _) in zip(
        read_dumps(run.directory / "dump")[0].tokens, SAID, strict=True
    ):
        assert question in tokenizer.decode(tokens.tolist())
