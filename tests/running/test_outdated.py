"""What a change runs again: no more than it touches."""

import shutil
from pathlib import Path

import nbformat
import pytest

from asrlib.models.registry import FAMILIES
from asrlib.running import pipeline
from asrlib.running.parameter_table import outdated, outdated_table
from asrlib.running.parameters import Schema
from asrlib.running.pipeline import pending, plan
from asrlib.running.preflight import check_whose_width
from asrlib.runs import NEEDS, TRAINED, BadParameter, Run, find_notebooks, needed_by, project_root, write_json
from asrlib.runs.dependencies import FAMILY_FILES, OPENER_FILES, SHARED_FILES, library_files, unused_files
from asrlib.runs.fingerprints import files_fingerprint
from asrlib.training.baseline import TESTING, TRAINING, kept_training, training_fingerprint

ROOT = project_root(Path(__file__).parent)
SHIPPED = {"model": "synthetic-conformer", "corpus": "synthetic"}


@pytest.fixture(scope="module")
def schema():
    return Schema(find_notebooks(ROOT))


@pytest.fixture(scope="module")
def steps_of(schema):
    """values → the steps of a run of them; the library's files are read once."""
    known: dict = {}

    def once(function):
        def remembered(first, *rest):
            key = (function, str(first), repr(rest))
            return known[key] if key in known else known.setdefault(key, function(first, *rest))

        return remembered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "library_files", once(library_files))
        patch.setattr(pipeline, "files_fingerprint", once(files_fingerprint))
        yield lambda values: plan(ROOT, Run(ROOT / "reports" / "none"), schema, values, list(NEEDS))


def changed_steps(before, after):
    return [one.name for one, other in zip(before, after, strict=True) if one.fingerprint != other.fingerprint]


def test_a_change_outdates_who_takes_the_parameter_and_who_needs_these(schema, steps_of):
    expected, before = outdated(ROOT), steps_of({})
    assert expected.keys() == schema.defaults.keys()
    assert {name: changed_steps(before, steps_of({name: "changed"})) for name in expected} == expected


ALL = list(NEEDS)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("analysis_samples", ["02_analyze_svd_error"]),
        ("latent_dim", ALL[1:]),
        ("kv_heads", ALL[1:]),
        ("new_latent_dim", ALL),
        ("epochs", ALL[3:]),
        ("benchmark_samples", ["05_benchmark", "06_compare"]),
        ("stream_caches", ["04_evaluate", "06_compare"]),
    ],
)
def test_the_table_says_so_too(name, steps):
    assert outdated(ROOT)[name] == steps


def test_the_page_is_up_to_date():
    if (ROOT / "docs" / "outdated.md").read_text(encoding="utf-8") != outdated_table(ROOT):
        pytest.fail("docs/outdated.md is not what the notebooks say: run `make parameters`")


def test_a_step_that_is_not_in_a_run_hands_its_needs_on():
    assert needed_by("04_evaluate", ["00_baseline", "01_convert", "04_evaluate"]) == ["00_baseline", "01_convert"]
    assert needed_by("02_own", ["00_first", "01_second", "02_own", "03_more"]) == ["00_first", "01_second"]


def test_only_what_is_not_done_runs_and_who_needs_it(tmp_path, steps_of):
    run, steps = Run(tmp_path), steps_of({})
    for step in steps:
        run.mark_completed(step.name, step.fingerprint, 1.0)
    assert pending(run, steps) == []
    assert [step.name for step in pending(run, steps_of({"analysis_samples": 1}))] == ["02_analyze_svd_error"]
    run.outdate("05_benchmark")
    assert [step.name for step in pending(run, steps)] == ["05_benchmark", "06_compare"]
    assert [step.name for step in pending(run, steps, ["04_evaluate"])] == ALL[4:]


# ---- the trained baseline ----------------------------------------------------------------------------------


def test_every_parameter_of_00_is_of_its_training_or_of_its_testing(schema):
    assert sorted([*TRAINING, *TESTING]) == sorted(schema.parameters["00_baseline"])


