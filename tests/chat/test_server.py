"""The server of the page: many clients at once, hostile uploads and questions, foreign sites, clients that leave."""

import concurrent.futures
import io
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import numpy as np
import PIL.Image
import pytest
from command import fastvlm
from page_client import MAX_TOKENS, Endless, ask, request, served, text_of, upload
from paths import ROOT
from pictures import chunk, encode, every_format, png

from fastvlm_jax.chat import uploads as uploading
from fastvlm_jax.chat.guard import refusal
from fastvlm_jax.chat.uploads import MissingUpload, Uploads, check_image
from fastvlm_jax.chat.worker import Job, Worker
from fastvlm_jax.generate import generate
from fastvlm_jax.images.decode import decode


def picture(seed):
    return encode(PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)), format="PNG")


def test_eight_clients_at_once_get_eight_right_answers_in_two_turns_each(address, loaded):
    """Each has its own picture and its own question; half of the conversations have the same name."""
    images = [picture(100 + i) for i in range(8)]
    asked = ["is it red?", "what color is it?", "what is it?", "no"] * 2

    def client(number):
        status, told = upload(address, images[number])
        assert (status, told["width"], told["height"]) == (200, 8, 8)
        turns, texts = [], []
        for text in (asked[number], "is it no?"):
            turns.append(("user", text, [told["name"]]) if not turns else ("user", text))
            status, events = ask(address, turns, f"client{number // 2 if number < 4 else number}")
            assert status == 200 and "done" in events[-1], events
            texts.append(text_of(events))
            turns.append(("assistant", texts[-1]))
        return texts

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(client, range(8)))
    expected = []
    for number, image in enumerate(images):
        talk, texts = [], []
        for content in ((0, asked[number]), ("is it no?",)):
            talk.append(("user", content))
            texts += generate(*loaded, [image], [talk], max_tokens=MAX_TOKENS)
            talk.append(("assistant", (texts[-1],)))
        expected.append(texts)
    assert found == expected and len({first for first, _ in found}) == 8


def test_events_tell_what_happens_in_its_order(address):
    name = upload(address, picture(50))[1]["name"]
    _, events = ask(address, [("user", "is it red?", [name])], "events")
    kinds = [next(iter(event)) for event in events]
    assert kinds[:5] == ["ahead", "doing", "doing", "doing", "first"] and set(kinds[5:-1]) == {"text"}
    assert [event["doing"] for event in events[1:4]] == ["decode, resize", "encoder", "prefill"]
    first, done = events[4]["first"], events[-1]["done"]
    assert {"queue", "tokenize", "decode, resize", "encoder", "prefill"} <= set(first["seconds"])
    assert all(seconds >= 0 for seconds in first["seconds"].values())
    assert first["image_tokens"] == 4 < first["prompt_tokens"] and first["kept_tokens"] == 0
    assert done["tokens"] == MAX_TOKENS and done["cut"] is True and done["seconds"] > 0


def hostile():
    """100 files that are no images, lie about themselves, or are damaged."""
    rng = random.Random(0)
    whole = [data for _, data, *_ in every_format()]
    header = b"\x89PNG\r\n\x1a\n"
    sizes = [(60_000, 60_000), (40_000, 1), (0, 10), (10_001, 10_000), (2**31 - 1, 2**31 - 1)]
    found = [header + chunk(b"IHDR", np.array(size, ">u4").tobytes() + b"\x08\2\0\0\0") for size in sizes]
    found += [b"", b"\0", b"GIF89a", header, b"\xff\xd8\xff", b"BM", b"II*\0" * 9, b"RIFF\0\0\0\0WEBP", b"%PDF-1.7"]
    found += [b"<svg onload='alert(1)'/>", b"<script>alert(1)</script>", b"\0\0\0\x18ftypheic" + bytes(50)]
    found += [b"version https://git-lfs.github.com/spec/v1\noid sha256:0", b"PK\3\4" + bytes(99), b"\x80\4K\1."]
    found += [png(np.zeros((9, 9, 3)), 8, 2)[:-20], header + chunk(b"tEXt", b"a" * 1000) * 99]
    while len(found) < 100:
        data = bytearray(rng.choice(whole))
        if rng.random() < 0.5:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.choice((1, 3, 30))):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        found.append(bytes(data))
    return found


