"""Single files of GitHub against a server on this machine: layout, pins, resumption, and what can go wrong."""

import hashlib
import os
import shutil
from pathlib import Path

import hub_mirror
import pytest
import yaml

from finetune.fetch import fetching
from finetune.fetch.github import GitHub, GitHubSource
from finetune.fetch.hub import Hub

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
QUESTIONS = b'{"question_id": 81}\n' * 20_000
REFERENCES = b'{"question_id": 101}\n'
CORRECTED = b'{"question_id": 82}\n'
WHERE = {  # place below the folder -> repository, revision, path, content
    "question.jsonl": ("acme/chat", "v1.2.3", "data/question.jsonl", QUESTIONS),
    "reference_answer/gpt-4.jsonl": ("acme/chat", "v1.2.3", "data/reference answer/gpt-4.jsonl", REFERENCES),
    "corrected.jsonl": ("acme/corrections", COMMIT, "corrected.jsonl", CORRECTED),
}


def entries(**changes) -> list[dict]:
    """The configuration's list; changes go to the first entry."""
    found = [
        {"repo": repo, "revision": rev, "path": path, "file": file, "sha256": hashlib.sha256(content).hexdigest()}
        for file, (repo, rev, path, content) in WHERE.items()
    ]
    found[0] |= changes
    return found


def source(**changes) -> GitHubSource:
    return GitHubSource.read("mt_bench", entries(**changes))


@pytest.fixture
def mirror(mirror):
    for repo, revision, path, content in WHERE.values():
        mirror.repos.setdefault(("raw", repo), hub_mirror.Repo(revision, {})).files[path] = content
    return mirror


def chat(mirror) -> "hub_mirror.Repo":
    return mirror.repos["raw", "acme/chat"]


def run(mirror, root, *wanted):
    both = servers(mirror.raw_endpoint)
    items = fetching.plan(wanted or [source()], root, both)
    return items, fetching.fetch(items, both)


def servers(endpoint):
    return fetching.Servers(Hub("http://127.0.0.1:9"), GitHub(endpoint))


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_files_of_several_repositories_make_one_folder(mirror, tmp_path):
    items, errors = run(mirror, tmp_path)
    assert errors == []
    found = tree(tmp_path / "mt_bench")
    sums = found.pop("SHA256SUMS").decode().splitlines()
    assert found == {file: content for file, (*_, content) in WHERE.items()}
    assert sums[0] == f"# acme/chat@v1.2.3 + acme/corrections@{COMMIT}"
    assert sums[1:] == [f"{hashlib.sha256(content).hexdigest()}  {file}" for file, (*_, content) in WHERE.items()]
    assert str(items[0]).startswith(f"mt_bench: acme/chat@v1.2.3 + acme/corrections@{COMMIT}, 3 files, ")
    mirror.requests.clear()
    items, errors = run(mirror, tmp_path)
    assert errors == [] and items[0].complete and mirror.requests == []


def test_the_plan_knows_sizes_and_downloads_nothing(mirror, tmp_path):
    (item,) = fetching.plan([source()], tmp_path, servers(mirror.raw_endpoint + "/"))
    assert item.missing == sum(len(content) for *_, content in WHERE.values())
    assert mirror.bodies == [] and tree(tmp_path) == {} and all("HEAD" in line for line in mirror.requests)


@pytest.mark.parametrize("resumable", [True, False])
def test_goes_on_after_the_connection_is_cut(mirror, tmp_path, resumable):
    chat(mirror).cuts["data/question.jsonl"] = [(100_000, "close")]
    chat(mirror).resumable = resumable
    assert run(mirror, tmp_path)[1] == []
    (_, first, _), (_, second, rest) = [body for body in mirror.bodies if body[0] == "data/question.jsonl"]
    assert first == 0 and second + rest == len(QUESTIONS) and (0 < second <= 100_000) == resumable
    assert (tmp_path / "mt_bench/question.jsonl").read_bytes() == QUESTIONS
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_connection_without_progress_ends_the_run_and_the_next_one_goes_on(mirror, tmp_path):
    chat(mirror).cuts["data/question.jsonl"] = [(70_000, "close"), *[(0, "close")] * 12]
    (error,) = run(mirror, tmp_path)[1]
    assert "question.jsonl can't be fetched, run again to go on" in error
    chat(mirror).cuts.clear()
    (partial,) = (tmp_path / "mt_bench").rglob("*.incomplete")
    assert partial.name == f"question.jsonl.{hashlib.sha256(QUESTIONS).hexdigest()[:8]}.incomplete"
    held = partial.stat().st_size
    assert 60_000 < held <= 70_000
    assert run(mirror, tmp_path)[1] == []
    assert ("data/question.jsonl", held, len(QUESTIONS) - held) in mirror.bodies


