"""Shards at an address: the same images as from the files, whatever is kept of them and whatever the network does."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from mae_core.config.load import load_config
from mae_core.data import remote
from mae_core.data.config import PretrainData
from mae_core.data.decoding import UnreadableImage, to_tensor
from mae_core.data.sources import open_source
from mae_core.errors import UserError
from mae_core.training.pretrain_config import PretrainConfig
from tests.data.test_sources import write_shards

pytestmark = pytest.mark.extra("fsspec", "aiohttp", "webdataset")


class Server(ThreadingHTTPServer):
    """Serves ``folder``, by parts where ``parts``; answers ``failures`` requests of a body with 503 before that."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.parts, self.failures, self.refusal = folder, True, 0, 503
        self.asked: list[tuple[str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def bodies(self) -> int:
        """How many requests of a body came since the last call."""
        found = sum(kind == "GET" for kind, _ in self.asked)
        self.asked.clear()
        return found


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, part = self.server, self.headers.get("Range")
        server.asked.append((self.command, part))
        file = server.folder / self.path.lstrip("/")
        file = file if file.is_file() else server.folder / self.path.partition("?")[0].lstrip("/")
        if self.command == "GET" and server.failures:
            server.failures -= 1
            return self.send_error(server.refusal)
        if not file.is_file():
            return self.send_error(403 if file.name == "secret.tar" else 404)
        content = file.read_bytes()
        status, total = 200, len(content)
        if part and server.parts:
            first, _, last = part.removeprefix("bytes=").partition("-")
            content, status = content[int(first) : int(last) + 1], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{total}")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes" if server.parts else "none")
        self.send_header("Last-Modified", str(file.stat().st_mtime_ns))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def shards(tmp_path, write_images) -> list[Path]:
    return write_shards(tmp_path / "there", write_images(tmp_path / "images", 6), 2)


@pytest.fixture
def server(shards, monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    with Server(shards[0].parent) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def read(server, tmp_path):
    """(name, size of the cache in bytes) -> the source."""

    def read(name: str = "part-{0000..0002}.tar", limit: float = 1e9):
        return open_source(PretrainData(path=f"{server.address}/{name}", cache=tmp_path / "kept", cache_gb=limit / 1e9))

    return read


def check_same(source, shards: list[Path]) -> None:
    expected = open_source(PretrainData(path=tuple(shards)))
    assert [name.rpartition("/")[2] for name in source.names] == [n.rpartition("/")[2] for n in expected.names]
    for index in range(len(expected)):
        assert torch.equal(to_tensor(source.read(index)), to_tensor(expected.read(index)))


def kept_bytes(tmp_path: Path) -> int:
    return sum(file.stat().st_size for file in (tmp_path / "kept").glob("*/*.tar"))


def test_shards_are_fetched_once_and_then_read_from_here(server, read, shards, tmp_path, capsys):
    check_same(read(), shards)
    assert server.bodies() == 3, "each whole, in one piece"
    assert capsys.readouterr().out.count("fetching http://") == 3
    check_same(read(), shards)
    assert server.bodies() == 0
    assert not capsys.readouterr().out
    assert kept_bytes(tmp_path) == sum(shard.stat().st_size for shard in shards)


def test_what_does_not_fit_is_read_by_parts_and_the_limit_holds(server, read, shards, tmp_path):
    two = sum(shard.stat().st_size for shard in shards[:2])
    check_same(read(limit=two), shards)
    assert kept_bytes(tmp_path) == two
    server.bodies()
    source = read(limit=two)
    assert server.bodies() == 0, "where the images of the third lie is known"
    source.read(5)
    assert server.bodies() == 1
    check_same(read(limit=0), shards)


def test_another_run_takes_the_room_of_shards_that_it_does_not_want(server, read, shards, tmp_path):
    first = read("part-0000.tar", limit=shards[0].stat().st_size)
    check_same(read("part-0001.tar", limit=shards[1].stat().st_size + 100), shards[1:2])
    assert kept_bytes(tmp_path) == shards[0].stat().st_size, "that of a run which lives stays"
    remote._in_use.clear()  # as when its process ends
    check_same(read("part-0001.tar", limit=shards[1].stat().st_size + 100), shards[1:2])
    assert kept_bytes(tmp_path) == shards[1].stat().st_size
    check_same(first, shards[:1])  # its copy is gone, its address is not


def test_what_a_killed_process_left_counts_and_goes_first(read, shards, tmp_path):
    limit = sum(shard.stat().st_size for shard in shards)
    read("part-0000.tar")
    left = next((tmp_path / "kept").glob("*/part-0000.tar")).with_name(".part-0000-abc.tar")
    left.write_bytes(bytes(2048))
    remote._in_use.clear()
    check_same(read(limit=limit), shards)
    assert not left.exists() and kept_bytes(tmp_path) == limit


def test_a_damaged_copy_is_fetched_again(server, read, shards, tmp_path, capsys):
    limit = sum(shard.stat().st_size for shard in shards)  # without room for a second copy
    read(limit=limit)
    copy = next((tmp_path / "kept").glob("*/part-0001.tar"))
    content = bytearray(copy.read_bytes())
    content[700] ^= 1
    copy.write_bytes(content)
    check_same(read(limit=limit), shards)
    assert f"{copy} is damaged and fetched again" in capsys.readouterr().out
    (copy.parent / "contents.json").write_text("{")
    check_same(read(), shards)


def test_shards_that_changed_at_their_address_are_fetched_again(server, read, shards):
    limit = sum(shard.stat().st_size for shard in shards)
    before = read(limit=limit)
    expected = [before.content(index) for index in (0, 1, 4, 5)]
    shutil.copy(shards[0], shards[1])
    check_same(read(limit=0), shards)  # the copy is of another file
    remote._in_use.clear()
    check_same(read(limit=limit), shards)
    assert [before.content(index) for index in (0, 1, 4, 5)] == expected


def test_a_server_without_parts_sends_whole_files(server, read, shards, monkeypatch):
    server.parts = False
    with monkeypatch.context() as small:
        small.setattr(remote, "PIECE", 1 << 12)
        check_same(read(), shards)
    assert server.bodies() == 3, "none is sent again for its next piece"
    with pytest.raises(UserError, match=r"sends no parts of files; raise data\.cache_gb so that all"):
        read("part-0000.tar", limit=0).read(0)


def test_a_request_that_fails_is_sent_again(server, read, shards):
    server.failures = 2
    check_same(read(limit=0), shards)
    source = read(limit=0)
    server.failures = 3
    with pytest.raises(UnreadableImage, match="503"):
        source.read(0)
    check_same(source, shards)


def test_what_a_busy_server_refuses_is_asked_again(server, read, shards):
    source = read(limit=0)
    server.failures, server.refusal = 1, 429
    check_same(source, shards)


def test_a_shard_that_is_removed_is_named_without_its_signature(server, read, shards):
    source = read("part-0000.tar?token=secret", limit=0)
    shards[0].unlink()
    with pytest.raises(UnreadableImage) as caught:
        source.read(0)
    assert "part-0000.tar" in str(caught.value) and "secret" not in str(caught.value)


def test_shards_that_a_query_alone_tells_apart_are_two(server, shards, tmp_path):
    for number, shard in enumerate(shards[:2]):
        shutil.copy(shard, shard.parent / f"get.tar?id={number}")
    place = f"{server.address}/get.tar?id={{0..1}}"
    check_same(open_source(PretrainData(path=place, cache=tmp_path / "kept")), shards[:2])


def test_an_outage_at_the_start_is_no_damaged_shard(server, read):
    server.failures = 100
    for limit in (0, 1e9):
        with pytest.raises(UserError, match=r"part-0000\.tar cannot be read \(.*503.*check the address"):
            read(limit=limit)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("{server}/part-{0000..0003}.tar", r"part-0003\.tar does not exist; check the address"),
        ("{server}/secret.tar?token=abc", r"secret\.tar cannot be read \(.*403"),
        ("{server}/folder/", r"folder(/)? (does not exist|cannot be read)|no \.tar files are listed at"),
        ("http://127.0.0.1:9/a.tar", r"a\.tar cannot be read \(.*check the address, the network"),
        ("nonsense://there/a.tar", "nonsense:// is not an address that fsspec reads; it reads .*https.*s3"),
        ("smb://there/a.tar", r"smb:// needs a package that is not installed .*pip install 'mae-transfer\[remote\]'"),
        ("memory://nowhere/", "no .tar files are listed at memory://nowhere; name them, such as memory://nowhere/part"),
    ],
)
def test_addresses_that_cannot_be_read_are_refused_in_a_sentence(server, tmp_path, place, message):
    address = place.replace("{server}", server.address)
    with pytest.raises(UserError, match=message) as caught:
        open_source(PretrainData(path=address, cache=tmp_path / "kept"))
    assert "token" not in str(caught.value)