def readable(data):
    try:
        decode(data)
    except ValueError:
        return False
    return True


def test_100_hostile_uploads_are_refused_in_a_line_and_none_harms_the_server(address):
    refused = 0
    for data in hostile():
        status, told = upload(address, data)
        assert status == (200 if readable(data) else 400), data[:60]
        if status == 400:
            refused += 1
            assert list(told) == ["error"] and 10 < len(told["error"]) < 300 and "\n" not in told["error"]
    assert refused > 60
    name = upload(address, picture(1))[1]["name"]
    assert "done" in ask(address, [("user", "is it red?", [name])])[1][-1]


def raw(address, text, wait=True):
    """What comes back for bytes on a connection; without `wait`, the connection."""
    connection = socket.create_connection(("127.0.0.1", urllib.parse.urlsplit(address).port), timeout=30)
    connection.sendall(text)
    if not wait:
        return connection
    with connection, connection.makefile("rb") as file:
        return file.read()


def test_a_body_that_is_too_large_is_refused_before_it_is_read(address, monkeypatch):
    head = "POST /{} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/{}\r\n"
    image, question = head.format("image", "octet-stream"), head.format("answer", "json")
    for start, length, words in ((image, 64 << 20, b"over 64 MB"), (question, 512 << 10, b"over 512 KB")):
        got = raw(address, f"{start}Connection: close\r\nContent-Length: {length + 1}\r\n\r\n".encode())
        assert got.startswith(b"HTTP/1.1 413") and words in got
    assert raw(address, f"{image}Content-Length: -1\r\n\r\n".encode()).startswith(b"HTTP/1.1 400")
    monkeypatch.setattr(uploading, "MAX_IMAGE", 1000)  # without a length, as much as allowed is read
    chunks = b"3e8\r\n" + bytes(1000) + b"\r\n1\r\n0\r\n0\r\n\r\n"
    got = raw(address, f"{image}Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + chunks)
    assert got.startswith(b"HTTP/1.1 413")


USER = {"role": "user", "text": "is it red?"}
DIGEST = "0" * 64


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ('{"turns": NaN}', "not readable JSON"),
        ("\ud800", "not readable JSON"),
        ([], "no list of turns"),
        ({"turns": {}}, "no list of turns"),
        ({"conversation": "../a"}, "a name of at most 64 letters and digits"),
        ({"conversation": 3}, "a name of at most 64 letters and digits"),
        ({"turns": []}, "end with the user's question"),
        ({"turns": [USER] * 401}, "more than 400 turns"),
        ({"turns": [USER, USER]}, "must be user, assistant, user"),
        ({"turns": ["hello"]}, "a turn of the conversation is not an object"),
        ({"turns": [{"role": "system", "text": "a"}]}, "a turn needs a role, user or assistant"),
        ({"turns": [{"role": "user", "text": 3}]}, "a turn needs a role, user or assistant"),
        ({"turns": [{"role": "user", "text": " "}]}, "a question needs a text or an image"),
        ({"turns": [{"role": "user", "text": "\ud800"}]}, "half a surrogate pair"),
        ({"turns": [USER | {"images": ["/etc/passwd"]}]}, "an image of a turn is not named by its digest"),
        ({"turns": [USER | {"images": [DIGEST] * 17}]}, "has 17 images, more than 16"),
        ({"turns": [USER, {"role": "assistant", "images": [DIGEST]}, USER]}, "an answer has no images"),
        ({"temperature": -1}, "temperature must be a number from 0 to 10"),
        ({"temperature": True}, "temperature must be a number from 0 to 10"),
        ({"seed": 2**31}, "seed must be a whole number"),
    ],
)
def test_a_question_of_another_form_is_refused_in_a_line(address, content, words):
    if isinstance(content, dict):
        content = json.dumps({"conversation": "c", "turns": [USER], **content})
    elif not isinstance(content, str):
        content = json.dumps(content)
    body = content.encode(errors="surrogatepass")
    status, _, told = request(address, "POST", "/answer", body, Content_Type="application/json")
    assert status == 400 and words in json.loads(told)["error"]


def test_images_are_known_by_their_bytes_alone_and_one_that_is_gone_is_named(address):
    status, events = ask(address, [("user", "is it red?", [DIGEST])])
    assert status == 410 and events[0]["missing"] == [DIGEST]


