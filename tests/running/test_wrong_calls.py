"""What a user may call wrongly ends in one sentence, and harms nothing that was made before.

Every row: what is called, what the sentence must hold. The project is a small one, with the real parameters.
"""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import family_models
import nbformat
import numpy as np
import papermill
import pytest
import soundfile
import tiny
from papermill.exceptions import PapermillExecutionError
from speech import tone
from test_run_all import write_notebook

import asrlib
import run_all
from asrlib import __main__
from asrlib.models.scratch import new_processor
from asrlib.runs import find_notebooks

ROOT = Path(__file__).parents[2]
MARK = 'from asrlib.runs import Run\nRun.open(run_dir).write_metrics("baseline", {"splits": {}})'


def parameters_cell(notebook: Path) -> str:
    cells = nbformat.read(notebook, as_version=4).cells
    return next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))


def write_split(folder: Path, name: str = "7-1-0", transcripts: bool = True) -> None:
    chapter = folder / "7" / "1"
    chapter.mkdir(parents=True)
    soundfile.write(chapter / f"{name}.wav", tone(), 16_000)
    if transcripts:
        (chapter / "7-1.trans.txt").write_text(f"{name} A")


def spoil_models(whole: Path, models: Path) -> None:
    """Beside the whole model those with something missing."""
    lost = {"weightless": "model.safetensors", "speechless": "vocab.json", "configless": "config.json"}
    for name in (*lost, "cut", "garbled"):
        shutil.copytree(whole, models / name)
    for name, file in lost.items():
        (models / name / file).unlink()
    weights = models / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (models / "garbled" / "config.json").write_text("{")
    (models / "empty").mkdir()
    shutil.copytree(whole, models / "foreign")
    config = (whole / "config.json").read_text().replace('"wav2vec2-conformer"', '"wavlm"')
    (models / "foreign" / "config.json").write_text(config)
    shutil.copytree(whole, models / "latent")
    tiny.latent_conformer("joint").save_pretrained(models / "latent")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project of the real parameters with a finished run, and everything that may be wrong with models and speech."""
    project = tmp_path_factory.mktemp("project")
    for step, notebook in find_notebooks(ROOT).items():
        write_notebook(project / "notebooks" / f"{step}.ipynb", [parameters_cell(notebook), MARK])
    tiny.conformer().save_pretrained(project / "models" / "whole")
    new_processor().save_pretrained(project / "models" / "whole")
    for name in ("whisper", "nemotron", "parakeet_rnnt"):
        getattr(family_models, name)().save_pretrained(project / "models" / name)
        family_models.processor_of(name).save_pretrained(project / "models" / name)
    spoil_models(project / "models" / "whole", project / "models")

    for split in ("train", "validation", "test"):
        write_split(project / "speech" / split)
    write_split(project / "mute" / "test", transcripts=False)
    (project / "nothing").mkdir()
    (project / "empty.csv").write_text("audio,text\n")
    (project / "columns.csv").write_text("path,sentence\na.wav,A\n")
    (project / "one.jsonl").write_text('{"audio": "a.wav", "text": "A"}\n')
    (project / "notes.txt").write_text("A")
    (project / "noise.wav").write_bytes(b"RIFF and then nothing")
    soundfile.write(project / "speech.wav", tone(), 16_000)

    params = {
        "finished": "steps: [00_baseline]\nmodel: models/whole\ncorpus: speech\neval_splits: [test]\ndevice: cpu\n",
        "widths": "sweep: {latent_dim: [4, 8]}\nsteps: [00_baseline]\nmodel: models/whole\ncorpus: speech\n"
        "eval_splits: [test]\n",
        "all": "model: models/whole\ncorpus: speech\neval_splits: [test]\ndevice: cpu\n",
        "list": "- epochs\n",
        "twice": "epochs: 1\nepochs: 2\n",
        "unclosed": "epochs: [1\n",
    }
    (project / "params").mkdir()
    for name, text in params.items():
        (project / "params" / f"{name}.yaml").write_text(text)
    (project / "params" / "latin.yaml").write_bytes("# caf\xe9\n".encode("latin-1"))

    blocked = project / "blocked"
    blocked.mkdir()
    for name in ("notebooks", "params", "models", "speech"):
        (blocked / name).symlink_to(project / name)
    (blocked / "reports").write_text("a file")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(project)
        assert run_all.main(["finished", "--root", str(project)]) == 0
    return project


def hashes(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def nothing_is_lost(project, monkeypatch):
    """After every call here the finished run is what it was, and there is no other."""
    monkeypatch.chdir(project)
    before = hashes(project / "reports")
    yield
    assert before == hashes(project / "reports") and any("00_baseline.html" in path for path in before)


def status_of(main, words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as end:  # argparse's way
        return end.code


def as_id(value) -> str:
    """Of a column of the tables below: the words of a call, or a command's module."""
    if isinstance(value, list):
        return " ".join(value)[:60] or "nothing"
    return getattr(value, "__name__", "").removeprefix("asrlib.")


