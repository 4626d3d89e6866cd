"""A server on loopback shaped like OpenAI's and vLLM's, whose model is a real tiny one, so that what comes back can be checked against its logits.

Like OpenAI's it gives at most 20 top log-probabilities, of generated tokens only; with `vllm=True` it knows `prompt_logprobs` too. Faults are taken from a
list, one for each request: a status with headers, "cut" (the connection ends), "garbage" (no JSON), "half" (JSON without choices), "slow".
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class FakeApi:
    """State of the server: its model, what it is to do wrong, and what it was asked."""

    def __init__(self, folder: Path, *, vllm: bool = False, key: str | None = None) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.vllm, self.key = vllm, key
        self.faults: list[Any] = []
        self.drop_logprobs = self.without_bytes = self.without_usage = False
        self.most_logprobs = 20
        self.wants_completion_limit = self.lists_models = False
        self.answer_with: Callable[[dict[str, Any]], tuple[str, str]] | None = None
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.slow_seconds = 0.0
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.url = ""

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The requests that were no probe."""
        return [
            body
            for body in self.requests
            if "Say hello." not in json.dumps(body) and body.get("prompt") not in ("Hello there,", "Hello there, my dear friend.")
        ]

    # answers

    def refusal(self, body: dict[str, Any]) -> str | None:
        asked = body.get("top_logprobs") or (body.get("logprobs") if isinstance(body.get("logprobs"), int) and body.get("logprobs") is not True else 0) or 0
        if asked > self.most_logprobs:
            return f"Invalid value for 'top_logprobs': must be at most {self.most_logprobs}."
        if "prompt_logprobs" in body and not self.vllm:
            return "Unrecognized request argument supplied: prompt_logprobs"
        if self.wants_completion_limit and "max_tokens" in body:
            return "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        return None

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Of the next token at each place, over the tokens that have a name."""
        return torch.log_softmax(self.model(torch.tensor([ids])).logits[0, :, : len(self.tokenizer)].float(), -1)

    @torch.no_grad()
    def answer(self, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        scoring = body.get("prompt_logprobs")
        if chat:
            text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=body.get("add_generation_prompt", True))
            if body.get("continue_final_message"):
                text = text.removesuffix("<|im_end|>\n")
        else:
            text = body["prompt"]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        limit = int(body.get("max_completion_tokens") or body.get("max_tokens") or 16)
        logprobs_TV = self.logprobs(ids)
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        if self.answer_with is not None and not scoring:
            said, finish = self.answer_with(body)
            usage["completion_tokens"] = len(self.tokenizer(said)["input_ids"]) if said else 0
            return self._wrapped(chat, said, finish, None, usage)
        if scoring:
            listed: list[Any] = [None]
            for place in range(1, len(ids)):
                top = logprobs_TV[place - 1].topk(scoring)
                entries = {ids[place]: float(logprobs_TV[place - 1, ids[place]])} | {int(i): float(v) for v, i in zip(*top, strict=True)}
                listed.append({str(i): {"logprob": v, "rank": 1, "decoded_token": self.tokenizer.decode([i])} for i, v in entries.items()})
            whole = self._wrapped(chat, "x", "length", None, usage)
            (whole if chat else whole["choices"][0])["prompt_logprobs"] = listed
            return whole
        new: list[int] = []
        rows: list[torch.Tensor] = []
        while len(new) < limit:
            row = self.logprobs(ids + new)[-1]
            token = int(row.argmax())
            if token == self.tokenizer.eos_token_id:
                break
            new.append(token)
            rows.append(row)
        usage |= {"completion_tokens": len(new), "total_tokens": len(ids) + len(new)}
        top = body.get("top_logprobs") if chat else body.get("logprobs")
        logprobs = self._logprobs(new, rows, int(top or 0), chat) if top and not self.drop_logprobs else None
        return self._wrapped(chat, self.tokenizer.decode(new), "length" if len(new) == limit else "stop", logprobs, usage)

    def _logprobs(self, ids: list[int], rows: list[torch.Tensor], top: int, chat: bool) -> dict[str, Any]:
        def entry(token: int, value: float) -> dict[str, Any]:
            raw = token_bytes(self.tokenizer, token)
            return {"token": raw.decode("utf-8", "replace"), "bytes": None if self.without_bytes else list(raw), "logprob": value}

        tops = [[(int(i), float(v)) for v, i in zip(*row.topk(top), strict=True)] for row in rows]
        if chat:
            content = [{**entry(i, float(row[i])), "top_logprobs": [entry(*pair) for pair in best]} for i, row, best in zip(ids, rows, tops, strict=True)]
            return {"content": content}
        return {
            "tokens": [token_bytes(self.tokenizer, i).decode("utf-8", "replace") for i in ids],
            "token_logprobs": [float(row[i]) for i, row in zip(ids, rows, strict=True)],
            "top_logprobs": [{token_bytes(self.tokenizer, i).decode("utf-8", "replace"): v for i, v in best} for best in tops],
        }

    def _wrapped(self, chat: bool, text: str, finish: str, logprobs: Any, usage: dict[str, int]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if logprobs is not None:
            choice["logprobs"] = logprobs
        return {"id": "1", "object": "x", "created": 0, "model": "tiny", "choices": [choice]} | ({} if self.without_usage else {"usage": usage})


@functools.cache
def _letters() -> dict[str, int]:
    """Byte-level letters by the tokenizers library itself rather than by the code under test."""
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found: dict[str, int] = {}
    for character in map(chr, [*range(0x800), *range(0x800, 0x10000, 0x700), *range(0x10000, 0x110000, 0x10000)]):
        if not "\ud800" <= character <= "\udfff":
            found |= dict(zip(split.pre_tokenize_str(character)[0][0], character.encode(), strict=True))
    return found


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes of a token of a byte-level tokenizer."""
    name = tokenizer.convert_ids_to_tokens(token)
    return name.encode() if token in tokenizer.added_tokens_decoder else bytes(_letters()[letter] for letter in name)


