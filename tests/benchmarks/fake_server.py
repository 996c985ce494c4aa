"""A chat server that answers by the word in the prompt, in a thread of its own; nothing in it sleeps."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NUM_INPUT = 7


class FakeServer(ThreadingHTTPServer):
    """``bodies`` and ``keys`` hold what came; ``release`` ends the streams of prompts that say ``hang``."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def fake_server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.release.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers["authorization"])
        prompt = body["messages"][0]["content"]
        if prompt == "refuse":
            self.send_error(429)
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("x-fairserve-queue-ms", "250")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._stream(prompt, body["max_tokens"])

    def _stream(self, prompt: str, num_output: int) -> None:
        self._chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        if prompt == "hang":
            self.server.release.wait()
        if prompt == "fail":
            self._chunk(error={"message": "the replica died", "code": "replica_failed"})
            return
        if prompt == "break":
            return
        self._chunk(choices=[{"index": 0, "delta": {"content": "word"}, "finish_reason": None}])
        self._chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}])
        self._chunk(choices=[], usage={"prompt_tokens": NUM_INPUT, "completion_tokens": num_output})
        self.wfile.write(b"data: [DONE]\n\n")

    def _chunk(self, **fields: Any) -> None:
        self.wfile.write(f"data: {json.dumps(fields)}\n\n".encode())
        self.wfile.flush()
