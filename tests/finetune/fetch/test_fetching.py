"""Fetching against a hub on this machine: layout, checksums, resumption, and every way in which a hub can refuse."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hub_mirror
import pytest

from finetune.fetch import fetching
from finetune.fetch.github import GitHub
from finetune.fetch.hub import FetchError, Hub, Source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 1024
MODEL = {"config.json": b'{"model_type": "bert"}\n', "model.safetensors": WEIGHTS, "README.md": b"not wanted"}
GLUE = {
    "README.md": b"not wanted",
    "cola/train-00000-of-00001.parquet": b"PAR1 train",
    "cola/validation-00000-of-00001.parquet": b"PAR1 validation",
    "mrpc/train-00000-of-00001.parquet": b"PAR1 other task",
}
MODEL_CONFIG = {
    "checkpoint": "acme/tiny",
    "revision": COMMIT,
    "folder": "models/tiny",
    "files": ["config.json", "*.safetensors"],
}
DATA_CONFIG = {"source": "acme/glue", "revision": COMMIT, "folder": "glue", "tasks": {"cola": {}, "mrpc": {}}}
EXPERIMENT = {"models": ["tiny"], "tasks": ["cola"]}


@pytest.fixture
def mirror(mirror):
    mirror.repos["models", "acme/tiny"] = hub_mirror.Repo(COMMIT, dict(MODEL))
    mirror.repos["datasets", "acme/glue"] = hub_mirror.Repo(COMMIT, dict(GLUE))
    return mirror


def tiny(**changes) -> Source:
    return fetching.sources({"models": ["tiny"]}, {"tiny": MODEL_CONFIG | changes}, {})[0]


def servers(endpoint, token=None):
    return fetching.Servers(Hub(endpoint, token), GitHub("http://127.0.0.1:9"))


def run(mirror, root, sources=None, token=None):
    hub = servers(mirror.endpoint, token)
    sources = (
        fetching.sources(EXPERIMENT, {"tiny": MODEL_CONFIG}, {"glue": DATA_CONFIG}) if sources is None else sources
    )
    items = fetching.plan(sources, root, hub)
    return items, fetching.fetch(items, hub)


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_fetches_the_wanted_files_in_the_hubs_layout(mirror, tmp_path):
    items, errors = run(mirror, tmp_path)
    assert errors == []
    assert [item.missing for item in items] == [0, 0]
    found = tree(tmp_path)
    sums = {name: found.pop(name).decode() for name in ("models/tiny/SHA256SUMS", "glue/cola/SHA256SUMS")}
    assert found == {
        "models/tiny/config.json": MODEL["config.json"],
        "models/tiny/model.safetensors": WEIGHTS,
        "glue/cola/train-00000-of-00001.parquet": b"PAR1 train",
        "glue/cola/validation-00000-of-00001.parquet": b"PAR1 validation",
    }
    sha = {name: hashlib.sha256(MODEL[name]).hexdigest() for name in MODEL}
    assert sums["models/tiny/SHA256SUMS"] == (
        f"# acme/tiny@{COMMIT}\n{sha['config.json']}  config.json\n{sha['model.safetensors']}  model.safetensors\n"
    )


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_sha256sum_reads_what_is_written(mirror, tmp_path):
    run(mirror, tmp_path)
    for folder in ("models/tiny", "glue/cola"):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / folder, check=True)


def test_a_second_run_asks_the_hub_for_nothing_and_needs_no_network(mirror, tmp_path, monkeypatch):
    run(mirror, tmp_path)
    before, mirror.bodies, mirror.requests = tree(tmp_path), [], []
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        items, errors = run(mirror, tmp_path)
        assert errors == [] and all(item.complete for item in items)
    assert (mirror.bodies, mirror.requests) == ([], [])
    assert tree(tmp_path) == before


def test_files_that_are_there_are_verified_and_kept(mirror, tmp_path):
    folder = tmp_path / "models/tiny"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    items = fetching.plan([tiny()], tmp_path, servers(mirror.endpoint))
    assert items[0].missing == len(MODEL["config.json"])
    assert run(mirror, tmp_path, [tiny()])[1] == []
    assert [path for path, _, _ in mirror.bodies] == ["config.json"]


@pytest.mark.parametrize("how", ["close", "reset"])
def test_resumes_after_the_connection_is_cut(mirror, tmp_path, how):
    mirror.repos["models", "acme/tiny"].cuts["model.safetensors"] = [(100_000, how)]
    assert run(mirror, tmp_path, [tiny()])[1] == []
    (_, start, _), (_, resumed, rest) = [body for body in mirror.bodies if body[0] == "model.safetensors"]
    assert start == 0 and 0 < resumed <= 100_000 and resumed + rest == len(WEIGHTS)
    assert (tmp_path / "models/tiny/model.safetensors").read_bytes() == WEIGHTS


def test_resumes_a_partial_file_of_the_same_content_only(mirror, tmp_path):
    folder = tmp_path / "models/tiny"
    folder.mkdir(parents=True)
    sha = hashlib.sha256(WEIGHTS).hexdigest()
    (folder / f"model.safetensors.{sha[:8]}.incomplete").write_bytes(WEIGHTS[:200_000])
    (folder / "model.safetensors.00000000.incomplete").write_bytes(b"another revision")
    _items, errors = run(mirror, tmp_path, [tiny()])
    assert errors == []
    assert ("model.safetensors", 200_000, len(WEIGHTS) - 200_000) in mirror.bodies
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("model.safetensors", lambda body: b"evil" + body[4:]),
        ("model.safetensors", lambda body: body[:1000]),
        ("config.json", lambda body: b"evil" + body[4:]),
    ],
)
def test_wrong_or_short_content_is_kept_aside_and_named(mirror, tmp_path, path, change):
    repo = mirror.repos["models", "acme/tiny"]
    repo.tampered[path] = change(MODEL[path])
    _, errors = run(mirror, tmp_path, [tiny()])
    lfs = path.endswith("safetensors")
    expected = hashlib.sha256(WEIGHTS).hexdigest() if lfs else hub_mirror.blob_id(MODEL[path])
    received = hashlib.sha256(repo.tampered[path]).hexdigest() if lfs else hub_mirror.blob_id(repo.tampered[path])
    assert len(errors) == 1 and expected in errors[0] and received in errors[0] and "\n" not in errors[0]
    folder = tmp_path / "models/tiny"
    assert (folder / f"{path}.corrupt").read_bytes() == repo.tampered[path]
    assert not (folder / path).exists() and not (folder / "SHA256SUMS").exists()

    run(mirror, tmp_path, [tiny()])
    assert (folder / f"{path}.1.corrupt").exists(), "an earlier corrupt file is never overwritten"
    repo.tampered.clear()
    assert run(mirror, tmp_path, [tiny()])[1] == []
    assert (folder / path).read_bytes() == MODEL[path]


def test_pinned_checksum_is_checked_before_and_after_the_download(mirror, tmp_path):
    (error,) = run(mirror, tmp_path, [tiny(checksums={"model.safetensors": "0" * 64})])[1]
    assert "pinned" in error and "0" * 64 in error and hashlib.sha256(WEIGHTS).hexdigest() in error
    assert mirror.bodies == [], "a listing that contradicts the pin is refused before any download"

    (error,) = run(mirror, tmp_path, [tiny(checksums={"config.json": "0" * 64})])[1]
    assert f"expected {'0' * 64}, received {hashlib.sha256(MODEL['config.json']).hexdigest()}" in error

    right = {name: hashlib.sha256(MODEL[name]).hexdigest() for name in ("config.json", "model.safetensors")}
    assert run(mirror, tmp_path, [tiny(checksums=right)])[1] == []


def test_verify_finds_changed_and_missing_files_without_a_network(mirror, tmp_path, monkeypatch):
    run(mirror, tmp_path, [tiny()])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "models/tiny"
    fetching.verify(tiny(), folder)

    (folder / "config.json").unlink()
    (folder / "model.safetensors").write_bytes(b"\xff" + WEIGHTS[1:])
    with pytest.raises(FetchError, match=r"config.json is missing; .*model.safetensors: expected .*kept as .*corrupt"):
        fetching.verify(tiny(), folder)
    assert sorted(tree(folder)) == ["SHA256SUMS.old", "model.safetensors.corrupt"]
    with pytest.raises(FetchError, match="not complete"):
        fetching.verify(tiny(), folder)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert run(mirror, tmp_path, [tiny()])[1] == []
    fetching.verify(tiny(), folder)


def test_verify_checks_pins_that_came_later(mirror, tmp_path):
    run(mirror, tmp_path, [tiny()])
    with pytest.raises(FetchError, match=f"expected {'0' * 64}, received"):
        fetching.verify(tiny(checksums={"config.json": "0" * 64}), tmp_path / "models/tiny")


def test_sums_that_a_user_wrote_are_enough_to_verify_but_not_to_skip_the_hub(mirror, tmp_path):
    run(mirror, tmp_path, [tiny()])
    sums = tmp_path / "models/tiny/SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if not line.startswith("#")))
    fetching.verify(tiny(), sums.parent)
    mirror.bodies, mirror.requests = [], []
    assert run(mirror, tmp_path, [tiny()])[1] == []
    assert mirror.requests and mirror.bodies == []
    assert sums.read_text().startswith(f"# acme/tiny@{COMMIT}\n")


def test_a_new_pattern_fetches_the_new_files_only(mirror, tmp_path):
    mirror.repos["models", "acme/tiny"].files["empty.json"] = b""
    run(mirror, tmp_path, [tiny()])
    mirror.bodies = []
    assert run(mirror, tmp_path, [tiny(files=["config.json", "*.safetensors", "README.md", "empty.json"])])[1] == []
    assert [path for path, _, _ in mirror.bodies] == ["README.md"]
    assert (tmp_path / "models/tiny/empty.json").read_bytes() == b""


def test_a_folder_of_another_revision_is_left_alone(mirror, tmp_path):
    run(mirror, tmp_path, [tiny()])
    before = tree(tmp_path)
    (error,) = run(mirror, tmp_path, [tiny(revision="f" * 40)])[1]
    assert f"holds acme/tiny@{COMMIT}" in error and "another data.root" in error
    assert tree(tmp_path) == before


def test_gated_model(mirror, tmp_path):
    mirror.repos["models", "acme/tiny"].token = "hf_secret"
    items, errors = run(mirror, tmp_path, [tiny()])
    assert errors == [items[0].error], "found out while planning, not in the middle of the downloads"
    assert "HTTP 401" in errors[0] and f"accept the licence at {mirror.endpoint}/acme/tiny" in errors[0]
    assert "HF_TOKEN is not set" in errors[0]

    (error,) = run(mirror, tmp_path, [tiny()], token="hf_wrong")[1]
    assert "HTTP 403" in error and "gives no access" in error and "hf_wrong" not in error

    assert run(mirror, tmp_path, [tiny()], token="hf_secret\n")[1] == []
    assert mirror.leaked_tokens == [], "the token stays with the hub, it does not follow a redirect"


def test_a_token_on_disk_is_not_used(mirror, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    mirror.repos["models", "acme/tiny"].token = "hf_secret"
    assert "HF_TOKEN is not set" in run(mirror, tmp_path, [tiny()])[1][0]


def test_one_failing_source_does_not_stop_the_others(mirror, tmp_path):
    mirror.repos["models", "acme/tiny"].token = "hf_secret"
    _items, errors = run(mirror, tmp_path)
    assert len(errors) == 1 and "acme/tiny" in errors[0]
    assert (tmp_path / "glue/cola/SHA256SUMS").exists() and not (tmp_path / "models/tiny/SHA256SUMS").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": "f" * 40}, f"acme/tiny has no revision {'f' * 40}"),
        ({"checkpoint": "acme/none"}, "there is no model at http://127.0.0.1:.*/acme/none"),
        ({"files": ["config.json", "merges.txt"]}, "has no file 'merges.txt'; it has README.md, config.json, model"),
        ({"checkpoint": "not a name"}, "not a name@.*: Repo id must"),
    ],
)
def test_what_the_hub_does_not_have(mirror, tmp_path, changes, message):
    (error,) = run(mirror, tmp_path, [tiny(**changes)])[1]
    assert re.search(message, error), error
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ({"size": None}, "no size for config.json"),
        ({"blobId": None}, "no checksum for config.json"),
        ({"size": "1"}, "no size for config.json"),
        ({"size": -1}, "no size for config.json"),
        ({"blobId": "zz"}, "gives blobId 'zz' for config.json, no 40 hexadecimal digits"),
        ({"lfs": {"sha256": "A" * 64, "size": 1, "pointerSize": 1}}, "gives sha256 'AAAA"),
        ({"lfs": {"size": 1}}, "the hub's answer is no listing (KeyError)"),
        ({"rfilename": "../../config.json"}, "would leave the folder"),
        ({"rfilename": "/etc/config.json"}, "would leave the folder"),
        ({"rfilename": "a//config.json"}, "would leave the folder"),
        ({"rfilename": "a\\..\\config.json"}, "would leave the folder"),
        ({"rfilename": "a\n/config.json"}, "would leave the folder"),
    ],
)
def test_listings_that_can_not_be_trusted(mirror, tmp_path, listing, message):
    mirror.repos["models", "acme/tiny"].listing["config.json"] = listing
    (error,) = run(mirror, tmp_path, [tiny(files=["*config.json"])])[1]
    assert message in error


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {"Content-Type": "text/html"}, b"<html>log in</html>"), "Expecting value: line 1"),
        ((200, {}, b'{"id": "acme/ti'), "Unterminated string"),
        ((200, {}, b"[]"), "the hub's answer is no listing (TypeError)"),
        ((200, {}, b'{"id": "acme/tiny", "siblings": [7]}'), "the hub's answer is no listing (TypeError)"),
        ((200, {}, b'{"id": "acme/tiny", "sha": "%s"}' % COMMIT.encode()), "has no file 'config.json'; it has none"),
        ((200, {}, b'{"id": "acme/tiny", "sha": "main"}'), "the hub answers with commit 'main': do not trust it"),
        ((302, {"Location": f"/api/models/acme/tiny/revision/{COMMIT}"}, b""), "maximum allowed redirects"),
        ((500, {}, b"<html>\n"), "the hub answers Server error '500"),
        ((404, {"X-Error-Code": "RepoNotFound"}, b"\xff"), "'utf-8' codec can't decode"),
    ],
)
def test_answers_that_are_no_listing_are_one_line(mirror, tmp_path, answer, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    mirror.canned[f"/api/models/acme/tiny/revision/{COMMIT}"] = answer
    (error,) = run(mirror, tmp_path, [tiny()])[1]
    assert message in error and "\n" not in error
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("how", ["longer", "html", "redirects"])
def test_a_body_that_is_another_than_the_listed_does_not_count(mirror, tmp_path, how):
    """Nor does it fill the disk."""
    path = f"/acme/tiny/resolve/{COMMIT}/config.json"
    bodies = {"longer": MODEL["config.json"] + b"x" * 10_000, "html": b"<html>", "redirects": b""}
    headers = {"Location": path} if how == "redirects" else {}
    mirror.canned[path] = (302 if headers else 200, headers, bodies[how])
    (error,) = run(mirror, tmp_path, [tiny(files=["config.json"])])[1]
    said = {
        "longer": "sends more than the 23 bytes that it lists",
        "html": "expected git blob",
        "redirects": "redirects",
    }
    assert said[how] in error and "\n" not in error
    assert all(len(content) <= 23 for content in tree(tmp_path).values())
    assert not {"models/tiny/config.json", "models/tiny/SHA256SUMS"} & set(tree(tmp_path))
    mirror.canned.clear()
    assert run(mirror, tmp_path, [tiny(files=["config.json"])])[1] == []
    assert tree(tmp_path)["models/tiny/config.json"] == MODEL["config.json"]


@pytest.mark.parametrize(
    "variable", ["HTTP_PROXY=http://127.0.0.1:9", "ALL_PROXY=socks5h://127.0.0.1:9", "SSL_CERT_FILE=/no"]
)
def test_servers_of_this_machine_are_reached_without_proxy_and_certificates(mirror, tmp_path, variable, monkeypatch):
    for name in (
        "NO_PROXY",
        "no_proxy",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
    name, value = variable.split("=")
    monkeypatch.setenv(name, value)
    hub = fetching.Servers.of([tiny()], {"HF_ENDPOINT": mirror.endpoint})
    assert fetching.fetch(fetching.plan([tiny()], tmp_path, hub), hub) == []
    away = fetching.Servers.of([tiny()], {"HF_ENDPOINT": "https://hub.invalid"})
    if name != "HTTP_PROXY":  # that one is a proxy that does not answer
        (item,) = fetching.plan([tiny()], tmp_path / "other", away)
        assert f" that {name} names can't be used (" in item.error and value not in item.error


def test_without_a_network_the_plan_says_why(mirror, tmp_path, monkeypatch):
    (item,) = fetching.plan([tiny()], tmp_path, servers("http://127.0.0.1:9"))
    assert "http://127.0.0.1:9 can't be reached" in item.error
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (error,) = run(mirror, tmp_path, [tiny()])[1]
    assert "HF_HUB_OFFLINE" in error and "unset it" in error and mirror.requests == []


def test_the_disk_must_have_room(mirror, tmp_path, monkeypatch):
    items = fetching.plan([tiny()], tmp_path / "not" / "there", servers(mirror.endpoint))
    fetching.check_room(items, tmp_path / "not" / "there")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(FetchError, match=r"262.2 kB to download, but .* has room for 1.0 kB"):
        fetching.check_room(items, tmp_path / "not" / "there")


def test_plan_says_what_is_missing(mirror, tmp_path):
    hub = servers(mirror.endpoint)
    source = tiny()
    assert str(fetching.plan([source], tmp_path, hub)[0]) == (
        f"models/tiny: acme/tiny@{COMMIT}, 2 files, 262.2 kB: 262.2 kB to download"
    )
    assert mirror.bodies == [] and tree(tmp_path) == {}
    run(mirror, tmp_path, [source])
    assert str(fetching.plan([source], tmp_path, hub)[0]).endswith("262.2 kB: complete")


def test_sources_of_an_experiment():
    made = {"checkpoint": None, "revision": None, "folder": "models/made", "files": []}
    experiment = {"models": ["made", "tiny", "tiny"], "tasks": ["mrpc", "cola"]}
    pins = {"cola/train-00000-of-00001.parquet": "1" * 64}
    found = fetching.sources(
        experiment, {"made": made, "tiny": MODEL_CONFIG}, {"glue": DATA_CONFIG | {"checksums": pins}, "generated": {}}
    )
    assert [(str(s), s.kind, s.folder, s.files) for s in found] == [
        (f"acme/tiny@{COMMIT}", "model", "models/tiny", ("config.json", "*.safetensors")),
        (f"acme/glue@{COMMIT}", "dataset", "glue/mrpc", ("mrpc/*.parquet",)),
        (f"acme/glue@{COMMIT}", "dataset", "glue/cola", ("cola/*.parquet",)),
    ]
    assert [s.checksums for s in found] == [{}, {}, {"train-00000-of-00001.parquet": "1" * 64}]

    local = MODEL_CONFIG | {"checkpoint": "."}
    assert fetching.sources({"models": ["local"]}, {"local": local}, {}) == []

    whole = {"source": "acme/chat", "revision": COMMIT, "folder": "chat", "files": ["data/*.parquet"]}
    (chat,) = fetching.sources({}, {}, {"chat": whole})
    assert (chat.folder, chat.files, chat.prefix) == ("chat", ("data/*.parquet",), "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"revision": "main"}, "revision is 'main'; pin a commit"),
        ({"revision": None}, "revision is None; pin a commit"),
        ({"folder": "../elsewhere"}, "give a path below data.root"),
        ({"checksums": {"vocab.txt": "0" * 64}}, "'vocab.txt' has a pinned checksum but is not among files"),
    ],
)
def test_configurations_that_can_not_be_fetched(change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**change)


def test_unknown_tasks_and_shared_folders_are_refused():
    with pytest.raises(ValueError, match=r"tasks \['sst3'\] are not in acme/glue; allowed: \['cola', 'mrpc'\]"):
        fetching.sources({"tasks": ["sst3"]}, {}, {"glue": DATA_CONFIG})
    with pytest.raises(ValueError, match="models/tiny is the folder of both acme/tiny@.* and acme/other@"):
        other = MODEL_CONFIG | {"checkpoint": "acme/other"}
        fetching.sources({"models": ["tiny", "other"]}, {"tiny": MODEL_CONFIG, "other": other}, {})


def test_sums_of_another_program_are_refused(tmp_path):
    (tmp_path / "SHA256SUMS").write_text("SHA256 (config.json) = 00\n")
    with pytest.raises(FetchError, match="not a line of sha256sum"):
        fetching.verify(tiny(), tmp_path)


def test_importing_is_free_of_the_hub_client():
    code = "import sys, finetune.fetch.fetching; sys.exit(bool({'huggingface_hub', 'hydra'} & {*sys.modules}))"
    src = str(Path(fetching.__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": src})
