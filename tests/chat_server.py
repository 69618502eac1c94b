"""A server that speaks OpenAI's chat protocol over real sockets, and misbehaves when it is told to."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the server does with one request."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    sent: int | None = None  # bytes of the body before the connection is closed; None: all of it
    wait: threading.Event | None = None  # held back until then; with `sent`, after those bytes


def chat(text: str | None, *, finish_reason: str = "stop", usage: tuple[int, int] | None = (100, 20)) -> Reply:
    """A chat completion."""
    found: dict[str, Any] = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "served-model",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}],
    }
    if usage is not None:
        found["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return Reply(body=json.dumps(found).encode())


def fault(status: int, message: str = "told", code: str | None = None, **headers: str) -> Reply:
    """An error, as the protocol has it; headers with underscores for hyphens."""
    body = json.dumps({"error": {"message": message, "type": "error", "code": code}}).encode()
    return Reply(status=status, body=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


class ChatServer:
    """Answers on a port of its own, as a context manager. `respond` gets the number of the request and what it asks."""

    def __init__(self, respond: Callable[[int, dict[str, Any]], Reply]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_a_time = 0
        self._respond = respond
        self._at_a_time = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        ours = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                ours._answer(self)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that was killed

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def prompts(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        assert handler.path == "/v1/chat/completions"
        with self._lock:
            number = len(self.requests)
            self.requests.append(asked)
            self.keys.append(handler.headers["Authorization"])
            self._at_a_time += 1
            self.most_at_a_time = max(self.most_at_a_time, self._at_a_time)
        try:
            reply = self._respond(number, asked)
            if reply.sent is None:
                self._hold(reply)
        finally:
            with self._lock:
                self._at_a_time -= 1
        handler.send_response(reply.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(reply.body)), **reply.headers}
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(reply.body[: reply.sent])
        if reply.sent is not None:
            handler.wfile.flush()
            self._hold(reply)
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)

    def _hold(self, reply: Reply) -> None:
        while reply.wait is not None and not reply.wait.wait(0.02) and not self._stopped.is_set():
            pass
