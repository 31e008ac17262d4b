"""Archives of results: what they hold, what they refuse, what they leave of what is here."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from finetune.store import archive, dvc_stages, origin, unpack
from finetune.store.experiment import load
from finetune.store.pack import pack
from finetune.store.places import LOCKS, Busy, locked
from finetune.store.records import iterate, read_json, write_json, write_record

ROOT = Path(__file__).parents[3]
RUNS, ANSWERS = "runs/stories260k/full", "mt_bench/answers/stories260k/full"
JOURNAL = "search/minilm/full/cola.journal"
TAKEN = (RUNS, ANSWERS, "search/minilm/full/cola.json", JOURNAL, "cost_curves.json")
COMMIT = "a" * 40


def code(commit=COMMIT):
    return lambda: {"commit": commit, "dirty": False}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with a few of the results that are committed, and their archive."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "conf", folder / "conf", ignore=shutil.ignore_patterns("lengths"))
    shutil.copytree(ROOT / "experiments", folder / "experiments", ignore=shutil.ignore_patterns("*.py"))
    for name in TAKEN:
        source, target = (root / "results/local" / name for root in (ROOT, folder))
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(origin, "provenance", code())
        pack(Path("experiments/local.yaml"), Path("all.tar.xz"))
    return folder


@pytest.fixture
def results(checkout, tmp_path, monkeypatch):
    """Results of a copy of it, the working folder."""
    shutil.copytree(checkout, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(origin, "provenance", code())
    return Path("results/local")


@pytest.fixture
def take():
    return lambda *commit: unpack.unpack(Path("all.tar.xz"), *commit)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(record):
    """The same run, measured anew: another record under the same name."""
    return write_record(record, read_json(record) | {"provenance": {}})


def test_what_was_packed_is_there_again_and_no_weights_are_packed(results, take):
    before = contents(results)
    for name in ("models/m/full/seed1/model.safetensors", f"{RUNS}/earlier/x-seed1-0123456789ab.json", "report.html"):
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text("{}")
    (results / RUNS / ".oasst1-seed9-0123456789ab.json.xyz").write_text("torn")
    first = Path("all.tar.xz").read_bytes()
    pack(Path("experiments/local.yaml"), Path("all.tar.xz"))
    assert Path("all.tar.xz").read_bytes() == first
    for _ in range(2):
        shutil.rmtree(results)
        take()
        assert contents(results) == before and not list(Path(LOCKS).iterdir())
    take()
    assert contents(results) == before


def test_a_pack_too_large_is_refused_with_its_sizes(results, monkeypatch):
    monkeypatch.setattr(archive, "LIMIT", 1000)
    with pytest.raises(ValueError, match=r"would have 0\.\d MB.*: mt_bench 0\.\d MB, .*runs 0\.\d MB"):
        pack(Path("experiments/local.yaml"), Path("new.tar.xz"))
    assert not Path("new.tar.xz").exists()


def test_nothing_and_unsound_records_are_not_packed(results):
    with pytest.raises(ValueError, match=r"results/smoke holds nothing that a stage wrote"):
        pack(Path("experiments/smoke.yaml"), Path("new.tar.xz"))
    path = sorted((results / RUNS).glob("oasst1-*"))[0]
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b'"seed": 1', b'"seed": 2'))
    with pytest.raises(ValueError, match=r"oasst1-seed1-\w+\.json is not what was written"):
        pack(Path("experiments/local.yaml"), Path("new.tar.xz"))
    path.unlink()
    with pytest.raises(ValueError, match=r"cell\.json lists oasst1-seed1-\w+\.json, which is not there"):
        pack(Path("experiments/local.yaml"), Path("new.tar.xz"))


def test_records_of_another_scale_are_not_packed_with_those_of_this(results):
    Path("experiments/longer.yaml").write_text("extends: local\nname: local\nscale: paper\n")
    with pytest.raises(ValueError, match=r"is of scale 'local', experiments/longer\.yaml names 'paper'"):
        pack(Path("experiments/longer.yaml"), Path("new.tar.xz"))


def test_a_file_of_another_name_takes_its_own_place(results, take):
    before = contents(results)
    Path("experiments/shorter.yaml").write_text("extends: local\nname: local\n")
    pack(Path("experiments/shorter.yaml"), Path("all.tar.xz"))
    shutil.rmtree(results)
    take()
    assert contents(results) == before


def rebuilt(edit):
    """The archive again, its members, by name, as ``edit`` leaves them; some of another kind."""
    path = Path("all.tar.xz")
    with tarfile.open(path) as tar:
        members = {one.name: tar.extractfile(one).read() for one in tar}
    edit(members)
    with tarfile.open(path, "w:xz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(b"" if isinstance(content, str) else content))


def planted(name, content=b"{}"):
    return lambda members: members.update({name: content})


def manifest(**changes):
    def edit(members):
        members["manifest.json"] = json.dumps(json.loads(members["manifest.json"]) | changes).encode()

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (planted("../../conf/base.yaml"), r"holds '\.\./\.\./conf/base\.yaml', which is no file that a stage writes"),
        (planted("/tmp/cost_curves.json"), "holds '/tmp/cost_curves.json', which is no file"),
        (planted("models/m/full/model.safetensors"), "which is no file that a stage writes"),
        (planted("hosvd_cost.json", "/etc/passwd"), "holds 'hosvd_cost.json', which is no file"),
        (planted("hosvd_cost.json"), "hosvd_cost.json is in no list of what was packed"),
        (planted("cost_curves.json"), "cost_curves.json is not what was packed"),
        (lambda members: members.pop("cost_curves.json"), "lacks cost_curves.json"),
        (lambda members: members.pop("manifest.json"), "damaged, or no archive of make pack"),
        (manifest(format=2), "of another format"),
        (manifest(file="elsewhere"), "of experiment 'elsewhere'; there is no experiments/elsewhere.yaml"),
        (manifest(file="../x"), r"of experiment '\.\./x'"),
        (manifest(commit="--output=x"), "is of commit --output=x, here is a"),
        (manifest(commit=None), "is of an unknown commit"),
        (manifest(dirty=True), "with changes, here is a"),
    ],
)
def test_another_archive_is_refused_and_writes_nothing(edit, said, results, take):
    shutil.rmtree(results)
    rebuilt(edit)
    with pytest.raises(ValueError, match=said):
        take()
    assert not results.exists() and not Path("x").exists()


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_torn_archive_and_one_of_another_kind_are_refused(keep, results, take):
    path = Path("all.tar.xz")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"all\.tar\.xz is damaged, or no archive of make pack"):
        take()
    path.unlink()
    with pytest.raises(ValueError, match=r"there is no archive all\.tar\.xz"):
        take()


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("conf/base.yaml", "version", 2, "another version of conf/base.yaml: 1, here 2"),
        ("conf/protocol/sound.yaml", "density", 0.5, r"another configuration of conf/protocol/sound\.yaml: \w+, here"),
        ("experiments/local.yaml", "seeds", [1, 2], r"another configuration of decoder_seeds: .*\(and of seeds\)"),
        ("experiments/local.yaml", "tables", [1], None),  # of what is made of records
        ("conf/protocol/printed.yaml", "density", 0.5, None),  # of others
    ],
)
def test_another_configuration_is_named(file, key, value, said, results, take):
    content = yaml.safe_load(Path(file).read_text()) | {key: value}
    Path(file).write_text(yaml.safe_dump(content))
    if said is None:
        take()
    else:
        with pytest.raises(ValueError, match=said):
            take()


def test_another_commit_counts_if_its_code_is_the_same_or_it_is_named(results, take, monkeypatch):
    monkeypatch.setattr(origin, "provenance", code("b" * 40))
    asked = []
    monkeypatch.setattr(origin, "git", lambda *given: asked.append(given[1:]))  # None: they differ, or git does
    with pytest.raises(ValueError, match=r"is of commit a+, here is b+, .* COMMIT=aaaaaaaaaaaa\."):
        take("bbbbbbbb")
    assert asked == [("diff", "--quiet", COMMIT, "--", "src", "conf")]
    take(COMMIT[:7])
    monkeypatch.setattr(origin, "git", lambda *given: "")
    take()


def test_a_finished_record_here_is_not_overwritten_and_nothing_else_is_written(results, take):
    first, second, _ = sorted((results / RUNS).glob("oasst1-*"))
    refuse(second)
    first.unlink()
    before = contents(results)
    with pytest.raises(ValueError, match=rf"{second} is here, and all\.tar\.xz holds another .*: nothing is taken"):
        take()
    assert contents(results) == before


def test_a_run_under_another_hash_is_another_record_of_it(results, take, monkeypatch):
    first, *_ = sorted((results / RUNS).glob("oasst1-*"))
    other = first.with_name("oasst1-seed1-0123456789ab.json")
    first.rename(other)
    monkeypatch.setattr(unpack, "check_record", lambda path, record: None)
    with pytest.raises(ValueError, match=rf"{other} is here"):
        take()
    pack_again = pytest.raises(ValueError, match=r"oasst1-seed1-\*\.json: two records of one run")
    shutil.copy(other, first)
    with pack_again, monkeypatch.context() as patch:
        patch.setattr(archive, "check_record", lambda path, record: None)
        pack(Path("experiments/local.yaml"), Path("new.tar.xz"))


def test_a_failed_or_damaged_record_gives_way_to_a_finished_one_and_not_the_other_way_round(results, take):
    before = contents(results)
    first, second, _ = sorted((results / RUNS).glob("oasst1-*"))
    failed = {"status": "failed", "score": None, "error": "loss is nan"}
    write_record(first, read_json(first) | failed)
    second.write_text("{")
    take()
    assert contents(results) == before
    write_record(first, read_json(first) | failed)
    pack(Path("experiments/local.yaml"), Path("failed.tar.xz"))
    first.write_bytes(before[f"{RUNS}/{first.name}"])
    unpack.unpack(Path("failed.tar.xz"))
    assert contents(results) == before


def test_a_journal_goes_on_and_is_never_cut(results, take):
    before = contents(results)
    journal = results / JOURNAL
    record = journal.with_suffix(".json")
    journal.write_bytes(b"".join(before[JOURNAL].splitlines(keepends=True)[:9]))
    record.unlink()
    take()
    assert contents(results) == before
    for name in (JOURNAL, f"{ANSWERS}/stories260k-full-seed1.jsonl"):  # here and there without its record
        path, own = results / name, (results / name).with_suffix(".json")
        own.unlink()
        if name.startswith("mt_bench"):
            write_json(own.parent / "cell.json", {"records": []})
        pack(Path("experiments/local.yaml"), Path("all.tar.xz"))
        path.write_bytes(before[name] + b"more\n")
        take()
        assert path.read_bytes() == before[name] + b"more\n"
        path.write_bytes(before[name].replace(b"e", b"f", 1))
        with pytest.raises(ValueError, match=rf"{path} is here"):
            take()
        path.write_bytes(before[name])


def test_a_cells_list_names_what_is_here_and_what_came(results, take):
    cell, listed = results / RUNS / "cell.json", read_json(results / RUNS / "cell.json")["records"]
    for name in listed[1:]:
        (results / RUNS / name).unlink()
    write_json(cell, {"records": listed[:1]})
    take()
    assert read_json(cell) == {"records": listed} and len([*iterate(results / RUNS)]) == 3
    cell.unlink()  # a cell that is not done has none
    pack(Path("experiments/local.yaml"), Path("all.tar.xz"))
    take()
    assert not cell.exists()
    (results / RUNS / listed[2]).unlink()
    write_json(cell, {"records": listed[:2]})
    take()
    assert read_json(cell) == {"records": listed}


@pytest.mark.parametrize("place", [RUNS, ANSWERS, "runs/minilm/full", "cost_curves.json"])
def test_nothing_is_taken_while_a_stage_writes(place, results, take):
    shutil.rmtree(results)
    with locked(results / place, LOCKS), pytest.raises(Busy, match=f"{place}: another process is working on it"):
        take()
    assert not results.exists()


def test_a_kill_leaves_whole_files_and_the_next_call_goes_on(results, take, monkeypatch):
    before, write = contents(results), unpack.write_atomically
    shutil.rmtree(results)
    written = []

    def dies(path, content):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(unpack, "write_atomically", dies)
        take()
    found = contents(results)
    assert len(found) == 5 and found.items() < before.items() and not any(name.endswith("cell.json") for name in found)
    take()
    assert contents(results) == before


def test_a_stage_is_done_for_dvc_if_all_its_records_and_what_they_are_made_from_are_here(results, monkeypatch):
    import dvc.repo

    shutil.copytree(ROOT / results / "energy/minilm", results / "energy/minilm")
    lists, there = load("experiments/local.yaml"), {"bases": True}
    cell = "train@local-stories260k-full"
    made = SimpleNamespace(addressing=cell, deps=[SimpleNamespace(exists=there.get("bases"))])
    others = [
        SimpleNamespace(addressing=name, deps=[]) for name in ("cost_curves@local", "energy@local-minilm", "x@local")
    ]
    others.append(SimpleNamespace(addressing="answers@local-stories260k", deps=[]))  # of one method of three
    done = []

    class Repo:
        index = SimpleNamespace(stages=[made, *others])

        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def commit(self, name, force):
            done.append(name)

    monkeypatch.setattr(dvc.repo, "Repo", Repo)
    found = dvc_stages.commit_complete(lists)
    assert found == done == [cell, "cost_curves@local", "energy@local-minilm"]
    assert (results / "models/stories260k/full").is_dir()
    made.deps[0].exists = False
    assert cell not in dvc_stages.commit_complete(lists)
    made.deps[0].exists = True
    [record, *_] = (results / RUNS).glob("oasst1-*")
    write_record(record, read_json(record) | {"status": "failed", "score": None, "error": "loss is nan"})
    assert cell not in dvc_stages.commit_complete(lists)
