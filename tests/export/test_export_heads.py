"""Models that write by a decoder or a transducer leave: they load where asrlib is not, compute and write the same."""

import json
import subprocess
import sys

import family_models
import pytest
import tiny
import torch
from commands import command
from huggingface_hub import ModelCard

import asrlib
from asrlib.attention.cache import kv_cache_bytes
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.export.folders import standard, write_folder, write_hub_folder
from asrlib.export.graphs import OfflineGraph
from asrlib.export.loading import loading_code
from asrlib.export.modules import self_contained
from asrlib.models.inference import recognise
from asrlib.models.registry import FAMILIES, family_of, frame_counts
from asrlib.reporting.numbers import size
from asrlib.runs import Run

main = command("export")

ALONE = """
import contextlib, io, json, sys
sys.modules["asrlib"] = None  # importing it is an error
import torch, transformers
from pathlib import Path
from transformers.models.nemotron_asr_streaming import modeling_nemotron_asr_streaming as of_nemotron
found = {}
for name, (auto, trust) in json.loads(sys.argv[2]).items():
    folder = Path(sys.argv[1], name)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=trust).eval()
    given, wanted = torch.load(folder / "given.pt"), torch.load(folder / "wanted.pt")
    with torch.no_grad():
        said = {"logits": model(**given["teacher"]).logits}
        if given["chunks"]:
            chunks = (chunk for chunk in given["chunks"])
            said["streamed"] = model.generate(input_features=chunks, num_lookahead_tokens=1).sequences
        told = model.generate(**given["generate"])
        said["ids"] = getattr(told, "sequences", told)
        printed, apart = io.StringIO(), {"audio": given["audio"].numpy()}
        with contextlib.redirect_stdout(printed):
            exec((folder / "load.txt").read_text().replace("FOLDER", str(folder)), apart)
    found[name] = {
        "classes": [type(model).__name__, type(processor).__name__],
        "differ": [what for what in wanted if not torch.equal(said[what], wanted[what])],
        "printed": printed.getvalue().strip(),
        "told": model.generation_config.to_diff_dict(),
    }
found["changed"] = hasattr(of_nemotron.NemotronAsrStreamingEncoderAttention.forward, "__wrapped__")
print(json.dumps(found))
"""
SEVEN = {"latent_dim": 7}
MODELS = {  # name: (the family's name in family_models, what makes it latent)
    "whisper": ("whisper", SEVEN),
    "whisper, one latent for all cross-attention": ("whisper", SEVEN | {"shared": True}),
    "parakeet_rnnt": ("parakeet_rnnt", SEVEN),
    "nemotron_asr_streaming": ("nemotron", SEVEN),
}
EVERY = pytest.mark.parametrize("name", MODELS)
EVERY_FAMILY = pytest.mark.parametrize("name", ["whisper", "parakeet_rnnt", "nemotron_asr_streaming"])
AUTO = {"whisper": "AutoModelForSpeechSeq2Seq", "parakeet_rnnt": "AutoModelForRNNT", "nemotron": "AutoModelForRNNT"}


def latent_of(name: str) -> tuple:
    """(latent model, its processor)"""
    family, how = MODELS[name]
    model, processor = asrlib.convert(getattr(family_models, family)(), **how), family_models.processor_of(family)
    family_of(model.config).head.prepare(model, processor)
    if family == "whisper":
        model.generation_config.max_length = 11  # fewer tokens than asrlib allows for the shortest utterance
    if family == "parakeet_rnnt":  # it would say one word without a pause
        torch.manual_seed(1)
        with torch.no_grad():
            model.joint.head.weight[:-2].normal_()
            model.joint.head.bias[-1] += 4
    return model, processor


def told_of(model, processor) -> dict:
    """As asrlib has texts written."""
    if blank := getattr(model.config, "blank_token_id", None):
        return {"decoder_start_token_id": blank}
    return family_of(model.config).head.prompt(model, processor)


