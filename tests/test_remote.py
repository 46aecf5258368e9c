"""Checkpoints by name: fetched from a local server that speaks the Hub's protocol, never from the network."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

from ats_detr import remote
from ats_detr.checkpoint import load_checkpoint, read_file, resolve_checkpoint
from ats_detr.cli import main
from ats_detr.config import shipped_configs
from ats_detr.detector import Detector
from ats_detr.errors import UserError
from tests.small_detector import small_detector

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = (None, "main", "v1", "refs/pr/1", "feature/x", COMMIT)


class Hub:
    """Repositories in memory. `cut` bytes of the next answers are withheld and the connection is closed."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: Counter[str] = Counter()
        self.refused: dict[str, tuple[int, str, str]] = {}
        """(status, error code, message) by repository."""
        self.cut: list[int] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = urlsplit(handler.path).path
        self.requests[f"{handler.command} {unquote(path)}"] += 1
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([^/]+))?", path):
            if not self.refuse(handler, match[1]):
                self.answer_api(handler, match)
        elif match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            repository, revision, name = map(unquote, match.groups())
            if self.refuse(handler, repository):
                return
            error = self.error_of(repository, revision)
            if error is None and name not in self.repositories[repository]:
                error = "EntryNotFound"
            if error is not None:
                self.send(handler, 404, b"", {"X-Error-Code": error})
            else:
                self.send_file(handler, self.repositories[repository][name], body)
        elif path.startswith("/files/"):
            self.send_file(handler, b"x" * 5000, body)
        else:
            self.send(handler, 404, b"", {})

    def refuse(self, handler: BaseHTTPRequestHandler, repository: str) -> bool:
        """Whether the repository needs permission, which was answered."""
        status, error, text = self.refused.get(repository, (0, "", ""))
        if status:
            self.send(handler, status, b"{}", {"X-Error-Code": error, "X-Error-Message": text})
        return status > 0

    def error_of(self, repository: str, revision: str | None) -> str | None:
        if repository not in self.repositories:
            return "RepoNotFound"
        return None if revision in REVISIONS else "RevisionNotFound"

    def answer_api(self, handler: BaseHTTPRequestHandler, match: re.Match[str]) -> None:
        repository, kind, revision = match[1], match[2], unquote(match[3]) if match[3] else None
        if error := self.error_of(repository, revision):
            self.send(handler, 404, b'{"error": "none"}', {"X-Error-Code": error})
            return
        files = self.repositories[repository]
        content: object = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        if kind != "tree":
            content = {
                "id": repository, "modelId": repository, "sha": COMMIT, "private": False, "tags": [],
                "siblings": [{"rfilename": name} for name in files],
            }  # fmt: skip
        self.send(handler, 200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send_file(self, handler: BaseHTTPRequestHandler, data: bytes, body: bool) -> None:
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        status, start = 200, 0
        if body and (found := re.match(r"bytes=(\d+)-", handler.headers.get("Range") or "")):
            status, start = 206, int(found[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send(handler, status, data[start:], headers, body=body)

    def send(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        data: bytes,
        headers: dict[str, str],
        *,
        body: bool = True,
    ) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if body and handler.command == "GET":
            missing = self.cut.pop() if self.cut and len(data) > 2000 else 0
            handler.wfile.write(data[: len(data) - missing])
            handler.close_connection = handler.close_connection or missing > 0


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("ATS_DETR_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A detector as a model folder and as one file."""
    folder = tmp_path_factory.mktemp("model")
    detector = small_detector()
    detector.save(folder)
    detector.save(folder / "small.pt")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_repository_with_a_model_folder(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["someone/folder"] = files
    detector = Detector.from_checkpoint("hf://someone/folder", device="cpu")
    assert detector.classes == small_detector().classes
    fetched = resolve_checkpoint("hf://someone/folder")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_checkpoint("hf://someone/folder") == fetched
    assert fetched.is_dir() and not (fetched / "small.pt").exists(), "only what the model needs is fetched"
    weights = resolve_checkpoint("hf://someone/folder/model.safetensors")
    assert load_checkpoint(weights)["classes"] == load_checkpoint(fetched)["classes"]


def test_a_file_is_fetched_once_and_found_offline(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["someone/file"] = {"sub/small.pt": files["small.pt"]}
    path = resolve_checkpoint("hf://someone/file/sub/small.pt")
    assert path.read_bytes() == files["small.pt"]

    def gets() -> int:
        return sum(n for name, n in hub.requests.items() if name.startswith("GET") and "small" in name)

    assert gets() == 1
    assert resolve_checkpoint("hf://someone/file@v1/sub/small.pt").read_bytes() == files["small.pt"]
    assert resolve_checkpoint("hf://someone/file") == path, "the only checkpoint of the repository"
    assert resolve_checkpoint(Path("hf://someone/file/sub/small.pt")) == path
    assert gets() == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_checkpoint("hf://someone/file/sub/small.pt") == path
    assert resolve_checkpoint("hf://someone/file") == path
    for name in ("hf://someone/file/other.pt", "hf://someone/else", "hf://someone/file@v2/sub/small.pt"):
        with pytest.raises(UserError, match=r"not in the cache .*HF_HUB_OFFLINE is set"):
            resolve_checkpoint(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://someone/nothing", "there is no such repository on the Hub"),
        ("hf://someone/nothing/a.pt", "there is no such repository on the Hub"),
        ("hf://someone/two", "has 2 checkpoints, name one: hf://someone/two/a.pth, hf://someone/two/b.pth"),
        ("hf://someone/two/c.pth", "has no file c.pth; its checkpoints are"),
        ("hf://someone/two@v9/a.pth", "there is no such revision"),
        ("hf://someone/text", "has no checkpoint"),
        ("hf://someone", "must be hf://owner/repo"),
        ("hf://a--b/..c/d.pt", "hf://a--b/..c/d.pt: "),
    ],
)
def test_wrong_names_are_answered_in_one_line(name: str, message: str, hub: Hub) -> None:
    hub.repositories |= {
        "someone/two": {"a.pth": b"1", "b.pth": b"2", "README.md": b""},
        "someone/text": {"README.md": b""},
    }
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        resolve_checkpoint(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("revision", ["@refs/pr/1", "@feature%2Fx", "@v1", f"@{COMMIT}", ""])
def test_revisions_with_slashes(
    revision: str, hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["someone/file"] = {"sub/small.pt": files["small.pt"]}
    for name in (f"hf://someone/file{revision}/sub/small.pt", f"hf://someone/file{revision}"):
        assert resolve_checkpoint(name).read_bytes() == files["small.pt"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_checkpoint(f"hf://someone/file{revision}").read_bytes() == files["small.pt"]


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (403, "GatedRepo", "access must be granted by its owner first; then set HF_TOKEN"),
        (401, "GatedRepo", "access must be granted by its owner first; then set HF_TOKEN"),
        (401, "RepoNotFound", "there is no such repository on the Hub; if it is private, set HF_TOKEN"),
        (401, "", "if it is private, set HF_TOKEN|HTTP status 401.*; set HF_TOKEN"),
        (403, "", r"access denied \(HTTP status 403\); set HF_TOKEN"),
    ],
)
def test_repositories_that_need_permission(status: int, error: str, message: str, hub: Hub) -> None:
    hub.repositories["someone/private"] = {"a.pth": b"1"}
    hub.refused["someone/private"] = (status, error, "")
    for name in ("hf://someone/private", "hf://someone/private/a.pth"):
        with pytest.raises(UserError, match=message) as raised:
            resolve_checkpoint(name)
        assert "\n" not in str(raised.value) and str(raised.value).startswith(name)


def test_an_interrupted_transfer_of_a_model_in_several_files_is_completed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {
        f"model-0000{i}-of-00002.safetensors": safetensors.torch.save({f"t{i}": torch.ones(1000)})
        for i in (1, 2)
    }
    index = {"weight_map": {f"t{i + 1}": name for i, name in enumerate(parts)}}
    config = b'{"model_type": "deformable_detr"}'
    hub.repositories["someone/parts"] = {
        **parts, "config.json": config, "model.safetensors.index.json": json.dumps(index).encode()
    }  # fmt: skip
    folder = resolve_checkpoint("hf://someone/parts")
    assert set(read_file(folder)["model"]) == {"t1", "t2"}
    (folder / "model-00002-of-00002.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"1 of the 2 files of its weights are missing, such as model-00002"):
        load_checkpoint(resolve_checkpoint("hf://someone/parts"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert set(read_file(resolve_checkpoint("hf://someone/parts"))["model"]) == {"t1", "t2"}


def test_an_interrupted_transfer_is_resumed_or_fails_and_leaves_nothing_broken(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories["someone/file"] = {"small.pt": files["small.pt"]}
    hub.cut = [1000]
    assert resolve_checkpoint("hf://someone/file/small.pt").read_bytes() == files["small.pt"]
    hub.repositories["someone/again"] = {"small.pt": files["small.pt"]}
    hub.cut = [len(files["small.pt"])] * 100
    with pytest.raises(UserError, match=r"cannot be fetched .*try again"):
        resolve_checkpoint("hf://someone/again/small.pt")
    hub.cut = []
    assert load_checkpoint(resolve_checkpoint("hf://someone/again/small.pt"))["finished"] is not None


@pytest.mark.slow  # huggingface_hub repeats failed connections for half a minute
def test_without_a_server_the_cause_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    for name in ("hf://someone/file/a.pt", "hf://someone/file"):
        with pytest.raises(UserError, match="cannot be fetched") as raised:
            resolve_checkpoint(name)
        assert "\n" not in str(raised.value)


def test_published_files_of_other_servers(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = remote.Published(f"{hub.url}/files/a.pth", "sparse_detr_r50_0.1", "")
    monkeypatch.setitem(remote.PUBLISHED, "sparse-detr-r50-10", published)
    hub.cut = [1000]
    with pytest.raises(UserError, match=r"4000 of 5000 bytes arrived"):
        remote.fetch("sparse-detr-r50-10")
    assert not list((tmp_path / "ours" / "models").iterdir())
    path = resolve_checkpoint("sparse-detr-r50-10")
    assert path == tmp_path / "ours" / "models" / "a.pth" and path.stat().st_size == 5000
    assert resolve_checkpoint("sparse-detr-r50-10") == path and hub.requests["GET /files/a.pth"] == 2


def test_models_lists_every_short_name_with_a_shipped_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["models"])
    printed = capsys.readouterr().out
    for name, model in remote.PUBLISHED.items():
        assert name[:8] in printed and model.config in shipped_configs(), name


def test_a_file_of_the_same_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ats-detr").write_bytes(b"")
    assert resolve_checkpoint("ats-detr") == Path("ats-detr")
    run = tmp_path / "runs" / "deformable-detr"
    run.mkdir(parents=True)
    (run / "final.pt").write_bytes(b"")
    assert resolve_checkpoint("deformable-detr") == Path("runs/deformable-detr/final.pt")
