"""Serves the page of `fastvlm chat` in a thread, and asks it as a browser does, without one."""

import contextlib
import http.client
import json
import threading
import time
import urllib.parse

from fastvlm_jax.chat.server import make_app, make_server, open_port
from fastvlm_jax.chat.worker import Worker

MAX_TOKENS = 12  # of an answer of the tests' page


@contextlib.contextmanager
def served(answering, about):
    """The address of a page, and its worker."""
    worker, listening = Worker(answering), open_port(0)
    server = make_server(make_app(worker, about))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", worker
    server.should_exit = True
    thread.join()
    worker.stop()


def request(address, method, path, body=None, **headers):
    """(status, headers, body) of a response; the names of headers are written with underscores."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=120)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    found = response.status, dict(response.getheaders()), response.read()
    connection.close()
    return found


def upload(address, data, **headers):
    """(status, what the page tells of an image)."""
    status, _, body = request(
        address, "POST", "/image", data, **{"Content_Type": "application/octet-stream", **headers}
    )
    return status, json.loads(body)


def ask(address, turns, conversation="c", **fields):
    """(status, events) of a question; `turns` are (role, text, digests of images)."""
    turns = [{"role": role, "text": text, "images": images} for role, text, *images in turns]
    turns = [turn | {"images": turn["images"][0] if turn["images"] else []} for turn in turns]
    body = json.dumps({"conversation": conversation, "turns": turns, **fields})
    status, _, body = request(address, "POST", "/answer", body, Content_Type="application/json")
    return status, [json.loads(line) for line in body.splitlines()]


def text_of(events):
    return "".join(event.get("text", "") for event in events)


class Endless:
    """Writes without end, in place of a model."""

    def __init__(self):
        self.ended = threading.Event()

    def answer(self, question):
        try:
            yield {"first": {"seconds": {}, "prompt_tokens": 9, "image_tokens": 0, "kept_tokens": 0}}
            while question.conversation != "short":
                time.sleep(0.01)
                yield {"text": "a"}
        finally:
            if question.conversation != "short":
                self.ended.set()
