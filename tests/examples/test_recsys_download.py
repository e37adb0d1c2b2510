"""The downloader against a server on the loopback device that fails on request."""

from __future__ import annotations

import gzip
import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from examples.recsys.data import AmazonReviews2014, amazon2014
from examples.recsys.data.download import download_gzip

CONTENT = gzip.compress(random.Random(0).randbytes(300_000))


class Server(ThreadingHTTPServer):
    """Serves ``content``; each entry of ``cuts`` ends one response after that number of bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.cuts: list[int] = []
        self.ranges = True
        self.status: int | None = None
        self.requests: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append(asked)
        size = len(self.server.content)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        if self.server.status:
            return self.send_error(self.server.status)
        if start >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        end = start + self.server.cuts.pop(0) if self.server.cuts else size
        self.wfile.write(self.server.content[start:end])

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "file.gz"


def test_a_whole_file_is_fetched_once(server, path):
    assert download_gzip(f"{server.url}/file.gz", path).read_bytes() == CONTENT
    download_gzip(f"{server.url}/file.gz", path)
    assert server.requests == [None]
    assert list(path.parent.iterdir()) == [path]


def test_a_broken_connection_goes_on_where_it_broke(server, path):
    server.cuts = [100_000, 50_000]
    assert download_gzip(f"{server.url}/file.gz", path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_call_resumes(server, path):
    server.cuts = [100_000]
    with pytest.raises(ConnectionError, match=f"connection ended after 100000 of {len(CONTENT)} bytes.*run again"):
        download_gzip(f"{server.url}/file.gz", path, attempts=1)
    assert not path.exists()
    assert download_gzip(f"{server.url}/file.gz", path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=100000-"]


def test_a_server_without_ranges_starts_again(server, path):
    server.ranges, server.cuts = False, [100_000]
    assert download_gzip(f"{server.url}/file.gz", path).read_bytes() == CONTENT


def test_a_part_that_is_already_whole_needs_no_more(server, path):
    path.parent.mkdir()
    path.with_name("file.gz.part").write_bytes(CONTENT)
    assert download_gzip(f"{server.url}/file.gz", path).read_bytes() == CONTENT
    assert server.requests == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("length", [1_000, len(CONTENT) + 1_000])
def test_a_part_of_another_file_is_dropped(server, path, length):
    path.parent.mkdir()
    path.with_name("file.gz.part").write_bytes(b"x" * length)
    assert download_gzip(f"{server.url}/file.gz", path).read_bytes() == CONTENT


def test_a_damaged_file_in_the_cache_is_fetched_again(server, path):
    path.parent.mkdir()
    path.write_bytes(CONTENT[:-9])
    assert download_gzip(f"{server.url}/file.gz", path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "content", [b"<html>log in</html>", CONTENT[:-20], CONTENT[:1000] + b"\0" * 8 + CONTENT[1008:]]
)
def test_what_is_no_whole_gzip_file_gets_a_sentence_and_leaves_nothing(server, path, content):
    server.content = content
    with pytest.raises(ValueError, match=f"sent {len(content)} bytes that are not a whole gzip file"):
        download_gzip(f"{server.url}/file.gz", path)
    assert list(path.parent.iterdir()) == []


def test_a_wrong_address_fails_at_once(server, path):
    server.status = 404
    with pytest.raises(ConnectionError, match=r"/file.gz answers 404 Not Found"):
        download_gzip(f"{server.url}/file.gz", path)
    assert len(server.requests) == 1


def test_an_overloaded_server_is_asked_again(server, path):
    server.status = 503
    with pytest.raises(ConnectionError, match=r"in 3 attempts \(503 Service Unavailable\)"):
        download_gzip(f"{server.url}/file.gz", path, attempts=3)
    assert len(server.requests) == 3


def reviews(users: int, items: int) -> bytes:
    lines = [
        json.dumps({"reviewerID": f"u{user}", "asin": f"i{(user + day) % items}", "unixReviewTime": 9 - day})
        for user in range(users)
        for day in range(5)
    ]
    return gzip.compress("\n".join(lines).encode())


class TestAmazonReviews2014:
    def data(self, server, tmp_path) -> AmazonReviews2014:
        return AmazonReviews2014("Toys_and_Games", cache_dir=str(tmp_path / "cache"), base_url=server.url)

    def test_downloads_processes_and_caches(self, server, tmp_path, monkeypatch):
        monkeypatch.setitem(amazon2014.PUBLISHED, "Toys_and_Games", amazon2014.Counts(6, 7, 30))
        server.content, server.cuts = reviews(6, 7), [100]
        data = self.data(server, tmp_path)
        data.prepare_data()
        data.setup("fit")
        assert len(server.requests) == 2
        assert data.protocol.sequences[0].tolist() == [1, 2, 3, 4, 5]
        # Items are numbered in the order of the sequences, and later days come first in this file.
        assert data.protocol.sequences[1].tolist() == [6, 1, 2, 3, 4]
        self.data(server, tmp_path).prepare_data()
        assert len(server.requests) == 2
        AmazonReviews2014("Toys_and_Games", data_dir=str(tmp_path / "cache")).setup("fit")

    def test_another_set_than_the_published_one_gets_a_sentence(self, server, tmp_path):
        server.content = reviews(6, 7)
        with pytest.raises(ValueError, match=r"has 6 users, 7 items and 30 interactions, but the published Toys_and_G"):
            self.data(server, tmp_path).prepare_data()
        assert not (tmp_path / "cache" / "Toys_and_Games.txt").exists()
