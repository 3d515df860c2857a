"""Remote files against servers that fail in every way we know of, and against a store in memory."""

import hashlib
import http.server
import io
import itertools
import json
import os
import random
import string
import subprocess
import sys
import threading
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmkit.data import downloads, locations, remote
from ldmkit.data.locations import expand, is_remote, shown
from ldmkit.data.remote import Cache, RemoteSpan, cache_of, stage
from ldmkit.data.sources import open_source, scan_source
from ldmkit.data_configs import SourceConfig
from ldmkit.errors import DataError, StorageError, UsageError
from ldmkit.terminal import be_quiet
from test_tars import png, tar_bytes

BODY = bytes(range(256)) * 3000
LIMIT = 1 << 30


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; each path may have a list of faults, one for each answer, the last for good."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.ranges: list[str] = []
        self.stopped = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        path = urlsplit(self.path).path.strip("/")
        self.server.asked.append(path)
        self.server.ranges += [self.headers["Range"]] if "Range" in self.headers else []
        body = self.server.files.get(path)
        faults = self.server.faults.get(path, ["none"])
        fault = faults.pop(0) if len(faults) > 1 else faults[0]
        if body is None or fault.isdigit():
            self.send_error(int(fault) if fault.isdigit() else 404)
            return
        if fault.startswith("to "):
            self.send_response(302)
            self.send_header("Location", fault[3:])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "silent":
            self.server.stopped.wait(5)
            return
        self.answer(body, fault)

    def answer(self, body, fault):
        lengths = {"longer": len(body) + 1000, "shorter": len(body) - 1000}
        self.send_response(200)
        self.send_header("ETag", '"v1"')
        if fault in ("chunked", "chunked cut"):
            self.send_header("Transfer-Encoding", "chunked")
        elif fault != "no length":
            self.send_header("Content-Length", str(lengths.get(fault, len(body))))
        if fault == "gzip":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if fault.startswith("chunked"):
            for start in range(0, len(body), 100_000):
                part = body[start : start + 100_000]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                if fault == "chunked cut":
                    break
            else:
                self.wfile.write(b"0\r\n\r\n")
        else:
            cut = fault in ("cut", "stall")
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.wfile.flush()
        if fault in ("stall", "stays open"):
            self.server.stopped.wait(5)
        self.close_connection = True


@pytest.fixture
def server():
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    running.files["a.tar"] = BODY
    yield running
    running.stopped.set()
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    monkeypatch.setattr(remote, "TRIES", 3)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(remote, "_verified", {})
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cache(tmp_path):
    return Cache(str(tmp_path / "cache"), LIMIT)


def left(cache):
    return sorted(path.suffix for path in Path(cache.directory).iterdir() if path.suffix != ".lock")


def test_a_file_is_staged_once_and_recorded(server, cache):
    staged = stage(server.url("a.tar"), cache)
    assert staged.path().read_bytes() == BODY
    assert (staged.size, staged.sha256) == (len(BODY), hashlib.sha256(BODY).hexdigest())
    record = json.loads(staged.path().with_suffix(".json").read_text())
    assert record["etag"] == '"v1"'
    assert record["location"] == server.url("a.tar")
    assert stage(server.url("a.tar"), cache) == staged
    remote._verified.clear()  # as in another process
    assert stage(server.url("a.tar"), cache).path().read_bytes() == BODY
    assert server.asked == ["a.tar"]
    assert left(cache) == [".data", ".json"]


@pytest.mark.parametrize(
    "fault",
    ["500", "503", "429", "408", "silent", "stall", "cut", "longer", "shorter", "chunked cut"],
)
def test_what_passes_is_tried_again_and_then_refused(server, cache, fault):
    server.faults["a.tar"] = [fault, fault, "none"]
    assert stage(server.url("a.tar"), cache).path().read_bytes() == BODY
    assert len(server.asked) == 3
    server.files["b.tar"], server.faults["b.tar"] = BODY, [fault]
    begun = time.monotonic()
    with pytest.raises(StorageError, match=r"cannot fetch http://127.*b\.tar.*tried 3 times"):
        stage(server.url("b.tar"), cache)
    assert time.monotonic() - begun < 3
    assert server.asked[3:] == ["b.tar"] * 3
    assert server.ranges == []  # parts of two answers are never put together
    assert left(cache) == [".data", ".json"]


