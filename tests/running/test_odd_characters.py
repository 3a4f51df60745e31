"""Quotes, markup, emoji, right-to-left text, accents and strange file names go through everything unharmed."""

import csv
import io
import json
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
import soundfile
import tiny
from bs4 import BeautifulSoup
from pyarrow import parquet
from speech import make_processor, tone
from test_run_all import call

import asrlib
from asrlib.data.opening import check_splits, open_corpus
from asrlib.data.text import folded, label_ids, normalise_text
from asrlib.measuring.word_errors import load_predictions, score
from asrlib.reporting import tables

ROOT = Path(__file__).parents[2]
LETTERS = "abcdefghijklmnopqrstuvwxyz'\"<>&;/()?!.,-1é🎉שלוםעמ"
TEXTS = [
    'he said, "hi"; it\'s',
    "<script>alert(1)</script>",
    "&amp; <b onclick='x()'>".replace("=", ""),
    "a <s> b <pad>",  # as special tokens are written
    "party 🎉",
    "שלום עולם!",
    unicodedata.normalize("NFD", "café"),
    unicodedata.normalize("NFC", "café"),
]
NAMES = [
    "-rf",
    ".hidden",
    "two words",
    'it\'s "quoted", and',
    "<b>&amp;#",
    "🎉 100%",
    "שלום",
    unicodedata.normalize("NFD", "éé") + "n" * 180,
]
SPOKEN = dict(zip(NAMES, TEXTS, strict=True))
LISTED = SPOKEN | {"two\nlines": "say\r\nit"}  # which a line of a LibriSpeech folder cannot hold
TURNED = "\u202eabc"  # what follows would be read from right to left


def write_audio(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        soundfile.write(folder / f"{name}.wav", tone(1.2), 16_000)


def write_tree(split: Path) -> None:
    chapter = split / "it's <b>שלום" / "-1"
    write_audio(chapter)
    lines = [f"{unicodedata.normalize('NFC', name)} {text}" for name, text in SPOKEN.items()]
    (chapter / "any.trans.txt").write_text("\n".join(lines), encoding="utf-8")


def rows_of(folder: str) -> list[dict]:
    """Each file is named in another composition of its accents than it has on the disk."""
    paths = [unicodedata.normalize("NFC", f"{folder}/{name}.wav") for name in NAMES]
    rows = [{"audio": p, "text": t, "id": n, "speaker": n} for p, n, t in zip(paths, NAMES, TEXTS, strict=True)]
    rows += [{"audio": paths[0], "text": LISTED[id], "id": id, "speaker": id} for id in LISTED.keys() - SPOKEN.keys()]
    return [*rows, {"audio": paths[0], "text": "日本 <i>", "id": "<u>no\nsuch</u>", "speaker": TURNED}]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path) -> None:
    import datasets

    file = io.BytesIO()
    soundfile.write(file, tone(1.2), 16_000, format="WAV")
    columns = {
        "audio": [{"bytes": file.getvalue(), "path": f"{name}.wav"} for name in NAMES],
        "text": TEXTS,
        "id": NAMES,
        "speaker": NAMES,
    }
    parquet.write_table(datasets.Dataset.from_dict(columns).data.table, path)


