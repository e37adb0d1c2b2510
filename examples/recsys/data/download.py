"""Download files over HTTP, with a progress bar, resuming, and a check before a file gets its name."""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path

import rich
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_CHUNK = 1 << 18
_TIMEOUT_S = 60


def download_gzip(url: str, path: Path, attempts: int = 5) -> Path:
    """Download a gzip file to ``path``, unless it exists and is complete, and check its checksums.

    Received bytes are kept in ``<path>.part``. After a broken connection, or in a later call, the download resumes from
    there by an HTTP range request. A file at ``path`` is always complete.

    Args:
        url: an http or https address.
        path: path of the file; its folder is created.
        attempts: number of connections before giving up.

    Raises:
        ConnectionError: if the download fails; calling again resumes it.
        ValueError: if the server sends something else than a complete gzip file.
    """
    return _download(url, path, _gzip_fault, "a whole gzip file", attempts)


def download_md5(url: str, path: Path, md5: str, attempts: int = 5) -> Path:
    """Like :func:`download_gzip`, for any file whose MD5 checksum, 32 hexadecimal digits, was published.

    Raises:
        ConnectionError: if the download fails; calling again resumes it.
        ValueError: if the received file has another checksum than ``md5``.
    """
    return _download(url, path, partial(_md5_fault, md5=md5), "the published file", attempts)


def cache_folder(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return ``cache_dir``; if None, ``lightning_muon/<name>`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_muon" / name


def _download(url: str, path: Path, fault_of: Callable[[Path], str | None], kind: str, attempts: int) -> Path:
    if path.exists() and fault_of(path) is None:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    resumed = part.exists()
    _fetch_all(url, part, attempts)
    fault = fault_of(part)
    if fault and resumed:
        # The part may be the start of another version of the file, so download it from the beginning.
        part.unlink()
        _fetch_all(url, part, attempts)
        fault = fault_of(part)
    if fault:
        size = part.stat().st_size
        part.unlink()
        raise ValueError(
            f"{url} sent {size} bytes that are not {kind} ({fault}): open the address in a browser; a proxy or a login "
            "page may answer instead of the server."
        )
    return part.replace(path)


def _fetch_all(url: str, part: Path, attempts: int) -> None:
    """Connect until ``part`` has all bytes that the server announced."""
    failure = "no attempt was made"
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=rich.get_console()) as progress:
        task = progress.add_task(url.rsplit("/", 1)[-1], total=None)
        for _ in range(attempts):
            try:
                with _open(url, part) as response:
                    resumes = response.status == 206
                    expected = _total_bytes(response)
                    with part.open("ab" if resumes else "wb") as file:
                        progress.update(task, total=expected, completed=file.tell())
                        for chunk in _chunks(response):
                            file.write(chunk)
                            progress.advance(task, len(chunk))
            except urllib.error.HTTPError as error:
                if error.code == 416 and part.exists():
                    # There is nothing after these bytes: they are the whole file, or more than the file has.
                    if error.headers.get("Content-Range") == f"bytes */{part.stat().st_size}":
                        return
                    part.unlink()
                    failure = "the unfinished download was longer than the file"
                    continue
                if error.code < 500:
                    raise ConnectionError(f"{url} answers {error.code} {error.reason}.") from error
                failure = f"{error.code} {error.reason}"
            except (OSError, HTTPException) as error:
                failure = str(error) or type(error).__name__
            else:
                arrived = part.stat().st_size
                if expected is None or arrived == expected:
                    return
                failure = f"the connection ended after {arrived} of {expected} bytes"
    raise ConnectionError(f"{url} could not be downloaded in {attempts} attempts ({failure}): run again to resume.")


def _open(url: str, part: Path) -> HTTPResponse:
    # Without "identity" a proxy may compress, and ranges would count compressed bytes.
    headers = {"Accept-Encoding": "identity"}
    if part.exists() and part.stat().st_size:
        headers["Range"] = f"bytes={part.stat().st_size}-"
    response: HTTPResponse = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
    return response


def _total_bytes(response: HTTPResponse) -> int | None:
    """Size of the whole file; None if the server does not say."""
    if response.status == 206:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = response.headers.get("Content-Length", "")
    return int(total) if total.isdigit() else None


def _chunks(response: HTTPResponse) -> Iterator[bytes]:
    while chunk := response.read(_CHUNK):
        yield chunk


def _gzip_fault(path: Path) -> str | None:
    """Read a whole gzip file with its checksums, and return what is wrong; None if nothing is."""
    try:
        with gzip.open(path) as file:
            while file.read(_CHUNK):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        return str(error)
    return None


def _md5_fault(path: Path, md5: str) -> str | None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    return None if found == md5 else f"md5 {found} instead of {md5}"