def test_a_folder_that_can_be_listed_names_its_shards(shards, tmp_path):
    import fsspec

    store = fsspec.filesystem("memory")
    for shard in shards:
        store.pipe_file(f"/photos/{shard.name}", shard.read_bytes())
    for place in ("memory://photos", "memory://photos/"):
        check_same(open_source(PretrainData(path=place, cache=tmp_path / "kept")), shards)


def test_loading_processes_read_parts_too(read, shards):
    source = read(limit=0)
    expected = [source.content(index) for index in range(len(source))]  # connections are open before the fork

    class Contents(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> bytes:
            return source.content(index)

    loader = DataLoader(Contents(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert list(loader) == expected


def test_processes_that_start_together_fetch_each_shard_once(server, read, shards):
    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            check_same(read(), shards)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert server.bodies() == 3


def test_a_run_from_an_address_is_that_from_the_files(server, shards, tmp_path, pretrain_options):
    from mae_core.training.pretrain import pretrain

    def run(place: str, name: str) -> None:
        words = [f"data.path={place}", f"output={tmp_path / name}", f"data.cache={tmp_path / 'kept'}"]
        pretrain(load_config(PretrainConfig, None, [*words, *pretrain_options, "optim.epochs=2"]))

    address = f"{server.address}/part-{{0000..0002}}.tar"
    run(address, "remote")
    run(str(shards[0].parent), "local")
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("remote", "local")]
    losses = [[entry["loss"] for entry in map(json.loads, log) if "loss" in entry] for log in logs]
    assert losses[0] == losses[1]
    saved = load_config(PretrainConfig, tmp_path / "remote" / "config.yaml")
    assert remote.address_of(saved.data.path) == address  # type: ignore[arg-type]
