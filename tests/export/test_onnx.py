"""Graphs of every kind of model compute what it does, whatever the batch, the length and the past."""

import json
import shutil

import family_models
import numpy as np
import onnx
import pytest
import tiny
import torch
from commands import command

import asrlib
from asrlib.attention.chunks import Chunks
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.export.folders import write_folder
from asrlib.export.onnx_check import check_agrees, session, stream_logits
from asrlib.export.onnx_graphs import OPSET, Window, write_offline, write_streaming
from asrlib.models.inference import padding_silenced
from asrlib.models.registry import frame_counts
from asrlib.models.scratch import new_processor
from asrlib.runs import Run

main = command("export")

SPLIT = dict(latent_dim=[9, 6], latent_layout="split", latent_key_dim=[4, 5])
MODELS = {  # name: (model, inputs)
    "wav2vec2-conformer MLA": (lambda: tiny.latent_conformer("joint"), tiny.padded_batch),
    "conformer MLA": (lambda: tiny.encoder("conformer", "mla_simple", latent_dim=[5, 8], causal=True), tiny.features),
    "branchformer split MLA": (lambda: tiny.encoder("branchformer", "mla", query_latent_dim=6, **SPLIT), tiny.features),
    "conformer linear": (lambda: tiny.encoder("conformer", "linear"), tiny.features),
}


def of_family(family: str, **changes) -> tuple:
    """A model of transformers' made latent, and inputs."""

    def inputs() -> dict[str, torch.Tensor]:
        processor = family_models.processor_of(family)
        return SpeechCollator(processor)(list(SpeechDataset(tiny.corpus(3), processor)))

    return lambda: asrlib.convert(family_models.FAMILIES[family](**changes), latent_dim=7), inputs


# One layer: to write a graph takes as long as it has nodes, and layers after the first add no kind of node.
MODELS |= {f"{family} MLA": of_family(family, num_hidden_layers=1) for family in family_models.FAMILIES}
CLOSE = dict(rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "conformer MLA"])
def test_a_graph_of_utterances_computes_what_the_model_does_with_any_batch_and_length(name, tmp_path):
    make, inputs = MODELS[name]
    model, batch = make(), inputs()
    with torch.no_grad():
        frames_B = frame_counts(model, batch["attention_mask"].sum(-1))
        with padding_silenced(model, frames_B):
            wanted = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.numpy()
    about = write_offline(make(), tmp_path / "model.onnx")
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == about["opset"] == OPSET
    running, given = session(tmp_path / "model.onnx"), batch[model.main_input_name].numpy()
    mask = batch["attention_mask"].bool().numpy()
    logits, frames = running.run(None, {model.main_input_name: given, "attention_mask": mask})
    assert frames.tolist() == frames_B.tolist()
    for row, count in enumerate(frames):
        np.testing.assert_allclose(logits[row, :count], wanted[row, :count], **CLOSE)
        alone = {
            model.main_input_name: given[row : row + 1, : mask[row].sum()],
            "attention_mask": mask[row : row + 1, : mask[row].sum()],
        }
        np.testing.assert_allclose(running.run(None, alone)[0][0], wanted[row, :count], **CLOSE)


def test_a_graph_of_a_step_goes_through_recordings_as_streams_do(tmp_path):
    make, inputs = MODELS["conformer MLA"]
    model, chunks = make(), Chunks(4, None, lookahead=2)
    given = inputs()["input_features"][:2]
    wanted, streams = tiny.streamed(model, given, chunks)
    about = write_streaming(make(), chunks, tmp_path / "model.onnx")
    running = session(tmp_path / "model.onnx")
    np.testing.assert_allclose(stream_logits(running, about, given.numpy(), wanted.shape[1]), wanted.numpy(), **CLOSE)
    held = [one.shape[-1] for one in running.get_outputs() if "_frames" in one.name]
    assert held == [window.kept_BtX.shape[-1] for memory in streams.memories for (window,) in memory.held] == [5, 8]


def test_the_window_is_what_frames_read():
    assert Window.of(tiny.conformer()) == Window(320, 1 + 24 + 7 * 10 + 7 * 40 + 3 * 160)
    assert Window.of(tiny.encoder()) == Window(4, 7)


