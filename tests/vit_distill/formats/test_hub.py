"""`hf-hub:` through the real huggingface_hub against a server on this machine that speaks the hub's protocol."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_distill.formats.timm import write_timm_folder
from vit_distill.teacher import load_teacher

REPOSITORY, COMMIT = "someone/vit_small", "0123456789abcdef0123456789abcdef01234567"
DOWNLOAD = "import sys; from vit_distill.formats.hub import download; print(download(sys.argv[1]))"


class Hub(http.server.BaseHTTPRequestHandler):
    """What snapshot_download asks: the repository's files at a revision, each file's headers, each file."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path.startswith(f"/api/models/{REPOSITORY}"):
            names = sorted(file.name for file in self.folder.iterdir())
            files = [{"rfilename": name, "type": "file", "path": name, "size": 1, "oid": name} for name in names]
            content = files if "/tree/" in path else {"id": REPOSITORY, "sha": COMMIT, "siblings": files}
            return self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"}, body)
        file = self.folder / path.rsplit("/", 1)[-1]
        if path.startswith(f"/{REPOSITORY}/resolve/") and file.exists():
            content = file.read_bytes()
            return self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, body)
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[http.server.ThreadingHTTPServer, Path]]:
    Hub.folder, Hub.asked = tmp_path / "served", []
    Hub.folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, tmp_path / "cache"
    server.shutdown()
    server.server_close()


def _download(name: str, server: http.server.ThreadingHTTPServer, cache: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its endpoint and its cache when it is imported."""
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(cache)}
    environment = os.environ | settings | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for name_of in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "HF_HUB_OFFLINE"):
        environment.pop(name_of, None)
    command = [sys.executable, "-c", DOWNLOAD, name]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_a_teacher_comes_from_the_hub_then_from_the_cache_and_nothing_else_is_fetched(hub):
    server, cache = hub
    sizes = {"depth": 2, "width": 32, "num_heads": 2, "mlp_dim": 48, "image_size": 32, "patch_size": 8}
    plain = load_teacher("random:vit_tiny_patch16_224", overrides=sizes)
    write_timm_folder(Hub.folder, plain.config, plain.params, plain.preprocessing)
    (Hub.folder / "pytorch_model.bin").write_bytes(b"a pickle")
    first = _download(REPOSITORY, server, cache)
    assert first.returncode == 0, first.stderr
    folder = Path(first.stdout.strip().splitlines()[-1])
    assert folder.is_relative_to(cache)
    assert not any("pytorch_model.bin" in path for path in Hub.asked)
    loaded = load_teacher(str(folder))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, plain.params)

    missing = _download("someone/else", server, cache)
    assert missing.returncode
    assert "hf-hub:someone/else: no such repository or revision" in missing.stderr
    server.shutdown()
    server.server_close()
    offline = _download(REPOSITORY, server, cache)
    assert offline.returncode == 0, offline.stderr
    assert Path(offline.stdout.strip().splitlines()[-1]) == folder
    never = _download("someone/new", server, cache)
    assert never.returncode
    assert "hf-hub:someone/new: not in the cache, and the hub cannot be reached" in never.stderr
