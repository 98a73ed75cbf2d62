"""Serves the page on 127.0.0.1: the page itself, what it shows of the model, uploads of images, and answers.

GET  /        the page
GET  /model   what the model is
POST /image   an encoded image              ->  its digest
POST /answer  a conversation, as JSON       ->  events, a line of JSON each, as they happen
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fastvlm_jax.chat import uploads as uploading
from fastvlm_jax.chat.guard import refusal
from fastvlm_jax.chat.uploads import MissingUpload, Uploads, check_image, read_question
from fastvlm_jax.chat.worker import Job, Worker

PAGE = pathlib.Path(__file__).with_name("page.html")
AT_ONCE = 4  # uploads that are read at the same time
UPLOAD_SECONDS = 60.0  # longest upload
MAX_CONNECTIONS = 128


def policy(page: str) -> str:
    """Returns the Content-Security-Policy of a page, which runs its own script alone and asks its own server alone."""

    def digest(tag: str) -> str:
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        return base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; "
        "connect-src 'self'; img-src blob: data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


class Guard:
    """Refuses requests of other sites, and adds the headers that keep a browser strict to every response."""

    def __init__(self, app: Any, headers: dict[str, str]):
        self.app, self.headers = app, headers

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return

        async def send_strict(message):
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        why = refusal(Headers(scope=scope), scope["path"])
        await (_error(403, why) if why else self.app)(scope, receive, send_strict)


def make_app(worker: Worker, about: dict[str, Any]) -> Starlette:
    """Returns the application.

    Args:
      worker: answers the questions.
      about: JSON values that the page shows of the model.
    """
    page, uploads = PAGE.read_text(encoding="utf-8"), Uploads()
    reading = asyncio.Semaphore(AT_ONCE)
    decoder = concurrent.futures.ThreadPoolExecutor(1, "images")
    strict = {
        "content-security-policy": policy(page),
        "permissions-policy": "camera=(self), microphone=(), geolocation=()",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-store",
    }

    async def image(request: Request) -> Response:
        if request.headers.get("content-type") != "application/octet-stream":
            return _error(415, "an image is sent as application/octet-stream")
        async with reading:
            data = await _body(request, uploading.MAX_IMAGE)
            if isinstance(data, Response):
                return data
            try:
                picture = await asyncio.get_running_loop().run_in_executor(decoder, check_image, data)
            except ValueError as error:
                return _error(400, " ".join(str(error).split()))
            except MemoryError:
                return _error(413, "the memory of this machine is too small for the image")
        uploads.add(picture)
        return JSONResponse({"name": picture.name, "width": picture.size[0], "height": picture.size[1]})

    async def answer(request: Request) -> Response:
        if request.headers.get("content-type") != "application/json":
            return _error(415, "a question is sent as application/json")
        data = await _body(request, uploading.MAX_QUESTION)
        if isinstance(data, Response):
            return data
        try:
            question = read_question(data, uploads)
        except MissingUpload as error:
            return JSONResponse({"error": str(error), "missing": error.names}, 410)
        except ValueError as error:
            return _error(400, " ".join(str(error).split()))
        return StreamingResponse(_events(worker, question), media_type="application/x-ndjson")

    return Starlette(
        routes=[
            Route("/", lambda _: Response(page, media_type="text/html")),
            Route("/model", lambda _: JSONResponse(about)),
            Route("/image", image, methods=["POST"]),
            Route("/answer", answer, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, headers=strict)],
    )


def open_port(port: int) -> socket.socket:
    """Returns a socket that listens on a port of 127.0.0.1; 0 takes any that is free.

    Raises:
      OSError, ValueError: the port cannot be had; the message is one line.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port={port} must be from 0 to 65535; 0 takes any port that is free")
    # asyncio sends small pieces at once only on sockets that name TCP: else they wait for 40 ms.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # so that the command can be started again at once
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen()
        return listening
    except OSError as error:
        listening.close()
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had: {error.strerror}"
        raise ValueError(f"--port={port}: port {port} of 127.0.0.1 {reason}: give another, or 0 for any") from error


def make_server(app: Starlette) -> uvicorn.Server:
    """Returns a server for the application; `run(sockets=[socket])` serves until Ctrl-C or `should_exit`."""
    return uvicorn.Server(
        uvicorn.Config(
            app, http="h11", loop="asyncio", ws="none", lifespan="off", interface="asgi3", log_level="critical",
            access_log=False, proxy_headers=False, server_header=False, date_header=False,
            limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=1,
        )
    )  # fmt: skip


async def _body(request: Request, limit: int) -> bytes | Response:
    """Returns the body of a request, or what refuses one that is too large or too slow, before more of it is read."""
    length = request.headers.get("content-length", "0")
    too_large = _error(413, f"it is over {_size(limit)}, the most that is taken")
    if not length.isascii() or not length.isdigit() or len(length) > 18 or int(length) > limit:
        return too_large
    parts, count = [], 0
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for part in request.stream():
                count += len(part)
                if count > limit:
                    return too_large
                parts.append(part)
    except TimeoutError:
        return _error(408, f"it took longer than {UPLOAD_SECONDS:.0f} s to arrive")
    except ClientDisconnect:
        return _error(400, "it was not sent whole")
    return b"".join(parts)


async def _events(worker: Worker, question: Any) -> AsyncIterator[str]:
    """Yields the events of an answer as lines of JSON; when the client goes away, the answer ends."""
    loop, inbox = asyncio.get_running_loop(), asyncio.Queue()

    def tell(event: dict[str, Any] | None) -> None:
        with contextlib.suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(inbox.put_nowait, event)

    job = Job(question, tell)
    try:
        try:
            yield _line({"ahead": worker.ask(job)})
        except ValueError as error:
            yield _line({"error": str(error)})
            return
        while (event := await inbox.get()) is not None:
            yield _line(event)
    finally:
        job.gone.set()


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event) + "\n"


def _size(count: int) -> str:
    return f"{count >> 20} MB" if count >= 1 << 20 else f"{count >> 10} KB"


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)