def check_said(written: str, said: str) -> None:
    """One sentence, behind argparse's lines of usage where it is argparse's, with advice or what was wrong besides."""
    sentence = written.rpartition("error: ")[2] if written.startswith("usage: ") else written
    assert said in sentence and "Traceback" not in written
    assert len(sentence.strip().splitlines()) <= 3, sentence


# ---- run_all.py --------------------------------------------------------------------------------------------

SET = {  # of the params file `finished`: assignments → what is said
    "latent_dmi=4": "unknown parameter 'latent_dmi' (in --set): did you mean 'latent_dim'?",
    "epochs=many": "parameter 'epochs' (in --set) is 'many', should be a valid number",
    "eval_splits=test": "parameter 'eval_splits' (in --set) is 'test', should be a valid list",
    "epochs": "'epochs' (in --set) should be name=value",
    "epochs=[1": "the value of 'epochs' (in --set) is not valid YAML",
    "epochs=1 epochs=2": "'epochs' (in --set) is given twice: give one value",
    "run_dir=elsewhere": "'run_dir' (in --set) is set by run_all itself: name the run with --name",
    "latent_dim=0": "'latent_dim' (in --set) is 0, should be greater than or equal to 1",
    "latent_dim=-4": "'latent_dim' (in --set) is -4, should be greater than or equal to 1",
    "latent_dim=33": "latent_dim is 33, but a joint latent of a model of width 16 has between 1 and 32 numbers",
    "latent_dim=1 layout=split": "latent_dim is 1, but a split latent of a model of width 16 has between 2 and 32",
    "cache_cut=1.5": "parameter 'cache_cut' (in --set) is 1.5, should be less than 1",
    "cache_cut=0.99": "leaves less than one of the 32 numbers per frame of a model of width 16",
    "learning_rates=[1e-3] learning_rate=1e-3": "say the same thing twice: give one and set the other to null",
    "learning_rate=null": "'learning_rate' and 'learning_rates' are both null: give one of them",
    "chosen_by=divergence kl_weight=0": "'chosen_by' is divergence, that from a teacher: give 'kl_weight'",
    "latent_dim=4 cache_cut=0.5": "say the same thing twice: give one and set the other to null",
    "benchmark_seconds=[10,0]": "should hold numbers above 0, not 0",
    "analysis_cuts=[0.5,75]": "should hold numbers above 0 and below 1, not 75",
    "layout=splt": "is 'splt', should be one of joint, split: did you mean 'split'?",
    "method=svdd": "clover, kq_svd, palu: did you mean 'svd'?",
    "ranks=best": "is 'best', should be one of uniform, energy, sensitivity",
    "attention=mhla": "attention is 'mhla': choose one of mha, mla",
    "architecture=conformr baseline_epochs=1": "architecture is 'conformr': choose one of wav2vec2-conformer",
    "architecture=conformer": "whose weights are random: give 'baseline_epochs' too",
    "architecture=conformer baseline_epochs=1 num_heads=5": "hidden_size 144 is not divisible by num_heads 5",
    "convert_to=gqa": "'method' is attended, which cannot convert to gqa",
    "device=gpu": "'device' (in --set) is 'gpu', should be auto, cpu, mps, cuda or cuda:N",
    "device=cuda:99": "'device' is cuda:99, but torch finds",
    "precision=fp16": "'precision' is fp16, which needs a CUDA device: use bf16 or fp32",
    "model=models/nowhere/at/all": "no model at ",
    "model=models/empty": "models/empty holds no config.json: give a model folder made by save_pretrained",
    "model=models/configless": "models/configless holds no config.json",
    "model=models/garbled": "models/garbled: its config.json is not a valid JSON object with a model_type",
    "model=models/weightless": "models/weightless: it holds no file named model.safetensors",
    "model=models/speechless": "models/speechless holds no vocab.json or tokenizer.json, so the model cannot spell",
    "model=models/cut": "models/cut: its weights are cut short or damaged: get the file again",
    "model=models/foreign": "no family for model type 'wavlm': asrlib knows ",
    "parts=[decodr]": "should be one of encoder, decoder, cross: did you mean 'decoder'?",
    "window_seconds=0": "'window_seconds' (in --set) is 0, should be greater than or equal to 1",
    "window_seconds=31": "'window_seconds' (in --set) is 31, should be less than or equal to 30",
    "architecture=whisper baseline_epochs=1 attention=mla": "a new whisper has attention mha",
    "architecture=whisper baseline_epochs=1 largest_chunk=4": "hears whole windows and masks nothing: leave attention",
    "architecture=whisper baseline_epochs=1 num_heads=5": "hidden_size 144 is not divisible by num_heads 5",
    "model=models/whisper latent_dim=33": "latent_dim is 33, but a joint latent of a model of width 16 has between 1",
    "corpus=speach": "there is no corpus at ",
    "corpus=nothing": "nothing holds no corpus: give SPLIT/SPEAKER/CHAPTER/*.trans.txt beside audio",
    "corpus=mute": "mute holds no corpus, and no transcript of test/7/1/7-1-0.wav: give",
    "eval_splits=[tset]": "eval_splits: corpus speech has no split 'tset': it has test, train, validation",
    "eval_splits=[]": "'eval_splits' (in --set) is [], List should have at least 1 item",
    "eval_splits=[test+]": "join different splits like",
    "corpus=empty.csv eval_splits=[empty]": "empty.csv lists nothing: give a row for each utterance",
    "corpus=columns.csv eval_splits=[columns]": "no column audio and no column text; columns found: path, sentence",
    "corpus=one.jsonl": "one.jsonl is one split, 'one', and 'test' was asked for: add a column `split`",
    "corpus=notes.txt": "notes.txt is no manifest: expected a .jsonl or .csv file",
}


