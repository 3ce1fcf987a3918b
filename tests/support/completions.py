"""A server that speaks the completions protocol for a real transformers model.

As vLLM does where it takes token ids; with `text_only` as llama-cpp-python does: text alone, whose
first token it puts before the text and does not list.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from tokenizers import Tokenizer


class Model:
    """What the server answers with."""

    def __init__(self, model: Any, tokenizer: Tokenizer, bos: int, text_only: bool) -> None:
        self.model, self.tokenizer, self.bos, self.text_only = model, tokenizer, bos, text_only
        self.size = tokenizer.get_vocab_size()  # without padding of the model's vocabulary
        self.lock = threading.Lock()
        self.requests = 0
        self.fail_every = 0  # every so many requests are answered by 503
        self.cut_every = 0  # the connection breaks off in every so many answers
        self.shift = 0  # by how many places losses of prompts are wrong

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        prompt = body["prompt"]
        if self.text_only == isinstance(prompt, list):
            return 422, {"error": "prompt: Input should be a valid string"}
        listed = prompt
        if isinstance(prompt, str):
            listed = self.tokenizer.encode(prompt, add_special_tokens=False).ids
            prompt = [self.bos, *listed]
        with self.lock, torch.inference_mode():
            logits = self.model(torch.tensor([prompt])).logits[0].float()[:, : self.size]
        best = int(logits[-1].argmax())
        rows = logits.log_softmax(-1)
        whole = [*prompt, best]
        values = [None, *(float(rows[at, whole[at + 1]]) for at in range(len(prompt)))]
        start = len(whole) - len(listed) - 1 if body["echo"] else len(prompt)
        if body["echo"]:
            values = [None] * self.shift + values
        values = values[start : len(whole)]
        words = [self.tokenizer.decode([each], skip_special_tokens=False) for each in whole[start:]]
        text = self.tokenizer.decode([best], skip_special_tokens=False)
        return 200, {
            "choices": [{"text": text, "logprobs": {"tokens": words, "token_logprobs": values}}],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": 1},
        }


@contextmanager
def completions_server(model: Model) -> Iterator[str]:
    """Serve a model while the block lasts; yield the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": "tiny"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with model.lock:
                model.requests += 1
                fails = model.fail_every and model.requests % model.fail_every == 0
                cut = model.cut_every and model.requests % model.cut_every == 0
            self.reply(*((503, {"error": "busy"}) if fails else model.answer(body)), bool(cut))

        def reply(self, code: int, content: dict[str, Any], cut: bool = False) -> None:
            written = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(written)))
            self.end_headers()
            self.wfile.write(written[: len(written) // 2] if cut else written)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
