"""Fetching a file from a server on this machine that cuts, or sends something else."""

import hashlib
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import ROOT, make, refusal

import disback
from imagenet64 import download, features, fid, pickles, problem
from runtime import files

BODY = bytes(range(256)) * 12_000  # 3 MB, more than one chunk
PAGE = b"<html>please log in</html>"
FIXTURE = ROOT / "tests" / "data" / "edm_pkl_fixture_adm.pkl"


class Handler(BaseHTTPRequestHandler):
    """Serves server.body; with `cut`, only so many bytes of it; with `length`, says how many."""

    def do_GET(self):
        server = self.server
        server.asked += 1
        self.send_response(200 if self.path == "/file" else 404)
        if server.length:
            self.send_header("Content-Length", str(len(server.body)))
        self.end_headers()
        self.wfile.write(server.body[:server.cut])
        server.between()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.cut, server.length, server.asked = BODY, None, True, 0
    server.between = lambda: None
    server.url = f"http://127.0.0.1:{server.server_port}/file"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def left(folder):
    return [file for file in folder.iterdir() if not file.name.endswith(".lock")]


def is_body(file):
    if file.read_bytes() != BODY:
        raise ValueError("other bytes")


def test_a_file_arrives_whole_in_a_folder_that_was_not_there_and_is_not_asked_for_again(
        server, tmp_path):
    file = tmp_path / "new" / "file.bin"
    for _ in range(2):
        assert download.fetch(server.url, file, is_body) == file
        assert file.read_bytes() == BODY and left(file.parent) == [file]
    assert server.asked == 1


@pytest.mark.parametrize("body, cut", [(PAGE, None), (BODY, 1_500_000), (b"", None)])
@pytest.mark.parametrize("length", [True, False])
def test_what_is_not_the_file_is_forgotten_and_the_next_try_gets_it(
        server, tmp_path, body, cut, length):
    file, server.body, server.cut, server.length = tmp_path / "file.bin", body, cut, length
    with pytest.raises(disback.Refusal, match=f"{server.url}.*other bytes.*{file} by hand"):
        download.fetch(server.url, file, is_body)
    assert not left(tmp_path)
    server.body, server.cut = BODY, None
    assert download.fetch(server.url, file, is_body).read_bytes() == BODY


@pytest.mark.parametrize("check", [pickles.load, features.read_reference, download.check_inception])
@pytest.mark.parametrize("body", [PAGE, FIXTURE.read_bytes()[:-999], b"PK\3\4" + bytes(99), b""])
def test_each_reader_knows_a_page_a_cut_file_and_nothing_at_all(server, tmp_path, check, body):
    server.body = body
    with pytest.raises(disback.Refusal, match="another file or not whole"):
        download.fetch(server.url, tmp_path / "file", check)
    assert not left(tmp_path)


def test_each_reader_takes_its_own_file(server, tmp_path, monkeypatch):
    np.savez(tmp_path / "own.npz", mu=np.zeros(3), sigma=np.eye(3))
    monkeypatch.setattr(download, "INCEPTION_SHA256", hashlib.sha256(BODY).hexdigest())
    for body, check in ((FIXTURE.read_bytes(), pickles.load), (BODY, download.check_inception),
                        ((tmp_path / "own.npz").read_bytes(), features.read_reference)):
        server.body = body
        file = tmp_path / check.__name__
        assert download.fetch(server.url, file, check).read_bytes() == body


def test_a_broken_reference_is_removed_where_it_was_fetched_and_else_another_named(
        tmp_path, monkeypatch):
    (tmp_path / "page.npz").write_bytes(PAGE)
    assert "sigma: name another (" in refusal(features.read_reference, tmp_path / "page.npz")
    monkeypatch.setenv("DISBACK_CACHE", str(tmp_path))  # in which a user may keep his own
    assert "sigma: name another (" in refusal(features.read_reference, tmp_path / "page.npz")
    assert f"sigma: remove {tmp_path / 'page.npz'}, and it is made or fetched again (" in refusal(
        features.read_reference, files.cached("page.npz"))


def test_of_two_that_fetch_at_one_time_one_waits_and_both_get_the_whole_file(server, tmp_path):
    file, found = tmp_path / "file.bin", []
    server.between = lambda: time.sleep(0.3)
    threads = [threading.Thread(target=lambda: found.append(
        download.fetch(server.url, file, is_body).read_bytes())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [BODY, BODY] and left(tmp_path) == [file] and server.asked == 1


@pytest.mark.parametrize("breaks", ["404", "no server", "no address"])
def test_a_failing_network_is_one_line_with_the_url_and_the_place_for_the_file(
        server, tmp_path, breaks):
    url = {"404": server.url + "-not-there", "no server": "http://127.0.0.1:1/file",
           "no address": "http://nowhere.invalid/file"}[breaks]
    line = refusal(download.fetch, url, tmp_path / "file.bin", is_body)
    assert url in line and f"{tmp_path / 'file.bin'} by hand" in line
    assert not left(tmp_path)


def test_a_broken_inception_in_the_cache_is_to_be_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("DISBACK_CACHE", str(tmp_path))
    (tmp_path / "inception-2015-12-05.pt").write_bytes(BODY)
    with pytest.raises(disback.Refusal, match="inception-2015-12-05.pt is broken: remove it"):
        fid.inception_files(fid.parse(["x.npz"]))


def test_a_checkpoint_of_another_network_in_the_cache_is_to_be_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("DISBACK_CACHE", str(tmp_path))
    file = tmp_path / "edm-imagenet-64x64-cond-adm.pkl"
    file.write_bytes(FIXTURE.read_bytes())
    monkeypatch.setitem(problem.NETWORKS, "imagenet", problem.NETWORKS["digits"])  # for speed
    assert f"{file} does not hold this network: remove {file}" in refusal(make, problem, "full")
    assert [*tmp_path.iterdir()] == [file]


def test_a_full_disk_is_not_blamed_on_the_network(tmp_path, monkeypatch):
    def full(url, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.hub, "download_url_to_file", full)
    line = refusal(download.fetch, "http://x/y", tmp_path / "file.bin", is_body)
    assert str(tmp_path / "file.bin") in line and "No space left on device: make room" in line
    assert "try again" not in line
    assert [file.name for file in tmp_path.iterdir()] == [".file.bin.lock"]


def test_a_lock_and_a_half_written_file_of_another_user_keep_nobody_from_fetching(
        server, tmp_path, monkeypatch):
    torn, living = (tmp_path / f".file.bin.{name}.unfinished" for name in ("a1b2c3d4", "e5f6g7h8"))
    torn.mkdir()
    living.mkdir()  # of a process that has no lock either
    rmdir = os.rmdir

    def refuse(path, **_):
        if torn.name in str(path) or path == tmp_path / ".file.bin.lock":
            raise PermissionError(13, "Permission denied")
        rmdir(path, **_)

    monkeypatch.setattr(os, "rmdir", refuse)
    with monkeypatch.context() as patch:
        patch.setattr(download, "FileLock", refuse)
        assert download.fetch(server.url, tmp_path / "file.bin", is_body).read_bytes() == BODY
    assert living.exists()
    (tmp_path / "file.bin").unlink()
    assert download.fetch(server.url, tmp_path / "file.bin", is_body).read_bytes() == BODY
    assert torn.exists() and not living.exists()
