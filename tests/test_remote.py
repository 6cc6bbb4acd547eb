"""Stores that lie elsewhere: fetched once, whole, checked; and what is said when that cannot be."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from photos import write_photos, write_store
from safetensors.torch import load_file
from small_stores import make_store, small_plan

from ferkd import remote
from ferkd.cli import main
from ferkd.errors import StoreError
from ferkd.store import LabelStore

FILES = {"manifest.json", "index.bin", "shards/00000.bin"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FERKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAIT_S", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    return make_store(tmp_path / "server/labels", small_plan())


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `asked` counts requests by path, `broken[path]` more answers to it are cut short, `status[path]` is refused;
    files come in `pieces` with a `pause` before each."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.broken, self.status = folder, Counter[str](), Counter[str](), dict[str, int]()
        self.pieces, self.pause = 1, 0.0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        file = self.server.folder / self.path.lstrip("/")
        if body:
            self.server.asked[self.path] += 1
        if (status := self.server.status.get(self.path)) or not file.is_file():
            self.send_error(status or 404)
            return
        text = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if body and self.server.broken[self.path]:
            self.server.broken[self.path] -= 1
            self.wfile.write(text[: len(text) // 2])
            self.wfile.flush()
            self.connection.close()
        elif body:
            size = max(1, -(-len(text) // self.server.pieces))
            for at in range(0, len(text), size):
                time.sleep(self.server.pause)
                self.wfile.write(text[at : at + size])
                self.wfile.flush()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(store: LabelStore) -> Iterator[Server]:
    served = Server(store.path.parent)
    threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "policies" not in path.parts
    }


# ---- Addresses -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("http://host/a/b", "http://host/a/b"),
        (Path("https://host:8000/a/b/"), "https://host:8000/a/b"),
        (Path("s3://bucket/labels"), "s3://bucket/labels"),
        (Path("hf://datasets/owner/name@v1/labels"), "hf://datasets/owner/name@v1/labels"),
        (Path("file:///srv/labels"), "file:///srv/labels"),
        ("labels", None),
        (Path("/srv/labels"), None),
        ("./http:/x", None),
    ],
)
def test_an_address_is_told_from_a_path_also_when_pathlib_had_it(given: Any, address: str | None) -> None:
    assert remote.url_of(given) == address


def test_secrets_in_an_address_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert remote.shown("https://user:hush@host/a?token=hush#hush") == "https://host/a"
    with pytest.raises(StoreError) as refused:
        LabelStore("http://user:hush@127.0.0.1:9/a")
    assert "hush" not in str(refused.value) + capsys.readouterr().err


def test_the_hub_is_reached_through_its_own_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    place = remote._Place("hf://datasets/owner/name@v1/labels")
    assert isinstance(place.files, hub.HfFileSystem)
    assert place.root == "datasets/owner/name@v1/labels"


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(StoreError, match=r"s3://bucket/labels: .*pip install 'ferkd\[s3\]'"):
        LabelStore("s3://bucket/labels")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(StoreError, match=r"pip install 'ferkd\[remote\]'"):
        LabelStore("http://127.0.0.1:9/labels")


def test_importing_ferkd_does_not_import_fsspec() -> None:
    code = "import sys, ferkd.store, ferkd.loader; print([m for m in ('fsspec', 'huggingface_hub', 'aiohttp', 's3fs') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---- Fetching --------------------------------------------------------------------------------------------------------------------


def test_a_store_behind_http_is_fetched_once_and_is_the_same(server: Server, store: LabelStore, cache: Path) -> None:
    opened = LabelStore(f"{server.url}/labels")
    assert opened.path.is_relative_to(cache)
    assert opened.source == f"{server.url}/labels"
    assert files_below(opened.path) == files_below(store.path)
    for image in range(len(store)):
        assert opened.read(image).label_words.tobytes() == store.read(image).label_words.tobytes()
    LabelStore(f"{server.url}/labels/").check_integrity()
    assert {path: count for path, count in server.asked.items() if "manifest" not in path} == {
        f"/labels/{file}": 1 for file in files_below(store.path) if file != "manifest.json"
    }


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_other_file_systems_are_fsspecs(kind: str, store: LabelStore) -> None:
    url = f"file://{store.path}"
    if kind == "memory":
        url = "memory://labels"
        fsspec.filesystem("memory").put(str(store.path) + "/", "/labels/", recursive=True)
    opened = LabelStore(url)
    assert opened.source == url
    assert files_below(opened.path) == files_below(store.path)


def test_it_pickles_into_loader_processes_without_being_fetched_there(server: Server) -> None:
    import pickle

    opened = LabelStore(f"{server.url}/labels")
    asked = server.asked.total()
    again = pickle.loads(pickle.dumps(opened))
    assert (again.path, again.source, server.asked.total()) == (opened.path, opened.source, asked)


def test_a_connection_that_breaks_is_tried_again(server: Server, store: LabelStore) -> None:
    server.broken["/labels/manifest.json"] = server.broken["/labels/shards/" + next(store.path.glob("shards/*")).name] = 1
    LabelStore(f"{server.url}/labels").check_integrity()


def test_a_slow_line_may_take_any_time_and_a_silent_one_may_not(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SILENCE_S", 0.5)
    assert remote._Place(server.url).files.client_kwargs["timeout"].total is None
    server.pieces, server.pause = 10, 0.1
    LabelStore(f"{server.url}/labels").check_integrity()
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    server.pieces, server.pause = 1, 1.5
    with pytest.raises(StoreError, match=r"manifest\.json cannot be fetched"):
        LabelStore(f"{server.url}//labels")  # an address that nothing was fetched from


def test_one_that_keeps_breaking_is_told_and_what_came_is_kept(server: Server, store: LabelStore, cache: Path) -> None:
    shard = "/labels/shards/" + sorted(store.path.glob("shards/*"))[-1].name
    server.broken[shard] = 99
    with pytest.raises(StoreError, match=r"cannot be fetched .*start the same command again to go on|is not the file that"):
        LabelStore(f"{server.url}/labels")
    assert not list(cache.rglob("manifest.json")), "a store in part is no store"
    assert list(cache.rglob("index.bin"))
    server.broken[shard] = 0
    LabelStore(f"{server.url}/labels").check_integrity()
    assert server.asked["/labels/index.bin"] == 1


def test_two_processes_fetch_once(server: Server, store: LabelStore) -> None:
    code = f"from ferkd.store import LabelStore; LabelStore({server.url + '/labels'!r}).check_integrity()"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert server.asked["/labels/index.bin"] == 1


def test_a_changed_store_is_another_entry(server: Server, store: LabelStore) -> None:
    first = LabelStore(f"{server.url}/labels")
    shutil.rmtree(store.path)
    make_store(store.path, small_plan(images=70))
    second = LabelStore(f"{server.url}/labels")
    assert (len(first), len(second)) == (150, 70)
    assert first.path != second.path
    first.check_integrity()


def test_without_a_network_the_copy_serves_and_says_so(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    LabelStore(f"{server.url}/labels")
    server.status["/labels/manifest.json"] = 503
    capsys.readouterr()
    assert len(LabelStore(f"{server.url}/labels")) == 150
    assert "using the copy that was fetched before" in capsys.readouterr().err


# ---- What is refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "has no manifest.json: this is not a whole store"), (403, "access to manifest.json was refused"), (500, "cannot be fetched")],
)
def test_what_the_server_refuses_is_said(server: Server, status: int, message: str) -> None:
    server.status["/labels/manifest.json"] = status
    with pytest.raises(StoreError, match=f"{server.url}/labels: .*{message}"):
        LabelStore(f"{server.url}/labels")


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"http://127\.0\.0\.1:9/labels: manifest.json cannot be fetched"):
        LabelStore("http://127.0.0.1:9/labels")


def test_a_web_page_is_no_store(server: Server, store: LabelStore) -> None:
    (store.path / "manifest.json").write_text("<!doctype html><title>Log in</title>")
    with pytest.raises(StoreError, match=f"{server.url}/labels/manifest.json: is no JSON"):
        LabelStore(f"{server.url}/labels")


@pytest.mark.parametrize("damage", ["flipped", "longer", "shorter", "missing"])
def test_damaged_files_never_get_their_name(server: Server, store: LabelStore, cache: Path, damage: str) -> None:
    shard = next(store.path.glob("shards/*"))
    text = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes({"flipped": text[:-1] + bytes([text[-1] ^ 1]), "longer": text + b"x", "shorter": text[:-1]}[damage])
    with pytest.raises(StoreError, match=f"{server.url}/labels") as refused:
        LabelStore(f"{server.url}/labels")
    assert f"shards/{shard.name}" in str(refused.value)
    assert not list(cache.rglob(shard.name))
    assert not list(cache.rglob("manifest.json"))
    shard.write_bytes(text)
    LabelStore(f"{server.url}/labels").check_integrity()


def test_a_manifest_that_names_files_elsewhere_is_refused(server: Server, store: LabelStore, tmp_path: Path) -> None:
    from ferkd.manifest import sealed_json

    content = json.loads((store.path / "manifest.json").read_text())
    del content["sha256"]
    content["shards"][0]["file"] = "../../escaped.bin"
    (store.path / "manifest.json").write_bytes(sealed_json(content))
    with pytest.raises(StoreError, match="do not add up"):
        LabelStore(f"{server.url}/labels")
    assert not list(tmp_path.rglob("escaped.bin*"))


def test_a_disk_without_room_is_said_before_anything_is_fetched(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(StoreError, match=r"needs .* MiB here and .* are free; make room, or set FERKD_CACHE"):
        LabelStore(f"{server.url}/labels")
    assert server.asked["/labels/index.bin"] == 0


def test_a_cache_that_cannot_be_written_is_named(server: Server, cache: Path) -> None:
    cache.write_text("a file where the cache should be")
    with pytest.raises(StoreError, match=rf"{cache}.*cannot be written.*FERKD_CACHE"):
        LabelStore(f"{server.url}/labels")


def test_a_query_is_refused(server: Server) -> None:
    with pytest.raises(StoreError, match="an address with a query"):
        LabelStore(f"{server.url}/labels?version=2")


def test_a_copy_damaged_later_is_noticed(server: Server) -> None:
    opened = LabelStore(f"{server.url}/labels")
    shard = min(opened.path.glob("shards/*"))
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(StoreError, match=r"do not have the CRC32.*delete it and start again: it is then fetched anew"):
        LabelStore(f"{server.url}/labels").read(0)
    shard.unlink()
    LabelStore(f"{server.url}/labels").check_integrity()
    os.truncate(shard, 10)
    LabelStore(f"{server.url}/labels").check_integrity()


# ---- Commands --------------------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def test_training_on_an_address_is_training_on_the_folder(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_photos(tmp_path / "photos")
    write_store(data, tmp_path / "server/photos")
    url = f"{server.url}/photos"
    same = ("--data", data, "--student", "python:photos:tiny_net", "--epochs", 2, "--batch-size", 8, "--workers", 0, "--image-size", 16)
    run("train", *same, "--labels", tmp_path / "server/photos", "--out", tmp_path / "a")
    run("train", *same, "--labels", url, "--out", tmp_path / "b")
    one, other = (load_file(tmp_path / name / "last.safetensors") for name in ("a", "b"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert url in (tmp_path / "b/config.json").read_text()
    (tmp_path / "server/photos").rename(tmp_path / "first")
    write_store(data, tmp_path / "server/photos", seed=1)
    with pytest.raises(SystemExit):
        run("train", *same, "--labels", url, "--out", tmp_path / "b", "--resume")
    assert "checkpoint.pt: was made with store = " in capsys.readouterr().err, "another store has come to this address"
    shutil.rmtree(tmp_path / "server/photos")
    (tmp_path / "first").rename(tmp_path / "server/photos")
    capsys.readouterr()
    run("inspect", url, "--data", data, "--page", tmp_path / "page.html")
    assert f"{url}: 24 images x 12 crops" in capsys.readouterr().out
    assert "<title>Labels of photos" in (tmp_path / "page.html").read_text()
    run("verify", url, "--integrity")
    assert f"{url}: PASS" in capsys.readouterr().out
    run("merge", url, tmp_path / "server/photos", tmp_path / "both")
    assert len(LabelStore(tmp_path / "both")) == 24
    run("export", "fkd", url, tmp_path / "fkd")
    assert len(list((tmp_path / "fkd").rglob("*.tar"))) == 24


@pytest.mark.parametrize(
    "arguments",
    [
        ("label", "--data", "photos", "--teacher", "python:photos:colour_teacher", "--out", "s3://bucket/labels"),
        ("train", "--data", "{data}", "--student", "python:photos:tiny_net", "--image-size", "16", "--out", "s3://bucket/run"),
        ("merge", "{store}", "{store}", "s3://bucket/both"),
        ("export", "fkd", "{store}", "s3://bucket/fkd"),
        ("inspect", "{store}", "--page", "s3://bucket/page.html"),
    ],
)
def test_nothing_is_written_elsewhere(
    arguments: tuple[str, ...], store: LabelStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([argument.format(data=data, store=store.path) for argument in arguments])
    assert ended.value.code == 2
    assert "is not on this machine; write into a local folder and copy it" in capsys.readouterr().err
    assert not list(tmp_path.glob("s3*")), "nor into a folder of that name"


def test_a_store_in_a_bucket(store: LabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs against moto's server, where both are installed."""
    pytest.importorskip("s3fs")
    threaded = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = threaded.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="labels")
        for file, text in files_below(store.path).items():
            client.put_object(Bucket="labels", Key=f"imagenet/{file}", Body=text)
        LabelStore("s3://labels/imagenet").check_integrity()
        with pytest.raises(StoreError, match=r"s3://labels/other: has no manifest.json"):
            LabelStore("s3://labels/other")
    finally:
        server.stop()