@contextmanager
def serving(state: FakeApi) -> Iterator[FakeApi]:
    """Serve on a free port of 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def _authorised(self) -> bool:
            given = self.headers.get("Authorization", "")
            if state.key and given != f"Bearer {state.key}":
                self._send(401, {"error": {"message": f"Incorrect API key provided: {given}"}})
                return False
            return True

        def do_GET(self) -> None:
            if self._authorised():
                listed = {"object": "list", "data": [{"id": "tiny", "object": "model"}]}
                self._send(200, listed) if self.path.endswith("/models") and state.lists_models else self._send(404, {"error": {"message": "nothing here"}})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._authorised():
                return
            with state.lock:
                state.requests.append(body)
                state.headers.append(dict(self.headers))
                state.times.append(time.monotonic())
                state.under_way += 1
                state.most_under_way = max(state.most_under_way, state.under_way)
                fault = state.faults.pop(0) if state.faults else None
            try:
                self._answer(body, fault)
            finally:
                with state.lock:
                    state.under_way -= 1

        def _answer(self, body: dict[str, Any], fault: Any) -> None:
            time.sleep(state.slow_seconds)
            if isinstance(fault, tuple):
                self._send(fault[0], {"error": {"message": fault[2] if len(fault) > 2 else "try later"}}, fault[1])
            elif fault == "cut":
                self.send_response(200)
                self.send_header("Content-Length", "5000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.close_connection = True
            elif fault == "garbage":
                self._send(200, b'{"choices": [{"mess')
            elif fault == "half":
                self._send(200, {"id": "1", "choices": []})
            elif fault == "slow":
                time.sleep(3)
                self._send(200, state.answer(body, "messages" in body))
            elif body.get("model") != "tiny":
                self._send(404, {"error": {"message": f"The model '{body.get('model')}' does not exist"}})
            elif refusal := state.refusal(body):
                self._send(400, {"error": {"message": refusal}})
            else:
                with state.lock:
                    answer = state.answer(body, self.path.endswith("/chat/completions"))
                self._send(200, answer)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving_bytes(body: bytes) -> Iterator[str]:
    """Answer every question with these bytes, and yield the base URL."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