def test_the_oldest_uploads_make_room(monkeypatch):
    monkeypatch.setattr(uploading, "MAX_STORED", 2)
    uploads, pictures = Uploads(), [check_image(picture(i)) for i in range(4)]
    for each in pictures[:2]:
        uploads.add(each)
    assert uploads.find([pictures[0].name]) == (pictures[0],)
    uploads.add(pictures[2])
    with pytest.raises(MissingUpload):
        uploads.find([pictures[1].name])
    monkeypatch.setattr(uploading, "MAX_STORED_BYTES", len(pictures[3].data))
    uploads.add(pictures[3])
    uploads.add(pictures[3])
    assert uploads.find([pictures[3].name]) == (pictures[3],)
    with pytest.raises(MissingUpload):
        uploads.find([pictures[0].name])


@pytest.mark.parametrize(
    "headers, path, refused",
    [
        ({"host": "127.0.0.1:8000"}, "/model", False),
        ({"host": "localhost:9000", "origin": "http://localhost:9000"}, "/answer", False),
        ({"host": "[::1]:8000", "sec-fetch-site": "same-origin"}, "/image", False),
        ({"host": "localhost", "sec-fetch-site": "cross-site"}, "/", False),  # a link from elsewhere
        ({"host": "localhost", "sec-fetch-site": "cross-site"}, "/model", True),
        ({"host": "localhost", "sec-fetch-site": "same-site"}, "/answer", True),
        ({"host": "localhost:8000", "origin": "http://localhost:3000"}, "/answer", True),
        ({"host": "localhost:8000", "origin": "http://evil.example"}, "/", True),
        ({"host": "localhost:8000", "origin": "https://localhost:8000"}, "/answer", True),
        ({"host": "localhost:8000", "origin": "null"}, "/answer", True),
        ({"host": "localhost", "origin": ""}, "/answer", True),
        ({"host": "evil.example"}, "/", True),
        ({"host": "127.0.0.1.evil.example:8000"}, "/", True),
        ({"host": "localhost:x"}, "/", True),
        ({"host": "a@localhost"}, "/", True),
        ({"host": "localhost/a"}, "/", True),
        ({"host": "[::1"}, "/", True),
        ({}, "/", True),
    ],
)
def test_requests_of_other_sites_are_refused(headers, path, refused):
    assert bool(refusal(headers, path)) == refused


def test_the_server_asks_the_guard_and_is_strict_to_the_browser(address):
    own = urllib.parse.urlsplit(address).netloc
    for headers in ({"Host": "evil.example"}, {"Host": own, "Origin": "http://evil.example"}):
        for method, path in (("GET", "/"), ("GET", "/model"), ("POST", "/image"), ("POST", "/answer")):
            status, found, body = request(address, method, path, **headers)
            assert status == 403 and "error" in json.loads(body) and "Access-Control-Allow-Origin" not in found
    assert request(address, "POST", "/image", b"a", Content_Type="text/plain")[0] == 415
    assert request(address, "POST", "/answer", b"{}", Content_Type="text/plain")[0] == 415
    assert request(address, "OPTIONS", "/answer")[0] == 405 and request(address, "GET", "/../model")[0] == 404
    status, headers, body = request(address, "GET", "/")
    policy = headers["content-security-policy"]
    assert status == 200 and b"<script src" not in body and "unsafe" not in policy
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "connect-src 'self'" in policy
    assert headers["x-content-type-options"] == "nosniff" and "server" not in headers


def test_the_page_is_told_of_the_model_and_its_lineage(address):
    told = json.loads(request(address, "GET", "/model")[2])
    assert told["name"] == "little" and told["lineage"]["parent"]["stage"] == "less"
    assert told["facts"]["lineage"] == "little (step 3) ← less (step 1)"
    assert told["facts"]["image"] == "8 px, 4 tokens" and told["reads_images"] is True


