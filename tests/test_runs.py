import json

import numpy as np
import pytest

from asrlib.runs import (
    NEEDS,
    CompletedRun,
    MissingStep,
    Run,
    atomic_folder,
    atomic_write,
    read_json,
    resolve,
    write_json,
)
from asrlib.runs.fingerprints import files_fingerprint, fingerprint


def visible_and_hidden(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_relative_path_means_the_same_in_jupyterlab_and_in_a_run(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "params").mkdir()
    for folder in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(folder)
        assert resolve("reports/demo") == tmp_path / "reports" / "demo"
    assert resolve("/somewhere/else").as_posix() == "/somewhere/else"


def test_outside_a_project_a_relative_path_is_taken_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("reports/demo") == tmp_path / "reports" / "demo"


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    file = tmp_path / "new" / "metrics.json"
    write_json(file, {"wer": 0.25})
    with pytest.raises(KeyboardInterrupt), atomic_write(file) as out:
        out.write("half of")
        raise KeyboardInterrupt
    assert read_json(file) == {"wer": 0.25}
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        write_json(file, {"wer": object()})
    assert read_json(file) == {"wer": 0.25}
    assert visible_and_hidden(file.parent) == ["metrics.json"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "models" / "converted"
    with atomic_folder(target) as folder:
        (folder / "old").touch()
        assert not target.exists()
    with pytest.raises(OSError, match="disk full"), atomic_folder(target) as folder:
        (folder / "half").touch()
        raise OSError("disk full")
    assert visible_and_hidden(target) == ["old"]
    with atomic_folder(target) as folder:
        (folder / "new").touch()
    assert visible_and_hidden(target) == ["new"]
    assert visible_and_hidden(target.parent) == ["converted"]


def test_numpy_and_paths_become_plain_json(tmp_path):
    write_json(tmp_path / "a.json", {"f": np.float32(0.5), "i": np.arange(2), "p": tmp_path, "t": "é<"})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "f": 0.5,
        "i": [0, 1],
        "p": str(tmp_path),
        "t": "é<",
    }


def test_what_is_missing_names_the_notebook_to_run(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "params").mkdir()
    monkeypatch.chdir(tmp_path)
    run = Run.open("reports/demo")
    with pytest.raises(MissingStep, match=r"metrics/convert\.json is missing in reports/demo: run 01_"):
        run.read_metrics("convert")
    with pytest.raises(MissingStep, match="models/finetuned is missing in reports/demo: run 03_finetune"):
        run.require_model("finetuned")
    assert not run.path.exists(), "asking must not make folders"

    run.write_metrics("convert", {"latent_dim": 72})
    assert run.read_metrics("convert") == {"latent_dim": 72}
    write_json(run.models / "finetuned" / "config.json", {})
    assert run.require_model("finetuned") == run.path / "models" / "finetuned"


def test_a_broken_json_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"wer": 0.')
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def begin_and_keep_a_checkpoint(run, fingerprint):
    run.mark_started("03_finetune", fingerprint)
    (run.checkpoints("03_finetune") / "checkpoint").touch()


def checkpoints_when_started_again(run, fingerprint):
    run.mark_started("03_finetune", fingerprint)
    return visible_and_hidden(run.checkpoints("03_finetune"))


def test_checkpoints_serve_only_the_very_same_interrupted_step(tmp_path):
    run = Run(tmp_path)
    begin_and_keep_a_checkpoint(run, "a")
    assert run.resumable("03_finetune")
    assert checkpoints_when_started_again(run, "a") == ["checkpoint"]
    assert checkpoints_when_started_again(run, "b") == [], "of other parameters"

    begin_and_keep_a_checkpoint(run, "b")
    run.outdate("03_finetune")
    assert checkpoints_when_started_again(run, "b") == ["checkpoint"], "an interrupted step may go on"
    run.mark_completed("03_finetune", "b", seconds=7.0)
    assert not run.resumable("03_finetune")
    assert checkpoints_when_started_again(run, "b") == [], "a completed step begins afresh"

    begin_and_keep_a_checkpoint(run, "b")
    run.discard("03_finetune")
    assert not run.resumable("03_finetune")
    assert checkpoints_when_started_again(run, "b") == [], "discarded"


def test_a_notebook_opened_alone_never_finds_old_checkpoints(tmp_path):
    run = Run(tmp_path)
    (run.checkpoints("03_finetune") / "checkpoint").touch()
    assert visible_and_hidden(run.checkpoints("03_finetune")) == []


def test_how_long_a_step_took_is_remembered_while_it_runs_again(tmp_path):
    run = Run(tmp_path)
    assert run.seconds("04_evaluate") is None
    run.mark_started("04_evaluate", "a")
    run.mark_completed("04_evaluate", "a", seconds=7.0, commit="c")
    assert run.completed("04_evaluate") == {"fingerprint": "a", "seconds": 7.0, "commit": "c"}
    run.outdate("04_evaluate")
    assert run.completed("04_evaluate") is None
    assert run.seconds("04_evaluate") == 7.0
    run.mark_started("04_evaluate", "b")
    assert run.seconds("04_evaluate") == 7.0


def test_fingerprints_tell_values_apart_but_not_the_order_of_names(tmp_path):
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert len({fingerprint(value) for value in ({"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": None}, {})}) == 5

    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "text.py"
    file.write_text("x = 1")
    before = files_fingerprint([file], tmp_path)
    assert files_fingerprint([file], tmp_path) == before
    file.write_text('"""Says why."""\n\nx=1  # here too\n')
    assert files_fingerprint([file], tmp_path) == before, "not what it does"
    file.write_text("x = 2")
    changed = files_fingerprint([file], tmp_path)
    moved = file.rename(tmp_path / "text.py")
    assert len({before, changed, files_fingerprint([moved], tmp_path)}) == 3


def test_a_step_run_again_by_hand_is_no_longer_completed_nor_are_those_that_need_it(tmp_path):
    run = Run(tmp_path)
    for step in NEEDS:
        run.mark_completed(step, "same", 1.0)
    run.write_metrics("analyze", {})
    assert [step for step in NEEDS if not run.completed(step)] == ["02_analyze_svd_error"]
    run.write_metrics("benchmark", {})
    assert [step for step in NEEDS if run.completed(step)] == [*list(NEEDS)[:2], "03_finetune", "04_evaluate"]
    run.write_metrics("convert", {})
    assert run.completed("00_baseline")
    assert not any(run.completed(step) for step in ("01_convert", "02_analyze_svd_error", "03_finetune"))


def test_what_a_step_measured_counts_while_it_is_completed(tmp_path):
    run = Run(tmp_path / "run")
    completed = CompletedRun(run.path)
    run.write_metrics("evaluate", {"wer": 0.1})
    assert run.metrics_so_far("evaluate") == {"wer": 0.1} and completed.metrics_so_far("evaluate") == {}
    run.mark_started("04_evaluate", "f")
    run.mark_completed("04_evaluate", "f", seconds=1.0)
    assert completed.metrics_so_far("evaluate") == {"wer": 0.1}
    run.outdate("04_evaluate")
    assert completed.metrics_so_far("evaluate") == {}