@pytest.mark.parametrize("fault", ["404", "403", "401", "410", "no length", "gzip", "to ftp://h/a"])
def test_what_lasts_is_not_tried_again(server, cache, fault):
    server.faults["a.tar"] = [fault]
    with pytest.raises(StorageError, match=r"a\.tar") as caught:
        stage(server.url("a.tar"), cache)
    assert caught.value.exit_code == 4
    assert server.asked == ["a.tar"]
    assert left(cache) == []


@pytest.mark.parametrize("fault", ["chunked", "stays open", "to /b.tar"])
def test_unusual_answers_are_read(server, cache, fault):
    server.faults["a.tar"], server.files["b.tar"] = [fault], BODY
    assert stage(server.url("a.tar"), cache).path().read_bytes() == BODY
    assert left(cache) == [".data", ".json"]


def test_any_sequence_of_faults_gives_the_bytes_or_an_error(server, tmp_path):
    """Never short data, never a file that is left."""
    faults = ["500", "404", "cut", "longer", "shorter", "chunked", "chunked cut", "no length"]
    draw = random.Random(0)
    outcomes = set()
    for number in range(40):
        cache = Cache(str(tmp_path / str(number)), LIMIT)
        server.faults["a.tar"] = [draw.choice([*faults, "none"]) for _ in range(3)]
        try:
            assert stage(server.url("a.tar"), cache).path().read_bytes() == BODY
            outcomes.add("bytes")
        except StorageError:
            assert left(cache) == []
            outcomes.add("error")
    assert outcomes == {"bytes", "error"}


def test_a_server_that_is_not_there(server, cache):
    with pytest.raises(StorageError, match=r"cannot fetch http://127\.0\.0\.1:9/a\.tar: no answer"):
        stage("http://127.0.0.1:9/a.tar", cache)


def test_secrets_of_a_url_are_not_shown_or_stored(server, cache):
    url = server.url("a.tar") + "?X-Signature=secret"
    staged = stage(url, cache)
    assert "secret" not in staged.name
    assert all(b"secret" not in path.read_bytes() for path in Path(cache.directory).iterdir())
    server.faults["b.tar"] = ["403"]
    with pytest.raises(StorageError) as caught:
        stage(server.url("b.tar") + "?X-Signature=secret", cache)
    assert "secret" not in str(caught.value)
    assert shown("https://me:secret@host/a?b#c") == "https://host/a"


@pytest.mark.parametrize("damage", ["flip", "cut", "record", "no record", "gone"])
def test_a_damaged_copy_is_fetched_again(server, cache, damage):
    path = stage(server.url("a.tar"), cache).path()
    record = path.with_suffix(".json")
    {
        "flip": lambda: path.write_bytes(b"\xff" + BODY[1:]),
        "cut": lambda: path.write_bytes(BODY[:-1]),
        "record": lambda: record.write_text("{}"),
        "no record": record.unlink,
        "gone": path.unlink,
    }[damage]()
    remote._verified.clear()
    assert stage(server.url("a.tar"), cache).path().read_bytes() == BODY
    assert server.asked == ["a.tar"] * 2
    assert left(cache) == [".data", ".json"]


def test_what_was_used_longest_ago_is_removed_first(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "NOTE_EVERY", -1.0)
    cache = Cache(str(tmp_path), 3 * len(BODY) + 100)
    for name in ("b.tar", "c.tar", "d.tar"):
        server.files[name] = BODY
    staged = {name: stage(server.url(name), cache) for name in ("a.tar", "b.tar", "c.tar")}
    for age, name in enumerate(("b.tar", "a.tar", "c.tar")):
        record = remote._place(staged[name].url, cache).with_suffix(".json")
        os.utime(record, (1000 + age, 1000 + age))
    staged["b.tar"].path()  # used now
    stage(server.url("d.tar"), cache)
    there = {name for name, file in staged.items() if remote._place(file.url, cache).exists()}
    assert there == {"b.tar", "c.tar"}
    assert sum(path.stat().st_size for path in tmp_path.glob("*.data")) == 3 * len(BODY)


