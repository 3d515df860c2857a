"""One try at one URL: its length, and its bytes in chunks. A try ends whole or with TransferError.

HTTP goes through the standard library: its timeout holds for connecting and for every read, the
declared length can be set against the bytes that come, and there is nothing to install. A try
never asks for a part of a file (Range): a file put together from two answers may be that of two
versions, and no header proves that it is not. So a line that breaks begins anew.
"""

import contextlib
import queue
import threading
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit

from ldmkit.data.locations import HTTP, STORES
from ldmkit.errors import StorageError, UsageError
from ldmkit.version import __version__

CHUNK = 1 << 20
TIMEOUT = 30.0
"""Seconds without a byte after which a try ends."""
PASSING = (408, 425, 429)
"""HTTP states below 500 that may be gone a moment later."""


class TransferError(StorageError):
    """One try that failed.

    `again` says whether another may do better, `wait` how many seconds the server asks for,
    `status` is the HTTP state or 0.
    """

    def __init__(
        self, message: str, *, again: bool = True, wait: float = 0.0, status: int = 0
    ) -> None:
        super().__init__(message)
        self.again, self.wait, self.status = again, wait, status


class Download(NamedTuple):
    """An answer that has begun."""

    size: int | None
    """Declared number of bytes; None where the transfer itself marks the end."""
    etag: str
    """What the server calls this version, or ""."""
    chunks: Iterator[bytes]
    """The bytes, once; ends with TransferError unless they are all there."""


@contextlib.contextmanager
def open_download(url: str) -> Iterator[Download]:
    """Ask for a URL.

    Raises:
        TransferError: it cannot be had now; `again` says whether to try later.
        UsageError: the package for its scheme is not installed.
    """
    scheme = url.partition("://")[0].lower()
    with (_open_http if scheme in HTTP else _open_store)(url) as download:
        yield download


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to https, or from http to http; nowhere else."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: Any,  # noqa: ANN401 - an HTTPResponse, which the library calls an IO[bytes]
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme != "https" and (scheme, req.type) != ("http", "http"):
            fp.close()
            raise TransferError(f"is sent on to {scheme}://, which is not followed", again=False)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """What speaks http and https and, unlike the default, neither ftp nor file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


@contextlib.contextmanager
def _open_http(url: str) -> Iterator[Download]:
    headers = {"Accept-Encoding": "identity", "User-Agent": f"ldmkit/{__version__}"}
    try:
        plain = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        request = urllib.request.Request(plain, headers=headers)  # noqa: S310 - http(s), see _opener
        response = _opener().open(request, timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        again = error.code >= 500 or error.code in PASSING
        wait = error.headers.get("Retry-After", "")
        raise TransferError(
            f"the server answers {error.code} {error.reason}",
            again=again,
            wait=float(wait) if wait.isdecimal() else 0.0,
            status=error.code,
        ) from error
    except (OSError, HTTPException) as error:
        raise TransferError(f"no answer ({_reason(error)})") from error
    except ValueError as error:
        raise TransferError(f"this is no URL ({error})", again=False) from error
    with response:
        encoding = response.headers.get("Content-Encoding", "identity")
        if response.status != 200 or encoding != "identity":
            raise TransferError(
                f"the server answers {response.status} with encoding {encoding}, not with the file",
                again=False,
            )
        if response.length is None and not response.chunked:
            raise TransferError(
                "the server does not say how long it is, so that a cut would not show; "
                "download it yourself",
                again=False,
            )
        yield Download(response.length, response.headers.get("ETag", ""), _http_chunks(response))


def _http_chunks(response: HTTPResponse) -> Iterator[bytes]:
    """All bytes until the connection ends; they must be as many as declared."""
    declared, received = response.length, 0
    # Else the library stops at the declared length, and one that is too small would pass.
    response.length = None
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, HTTPException) as error:
            if received == declared and isinstance(error, TimeoutError):
                return  # all is there; this server just does not close
            raise TransferError(f"broke off after {received:,} bytes ({_reason(error)})") from error
        received += len(chunk)
        if declared is not None and (received > declared or (not chunk and received < declared)):
            raise TransferError(f"declared {declared:,} bytes, and sent {received:,}")
        if not chunk:
            return
        yield chunk


@contextlib.contextmanager
def _open_store(url: str) -> Iterator[Download]:
    """Through fsspec, in a thread: its file systems do not agree on how to set a timeout."""
    parts: queue.Queue[Any] = queue.Queue(maxsize=2)
    stop = threading.Event()
    threading.Thread(target=_read_store, args=(url, parts, stop), daemon=True).start()
    try:
        size, etag = _next(parts)
        yield Download(size, etag, _store_chunks(parts, size))
    finally:
        stop.set()


def _read_store(url: str, parts: queue.Queue[Any], stop: threading.Event) -> None:
    """Put the parts of a file into the queue, or the error that ends them, until told to stop."""
    try:
        for part in _store_parts(url):
            if not _put(part, parts, stop):
                return
    except Exception as error:  # each file system has errors of its own
        _put(error, parts, stop)


def _put(part: object, parts: queue.Queue[Any], stop: threading.Event) -> bool:
    """False where nobody waits for it any more."""
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            parts.put(part, timeout=0.1)
            return True
    return False


def _store_parts(url: str) -> Iterator[Any]:
    """(size, etag), chunks of bytes, None."""
    import fsspec

    files = fsspec.filesystem(url.partition("://")[0].lower())
    files.invalidate_cache()
    info = files.info(url)
    yield info.get("size"), str(info.get("ETag") or info.get("etag") or "")
    with files.open(url, "rb", cache_type="readahead") as file:
        while chunk := file.read(CHUNK):
            yield chunk
    yield None


def _next(parts: queue.Queue[Any]) -> Any:  # noqa: ANN401
    try:
        part = parts.get(timeout=TIMEOUT)
    except queue.Empty as error:
        raise TransferError(f"stalls for {TIMEOUT:g} s") from error
    if isinstance(part, Exception):
        if isinstance(part, ImportError):
            raise UsageError(
                f"this location needs a package that is not installed ({part}); pip install "
                f"'ldmkit[remote]' and that of its scheme: "
                f"{', '.join(f'{scheme} {name}' for scheme, name in STORES.items())}"
            ) from part
        final = isinstance(part, FileNotFoundError | PermissionError | IsADirectoryError)
        raise TransferError(
            _reason(part), again=not final, status=404 if isinstance(part, FileNotFoundError) else 0
        ) from part
    return part


def _store_chunks(parts: queue.Queue[Any], declared: int | None) -> Iterator[bytes]:
    if declared is None:
        raise TransferError("the store does not say how long it is", again=False)
    received = 0
    while (chunk := _next(parts)) is not None:
        received += len(chunk)
        if received > declared:
            break
        yield chunk
    if received != declared:
        raise TransferError(f"declared {declared:,} bytes, and sent {received:,}")


def _reason(error: BaseException) -> str:
    """The first line of what an error says, or its kind."""
    text = str(getattr(error, "reason", "") or error).strip().partition("\n")[0]
    return text[:200] or type(error).__name__