@pytest.fixture(scope="module")
def own_model(tmp_path_factory) -> Path:
    """A model that writes with these characters."""
    folder = tmp_path_factory.mktemp("own")
    processor = make_processor(folder, LETTERS)
    tiny.conformer(vocab_size=len(processor.tokenizer)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


# ---- the pieces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tree", "jsonl", "csv", "parquet"])
def test_every_kind_of_corpus_keeps_texts_ids_and_speakers_as_they_are(tmp_path, kind):
    if kind == "tree":
        write_tree(tmp_path / "test")
    elif kind == "parquet":
        write_parquet(tmp_path / "test.parquet")
    else:
        write_audio(tmp_path / "a b")
        {"jsonl": write_jsonl, "csv": write_csv}[kind](tmp_path / f"test.{kind}", rows_of("a b"))
    corpus = open_corpus(tmp_path, "test")
    found = {u.id: u.text for u in corpus if u.speaker != TURNED}
    assert found == (LISTED if kind in ("jsonl", "csv") else SPOKEN)
    assert not corpus.rejected and all(len(u.audio()) == 19_200 for u in corpus)
    speakers = [u.speaker for u in corpus][: len(NAMES)]
    assert speakers == ["it's <b>שלום"] * len(NAMES) if kind == "tree" else speakers == NAMES


def test_the_longest_name_that_fits_is_the_id_of_a_line(tmp_path):
    chapter = tmp_path / "test" / "1" / "1"
    chapter.mkdir(parents=True)
    for name in ("a", "a b", "a b c"):
        soundfile.write(chapter / f"{name}.wav", tone(), 16_000)
    (chapter / "1.trans.txt").write_text("a x\na b  y z\na b c\td\n")
    assert {u.id: u.text for u in open_corpus(tmp_path, "test")} == {"a": "x", "a b": "y z", "a b c": "d"}


@pytest.mark.parametrize("letters", ["é", "e\u0301"])
def test_accents_are_composed_as_the_vocabulary_has_them(tmp_path, letters):
    processor = make_processor(tmp_path, "caf" + letters)
    for form in ("NFC", "NFD"):
        assert normalise_text(unicodedata.normalize(form, "Café"), processor) == "caf" + letters


def test_how_accents_are_composed_is_no_word_error():
    row = {"id": "a", "speaker": "s", "seconds": 1.0}
    texts = [unicodedata.normalize(form, "Café da") for form in ("NFD", "NFC")]
    assert score([row | {"reference": texts[0], "hypothesis": texts[1]}]).wer == 0
    assert folded(texts[0]) == folded(texts[1])
    assert "<del" not in tables.diff_transcripts(*texts)


def test_what_looks_like_a_special_token_is_spelt(own_model):
    _, processor = asrlib.load(own_model)
    assert processor.tokenizer.decode(label_ids("a <s> b <pad>", processor), group_tokens=False) == "a <s> b <pad>"


def test_right_to_left_text_has_an_element_of_its_own():
    assert tables.isolated("שלום <b>") == "<bdi>שלום &lt;b&gt;</bdi>"
    assert tables.isolated("café 🎉") == "café 🎉"
    assert tables.isolated(TURNED).startswith("<bdi>")
    soup = BeautifulSoup(tables.table_html(pd.DataFrame({"שלום": ["עולם"], "b": ["c"]}, index=[TURNED])), "html.parser")
    assert [element.text for element in soup.select("bdi")] == ["שלום", TURNED, "עולם"]
    assert 'dir="auto"' in tables.diff_transcripts("שלום", "a") and "dir" not in tables.diff_transcripts("b", "a")


@pytest.mark.parametrize("split", ["../up", "a/b", ".hidden", "two\nlines", "n" * 201])
def test_a_split_that_cannot_name_a_file_is_refused(split):
    with pytest.raises(ValueError, match="cannot name files, as it must"):
        check_splits("synthetic", [split])


# ---- the whole ---------------------------------------------------------------------------------------------

SPLIT = "tést 🎉 #1"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    project = tmp_path_factory.mktemp("odd") / "it's a <b> “project” 100%"
    for name in ("notebooks", "asrlib"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run_all.py", project)
    (project / "params").mkdir()
    return project


def run_all(project: Path, name: str, values: dict) -> Path:
    """The folder of a run of that name."""
    (project / "params" / "odd.yaml").write_text(json.dumps(values), encoding="utf-8")  # emoji as two escapes
    command = [sys.executable, "run_all.py", "odd", "--name", name]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return project / "reports" / name


@pytest.fixture(scope="module")
def run(project, own_model) -> Path:
    """Of a pipeline on such speech, in a project of such a name: read, converted, trained, evaluated."""
    speech = project / "spëech & more"
    write_tree(speech / "train")
    write_audio(speech / "clips")
    write_csv(speech / "validation.csv", rows_of("clips"))
    write_jsonl(speech / f"{SPLIT}.jsonl", rows_of("clips"))
    values = {
        "steps": ["00_baseline", "01_convert", "03_finetune", "04_evaluate"],
        "model": str(own_model),
        "corpus": speech.name,
        "eval_splits": [SPLIT],
        "latent_dim": 4,
        "method": "svd",
        "ranks": "uniform",
        "epochs": 1,
        "device": "cpu",
    }
    return run_all(project, "שלום <i>", values)


def test_predictions_are_of_the_texts_as_they_are(run):
    for system in ("baseline", "converted", "finetuned"):
        rows = load_predictions(run / "predictions" / f"{system}_{SPLIT}.jsonl")
        assert {row["id"]: row["reference"] for row in rows} == LISTED
        assert [row["speaker"] for row in rows] == [row["id"] for row in rows]


def test_what_the_model_cannot_write_is_rejected_with_its_reason(run):
    for split in ("validation", SPLIT):
        [row] = map(json.loads, (run / "rejected" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines())
        assert row["id"] == "<u>no\nsuch</u>"
        assert row["reason"] == "characters outside the vocabulary: '日', '本'"
    assert (run / "rejected" / "train.jsonl").read_text() == ""


def test_pages_show_it_as_text_and_nothing_runs(run):
    shown = ""
    for page in run.glob("*.html"):
        soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
        assert not soup.select("script, u, [onclick]")
        assert "שלום <i>" in soup.title.text + soup.select_one("a.home").text
        shown += soup.main.text
    assert len(list(run.glob("*.html"))) == 5 and SPLIT in shown
    transcripts = BeautifulSoup((run / "04_evaluate.html").read_text(encoding="utf-8"), "html.parser").select(".diff")
    assert transcripts and any(text in said.text for said in transcripts for text in ("<", "&", "🎉"))


def test_it_is_verified_and_listed(run, capsys):
    assert call(run.parents[1], "--verify", "reports/שלום <i>") == 0
    assert "3 of 3 word error rates come out the same again" in capsys.readouterr().out
    assert call(run.parents[1], "--index") == 0
    soup = BeautifulSoup((run.parent / "index.html").read_text(encoding="utf-8"), "html.parser")
    link = soup.select_one("th a")
    assert link.text == "שלום <i>" and link["dir"] == "auto" and "<" not in link["href"] and " " not in link["href"]


def test_speech_in_parquet_files_trains_and_is_evaluated_likewise(project, own_model):
    tables = project / "-tables [x]"
    tables.mkdir()
    for split in ("train", "validation", "test"):
        write_parquet(tables / f"{split}.parquet")
    values = {"steps": ["00_baseline"], "model": str(own_model), "corpus": tables.name, "eval_splits": ["test"]}
    run = run_all(project, "it's\u202e #1", values | {"baseline_epochs": 1, "device": "cpu"})
    rows = load_predictions(run / "predictions" / "baseline_test.jsonl")
    assert {row["id"]: row["reference"] for row in rows} == SPOKEN