def test_a_file_that_is_not_there_is_named_by_its_address_while_planning(mirror, tmp_path):
    items, (error,) = run(mirror, tmp_path, source(path="data/questions.jsonl"))
    address = f"{mirror.raw_endpoint}/acme/chat/v1.2.3/data/questions.jsonl"
    assert error == items[0].error == f"there is no {address}: check repo, revision and path in `sources`"
    assert mirror.bodies == [] and tree(tmp_path) == {}
    assert "there is no" in run(mirror, tmp_path, source(revision="v9"))[1][0]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "nonsense"])
def test_a_server_that_is_not_there(mirror, tmp_path, endpoint):
    (item,) = fetching.plan([source()], tmp_path, servers(endpoint))
    assert endpoint in item.error and "can't be fetched, run again to go on" in item.error and "\n" not in item.error


def test_a_full_disk_is_an_error_of_the_folder(mirror, tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetune.fetch.hub.os.fsync", refuse)
    (error,) = run(mirror, tmp_path)[1]
    assert "No space left on device" in error and not (tmp_path / "mt_bench/SHA256SUMS").exists()


def test_no_account_is_used(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("GITHUB_TOKEN", "ghp_secret")
    assert run(mirror, tmp_path)[1] == [] and mirror.leaked_tokens == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": None}, "sha256 is None; give 64 hexadecimal digits"),
        ({"sha256": "ABC"}, "sha256 is 'ABC'"),
        ({"repo": "https://github.com/acme/chat"}, "give owner/name"),
        ({"revision": None}, "acme/chat: data/question.jsonl: revision is None; give a commit or a tag"),
        ({"revision": "main"}, "revision is 'main'; give a commit or a tag, a branch moves on"),
        ({"revision": "../v1"}, "give a commit or a tag"),
        ({"path": "../secret"}, "path is '../secret'; give a relative path"),
        ({"file": "/etc/passwd"}, "file is '/etc/passwd'; give a relative path"),
        ({"file": ""}, "file is ''; give a relative path"),
        ({"file": "corrected.jsonl"}, r"mt_bench: sources name \['corrected.jsonl'\] twice"),
        ({"size": 3}, r"keys \['file', 'path', 'repo', 'revision', 'sha256', 'size'\]; it needs"),
    ],
)
def test_sources_that_can_not_be_fetched(changes, message):
    with pytest.raises(ValueError, match=message):
        source(**changes)


def test_folders_outside_the_root_and_empty_sources_are_refused():
    with pytest.raises(ValueError, match="give a path below data.root"):
        GitHubSource.read("../mt_bench", entries())
    with pytest.raises(ValueError, match="sources name no file"):
        GitHubSource.read("mt_bench", [])


def test_sources_of_an_experiment_with_llama_cells():
    model = {"checkpoint": "acme/llama", "revision": COMMIT, "folder": "models/llama", "files": ["*.safetensors"]}
    made = {"checkpoint": None, "revision": None, "folder": "models/made", "files": []}
    oasst = {"source": "acme/oasst1", "revision": COMMIT, "folder": "oasst1", "files": ["data/*.parquet"]}
    experiment = {"models": [], "decoders": ["made", "llama"], "tasks": []}
    questions = {"folder": "mt_bench", "sources": entries()}
    found = fetching.sources(
        experiment, {"llama": model, "made": made}, {"oasst": oasst}, {"a": questions, "b": dict(questions), "c": {}}
    )
    assert [(s.folder, str(s)) for s in found] == [
        ("models/llama", f"acme/llama@{COMMIT}"),
        ("oasst1", f"acme/oasst1@{COMMIT}"),
        ("mt_bench", f"acme/chat@v1.2.3 + acme/corrections@{COMMIT}"),
    ]
    with pytest.raises(ValueError, match="mt_bench is the folder of both"):
        fetching.sources({}, {}, {}, {"a": questions, "b": questions | {"sources": entries()[:1]}})


@pytest.mark.parametrize("path", sorted((ROOT / "conf/questions").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_question_set_can_be_fetched_and_fetches_what_it_reads(path):
    config = yaml.safe_load(path.read_text())
    found = fetching.sources({}, {}, {}, {path.stem: config})
    if not config.get("sources"):
        return  # the pipeline makes it
    (made,) = found
    assert made.folder == config["folder"]
    assert {config["questions"], config["judge_prompts"], config["references"]} <= set(made.files)


def test_pins_are_those_of_the_real_files(tmp_path):
    real = Path(os.environ.get("SPARSEGRAD_DATA", ROOT / "data")) / "mt_bench"
    paths = sorted((ROOT / "conf/questions").glob("mt_bench*.yaml"))
    if not (real / "question.jsonl").is_file() or not paths:
        pytest.skip(f"no MT-Bench files in {real}: experiments/fetch.py brings them")
    for path in paths:
        (found,) = fetching.sources({}, {}, {}, {"real": yaml.safe_load(path.read_text())})
        copied = tmp_path / path.stem
        for file in found.files:
            (copied / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(real / file, copied / file)
        sums = "".join(f"{sha}  {file}\n" for file, sha in found.checksums.items())
        (copied / "SHA256SUMS").write_text(sums)
        fetching.verify(found, copied)