def test_an_answer_ends_when_its_client_goes_away_and_who_waits_is_next():
    endless = Endless()
    with served(endless, {}) as (address, _):
        body = json.dumps({"conversation": "long", "turns": [USER]})
        head = f"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        connection = raw(address, f"{head}Content-Type: application/json\r\n\r\n{body}".encode(), wait=False)
        received = b""
        while b'{"text": "a"}' not in received:
            received += connection.recv(1000)
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(ask, address, [("user", "is it red?")], "short")
            time.sleep(0.2)
            assert not waiting.done() and not endless.ended.is_set()
            connection.close()
            _, events = waiting.result(20)
        assert events[0] == {"ahead": 1} and endless.ended.is_set()
        assert events[1]["first"]["seconds"]["queue"] > 0.1


def test_a_server_that_ends_waits_for_no_answer():
    endless = Endless()
    with served(endless, {}) as (address, worker):
        told = []
        worker.ask(Job(type("Question", (), {"conversation": "long"}), told.append))
        while len(told) < 3:
            time.sleep(0.01)
        assert request(address, "GET", "/model")[0] == 200
    assert endless.ended.is_set() and told[-1] is None


class Failing:
    """Fails as a device does whose memory is full, in place of a model."""

    forgotten = 0

    def answer(self, question):
        yield {"doing": "prefill"}
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    def forget(self):
        self.forgotten += 1


def test_a_question_that_does_not_fit_frees_the_caches_and_is_told_in_a_line():
    failing, told, done = Failing(), [], threading.Event()
    worker = Worker(failing)
    worker.ask(Job(None, lambda event: done.set() if event is None else told.append(event)))
    assert done.wait(10) and failing.forgotten == 1
    assert told[-1] == {"error": "the question could not be answered: the memory of the device is too small for it"}
    worker.stop()


def test_the_command_serves_on_any_port_until_ctrl_c(folder):
    command = [sys.executable, "-m", "fastvlm_jax", "chat", f"--model={folder}", "--port=0", "--no_browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    line = process.stdout.readline()
    address = line.split(" at ")[1].split()[0]
    assert line == f"little answers at {address} until Ctrl-C\n" and address.startswith("http://127.0.0.1:")
    assert json.loads(request(address, "GET", "/model")[2])["name"] == "little"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stderr.read().splitlines()[-1] == "fastvlm chat: interrupted"


def test_wrong_flags_are_told_in_a_line(monkeypatch, capsys, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags, status, words in (
            ([f"--port={port}"], 1, f"--port={port}: port {port} of 127.0.0.1 is in use: give another, or 0 for any"),
            (["--port=70000"], 1, "--port=70000 must be from 0 to 65535; 0 takes any port that is free"),
            (["--temperature=-1"], 2, "--temperature=-1.0 must be from 0 to 10"),
            (["--port=0", "--model=nowhere"], 1, "there is no model at nowhere"),
            (["--port=0", "--max_tokens=0"], 1, "max_tokens=0 must be a whole number"),
        ):
            found, out, err = fastvlm(monkeypatch, capsys, "chat", f"--model={folder}", "--no_browser", *flags)
            assert (found, out) == (status, "") and words in err and err.count("\n") == 1


def test_without_its_packages_the_page_says_how_to_get_them(monkeypatch, capsys, folder):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = fastvlm(monkeypatch, capsys, "chat", f"--model={folder}")
    assert status == 1 and "pip install 'fastvlm_jax[chat]', or add --terminal" in err


def test_the_terminal_answers_about_images_and_earlier_turns(monkeypatch, capsys, folder, loaded, tmp_path):
    file = tmp_path / "a picture.png"
    file.write_bytes(picture(7))
    lines = [f"/image '{file}'", "is it red?", "", "/image nowhere.png", "no", "/what", "/new", "is it red?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    status, out, err = fastvlm(
        monkeypatch, capsys, "chat", f"--model={folder}", "--terminal", "--dtype=float32", f"--max_tokens={MAX_TOKENS}"
    )
    talk = [("user", (0, "is it red?"))]
    answers = generate(*loaded, file, [talk], max_tokens=MAX_TOKENS)
    talk += [("assistant", (answers[0],)), ("user", ("no",))]
    answers += generate(*loaded, file, [talk], max_tokens=MAX_TOKENS)
    answers += generate(*loaded, None, "is it red?", max_tokens=MAX_TOKENS)
    assert (status, out) == (0, "".join(f"{answer}\n" for answer in answers))
    assert "image 1: 8 x 8 pixels" in err and "there is no image nowhere.png" in err
    assert err.count("[first token after ") == 3 and err.count("tokens were kept]") == 1
