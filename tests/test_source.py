"""Where models come from: local names are settled without the network, and every failure is one clear line."""

import io
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from fp4rt import source
from fp4rt.errors import Fp4rtError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any download is a failure of the test, unless it brings its own."""
    def refuse(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def test_a_directory_is_itself(tmp_path, monkeypatch):
    assert source.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert source.resolve("owner/name") == Path("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert source.resolve("~/owner") == tmp_path / "owner"


def test_demo_is_in_the_package_even_beside_a_directory_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "package"
    monkeypatch.setattr(source.resources, "files", lambda name: package)
    with pytest.raises(Fp4rtError, match="without its demo"):
        source.resolve("demo")
    (package / "demo").mkdir(parents=True)
    assert source.resolve("demo") == package / "demo"
    assert source.resolve("./demo") == Path("./demo")


@pytest.mark.parametrize("model, words", [
    ("", "empty"), ("nothing", "no such directory"), ("./a/b", "no such directory"), ("/a/b", "no such directory"),
    ("a/b/c", "no such directory"), ("~nobody-at-all/x", "not a usable path"), ("a b/c", "no such directory"),
    ("owner/model.gguf", "GGUF"), ("C:\\models\\x", "no such directory"), ("a\0b", "no such directory"),
    ("x" * 5000, "not a usable path|no such directory"), ("https://huggingface.co/a/b", "no such directory"),
])
def test_names_that_are_nothing(model, words):
    with pytest.raises(Fp4rtError, match=words) as caught:
        source.resolve(model)
    assert caught.value.kind == "request" and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, words", [("m.gguf", "GGUF is not read"), ("m.safetensors", "directory that holds it"),
                                         ("config.json", "directory that holds it"), ("m.pth", "pickled"),
                                         ("README", "give the directory")])
def test_a_file_is_not_a_model(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(Fp4rtError, match=words):
        source.resolve(str(tmp_path / name))


def test_a_revision_of_a_directory_is_refused(tmp_path):
    for model in (str(tmp_path), "demo"):
        with pytest.raises(Fp4rtError, match="revision is 'main'"):
            source.resolve(model, revision="main")


def test_what_is_downloaded(monkeypatch, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert source.resolve("owner/name", revision="v1") == tmp_path
    assert (asked["repo"], asked["revision"]) == ("owner/name", "v1")
    there = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
             "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
             "pytorch_model.bin", "modeling_x.py", "consolidated.safetensors", "x.gguf",
             "original/params.json", "onnx/model.safetensors", "consolidated.00.pth", "model.pkl"]
    kept = filter_repo_objects(there, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert list(kept) == there[:6]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert asked["tqdm_class"](total=3, name="huggingface_hub.x").disable


def response(status=404):
    import importlib

    client = importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0])
    return client.Response(status, request=client.Request("GET", "https://huggingface.co/owner/name"))


@pytest.mark.parametrize("make, words", [
    (lambda: errors.RepositoryNotFoundError("x", response=response()), "no such repository"),
    (lambda: errors.GatedRepoError("x", response=response(403)), "gated: accept .*hf auth login"),
    (lambda: errors.RevisionNotFoundError("x", response=response()), "at v1: no such branch"),
    (lambda: errors.LocalEntryNotFoundError("x"), "cache, and the hub cannot be reached"),
    (lambda: errors.OfflineModeIsEnabled("x"), "cache, and the hub cannot be reached"),
    (lambda: OSError(28, "No space left on device"), "No space left"),
    (lambda: RuntimeError("proxy\nsays no"), "cannot be downloaded .*proxy says no"),
])
def test_what_can_go_wrong_in_a_download(monkeypatch, make, words):
    def download(*_, **__):
        raise make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(Fp4rtError, match=words) as caught:
        source.resolve("owner/name", revision="v1")
    assert "\n" not in str(caught.value) and caught.value.kind == "request"


def test_the_cache_serves_without_a_network(tmp_path):
    """With the real client, offline: a cached commit is found, anything else is one line."""
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "hub" / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    code = ("import sys; from fp4rt.source import resolve; from fp4rt.errors import Fp4rtError\n"
            "for name in ('owner/name', 'owner/other'):\n"
            "    try: print(resolve(name))\n"
            "    except Fp4rtError as error: print('error', error)")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1",
                   "PYTHONPATH": str(Path(source.__file__).parents[1])}
    environment.pop("HF_HUB_CACHE", None)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    found, missing = result.stdout.splitlines()
    assert found == str(snapshot)
    assert missing.startswith("error owner/other: no such directory here, not (or not wholly) in the")
    assert result.stderr == ""
