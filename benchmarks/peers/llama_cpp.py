"""llama.cpp's own server, started in this process by xllamacpp's wheel and asked over HTTP, a thread for each request.

Its native ``/completion`` tells token ids; the HTTP of 2 x 32 short messages a step is a small part of a millisecond
each.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Sequence
from http.client import HTTPConnection
from urllib.parse import urlsplit

from benchmarks.peers.driver import Spec, serve


class LlamaCpp:
    def __init__(self, spec: Spec) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = spec.model
        params.n_parallel = spec.max_requests
        params.n_ctx = spec.max_requests * spec.max_length
        params.n_batch = params.n_ubatch = spec.max_step_tokens
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = spec.threads
        params.n_threads_http = spec.max_requests + 2
        params.cache_prompt = False
        params.cache_ram_mib = 0
        params.kv_unified = False
        if spec.options.get("kv") == "f32":
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(params)
        url = urlsplit(self._server.listening_address)
        assert url.hostname is not None and url.port is not None
        self._host, self._port = url.hostname, url.port
        self._new: queue.SimpleQueue[tuple[int, Sequence[int]] | Exception] = queue.SimpleQueue()

    def add(self, request: int, prompt: Sequence[int], num_output: int) -> None:
        body = {
            "prompt": list(prompt),
            "n_predict": num_output,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": True,
        }
        threading.Thread(target=self._stream, args=(request, body, num_output), daemon=True).start()

    def step(self) -> list[tuple[int, Sequence[int]]]:
        new = self._new.get()
        if isinstance(new, Exception):
            raise new
        return [new]

    def _stream(self, request: int, body: dict[str, object], num_output: int) -> None:
        num_made = 0
        connection = HTTPConnection(self._host, self._port, timeout=600)
        try:
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                if response.status != 200:
                    raise RuntimeError(f"llama.cpp answers {response.status}: {response.read(500)!r}")
                for line in response:
                    if line.startswith(b"data: {"):
                        tokens = json.loads(line[6:]).get("tokens", [])[: num_output - num_made]
                        num_made += len(tokens)
                        if tokens:
                            self._new.put((request, tokens))
            if num_made < num_output:
                raise RuntimeError(f"llama.cpp made {num_made} of {num_output} tokens")
        except Exception as error:
            self._new.put(error)
        finally:
            connection.close()


if __name__ == "__main__":
    serve(LlamaCpp, ["xllamacpp"])