def test_the_training_of_the_baseline_is_told_by_what_it_reads(schema):
    values = schema.defaults | SHIPPED | {"run_dir": "reports/demo"}
    before = training_fingerprint(values)
    for name in TESTING:
        assert training_fingerprint(values | {name: "changed"}) == before, name
    for name in ("seed", "device", "baseline_precision", "baseline_batch_seconds", "new_latent_dim", "corpus"):
        assert training_fingerprint(values | {name: "changed"}) != before, name


def test_a_trained_baseline_is_kept_until_it_is_to_be_trained_again(tmp_path):
    run = Run(tmp_path)
    assert kept_training(run, "same") is None
    write_json(run.models / "baseline" / TRAINED, {"fingerprint": "same", "metrics": {"best_step": 3}})
    run.mark_completed("00_baseline", "tested so", 1.0)
    run.mark_started("00_baseline", "tested otherwise")
    assert kept_training(run, "same") == {"best_step": 3}
    assert kept_training(run, "other") is None
    run.discard("01_convert")
    assert kept_training(run, "same") == {"best_step": 3}
    run.discard("00_baseline")
    assert kept_training(run, "same") is None


# ---- whose width -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["latent_dim", "kv_heads"])
def test_a_width_of_the_conversion_is_refused_where_nothing_is_converted(name):
    with pytest.raises(BadParameter, match=f"{name} is the conversion's; the new model's is new_{name}"):
        check_whose_width({"architecture": "conformer", name: 8}, ["00_baseline"])
    check_whose_width({"architecture": "conformer", name: 8}, ["00_baseline", "01_convert"])
    check_whose_width({"architecture": "conformer", f"new_{name}": 8}, ["00_baseline"])
    check_whose_width({"model": "synthetic-conformer", name: 8}, ["00_baseline"])


# ---- families and openers ----------------------------------------------------------------------------------


def test_every_family_has_its_file():
    assert {kind.removesuffix("-mla") for kind in FAMILIES} == FAMILY_FILES.keys()
    for path in [*FAMILY_FILES.values(), *OPENER_FILES, *SHARED_FILES["models/families/nemotron.py"]]:
        assert (ROOT / "asrlib" / path).is_file(), path


def files_of(step: str, values: dict) -> set[str]:
    cells = nbformat.read(find_notebooks(ROOT)[step], as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    package = ROOT / "asrlib"
    return {str(path.relative_to(package)) for path in library_files(code, package, unused_files(values, ROOT))}


def test_a_run_counts_its_own_family_and_opener_and_what_these_need(tmp_path):
    others = {
        "models/families/parakeet.py",
        "models/families/nemotron.py",
        "models/families/wav2vec2.py",
        "data/remote.py",
    }
    own = files_of("00_baseline", SHIPPED)
    assert (
        not own & others
        and {"models/families/wav2vec2_conformer.py", "data/synthetic.py", "data/librispeech.py"} <= own
    )
    write_json(tmp_path / "config.json", {"model_type": "nemotron_asr_streaming-mla"})
    streaming = files_of("00_baseline", {"model": str(tmp_path), "corpus": "s3://bucket/speech"})
    assert streaming & others == {"models/families/parakeet.py", "models/families/nemotron.py", "data/remote.py"}
    assert others <= files_of("00_baseline", {"model": "owner/name", "corpus": "owner/speech"}), "a download may tell"
    assert "models/encoder.py" in files_of("00_baseline", {"architecture": "conformer", "corpus": "synthetic"})


def test_a_line_in_a_family_that_the_run_does_not_use_changes_nothing(tmp_path, schema, monkeypatch):
    monkeypatch.setattr(pipeline, "library_files", library_files)  # not those of steps_of, which read a file once
    monkeypatch.setattr(pipeline, "files_fingerprint", files_fingerprint)
    for folder in ("asrlib", "notebooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.zip", "__pycache__"))
    (tmp_path / "params").mkdir()

    def steps():
        return plan(tmp_path, Run(tmp_path / "reports" / "demo"), schema, SHIPPED, ["00_baseline"])

    before = steps()
    for path, expected in (
        ("models/families/parakeet.py", []),
        ("data/remote.py", []),
        ("models/families/wav2vec2_conformer.py", ALL[:1]),
    ):
        with open(tmp_path / "asrlib" / path, "a") as file:
            file.write("\nADDED = 1\n")
        assert changed_steps(before, steps()) == expected, path
