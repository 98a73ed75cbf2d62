"""The platform's notice, from a server that answers as the metadata server of a Google Cloud machine does."""

import contextlib
import http.server
import threading
import time

import pytest

from fastvlm_jax.distributed import Interrupted, StopRequest, notice

QUIET = {"preempted": "FALSE", "maintenance-event": "NONE"}


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers with the values of its server, in the header as in the query with Google's flavor."""

    def do_GET(self):
        key = self.path.removeprefix("/computeMetadata/v1/instance/")
        known = self.headers["Metadata-Flavor"] == "Google" and key in self.server.values
        self.send_response(200 if known else 403)
        if self.server.flavor:
            self.send_header("Metadata-Flavor", self.server.flavor)
        self.end_headers()
        if known:
            self.wfile.write(self.server.values[key].encode())
        self.server.answered += 1

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """Yields the server, whose `values` are the metadata of this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.values, server.flavor, server.answered = dict(QUIET), "Google", 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        monkeypatch.setattr(notice, "ASK_SECONDS", 0.05)
        yield server
        server.shutdown()


def wait_for_answers(server, more):
    """Waits until the server has given so many more answers; each look at the notices takes two."""
    last = server.answered + more
    while server.answered < last:
        time.sleep(0.01)


@contextlib.contextmanager
def watching():
    """Watches in a thread; yields the list of what is told and the thread."""
    told, ended = [], threading.Event()
    thread = threading.Thread(target=notice.watch, args=(told.append, ended))
    thread.start()
    yield told, thread
    ended.set()
    thread.join(20)


@pytest.mark.parametrize(
    "changed", [{"preempted": "TRUE"}, {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}], ids=str
)
def test_a_notice_that_appears_is_told_once(changed, server):
    with watching() as (told, thread):
        wait_for_answers(server, 3)
        assert told == []
        server.values |= changed
        thread.join(20)
    assert told == list(changed)


def test_a_live_migration_a_standing_notice_and_a_server_that_is_not_google_s_are_no_notice(server):
    server.values = {"preempted": "TRUE", "maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE"}
    assert notice.standing(notice.find_server()) == {"preempted"}
    with watching() as (told, _):
        wait_for_answers(server, 7)
        assert told == []
    server.flavor = ""
    assert notice.standing(notice.find_server()) == set()


def test_machines_without_a_metadata_server_are_asked_nothing(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(notice, "PRODUCT", tmp_path / "product")
    notice.watch(pytest.fail, threading.Event())
    (tmp_path / "product").write_text("Google Compute Engine\n")
    assert notice.find_server() == "metadata.google.internal"
    assert notice.ask("127.0.0.1:1", "preempted") == notice.ask("no such host:x", "preempted") == ""


def test_a_notice_stops_a_run_with_the_status_that_asks_for_another_start(server, capsys):
    with pytest.raises(Interrupted) as stopped, StopRequest() as stop:
        wait_for_answers(server, 3)
        assert not stop.reached()
        server.values["preempted"] = "TRUE"
        while not stop.reached():
            time.sleep(0.01)
        raise Interrupted("stopped")
    assert stopped.value.status == 75
    assert capsys.readouterr().err == "fastvlm: the platform takes this machine away (preempted): saving\n"