@pytest.mark.parametrize("fault", ["none", "chunked"])
def test_a_file_larger_than_the_cache_is_refused(server, tmp_path, fault):
    server.faults["a.tar"] = [fault]
    cache = Cache(str(tmp_path), len(BODY) - 1)
    with pytest.raises(StorageError, match="larger --cache-size"):
        stage(server.url("a.tar"), cache)
    assert left(cache) == []
    assert server.asked == ["a.tar"]


def test_leftovers_of_killed_downloads_are_removed(server, tmp_path):
    cache = Cache(str(tmp_path), 2 * len(BODY))
    place = remote._place(server.url("a.tar"), cache)
    place.with_name(f"{place.name}.tmp-0000").write_bytes(b"half")
    other = tmp_path / "other.data.tmp-0000"
    other.write_bytes(BODY + BODY)
    with pytest.raises(StorageError, match="does not fit"):
        stage(server.url("a.tar"), cache)  # the other may be a download that runs
    os.utime(other, (1000, 1000))
    stage(server.url("a.tar"), cache)
    assert left(cache) == [".data", ".json"]


def test_a_full_disk_is_exit_4_and_leaves_nothing(server, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    class Full(io.FileIO):
        write = full

    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **k: Full(self, "w") if "wb" in a else real(self, *a, **k)
    )
    cache = Cache(str(tmp_path), LIMIT)
    with pytest.raises(StorageError, match="No space left"):
        stage(server.url("a.tar"), cache)
    assert left(cache) == []
    assert server.asked == ["a.tar"]


STAGER = """
import sys
from ldmkit.data import remote
staged = remote.stage(sys.argv[1], remote.Cache(sys.argv[2], 1 << 30))
assert staged.path().read_bytes() == bytes(range(256)) * 3000
"""


def test_processes_that_stage_at_once_fetch_once(server, cache):
    command = [sys.executable, "-c", STAGER, server.url("a.tar"), cache.directory]
    running = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert server.asked == ["a.tar"]
    assert left(cache) == [".data", ".json"]


def shards(server, count=3):
    """Serve tars of two pictures each, and say where."""
    for number in range(count):
        members = [(f"{number}{n}.png", png(3 * number + n)) for n in range(2)]
        members += [(f"{number}0.cls", b"1")]
        server.files[f"{number:03d}.tar"] = tar_bytes(members)
    return server.url(f"{{000..{count - 1:03d}}}.tar")


def sent(blob) -> RemoteSpan:
    """As a reading process gets it."""
    return ForkingPickler.loads(ForkingPickler.dumps(blob))  # pyright: ignore


def test_remote_tars_are_a_source_like_local_ones(server, tmp_path):
    config = SourceConfig(data=shards(server), cache=tmp_path / "cache")
    server.files["classes.json"] = b'["left", "right"]'
    source = open_source(config)
    assert [item.key for item in source.items] == ["00", "01", "10", "11", "20", "21"]
    assert source.class_names == ("left", "right")
    assert source.items[3].name == f"{server.url('001.tar')}/11.png"
    assert [sent(item.picture).read() for item in source.items] == [
        png(3 * tar + n) for tar in range(3) for n in range(2)
    ]
    assert server.asked == ["000.tar", "001.tar", "002.tar", "classes.json"]
    server.files.clear()  # the copies are enough
    assert open_source(config).items


def test_class_names_are_counted_where_there_is_no_list(server, tmp_path):
    config = SourceConfig(data=shards(server, 1), cache=tmp_path)
    assert open_source(config).class_names == ("0", "1")
    server.faults["classes.json"] = ["500"]
    with pytest.raises(StorageError, match=r"classes\.json"):
        open_source(config)