@pytest.mark.parametrize("assignments", SET)
def test_a_wrong_value_is_refused_in_a_sentence(project, capsys, assignments):
    assert run_all.main(["finished", "--set", *assignments.split(), "--root", str(project)]) == 2
    check_said(capsys.readouterr().err, SET[assignments])


NEW = ["architecture=whisper", "baseline_epochs=1", "window_seconds=5"]
OF_A_WHISPER = {  # assignments → what is said
    "convert_to=gqa method=mean": "'convert_to' is gqa, which a whisper cannot be made: use mla",
    "sequential=true": "follow one stack of layers, and an encoder-decoder (whisper) has two: leave them out",
    "reestimate_batch_norm=true": "follow one stack of layers, and an encoder-decoder (whisper) has two",
    "stream_chunks_ms=[320]": "s as a whole, so it cannot stream",
    "benchmark_seconds=[10]": "benchmark_seconds times lengths of audio, and whisper has one: leave it out",
    "benchmark_compiled=true": "benchmark_compiled times models with CTC, and whisper has none: leave it out",
    "benchmark_left_seconds=[5]": "times an encoder of this model's size, and whisper has other sizes: give",
}
OF_A_TRANSDUCER = {
    "convert_to=gqa": "'method' is attended, which cannot convert to gqa",
    "benchmark_compiled=true": "benchmark_compiled times models with CTC, and ",
    "benchmark_left_seconds=[5]": "times an encoder of this model's size, and ",
}
CALLS = [  # words, what is said, exit status
    ([], "which params file? --list shows them", 2),
    (["finishd"], "there is no params file 'finishd': did you mean 'finished'?", 2),
    (["notes.txt"], "notes.txt is not a params file: its name should end in .yaml", 2),
    (["list"], "list.yaml should be one flat mapping of `name: value`", 2),
    (["twice"], "'epochs' is given twice", 2),
    (["unclosed"], "unclosed.yaml is not valid YAML", 2),
    (["latin"], "latin.yaml is not text in UTF-8 (see its byte 5): save it in UTF-8", 2),
    (["all", "--set", "model=models/latent"], "models/latent, which is latent already: give the one it was", 2),
    (["all", "--set", "convert_to=gqa", "method=mean"], "'convert_to' is gqa, which a wav2vec2-conformer cannot", 2),
    (["all", "--set", "train_split=test"], "'train_split': calibration on 'test' would spoil the test: give a", 2),
    (["all", "--set", "parts=[]"], "parts is [], but the parts of wav2vec2-conformer with attention are encoder", 2),
    (["all", "--set", "parts=[decoder]"], "but the parts of wav2vec2-conformer with attention are encoder: give a", 2),
    (
        ["all", "--set", "model=models/nemotron", "parts=[cross]"],
        "the parts of nemotron_asr_streaming with attention are encod",
        2,
    ),
    *[(["all", "--set", *NEW, *word.split()], said, 2) for word, said in OF_A_WHISPER.items()],
    *[(["all", "--set", "model=models/whisper", *word.split()], said, 2) for word, said in OF_A_WHISPER.items()],
    *[
        (["all", "--set", f"model=models/{name}", word], said, 2)
        for name in ("nemotron", "parakeet_rnnt")
        for word, said in OF_A_TRANSDUCER.items()
    ],
    (["all", "--set", "model=models/nemotron", "stream_chunks_ms=[320]"], "streams by its own cache and not by", 2),
    (["all", "--set", "model=models/parakeet_rnnt", "stream_chunks_ms=[320]"], "normalised over whole recordings", 2),
    (["finished", "--from", "03_finetun"], "unknown step '03_finetun' (in --from)", 2),
    (["finished", "--from", "03_finetune"], "unknown step '03_finetune' (in --from): steps are 00_baseline", 2),
    (["finished", "--force", "--from", "00_baseline"], "--force runs every step again, --from only some", 2),
    (["finished", "--name", "a/b"], "--name 'a/b' should be one folder name, without slashes", 2),
    (["finished", "--name", ".."], "--name '..' is reserved", 2),
    (["finished", "--name=-rf"], "--name '-rf' is reserved: choose another name, without a leading dot or dash", 2),
    (["finished", "--name", "two\nlines"], r"--name 'two\nlines' should be one folder name", 2),
    (["finished", "--name", "n" * 300], "is too long for a folder: give it at most 200 bytes", 2),
    (
        ["finished", "--engine", "ray"],
        "--engine ray is for the members of a sweep, but finished.yaml is not a sweep",
        2,
    ),
    (["finished", "--gpus", "1"], "--gpus 1.0 is for the members of a sweep, but finished.yaml is not a sweep", 2),
    (["finished", "--gpus", "one"], "argument --gpus: invalid float value: 'one'", 2),
    (["widths", "--engine", "rya"], "--engine 'rya' should be local, ray, ray://auto or ray://HOST:PORT", 2),
    (["widths", "--engine", "ray", "--cpus", "1.5"], "--cpus 1.5 should be a whole number, or a share of one", 2),
    (["widths", "--cpus", "2"], "--cpus, --gpus and --storage belong to --engine ray", 2),
    (["widths", "--engine", "ray", "--storage", "nope://x"], "nope://x cannot be used", 2),
    (["widths", "--set", "latent_dim=4"], "member latent_dim-8: 'latent_dim' is what the sweep varies", 2),
    (["widths", "--estimate", "--engine", "ray"], "--engine says where members run, but --estimate runs nothing", 2),
    (["finished", "--estimate", "--set", "epochs=x"], "'epochs' (in --set) is 'x', should be a valid number", 2),
    (["finished", "--verify", "reports/finished"], "--verify runs nothing, but 'finished' asks for a run", 2),
    (["--list", "--index"], "--list and --index ask for different things: give one of them", 2),
    (["--index", "--set", "epochs=1"], "--set has no effect without a params file: leave it out with", 2),
    (["--verify", "reports/nowhere"], "reports/nowhere holds no run: give its folder, like reports/demo", 2),
    (["--verify", "speech"], "speech holds no run", 2),
    (["--verify", "notes.txt"], "notes.txt holds no run", 2),
    (["--diff", "reports/finished"], "argument --diff: expected 2 arguments", 2),
    (["--diff", "reports/finished", "reports/nowhere"], "reports/nowhere holds no run", 2),
    (["finished", "--root", "nothing"], "nothing is not a project folder: it holds no notebooks", 2),
    (["finished", "--root", "blocked"], "a file is in the way: move it", 1),
    (["--index", "--root", "blocked"], "a file is in the way: move it", 1),
]