def test_a_graph_that_computes_something_else_is_not_kept():
    right = {"utterances": 2, "equal_transcripts": 2, "largest_difference": 9e-5}
    check_agrees(right)
    for wrong in ({"largest_difference": 2e-4}, {"equal_transcripts": 1}):
        with pytest.raises(ValueError, match=r"does not compute the same as the model: .* nothing was written"):
            check_agrees(right | wrong)


# ---- what has no graph -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", family_models.FAMILIES)
def test_a_family_that_cannot_stream_has_no_graph_of_a_step(family, tmp_path, capsys):
    run, out = Run(tmp_path / "trial"), tmp_path / "out"
    write_folder(MODELS[f"{family} MLA"][0](), family_models.processor_of(family), run.models / "converted")
    run.write_metrics("baseline", {"model": "tiny", "corpus": "synthetic", "splits": {"test-clean": {"wer": 1.0}}})
    capsys.readouterr()
    assert main([str(run.path), "--to", "onnx-streaming", "--out", str(out)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(("features of ", "positions of ")) and ("normalised over" in said or "frames ahead" in said)
    assert not out.exists()


@pytest.mark.parametrize("family", ["wav2vec2", "wav2vec2-bert"])
def test_an_adapter_is_refused_with_what_takes_it(family, tmp_path):
    model = family_models.FAMILIES[family](add_adapter=True, num_adapter_layers=1)
    with pytest.raises(ValueError, match="graphs do not support an adapter behind the encoder"):
        write_offline(model, tmp_path / "model.onnx")


def test_a_feature_encoder_that_normalises_over_padding_takes_one_utterance_at_a_time(tmp_path):
    make, inputs = of_family("wav2vec2", feat_extract_norm="group")
    model, batch = make(), inputs()
    assert write_offline(make(), tmp_path / "model.onnx")["one_at_a_time"]
    running = session(tmp_path / "model.onnx")
    for row, length in zip(batch["input_values"], batch["attention_mask"].sum(-1), strict=True):
        with torch.no_grad():
            wanted = model(row[None, :length]).logits.numpy()
        fed = {"input_values": row[None, :length].numpy(), "attention_mask": np.ones((1, int(length)), bool)}
        np.testing.assert_allclose(running.run(None, fed)[0], wanted, **CLOSE)
    assert running.get_inputs()[0].shape[0] == 1


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("reports") / "trial")
    write_folder(tiny.latent_conformer("joint"), new_processor(), run.models / "converted")
    scores = {"test-clean": {"wer": 1.0, "cer": 1.0}}
    run.write_metrics("baseline", {"model": "tiny", "corpus": "synthetic", "splits": scores})
    return run


def checked(out) -> dict:
    """What export.json says, once it agrees with the folder."""
    about = json.loads((out / "export.json").read_text())
    found = about["checked"]["float32"]
    assert about["opset"] == OPSET and found["utterances"] == found["equal_transcripts"] == 2
    assert 0 < found["largest_difference"] < 1e-4 and found["wer"] == found["wer_pytorch"] > 0
    assert found["change"]["difference"] == 0 and found["wer_interval"][0] <= found["wer"] <= found["wer_interval"][1]
    assert about["checked"]["of_utterances"] == 300
    assert about["bytes"] == (out / "model.onnx").stat().st_size
    assert "the first 2 of 300 utterances. There PyTorch has a WER of" in (out / "README.md").read_text()
    assert {"vocab.json", "processor_config.json"} <= {file.name for file in out.iterdir()}
    return about


def test_a_folder_of_graphs_says_what_they_were_checked_by(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(run.path), "--to", "onnx", "--int8", "--utterances", "2", "--out", str(out)]) == 0
    about = checked(out)
    rounded = about["checked"]["int8"]["largest_difference"]
    assert rounded > 10 * about["checked"]["float32"]["largest_difference"]
    assert about["int8"]["bytes"] == (out / "model_int8.onnx").stat().st_size
    where, found = capsys.readouterr().out.splitlines()
    assert where == str(out) and found.startswith("2 of 2 transcripts equal to PyTorch's (test-clean of synthetic")
    assert found.count(" % (") == 2 and "; int8 " in found, "both with intervals"
    assert "| int8 | " in (out / "README.md").read_text()


