"""Fetching a file from a server on this machine that cuts, ignores ranges, or has another file."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import disback
from imagenet64 import download

BODY = bytes(range(256)) * 12_000  # 3 MB, more than one chunk
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves server.body; with `cut`, only so many bytes of it; without `ranges`, always all."""

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        start = int(asked[len("bytes="):-1]) if asked and server.ranges else 0
        size = len(server.body)
        if self.path != "/file" or start >= size:
            self.send_response(404 if self.path != "/file" else 416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if asked and server.ranges else 200)
        self.send_header("Content-Length", str(size - start))
        if asked and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        self.wfile.write(server.body[start:server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.cut, server.ranges, server.asked = BODY, None, True, []
    server.url = f"http://127.0.0.1:{server.server_port}/file"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_file_arrives_whole_in_a_folder_that_was_not_there(server, tmp_path):
    file = tmp_path / "new" / "file.bin"
    assert download.fetch(server.url, file, SHA256) == file
    assert file.read_bytes() == BODY and "file.bin.part" not in names(file.parent)


def test_a_file_that_is_there_is_not_asked_for_again(server, tmp_path):
    file = tmp_path / "file.bin"
    file.write_bytes(BODY)
    download.fetch(server.url, file, SHA256)
    assert server.asked == []


def test_a_broken_transfer_leaves_no_file_and_goes_on_where_it_broke(server, tmp_path):
    file, server.cut = tmp_path / "file.bin", 1_500_000
    with pytest.raises(disback.Refusal, match=f"1500000 of {len(BODY)} bytes"):
        download.fetch(server.url, file)
    assert names(tmp_path) == ["file.bin.part"]
    server.cut = None
    download.fetch(server.url, file, SHA256)
    assert server.asked == [None, "bytes=1500000-"]
    assert file.read_bytes() == BODY and "file.bin.part" not in names(tmp_path)


def test_a_server_that_knows_no_ranges_sends_all_of_it_again(server, tmp_path):
    file, server.ranges = tmp_path / "file.bin", False
    (tmp_path / "file.bin.part").write_bytes(BODY[:1000])
    download.fetch(server.url, file)
    assert file.read_bytes() == BODY


def test_a_transfer_that_lacked_only_its_last_step_is_finished(server, tmp_path):
    file = tmp_path / "file.bin"
    (tmp_path / "file.bin.part").write_bytes(BODY)
    download.fetch(server.url, file, SHA256)
    assert file.read_bytes() == BODY


def test_a_part_that_is_longer_than_the_file_is_refused(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(BODY + b"more")
    with pytest.raises(disback.Refusal, match="part is not a part of it, remove it"):
        download.fetch(server.url, tmp_path / "file.bin")
    assert names(tmp_path) == ["file.bin.part"]


def test_another_file_than_the_known_one_is_refused_and_gets_not_its_name(server, tmp_path):
    server.body = BODY[:-1] + b"!"
    with pytest.raises(disback.Refusal, match=f"part has SHA-256 .* not {SHA256}.* remove"):
        download.fetch(server.url, tmp_path / "file.bin", SHA256)
    assert "file.bin" not in names(tmp_path)


def test_a_known_file_that_has_changed_on_the_disk_is_refused(server, tmp_path):
    file = tmp_path / "file.bin"
    file.write_bytes(BODY[:-1])
    with pytest.raises(disback.Refusal, match=f"file.bin has SHA-256 .* not {SHA256}"):
        download.fetch(server.url, file, SHA256)


def test_without_a_known_hash_the_first_use_decides(server, tmp_path):
    file = tmp_path / "file.bin"
    download.fetch(server.url, file)
    assert (tmp_path / "file.bin.sha256").read_text().strip() == SHA256
    download.fetch(server.url, file)
    file.write_bytes(BODY[:-1])
    with pytest.raises(disback.Refusal, match=SHA256):
        download.fetch(server.url, file)


@pytest.mark.parametrize("breaks", ["404", "no server", "no address"])
def test_a_failing_network_is_one_line_with_the_url_and_the_place_for_the_file(
        server, tmp_path, breaks):
    url = {"404": server.url + "-not-there", "no server": "http://127.0.0.1:1/file",
           "no address": "nowhere"}[breaks]
    with pytest.raises(disback.Refusal) as refused:
        download.fetch(url, tmp_path / "file.bin")
    line = str(refused.value)
    assert url in line and str(tmp_path / "file.bin") in line and "by hand" in line
    assert "\n" not in line and not (tmp_path / "file.bin").exists()