@pytest.mark.parametrize(("words", "said", "status"), CALLS, ids=as_id)
def test_a_wrong_call_of_run_all_ends_in_a_sentence(project, capsys, words, said, status):
    root = [] if "--root" in words else ["--root", str(project)]
    assert status_of(run_all.main, [*words, *root]) == status
    check_said(capsys.readouterr().err, said)


def test_debug_shows_where_an_error_arose(project, capsys):
    assert run_all.main(["finished", "--set", "epochs=x", "--debug", "--root", str(project)]) == 2
    written = capsys.readouterr().err
    assert written.startswith("Traceback") and "parameters.py" in written
    assert written.splitlines()[-1].startswith("parameter 'epochs' (in --set) is 'x'")


def test_what_nobody_foresaw_is_told_without_its_traceback(project, capsys, monkeypatch):
    def fails(root):
        raise KeyError("wer")

    monkeypatch.setattr(run_all, "listing", fails)
    for debug in ([], ["--debug"]):
        assert run_all.main(["--list", *debug]) == 1
        written = capsys.readouterr().err
        assert "KeyError: 'wer'\nThis error was not expected. The same command with --debug shows" in written
        assert ("Traceback" in written) == bool(debug)


# ---- commands of the package -------------------------------------------------------------------------------

SPEECH, WHOLE = "speech.wav", ["--model", "models/whole"]
MEASURED = ["models/whole", "speech", "--calibration", "train", "--splits"]
COMMANDS = [
    ("stream", ["nowhere.wav", *WHOLE], "nowhere.wav is no file: give a recording", 1),
    ("stream", ["noise.wav", *WHOLE], "noise.wav: audio cannot be decoded", 1),
    ("stream", [SPEECH, *WHOLE, "--chunk", "0"], "chunk_ms is 0.0: it must be greater than 0", 1),
    ("stream", [SPEECH, *WHOLE, "--chunk", "soon"], "argument --chunk: invalid float value: 'soon'", 2),
    ("stream", [SPEECH, *WHOLE, "--lookahead", "-5"], "lookahead_ms is -5.0: it must be 0 or more", 1),
    ("stream", [SPEECH, *WHOLE, "--cache", "int3"], "'int3' is no number format of a cache", 1),
    ("stream", [SPEECH, "--model", "models/cut"], "its weights are cut short or damaged", 1),
    ("stream", [SPEECH], "the following arguments are required: --model", 2),
    ("data", [], "the following arguments are required: prepare", 2),
    ("data", ["prepare", "an4", "--root", "."], "argument corpus: invalid choice: 'an4'", 2),
    ("data", ["prepare", "librispeech", "--root", ".", "--splits", "train"], "LibriSpeech has no split 'train'", 1),
    ("data", ["prepare", "librispeech", "--root", "notes.txt"], "cannot be written to: ", 1),
    ("methods", [*MEASURED, "tset"], "corpus speech has no split 'tset': it has", 2),
    ("methods", [*MEASURED, "test", "--cuts", "half"], "--cuts is 'half': give percentages with commas", 2),
    ("methods", [*MEASURED, "test", "--cuts", "150"], "150", 2),
    ("methods", [*MEASURED, "test", "--methods", "svdd"], "'svdd'", 2),
    (
        "methods",
        [*MEASURED, "test", "--cuts", "75", "--samples", "0"],
        "a sample needs at least one utterance, not 0",
        2,
    ),
    ("methods", [*MEASURED, "test", "--cuts", "75", "--device", "cuda:99"], "'device' is cuda:99, but torch finds", 2),
    ("methods", ["models/empty", *MEASURED[1:], "test"], "models/empty holds no config.json", 2),
    ("compare", ["a.jsonl", "b.jsonl"], "No such file or directory", 1),
    ("compare", ["one.jsonl", "one.jsonl"], "is no transcript: evaluate again to write the file anew", 1),
    ("lengths", ["--device", "gpu"], "'device' is gpu, which is no device: use auto", 1),
    ("steps", ["--cache", "int3"], "'int3' is no number format of a cache", 1),
]