def test_what_a_stream_hands_on_is_the_latent_and_no_longer_than_it_may_look_back(run, tmp_path):
    out = tmp_path / "out"
    words = ["--to", "onnx-streaming", "--chunk", "60", "--left", "0.14", "--utterances", "2"]
    assert main([str(run.path), *words, "--out", str(out)]) == 0
    about = checked(out)
    names = [name for name in about["first_state"] if "_frames" in name]
    assert [about["first_state"][name] for name in names] == [["batch", 0, 11], ["batch", 0, 7]]
    state = {name: np.zeros([1, *shape[1:]], np.float32) for name, shape in about["first_state"].items()}
    heard = np.random.default_rng(0).normal(size=(1, 2 * about["hop"] + about["reach"])).astype(np.float32)
    running, held = session(out / "model.onnx"), []
    for _ in range(4):
        fed = {"input_values": heard, "attention_mask": np.ones(heard.shape, bool)}
        state = dict(zip(state, running.run(None, fed | state)[2:], strict=True))
        held.append([state[name].shape[1] for name in names])
    assert held == [[3, 3], [6, 6], [7, 7], [7, 7]]


def test_a_missing_package_is_named_with_what_brings_it(run, capsys, monkeypatch):
    monkeypatch.setattr("asrlib.export.onnx_folder.NEEDED", ("onnx", "onnxruntime_of_tomorrow"))
    assert main([str(run.path), "--to", "onnx"]) == 1
    err = capsys.readouterr().err
    assert err.strip() == "onnxruntime_of_tomorrow not installed: pip install -c constraints.txt -e '.[onnx]'"


def test_without_a_number_every_utterance_of_the_split_is_checked(run, tmp_path, monkeypatch):
    speech = tiny.corpus(3, split="test-clean")
    monkeypatch.setattr("asrlib.export.onnx_folder.open_corpus", lambda *of: speech)
    assert main([str(run.path), "--to", "onnx", "--out", str(tmp_path / "out")]) == 0
    checked = json.loads((tmp_path / "out" / "export.json").read_text())["checked"]
    assert checked["float32"]["utterances"] == checked["of_utterances"] == 3
    assert "all 3 utterances" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("words", [["--to", "hub", "--int8"], ["--to", "onnx", "--left", "5"]])
def test_an_option_without_effect_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        main(["demo", *words])
    assert "use it with --to onnx" in capsys.readouterr().err


# ---- torch's own graphs ------------------------------------------------------------------------------------

TORCH = {  # name: (model, inputs)
    "wav2vec2-conformer": (tiny.conformer, tiny.padded_batch),
    "wav2vec2-conformer MLA": MODELS["wav2vec2-conformer MLA"],
    "conformer": (tiny.encoder, tiny.features),
    "conformer MLA": MODELS["conformer MLA"],
}
EVERY = pytest.mark.parametrize("name", TORCH)


def read_by(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    make, inputs = TORCH[name]
    return make(), {name: value for name, value in inputs().items() if name != "labels"}


@EVERY
def test_torch_export_takes_any_batch_and_length(name):
    model, given = read_by(name)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        exported = torch.export.export(model, (), given, dynamic_shapes=dict.fromkeys(given, free)).module()
        for rows, length in ((3, 9000), (2, Window.of(model).length(6))):
            some = {name: tensor[:rows, :length] for name, tensor in given.items()}
            torch.testing.assert_close(exported(**some).logits, model(**some).logits, rtol=0, atol=1e-5)


@EVERY
def test_torch_compile_computes_the_same(name):
    model, given = read_by(name)
    # All but the C++, which takes half a minute a model: one has it, where there is a compiler.
    backend = "inductor" if name == "wav2vec2-conformer MLA" and shutil.which("g++") else "aot_eager"
    with torch.no_grad():
        wanted = model(**given).logits
        compiled = torch.compile(model, backend=backend)
        torch.testing.assert_close(compiled(**given).logits, wanted, rtol=0, atol=1e-5)