class HubHandler(Handler):
    """As much of the Hub's interface as its file system asks for a dataset o/n; `status` 401 and 403 are a private and a gated one."""

    def answer(self, body: bool) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.server.asked[path] += body
        refused = self.server.status.get("o/n")
        content: Any = {"id": "o/n", "_id": "0", "sha": "0" * 40, "siblings": [], "tags": [], "private": False, "downloads": 0, "likes": 0}
        if refused == 401:
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if "/tree/main" in path or "/resolve/main" in path:
            if refused:
                return self.send(refused, b"{}", {"X-Error-Code": "GatedRepo"}, body)
            file = self.server.folder / path.partition("/main")[2].lstrip("/")
            if not file.exists():
                return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)
            if file.is_file():
                return self.send(200, file.read_bytes(), {"ETag": '"x"', "X-Repo-Commit": "0" * 40}, body)
            kinds = {True: "file", False: "directory"}
            content = [
                {
                    "type": kinds[one.is_file()],
                    "path": str(one.relative_to(self.server.folder)),
                    "size": one.stat().st_size,
                    "oid": "0" * 40,
                }
                for one in sorted(file.iterdir())
            ]
        elif not path.endswith("/datasets/o/n"):
            return self.send(404, b"{}", {}, body)
        return self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"}, body)

    def send(self, status: int, text: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(text))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(text)


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    files = pytest.importorskip("huggingface_hub").HfFileSystem
    monkeypatch.setattr(server, "RequestHandlerClass", HubHandler)
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url, "token": False})
    files.clear_instance_cache()
    yield server
    files.clear_instance_cache()


def test_a_store_on_the_hub(hub: Server, store: LabelStore) -> None:
    opened = LabelStore("hf://datasets/o/n/labels")
    opened.check_integrity()
    assert opened.source == "hf://datasets/o/n/labels"
    assert files_below(opened.path) == files_below(store.path)
    assert hub.asked["/datasets/o/n/resolve/main/labels/index.bin"] == 1
    with pytest.raises(StoreError, match=r"hf://datasets/o/n/other: has no manifest.json.*if it is private or gated: hf auth login"):
        LabelStore("hf://datasets/o/n/other")


@pytest.mark.parametrize("status", [401, 403])
def test_a_dataset_that_the_hub_hides_is_said_to_need_a_login(hub: Server, status: int) -> None:
    hub.status["o/n"] = status
    with pytest.raises(StoreError, match=r"hf://datasets/o/n/labels: .*hf auth login"):
        LabelStore("hf://datasets/o/n/labels")


def test_a_bucket_without_credentials_is_said_to_need_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"s3://bucket/labels: access to manifest.json was refused .*aws configure"):
        LabelStore("s3://bucket/labels")