@pytest.mark.parametrize(
    ("command", "words", "said", "status"),
    COMMANDS,
    ids=as_id,
)
def test_a_wrong_call_of_a_command_ends_in_a_sentence(project, capsys, command, words, said, status):
    assert status_of(__main__.main, [command, *words]) == status
    written = capsys.readouterr().err
    assert "Traceback" not in written
    check_said(written.strip().splitlines()[-1], said)  # bars of progress may stand above


@pytest.mark.parametrize(
    ("words", "said", "status"),
    [
        ([run_all.__file__, "finished", "--set", "latent_dmi=4"], "did you mean 'latent_dim'?", 2),
        (["-m", "asrlib", "data", "prepare", "librispeech", "--root", "notes.txt"], "cannot be written to: ", 1),
    ],
    ids=["run_all.py", "data"],
)
def test_a_process_ends_in_a_sentence_too(project, words, said, status):
    root = ["--root", str(project)] if words[0].endswith(".py") else []
    done = subprocess.run([sys.executable, *words, *root], cwd=project, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


# ---- notebooks by papermill, and functions -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "parameters", "said"),
    [
        (
            "00_baseline",
            {"model": "models/cut"},
            "models/cut: its weights are cut short or damaged: get the file again",
        ),
        ("01_convert", {}, "is missing in elsewhere: run 00_baseline first"),
    ],
)
def test_a_notebook_run_by_itself_says_what_is_wrong(project, tmp_path, step, parameters, said):
    given = {"run_dir": "elsewhere", "corpus": "speech", "eval_splits": ["test"], "device": "cpu"} | parameters
    with pytest.raises(PapermillExecutionError) as failed:
        papermill.execute_notebook(
            ROOT / "notebooks" / f"{step}.ipynb",
            tmp_path / "out.ipynb",
            given,
            kernel_name="python3",
            progress_bar=False,
        )
    assert said in failed.value.evalue