@torch.no_grad()
def written(model, processor, folder) -> dict[str, torch.Tensor]:
    """What `model` makes of a batch, in `folder` beside what it was given; returns it."""
    items = list(SpeechDataset(tiny.corpus(2), processor))
    batch = SpeechCollator(processor)(items)
    heard = {key: values for key, values in batch.items() if key != "labels"}
    given = {
        "teacher": heard | {"decoder_input_ids": batch["labels"].clamp(min=1)},
        "generate": heard,
        "chunks": [],
        "audio": torch.from_numpy(items[0]["audio"]),
    }
    wanted = {"logits": model(**given["teacher"]).logits}
    if "Nemotron" in type(model).__name__:
        frames = torch.randn(1, 9 + 16 * 12, 24, generator=torch.Generator().manual_seed(1))
        given["chunks"] = [frames[:, :9], *frames[:, 9:].split(16, dim=1)]
        chunks = (chunk for chunk in given["chunks"])
        wanted["streamed"] = model.generate(input_features=chunks, num_lookahead_tokens=1).sequences
    said = model.generate(**heard, **told_of(model, processor))
    wanted["ids"] = getattr(said, "sequences", said)
    torch.save(given, folder / "given.pt")
    torch.save(wanted, folder / "wanted.pt")
    trusted = type(model).__module__.startswith("asrlib")
    code = loading_code(model, processor, trust=trusted).removeprefix("```python\n").removesuffix("```")
    (folder / "load.txt").write_text(code)
    alone = SpeechCollator(processor)(items[:1])
    said = recognise(model, processor, {key: values for key, values in alone.items() if key != "labels"})
    return wanted | {"text": said, "frames": frame_counts(model, heard["attention_mask"].sum(-1)).tolist()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(what a process without asrlib found, what was wanted, the folders' place)"""
    root, autos, wanted = tmp_path_factory.mktemp("folders"), {}, {}
    for name, (family, _) in MODELS.items():
        model, processor = latent_of(name)
        for to in ("hub", "standard"):
            folder = root / f"{name} {to}"
            folder.mkdir()
            left = model if to == "hub" else standard(model)
            (write_hub_folder if to == "hub" else write_folder)(left, processor, folder)
            wanted[folder.name] = written(left, processor, folder)
            autos[folder.name] = [AUTO[family], to == "hub"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALONE, str(root), json.dumps(autos)],
        cwd=root, capture_output=True, text=True, timeout=300,
        env={"PATH": "", "HF_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), wanted, root


@EVERY
def test_a_hub_folder_computes_and_writes_the_same_where_asrlib_is_not(alone, name):
    found, wanted, root = alone
    model, processor = latent_of(name)
    here = found[f"{name} hub"]
    assert here["classes"] == [type(model).__name__, type(processor).__name__] and here["differ"] == []
    assert here["told"] == model.generation_config.to_diff_dict() | told_of(model, processor)
    assert len(wanted[f"{name} hub"]["ids"].unique()) > 1 and any(wanted[f"{name} hub"]["text"]), "it writes"
    for file in (root / f"{name} hub").glob("*.py"):
        assert "asrlib import" not in file.read_text() and ".register(" not in file.read_text(), file.name


@EVERY
def test_a_standard_folder_is_transformers_own_class_and_writes_the_same(alone, name):
    found, wanted, root = alone
    here, folder = found[f"{name} standard"], root / f"{name} standard"
    config = json.loads((folder / "config.json").read_text())
    assert here["classes"][0] == family_of(latent_of(name)[0].config).standard_model.__name__ and here["differ"] == []
    assert config["model_type"] == name.partition(",")[0] and not list(folder.glob("*.py"))
    assert not {"auto_map", "latent_dim", "latent_parts", "latent_shared"} & config.keys()
    latent, plain = wanted[f"{name} hub"], wanted[folder.name]
    for ours, theirs, frames in zip(latent["logits"], plain["logits"], latent["frames"], strict=True):
        torch.testing.assert_close(theirs[:frames], ours[:frames], atol=1e-3, rtol=1e-3)  # behind them anything may be
    assert plain["text"] == latent["text"]
    assert "streamed" not in latent or torch.equal(plain["streamed"], latent["streamed"])


@pytest.mark.parametrize("to", ["hub", "standard"])
@EVERY
def test_the_code_on_the_card_prints_what_asrlib_recognises(alone, name, to):
    found, wanted, _ = alone
    assert found[f"{name} {to}"]["printed"] == str(wanted[f"{name} {to}"]["text"])


def test_exported_code_changes_no_class_of_transformers(alone):
    assert alone[0]["changed"] is False
    assert "nemotron_eager" not in "".join(self_contained("asrlib.models.families.nemotron"))


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    """Of each family a run with its model, and latent, and a figure."""
    made = {}
    for name, (family, _) in MODELS.items():
        made[name] = Run(tmp_path_factory.mktemp("reports") / "trial")
        model, processor = latent_of(name)
        write_folder(getattr(family_models, family)(), processor, made[name].models / "baseline")
        write_folder(model, processor, made[name].models / "converted")
        score = {"wer": 0.05, "cer": 0.02, "wer_interval": [0.04, 0.06], "words": 90, "utterances": 9}
        splits = {"test": score | {"seconds_audio": 30.0}}
        made[name].write_metrics("baseline", {"model": "mine", "corpus": "speech", "splits": splits})
    return made


@pytest.mark.parametrize("to", ["hub", "standard"])
@EVERY
def test_the_card_says_how_it_is_loaded_and_asked(runs, tmp_path, name, to):
    assert main([str(runs[name].path), "--to", to, "--out", str(tmp_path / to)]) == 0
    card, auto = ModelCard.load(tmp_path / to / "README.md"), AUTO[MODELS[name][0]]
    assert f"{auto}.from_pretrained" in card.text and "model.generate(" in card.text and "argmax" not in card.text
    assert ("trust_remote_code=True" in card.text) is (to == "hub") and "asrlib.stream" not in card.text
    assert ("Do not change `attn_implementation`" in card.text) is (
        [name, to] == ["nemotron_asr_streaming", "standard"]
    )
    assert ("generator of chunks" in card.text) is name.startswith("nemotron")
    assert ("`pipeline`" in card.text) is (name.startswith("whisper") and to == "hub")
    latent = ["multi-head-latent-attention"] * (to == "hub")
    assert card.data.tags == ["automatic-speech-recognition", *latent]
    assert (tmp_path / to / "generation_config.json").is_file()


@EVERY
def test_the_card_says_what_is_kept_by_the_formula(runs, tmp_path, name):
    assert main([str(runs[name].path), "--to", "hub", "--out", str(tmp_path / "out")]) == 0
    text, config = ModelCard.load(tmp_path / "out" / "README.md").text, latent_of(name)[0].config
    said = {
        "whisper": ["4 · (50 · 14 + n · 14) bytes", "its window of 1 s", size(4 * 50 * 14), size(4 * 50 * 64)],
        "whisper, one latent for all cross-attention": ["4 · (50 · 7 + n · 14) bytes", size(4 * 50 * 7)],
        "parakeet_rnnt": [f"{size(4 * 12.5 * 14)} for a second of audio", size(4 * 12.5 * 64), "keeps none of it"],
        "nemotron_asr_streaming": ["4 · 6 · 14 bytes", size(4 * 6 * 14), size(4 * 6 * 64), "0.48 s"],
    }[name]
    assert [part for part in said if part not in text] == []
    if name.startswith("whisper"):
        assert size(kv_cache_bytes(config, 50)) in text and size(kv_cache_bytes(config, 0, tokens=1)) in text


@pytest.mark.parametrize("to", ["onnx", "onnx-streaming"])
@EVERY
def test_a_graph_is_refused_before_anything_is_loaded(runs, tmp_path, monkeypatch, capsys, name, to):
    monkeypatch.setattr("asrlib.models.loading.load", lambda *_: pytest.fail("the model was loaded"))
    assert main([str(runs[name].path), "--to", to, "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "graphs need CTC" in err and "use --to hub or standard" in err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_graph_of_anything_but_ctc_is_refused_without_the_command():
    with pytest.raises(ValueError, match="graphs need CTC, and whisper writes token by token"):
        OfflineGraph(family_models.whisper())


@EVERY_FAMILY
def test_a_model_as_it_was_leaves_too_and_needs_no_code(runs, tmp_path, name):
    call = [str(runs[name].path), "--to", "hub", "--model", "baseline", "--out", str(tmp_path / "out")]
    assert main(call) == 0
    assert not list((tmp_path / "out").glob("*.py")) and "would keep" not in (tmp_path / "out/README.md").read_text()
    model, _ = asrlib.load(tmp_path / "out")
    assert type(model) is FAMILIES[name].standard_model
