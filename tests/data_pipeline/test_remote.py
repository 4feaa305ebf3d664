"""Remote shards: a real HTTP server on loopback with every fault a network has, and fsspec's memory file
system."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from agff.errors import ConfigError, DataError, StorageError
from data_pipeline import remote, retries
from data_pipeline.convert import prepare
from data_pipeline.loader import load_batches
from data_pipeline.manifest import Manifest, Shard, read_manifest
from data_pipeline.reader import ShardReader
from data_pipeline.remote import CacheConfig, CachedFolder, open_folder
from data_pipeline.storage import LocalFolder
from tests.data_pipeline.test_loader import batches_of, flat
from tests.drawings import write_drawings


class FaultyServer:
    """Serves a folder; the first `faults[path]` requests of a path go wrong in the given way."""

    def __init__(self, folder: Path) -> None:
        self.requests: Counter[str] = Counter()
        self.faults: dict[str, list[str]] = {}
        self.released = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.lstrip("/")
                owner.requests[path] += 1
                remaining = owner.faults.get(path, [])
                fault = remaining.pop(0) if remaining else ""
                try:
                    content = (folder / path).read_bytes()
                except OSError:
                    self.send_error(404)
                    return
                if fault == "500":
                    self.send_error(500)
                    return
                if fault == "drop":
                    self.close_connection = True
                    self.connection.close()
                    return
                if fault == "hold":
                    owner.released.wait(60)
                if fault == "delay":
                    time.sleep(1.5)
                if fault == "flip":
                    content = content[:700] + bytes([content[700] ^ 1]) + content[701:]
                if fault == "short":  # a whole answer, but of too few bytes
                    content = content[: len(content) // 2]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if fault == "truncate":  # the connection ends before the announced length
                    content = content[: len(content) // 2]
                    self.close_connection = True
                if self.command == "GET":
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # dropped connections are what this server is for

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, Manifest]:
    manifest = prepare(write_drawings(tmp_path / "d").mmeb, tmp_path / "out", rows_per_shard=10)
    return tmp_path / "out", manifest


@pytest.fixture
def server(shards: tuple[Path, Manifest]) -> Iterator[FaultyServer]:
    server = FaultyServer(shards[0])
    yield server
    server.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)


def cached(server: FaultyServer, folder: Path, **choices: float) -> CachedFolder:
    opened = open_folder(server.url, CacheConfig(dir=str(folder), **choices))
    assert isinstance(opened, CachedFolder)
    return opened


def shard_of(manifest: Manifest, source: str = "Shapes_i2t", number: int = 0) -> Shard:
    return manifest.sources[source].shards[number]


def content_of(folder: CachedFolder, source: str, shard: Shard) -> bytes:
    descriptor = folder.open(source, shard)
    try:
        return os.pread(descriptor, shard.size_bytes, 0)
    finally:
        os.close(descriptor)


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith("lock")]


def test_batches_of_a_remote_folder_equal_those_of_the_local_one(
    shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path
) -> None:
    manifest = shards[1]
    remote = cached(server, tmp_path / "cache")
    assert read_manifest(remote) == manifest
    expected = [
        flat(batch) for batch in load_batches(batches_of(shards), start_step=0, num_steps=6, num_workers=0)
    ]
    for num_workers in (0, 2):
        batches = batches_of(shards)
        batches.reader = ShardReader(remote, manifest)
        batches.fetch_ahead_steps = 2
        found = load_batches(batches, start_step=0, num_steps=6, num_workers=num_workers)
        assert [flat(batch) for batch in found] == expected
    fetched = {path: count for path, count in server.requests.items() if path.endswith(".tar")}
    assert fetched
    assert set(fetched.values()) == {1}, "each shard is fetched once, by whichever process"


@pytest.mark.parametrize("fault", ["500", "drop", "truncate", "short", "flip", "delay"])
def test_a_fault_of_the_network_is_tried_again(
    shards: tuple[Path, Manifest],
    server: FaultyServer,
    tmp_path: Path,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "HTTP_TIMEOUT_S", 0.5)
    folder, manifest = shards
    shard = shard_of(manifest)
    path = f"Shapes_i2t/{shard.name}"
    server.faults[path] = [fault, fault]
    assert content_of(cached(server, tmp_path / "cache"), "Shapes_i2t", shard) == (folder / path).read_bytes()
    assert server.requests[path] == 3
    assert len(files_in(tmp_path / "cache")) == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", "8 attempts failed, the last: 500"),
        ("flip", r"8 attempts failed, the last: SHA-256 of what came is \w+..., the manifest says"),
        ("short", "8 attempts failed, the last: 10,240 bytes came, the manifest says 20,480"),
    ],
)
def test_a_fault_that_stays_is_an_error_with_the_address(
    shards: tuple[Path, Manifest],
    server: FaultyServer,
    tmp_path: Path,
    fault: str,
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shard = shard_of(shards[1], "Shapes_text")
    path = f"Shapes_text/{shard.name}"
    server.faults[path] = [fault] * 20
    with pytest.raises(StorageError, match=rf"^{server.url}/{path}: {message}"):
        content_of(cached(server, tmp_path / "cache"), "Shapes_text", shard)
    assert server.requests[path] == retries.ATTEMPTS
    assert [
        re.match(rf"{server.url}/{path}: attempt (\d) of 8 failed: ", line)[1] for line in caplog.messages
    ] == list("4567")
    assert files_in(tmp_path / "cache") == [], "nothing half is left"


def test_a_cached_file_that_lost_its_end_is_fetched_again(
    shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path
) -> None:
    folder, shard = cached(server, tmp_path / "cache"), shard_of(shards[1])
    content = content_of(folder, "Shapes_i2t", shard)
    os.truncate(next(iter(files_in(tmp_path / "cache"))), 512)
    assert content_of(folder, "Shapes_i2t", shard) == content
    assert server.requests[f"Shapes_i2t/{shard.name}"] == 2


def test_a_missing_file_is_not_tried_again(
    shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path
) -> None:
    shard = shard_of(shards[1])
    (shards[0] / "Shapes_i2t" / shard.name).unlink()
    with pytest.raises(StorageError, match=f"{shard.name}: the file is missing there, the manifest names it"):
        content_of(cached(server, tmp_path / "cache"), "Shapes_i2t", shard)
    assert server.requests[f"Shapes_i2t/{shard.name}"] == 1
    with pytest.raises(DataError, match="no shards here"):
        read_manifest(open_folder(f"{server.url}/nowhere", CacheConfig(dir=str(tmp_path / "cache"))))


def fetch_all(
    url: str, cache: Path, max_gib: float, manifest: Manifest, rounds: int, failures: list[str]
) -> None:
    try:
        folder = open_folder(url, CacheConfig(dir=str(cache), max_gib=max_gib))
        for _ in range(rounds):
            for name, source in manifest.sources.items():
                for shard in source.shards:
                    os.close(folder.open(name, shard))
    except BaseException as error:
        failures.append(repr(error))
        raise


def test_processes_of_a_machine_fetch_each_shard_once(
    shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = (server.url, tmp_path / "cache", 1.0, shards[1], 1, [])
    processes = [context.Process(target=fetch_all, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    counts = [count for path, count in server.requests.items() if path.endswith(".tar")]
    assert len(counts) == sum(len(source.shards) for source in shards[1].sources.values())
    assert set(counts) == {1}


def test_the_cache_stays_within_its_bound_and_keeps_what_was_used_last(
    shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path
) -> None:
    manifest, cache = shards[1], tmp_path / "cache"
    all_shards = [(name, shard) for name, source in manifest.sources.items() for shard in source.shards]
    total = sum(shard.size_bytes for _, shard in all_shards)
    limit = total // 2
    folder = cached(server, cache, max_gib=limit / 2**30)
    largest = 0
    for name, shard in all_shards:
        assert content_of(folder, name, shard) == (shards[0] / name / shard.name).read_bytes()
        content_of(folder, *all_shards[0])  # used again and again
        largest = max(largest, sum(path.stat().st_size for path in files_in(cache)))
    assert largest <= limit
    assert largest > limit / 2
    assert server.requests[f"{all_shards[0][0]}/{all_shards[0][1].name}"] == 1


def test_threads_that_evict_each_other_still_read_whole_files(
    shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path
) -> None:
    manifest = shards[1]
    largest = max(shard.size_bytes for source in manifest.sources.values() for shard in source.shards)
    failures: list[str] = []
    arguments = (server.url, tmp_path / "cache", 2.5 * largest / 2**30, manifest, 3, failures)
    threads = [threading.Thread(target=fetch_all, args=arguments) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert failures == []


def test_what_a_killed_fetch_left_behind_is_cleared(
    shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path
) -> None:
    cache, shard = tmp_path / "cache", shard_of(shards[1])
    cache.mkdir()
    for prefix in ("ab", shard.sha256[:2]):  # they claim more than the whole cache
        (cache / f"{prefix}{'cd' * 31}.{10**12}.partial").write_bytes(b"half")
    (cache / f"{shard.sha256}.{shard.size_bytes}.partial").write_bytes(b"half")
    content_of(cached(server, cache, max_gib=0.001), "Shapes_i2t", shard)
    assert [path.name for path in files_in(cache)] == [f"{shard.sha256}.tar"]


def test_what_is_not_the_caches_own_stays(
    shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path
) -> None:
    cache, manifest = tmp_path / "cache", shards[1]
    (cache / "folder").mkdir(parents=True)
    (cache / "thesis.doc").write_bytes(bytes(5000))
    (cache / "x.partial").write_bytes(bytes(5000))
    os.utime(cache / "thesis.doc", (1, 1))
    largest = max(shard.size_bytes for source in manifest.sources.values() for shard in source.shards)
    folder = cached(server, cache, max_gib=2.5 * largest / 2**30)
    for name, source in manifest.sources.items():
        for shard in source.shards:
            content_of(folder, name, shard)
    assert {path.name for path in cache.iterdir()} >= {"folder", "thesis.doc", "x.partial"}


def test_fetching_ahead_drives_out_nothing_that_is_needed(
    shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path
) -> None:
    manifest = shards[1]
    wanted = [(name, shard) for name, source in manifest.sources.items() for shard in source.shards]
    largest = max(shard.size_bytes for _, shard in wanted)
    folder = cached(server, tmp_path / "cache", max_gib=4.5 * largest / 2**30)
    for place, (name, shard) in enumerate(wanted):
        for ahead in wanted[place + 1 : place + 13]:
            folder.fetch_ahead(*ahead)
        time.sleep(0.02)
        content_of(folder, name, shard)
    counts = {path: count for path, count in server.requests.items() if path.endswith(".tar")}
    assert len(counts) == len(wanted)
    assert sum(counts.values()) <= len(wanted) + 1, (
        "the very first read may drive out one that was fetched ahead"
    )


def test_what_a_dead_run_fetched_ahead_makes_room(
    shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, cache = shards[1], tmp_path / "cache"
    wanted = [(name, shard) for name, source in manifest.sources.items() for shard in source.shards]
    size = 4.5 * max(shard.size_bytes for _, shard in wanted) / 2**30
    dead = cached(server, cache, max_gib=size)
    for ahead in wanted:
        dead.fetch_ahead(*ahead)
    seen = -1
    # until it has filled the cache and fetches no more
    while seen != (seen := sum(server.requests.values())):
        time.sleep(0.5)
    monkeypatch.setattr(remote, "WAITING_S", 0)  # an hour later
    server.requests.clear()
    folder = cached(server, cache, max_gib=size)
    for _ in range(5):
        for name, shard in wanted[-3:]:
            content_of(folder, name, shard)
    assert all(count == 1 for path, count in server.requests.items() if path.endswith(".tar"))


def test_the_bound_holds_while_many_fetch_at_once(
    shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path
) -> None:
    manifest, cache = shards[1], tmp_path / "cache"
    wanted = [(name, shard) for name, source in manifest.sources.items() for shard in source.shards]
    limit = int(2.5 * max(shard.size_bytes for _, shard in wanted))
    server.faults = {f"{name}/{shard.name}": ["delay"] for name, shard in wanted[:6]}
    threads = [
        threading.Thread(target=content_of, args=(cached(server, cache, max_gib=limit / 2**30), *one))
        for one in wanted[:6]
    ]
    for thread in threads:
        thread.start()
    sizes = []
    while any(thread.is_alive() for thread in threads):
        with contextlib.suppress(FileNotFoundError):  # evicted between two looks
            sizes.append(sum(path.stat().st_size for path in files_in(cache)))
        time.sleep(0.002)
    sizes.append(sum(path.stat().st_size for path in files_in(cache)))
    assert len(sizes) > 20
    assert 0 < max(sizes) <= limit


@pytest.mark.parametrize("sha256", ["/etc/passwd", "../" * 8 + "etc/passwd", "ab", None, 5, "g" * 64])
def test_a_hash_in_a_manifest_cannot_name_a_file_of_this_machine(
    shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path, sha256: object
) -> None:
    values = json.loads((shards[0] / "manifest.json").read_text())
    values["sources"]["Shapes_i2t"]["shards"][0]["sha256"] = sha256
    (shards[0] / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="damaged manifest"):
        read_manifest(cached(server, tmp_path / "cache"))


def test_a_shard_larger_than_the_cache_is_named(
    shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path
) -> None:
    with pytest.raises(
        StorageError, match=r"bytes are more than the whole cache of 1,073 .data.cache.max_gib.; raise it"
    ):
        content_of(cached(server, tmp_path / "cache", max_gib=1e-6), "Shapes_i2t", shard_of(shards[1]))


def test_a_full_disk_names_the_cache_and_leaves_nothing(
    shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, is_ahead: bool) -> None:
        raise OSError(28, "No space left on device")

    folder = cached(server, tmp_path / "cache")
    monkeypatch.setattr(folder, "_download", full)
    with pytest.raises(
        StorageError, match=r"cannot write .* bytes to the cache .*No space left on device; free space there"
    ):
        content_of(folder, "Shapes_i2t", shard_of(shards[1]))
    assert files_in(tmp_path / "cache") == []


def test_a_really_full_disk(shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path) -> None:
    cache = tmp_path / "small"
    cache.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(cache)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        with pytest.raises(
            StorageError, match=r"cannot write .* bytes to the cache .*No space left on device; free space"
        ):
            content_of(cached(server, cache), "Shapes_i2t", shard_of(shards[1]))
        assert files_in(cache) == []
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_fetching_ahead_happens_beside_the_reading(
    shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path
) -> None:
    folder, shard = cached(server, tmp_path / "cache"), shard_of(shards[1])
    path = f"Shapes_i2t/{shard.name}"
    server.faults[path] = ["delay"]
    started = time.monotonic()
    folder.fetch_ahead("Shapes_i2t", shard)
    folder.fetch_ahead("Shapes_i2t", shard)
    assert time.monotonic() - started < 1, "announcing does not wait"
    content_of(folder, "Shapes_i2t", shard)
    assert server.requests[path] == 1
    server.faults["Shapes_i2t/gone"] = []
    # nobody is notified
    folder.fetch_ahead("Shapes_i2t", Shard(name="gone", size_bytes=1, sha256="ff" * 32, num_samples=1))


def test_the_ranks_of_a_machine_share_out_what_they_all_want_ahead(
    shards: tuple[Path, Manifest], server: FaultyServer, tmp_path: Path
) -> None:
    """Each rank has rows of every source, so all announce the same shards in the same order; a rank that
    waited for the files another one is fetching would leave all of its connections idle."""
    by_lock = {shard.sha256[:2]: (n, shard) for n, s in shards[1].sources.items() for shard in s.shards}
    *held, last = list(by_lock.values())[: remote.FETCHERS + 1]
    server.faults = {f"{name}/{shard.name}": ["hold"] * 9 for name, shard in held}
    folders = [cached(server, tmp_path / "cache") for _ in range(2)]
    for ahead in (*held, last):
        folders[0].fetch_ahead(*ahead)
    while len(server.requests) < len(held):
        time.sleep(0.01)
    for ahead in (*held, last):
        folders[1].fetch_ahead(*ahead)
    deadline = time.monotonic() + 30
    while not (found := list((tmp_path / "cache").glob("*.tar"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [path.name for path in found] == [f"{last[1].sha256}.tar"]
    server.released.set()
    for name, shard in held:
        content_of(folders[1], name, shard)
    assert {server.requests[f"{name}/{shard.name}"] for name, shard in (*held, last)} == {1}


def test_memory_file_system(shards: tuple[Path, Manifest], tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(shards[0]), "/test-storage", recursive=True)
    try:
        folder = open_folder("memory://test-storage", CacheConfig(dir=str(tmp_path / "cache")))
        manifest = read_manifest(folder)
        assert manifest == shards[1]
        remote, local = ShardReader(folder, manifest), ShardReader(LocalFolder(shards[0]), manifest)
        for name, source in manifest.sources.items():
            for number in range(0, source.num_samples, 7):
                assert remote.read(name, number) == local.read(name, number)
    finally:
        memory.rm("/test-storage", recursive=True)


@pytest.mark.parametrize(
    "location",
    [
        "pipe:touch {}",
        "pipe:cat x.tar > {}",
        "ftp://host/x",
        "simplecache::s3://b/x",
        "file::pipe:touch {}",
        "ssh://h/x",
        "s3:b/x",
        "file://host/x",
        "file:/x",
    ],
)
def test_commands_and_unknown_storages_are_refused(location: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(
        ConfigError, match=r"is no storage we read; give a path, or a URL with s3://.*never run"
    ):
        open_folder(location.format(mark), CacheConfig())
    assert not mark.exists()
    assert isinstance(open_folder(f"file://{tmp_path}", CacheConfig()), LocalFolder)
    assert isinstance(open_folder("relative/path", CacheConfig()), LocalFolder)


def test_a_storage_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"s3:// needs the package s3fs .*; pip install s3fs"):
        read_manifest(open_folder("s3://bucket/shards", CacheConfig(dir=str(tmp_path))))


@pytest.mark.parametrize(
    "values",
    [
        {"max_gib": 0},
        {"max_gib": -1},
        {"max_gib": float("inf")},
        {"max_gib": float("nan")},
        {"fetch_ahead_steps": -1},
    ],
)
def test_impossible_cache_settings(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"data.cache.{next(iter(values))}=.* must be >"):
        CacheConfig(**values)