@pytest.fixture(scope="module")
def model():
    return tiny.conformer()


CONVERT = [
    ((), "give latent_dim (a width) or cache_cut (a share to save), one of the two"),
    ({"latent_dim": 4, "cache_cut": 0.5}, "give latent_dim (a width) or cache_cut (a share to save), one of the two"),
    ({"latent_dim": 0}, "latent_dim"),
    ({"latent_dim": -4}, "latent_dim"),
    ({"latent_dim": 33}, "latent_dim"),
    ({"latent_dim": 4.5}, "latent_dim is 4.5: it must be a whole number, or one a layer"),
    ({"latent_dim": [4, 4, 4]}, "latent_dim has 3 widths for 2 layers"),
    ({"cache_cut": 1.5}, "cache_cut is 1.5: it must lie between 0 and 1"),
    ({"latent_dim": 4, "layout": "splt"}, "splt"),
    ({"latent_dim": 4, "method": "svdd"}, "method is 'svdd': choose one of svd"),
    ({"latent_dim": 4, "ranks": "best"}, "ranks is 'best': choose one of uniform"),
    (
        {"latent_dim": 4, "ranks": "sensitivity"},
        "needs statistics of calibration speech: see asrlib.collect_statistics",
    ),
    ({"latent_dim": 4, "method": "whitened"}, "statistics"),
    ({"latent_dim": 4, "sequential": True}, "need calibration speech: see asrlib.collect_statistics"),
]


@pytest.mark.parametrize(("settings", "said"), CONVERT, ids=str)
def test_what_cannot_be_converted_is_said(model, settings, said):
    with pytest.raises(ValueError) as refusal:
        asrlib.convert(model, **dict(settings))
    check_said(str(refusal.value), said)