def test_pictures_of_removed_tars_are_staged_again(server, tmp_path, capsys):
    pattern = shards(server)
    size = len(server.files["000.tar"])
    config = SourceConfig(data=pattern, cache=tmp_path, cache_size=1.5 * size / (1 << 30))
    be_quiet(False)
    items = open_source(config).items
    assert "fetched again and again" in capsys.readouterr().err
    assert len(list((tmp_path / "remote").glob("*.data"))) == 1
    for number, item in enumerate(items):
        assert sent(item.picture).read() == png(3 * (number // 2) + number % 2)
        assert len(list((tmp_path / "remote").glob("*.data"))) == 1
    server.files["000.tar"] = server.files["001.tar"]
    with pytest.raises(DataError, match="changed since it was listed"):
        items[0].picture.read()
    server.faults["001.tar"] = ["404"]
    with pytest.raises(StorageError, match="404"):
        items[2].picture.read()


def test_a_tar_that_was_cut_at_its_source_is_fatal(server, tmp_path):
    shards(server, 1)
    server.files["000.tar"] = server.files["000.tar"][:2000]
    source = scan_source(SourceConfig(data=server.url("000.tar"), cache=tmp_path))
    assert [(p.kind, p.severity) for p in source.problems] == [("damaged tar", "fatal")]
    assert source.problems[0].where == server.url("000.tar")


def test_commands_name_the_location(run, server, tmp_path):
    done = run("train-ae", server.url("none.tar"), "--cache", tmp_path, "--out", tmp_path / "ae")
    assert (done.returncode, done.stdout) == (4, b"")
    assert server.url("none.tar").encode() in done.stderr
    done = run("train-ae", "pipe:curl x", "--out", tmp_path / "ae")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"no pipes" in done.stderr


@pytest.fixture
def store(monkeypatch):
    """fsspec's file system in memory, as if it were a store."""
    monkeypatch.setitem(locations.STORES, "memory", "fsspec")
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/a.tar", BODY)
    yield files
    files.rm("/bucket", recursive=True)


def test_stores_are_read_through_fsspec(store, cache):
    assert stage("memory://bucket/a.tar", cache).path().read_bytes() == BODY
    with pytest.raises(StorageError, match=r"cannot fetch memory://bucket/b\.tar"):
        stage("memory://bucket/b.tar", cache)


@pytest.mark.parametrize("fault", ["short", "long", "stall", "error"])
def test_stores_that_fail_are_tried_again(store, cache, monkeypatch, fault):
    real, opened = type(store).open, []

    class Bad(io.BytesIO):
        def read(self, size: int | None = -1):
            if fault == "stall":
                time.sleep(0.6)
            if fault == "error" and self.tell():
                raise RuntimeError("throttled")
            return super().read(size if fault != "error" else 1000)

    def open_(self, path, mode="rb", **options):
        opened.append(path)
        if len(opened) == 3:
            return real(self, path, mode, **options)
        return Bad(BODY[:-1] if fault == "short" else BODY + b"x" if fault == "long" else BODY)

    monkeypatch.setattr(type(store), "open", open_)
    assert stage("memory://bucket/a.tar", cache).path().read_bytes() == BODY
    assert len(opened) == 3


def test_a_missing_package_is_named(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UsageError, match="s3 s3fs"):
        stage("s3://bucket/a.tar", cache)


def test_braces_are_those_of_a_shell():
    assert expand("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand("{3..1}{a,b}") == ["3a", "3b", "2a", "2b", "1a", "1b"]
    assert expand("https://h/{0..6..3}.tar") == [f"https://h/{n}.tar" for n in (0, 3, 6)]
    assert expand("s3://b/{x,y/z}.tar") == ["s3://b/x.tar", "s3://b/y/z.tar"]
    assert len(expand("{0000..9999}")) == 10_000


def test_what_is_there_under_its_name_is_not_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a{0..1}", "a:b", "pipe:x"):
        Path(name).write_bytes(b"")
        assert expand(name) == [name]
        assert not is_remote(name)
    assert not is_remote("C:\\photos")


REFUSED = (
    *("pipe:cat x", "pipe://cat x", "file+shell://x", "shell:ls", "exec:ls", "ftp://h/a.tar"),
    *("file:///etc/passwd", "gopher://h/", "data:text/plain,x", "local:///x", "HTTP:", "https:a"),
    *("https://", "https:///a.tar", "s3://", "https://u:p@h/a.tar", "https://[::1/a.tar"),
    *("simplecache::https://h/a.tar", "https://h/a::file:///x", "{https,pipe}://h/a.tar"),
    *("{a,pipe:ls}", "{0..99999999}.tar", "{0..99999}{0..99999}", "{a,{b,c}}", "{a", "a}", "{a}"),
    *("{0..9..0}", "a\nb{0..1}", "x" * 5000 + "{0..1}", "https://h/\x1b[2J.tar", "reader:x.tar"),
)


@pytest.mark.parametrize("location", REFUSED)
def test_other_locations_are_refused(location, tmp_path):
    with pytest.raises(UsageError):
        expand(location)
    with pytest.raises((UsageError, DataError)):
        scan_source(SourceConfig(data=location, cache=tmp_path))


started: list[str] = []
listening = threading.local()


def _listen(event, arguments):
    if getattr(listening, "on", False) and event in (
        *("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn"),
        *("pty.spawn", "os.spawn", "socket.connect", "socket.getaddrinfo", "pickle.find_class"),
    ):
        started.append(event)


sys.addaudithook(_listen)
PIECES = [
    *("pipe:", "pipe://", "|", ";", "$(touch x)", "`id`", "{", "}", "..", ",", "{0..3}", "{a,b}"),
    *("file+", "shell:", "file://", "https://", "s3://", "hf://", "::", "@", "?", "#", "/", "\\"),
    *("cat", "curl -s", " ", "\n", "\0", ".tar", "..", "%2e", "%", "ü", "~", "-", "0", "9", "a"),
]


def fuzzed(count):
    draw = random.Random(0)
    for number in itertools.count():
        if number == count:
            return
        pieces = [*PIECES, *string.ascii_lowercase, chr(draw.randrange(0x3000))]
        yield "".join(draw.choices(pieces, k=draw.randrange(1, 9)))


def test_10000_fuzzed_locations_start_no_process(tmp_path, monkeypatch):
    """Nor do they reach the network, except through the one door that is shut here."""

    def shut(url):
        raise downloads.TransferError("shut", again=False)

    monkeypatch.setattr(remote, "open_download", shut)
    monkeypatch.chdir(tmp_path)
    asked = 0
    for location in fuzzed(10_000):
        listening.on = True
        try:
            expand(location)
            asked += 1
        except UsageError:
            pass
        finally:
            listening.on = False
    for location in [*fuzzed(300), *REFUSED]:
        listening.on = True
        try:
            scan_source(SourceConfig(data=location, format="webdataset", cache=tmp_path / "cache"))
        except (UsageError, DataError, StorageError):
            pass
        finally:
            listening.on = False
    assert asked > 100
    assert started == []
    assert [path.name for path in tmp_path.iterdir()] in ([], ["cache"])


@given(st.text(max_size=30))
@settings(max_examples=200)
def test_any_text_is_a_location_or_refused(text):
    try:
        names = expand(text)
    except UsageError:
        return
    assert names
    for name in names:
        scheme = name.partition("://")[0].lower()
        assert not is_remote(name) or scheme in (*locations.HTTP, *locations.STORES)


def test_where_copies_lie(monkeypatch, tmp_path):
    config = SourceConfig(data="x")
    monkeypatch.delenv("LDMKIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_of(config) == Cache("/c/ldmkit/remote", 50 << 30)
    monkeypatch.setenv("LDMKIT_CACHE", "/d")
    assert cache_of(config).directory == "/d/remote"
    assert cache_of(SourceConfig(data="x", cache=tmp_path)).directory == f"{tmp_path}/remote"