NOISE = tiny.corpus(2)
FUNCTIONS = {
    "load nothing": (lambda m, p: asrlib.load("models/none/here"), "no model at "),
    "load an empty folder": (lambda m, p: asrlib.load("models/empty"), "models/empty holds no config.json"),
    "load no weights": (lambda m, p: asrlib.load("models/weightless"), "it holds no file named model.safetensors"),
    "load no vocabulary": (lambda m, p: asrlib.load("models/speechless"), "holds no vocab.json"),
    "load half the weights": (lambda m, p: asrlib.load("models/cut"), "cut short or damaged"),
    "open nothing": (lambda m, p: asrlib.open_corpus("speach"), "no corpus at speach: give 'synthetic'"),
    "open an empty folder": (lambda m, p: asrlib.open_corpus("nothing"), "splits found: none"),
    "open no transcripts": (lambda m, p: asrlib.open_corpus("mute", "test"), "splits found: none"),
    "open no such split": (lambda m, p: asrlib.open_corpus("speech", "tset"), "splits found: test, train, validation"),
    "open no such synthetic": (lambda m, p: asrlib.open_corpus("synthetic", "tset"), "has no split 'tset': choose one"),
    "open an empty manifest": (lambda m, p: asrlib.open_corpus("empty.csv"), "empty.csv lists nothing"),
    "open other columns": (lambda m, p: asrlib.open_corpus("columns.csv"), "columns found: path, sentence"),
    "open a text": (lambda m, p: asrlib.open_corpus("notes.txt"), "notes.txt is no manifest"),
    "open a recording": (lambda m, p: asrlib.open_corpus("speech.wav"), "speech.wav is no manifest"),
    "convert a path": (lambda m, p: asrlib.convert("models/whole", 4), "a model is wanted, not 'models/whole'"),
    "convert what load gave": (lambda m, p: asrlib.convert((m, p), 4), "a model is wanted, not a tuple"),
    "convert a latent": (lambda m, p: asrlib.convert(asrlib.convert(m, 4), 4), "the model is latent already"),
    "undo nothing": (lambda m, p: asrlib.to_standard_attention(m), "there is nothing to undo"),
    "evaluate on a name": (lambda m, p: asrlib.evaluate(m, p, "speech"), "a corpus is wanted, not 'speech'"),
    "evaluate without a processor": (
        lambda m, p: asrlib.evaluate(m, NOISE, p),
        "a processor is wanted beside the model",
    ),
    "evaluate on a GPU": (lambda m, p: asrlib.evaluate(m, p, NOISE, device="cuda:99"), "but torch finds"),
    "evaluate on a word": (lambda m, p: asrlib.evaluate(m, p, NOISE, device="gpu"), "which is no device: use auto"),
    "evaluate in fp64": (lambda m, p: asrlib.evaluate(m, p, NOISE, precision="fp64"), "precision is 'fp64'"),
    "evaluate no batch": (lambda m, p: asrlib.evaluate(m, p, NOISE, batch_seconds=0), "batch_seconds must be"),
    "statistics of a test": (
        lambda m, p: asrlib.collect_statistics(m, p, tiny.corpus(2, "test")),
        "calibration on 'test' would spoil the test: give a training split",
    ),
    "statistics of a name": (lambda m, p: asrlib.collect_statistics(m, p, "speech"), "asrlib.open_corpus"),
    "statistics of a moment": (
        lambda m, p: asrlib.collect_statistics(m, p, tiny.corpus(1), max_seconds=0.01, device="gpu"),
        "use auto, cpu",
    ),
    "stream no chunk": (lambda m, p: list(asrlib.stream(m, p, [tone()], 0)), "chunk_ms is 0: it must be greater"),
    "stream a file name": (lambda m, p: list(asrlib.stream(m, p, "speech.wav")), "pieces of audio are wanted"),
    "stream one array": (lambda m, p: list(asrlib.stream(m, p, tone())), "a piece of audio is float32 []: give floats"),
    "stream integers": (
        lambda m, p: list(asrlib.stream(m, p, [np.zeros(99, np.int16)])),
        "a piece of audio is int16 [99]: give floats from −1 to 1",
    ),
    "cache of a past to come": (lambda m, p: asrlib.kv_cache_bytes(m.config, -1), "frames is -1"),
    "cache in int3": (lambda m, p: asrlib.kv_cache_bytes(m.config, 1, "int3"), "'int3' is no number format of a cache"),
}


@pytest.mark.parametrize("what", FUNCTIONS)
def test_a_function_called_wrongly_says_so(model, processor, what):
    call, said = FUNCTIONS[what]
    with pytest.raises((OSError, ValueError, TypeError)) as refusal:
        call(model, processor)
    check_said(str(refusal.value), said)
