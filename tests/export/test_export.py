"""A run's model leaves: what is written loads where asrlib is not, and computes what it did."""

import json
import subprocess
import sys

import family_models
import pytest
import tiny
import torch
import yaml
from commands import command
from huggingface_hub import ModelCard
from transformers import AutoModelForCTC, Wav2Vec2ConformerForCTC

import asrlib
from asrlib.attention.kinds import KINDS, MultiHeadAttention
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.export.folders import standard, write_folder, write_hub_folder
from asrlib.export.modules import self_contained
from asrlib.models.registry import family_of
from asrlib.models.scratch import new_processor
from asrlib.runs import Run, write_json

main = command("export")

ALONE = """
import json, sys
sys.modules["asrlib"] = None  # importing it is an error
import torch
from transformers import AutoModelForCTC, AutoProcessor
found = {}
for name, trust in json.loads(sys.argv[2]).items():
    folder = f"{sys.argv[1]}/{name}"
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
    model = AutoModelForCTC.from_pretrained(folder, trust_remote_code=trust).eval()
    with torch.no_grad():
        logits = model(**torch.load(f"{folder}/inputs.pt")).logits
    off = (logits - torch.load(f"{folder}/logits.pt")).abs().max().item()
    found[name] = [type(model).__name__, type(processor).__name__, off]
    if trust:
        model.save_pretrained(f"{folder}/again")
        found[name].append(sorted(path.name for path in __import__("pathlib").Path(folder, "again").glob("*.py")))
print(json.dumps(found))
"""


def models() -> dict[str, tuple[torch.nn.Module, object, dict]]:
    """By name a model with latent attention, its processor, and inputs: of every class that a run can hold."""
    split = dict(latent_dim=[9, 6], latent_layout="split", latent_key_dim=[4, 5])
    mels, features = new_processor("conformer", mel_bins=tiny.MEL_BINS), tiny.features()
    made = {
        "wav2vec2-conformer": (tiny.latent_conformer("joint"), new_processor(), tiny.padded_batch()),
        "conformer": (tiny.encoder("conformer", "mla_simple", latent_dim=[5, 8]), mels, features),
        "branchformer": (tiny.encoder("branchformer", "mla", query_latent_dim=6, **split), mels, features),
    }
    for family, make in family_models.FAMILIES.items():
        processor = family_models.processor_of(family)
        speech = list(SpeechDataset(tiny.corpus(1), processor))  # what is said of padding differs between classes
        made[family] = (asrlib.convert(make(), latent_dim=7), processor, SpeechCollator(processor)(speech))
    return made


EVERY = pytest.mark.parametrize("name", ["wav2vec2-conformer", "conformer", "branchformer", *family_models.FAMILIES])
OF_TRANSFORMERS = ["wav2vec2-conformer", *family_models.FAMILIES]


def keep_expected(model, inputs: dict, folder) -> None:
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    torch.save(inputs, folder / "inputs.pt")
    with torch.no_grad():
        torch.save(model(**inputs).logits, folder / "logits.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a process without asrlib found: [class of the model, of the processor, largest difference of logits]."""
    root = tmp_path_factory.mktemp("folders")
    wanted = {}
    for name, (model, processor, inputs) in models().items():
        (root / name).mkdir()
        write_hub_folder(model, processor, root / name)
        keep_expected(model, inputs, root / name)
        wanted[name] = True
        if name in OF_TRANSFORMERS:
            plain = root / f"{name} standard"
            plain.mkdir()
            write_folder(standard(model), processor, plain)
            keep_expected(model, inputs, plain)
            wanted[plain.name] = False
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALONE, str(root), json.dumps(wanted)],
        cwd=root, capture_output=True, text=True, timeout=300,
        env={"PATH": "", "HF_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), root


@EVERY
def test_a_hub_folder_loads_without_asrlib_and_computes_the_same(alone, name):
    found, root = alone
    of, processor, off, again = found[name]
    assert [of, processor] == [type(one).__name__ for one in models()[name][:2]]
    assert off <= 1e-6
    assert again == sorted(path.name for path in (root / name).glob("*.py")), "saved again, its code goes along"


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_a_standard_folder_is_transformers_own_model_and_computes_the_same(alone, name):
    found, root = alone
    of, _, off = found[f"{name} standard"]
    config = json.loads((root / f"{name} standard" / "config.json").read_text())
    assert of == family_of(models()[name][0].config).standard_model.__name__ and off <= 1e-4
    assert config["model_type"] == name and not {"auto_map", "latent_dim"} & config.keys()
    assert not list((root / f"{name} standard").glob("*.py"))


def test_where_asrlib_is_imported_its_own_code_is_used_and_leads_back(alone):
    _, root = alone
    model = AutoModelForCTC.from_pretrained(root / "wav2vec2-conformer", trust_remote_code=True)
    assert type(model).__module__ == "asrlib.models.families.wav2vec2_conformer"
    plain = asrlib.to_standard_attention(asrlib.load(root / "wav2vec2-conformer")[0])
    assert type(plain) is Wav2Vec2ConformerForCTC and not hasattr(plain.config, "auto_map")


@pytest.mark.parametrize("module", ["asrlib.models.families.wav2vec2_conformer", "asrlib.models.encoder"])
def test_the_code_that_goes_along_imports_nothing_of_asrlib_and_registers_nothing(module):
    files = self_contained(module)
    assert {"attention_kinds.py", "attention_relative.py"} < files.keys()
    for name, source in files.items():
        assert "from asrlib" not in source and "import asrlib" not in source and ".register(" not in source, name
        compile(source, name, "exec")


def test_a_kind_of_attention_from_elsewhere_is_refused_by_name(tmp_path, monkeypatch):
    class Elsewhere(MultiHeadAttention):
        pass

    monkeypatch.setitem(KINDS, "elsewhere", Elsewhere)
    with pytest.raises(ValueError, match="Elsewhere is in test_export, outside asrlib"):
        write_hub_folder(tiny.encoder(attention="elsewhere"), new_processor("conformer"), tmp_path)


@pytest.mark.parametrize("attention", ["gqa", "linear"])
def test_what_no_multi_head_attention_computes_is_refused(attention):
    with pytest.raises(ValueError, match=f"'{attention}', and no multi-head attention equals it: use --to hub or onnx"):
        standard(tiny.encoder(attention=attention))


# ---- the command -------------------------------------------------------------------------------------------


def score(wer: float) -> dict:
    counts = {"words": 1340, "utterances": 200, "seconds_audio": 588.0}
    return {"wer": wer, "cer": wer / 4, "wer_interval": [wer - 0.01, wer + 0.01], **counts}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run with a baseline and a converted model, and made-up figures of them."""
    run = Run(tmp_path_factory.mktemp("reports") / "trial")
    processor = new_processor()
    for name, model in (("baseline", tiny.conformer()), ("converted", tiny.latent_conformer("joint"))):
        write_folder(model, processor, run.models / name)
    before = {"model": "/secret/place/mine", "corpus": "/secret/place/speech", "splits": {"test": score(0.04)}}
    run.write_metrics("baseline", before)
    run.write_metrics("convert", {"latent_dim": [11, 7], "layout": "joint", "method": "whitened", "cache_cut": 0.71875})
    systems = {"baseline": {"test": score(0.04)}, "converted": {"test": score(0.0555)}}
    test = {"difference": 0.0155, "interval": [0.001, 0.03], "p": 0.02}
    run.write_metrics("evaluate", {"systems": systems, "paired": {"test": {"baseline vs converted": test}}})
    write_json(run.path / "params.json", {"model": "/secret/place/mine", "latent_dim": [11, 7], "seed": 3})
    return run


def test_the_card_says_what_the_run_found_and_what_nobody_knows(run, tmp_path):
    out = tmp_path / "out"
    assert main([str(run.path), "--to", "hub", "--out", str(out)]) == 0
    card = ModelCard.load(out / "README.md")
    (found,) = card.data.eval_results
    assert (found.metric_value, found.dataset_split, found.dataset_name) == (5.55, "test", "speech")
    assert "95 % interval 4.55–6.55" in found.metric_name
    assert card.data.license == "unknown" and card.data.library_name == "transformers"
    for said in (
        "| WER test | 4.00 % (3.00–5.00) | 5.55 % (4.55–6.55) |",
        "Change of the WER on test, by the paired bootstrap: +1.55 points (+0.10 to +3.00; p = 0.02).",
        "whitened, 71.88 % of the cache cut",
        "trust_remote_code=True",
        "`python -m asrlib export trial --to hub --model converted`",
        "The licence of the base model is not known to the run.",
        "not on other speech",
    ):
        assert said in card.text, said
    assert yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0]) == {
        "model": "path/to/mine", "latent_dim": [11, 7], "seed": 3,
    }  # fmt: skip
    assert "/secret" not in (out / "README.md").read_text()


def test_a_standard_folder_has_no_smaller_cache_and_its_card_says_none(run, tmp_path):
    assert main([str(run.path), "--to", "standard", "--out", str(tmp_path / "out"), "--licence", "cc-by-4.0"]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "cc-by-4.0" and "multi-head-latent-attention" not in card.data.tags
    assert "would keep" not in card.text and "trust_remote_code" not in card.text
    (of_latent := tmp_path / "latent").mkdir()
    assert main([str(run.path), "--to", "hub", "--out", str(of_latent)]) == 0
    assert "would keep" in (of_latent / "README.md").read_text()


def test_a_base_model_in_a_folder_has_no_licence_that_is_known(tmp_path):
    run = Run(tmp_path / "trial")
    write_folder(tiny.conformer(), new_processor(), run.models / "baseline")
    for base, licence in ((str(run.models / "baseline"), "unknown"), ("synthetic-conformer", "mit")):
        run.write_metrics("baseline", {"model": base, "corpus": "speech", "splits": {"test": score(0.04)}})
        assert main([str(run.path), "--to", "hub", "--out", str(tmp_path / licence)]) == 0
        assert ModelCard.load(tmp_path / licence / "README.md").data.license == licence


@pytest.mark.parametrize("family", family_models.FAMILIES)
def test_every_family_gets_a_card(family, tmp_path):
    run = Run(tmp_path / "trial")
    model, processor, _ = models()[family]
    write_folder(model, processor, run.models / "converted")
    run.write_metrics("baseline", {"model": "mine", "corpus": "speech", "splits": {"test": score(0.04)}})
    for to, said in (("hub", "trust_remote_code=True"), ("standard", "transformers' own")):
        assert main([str(run.path), "--to", to, "--out", str(tmp_path / to)]) == 0
        assert said in ModelCard.load(tmp_path / to / "README.md").text


def test_an_export_may_be_written_again_and_nothing_else_is_replaced(run, tmp_path, capsys):
    call = [str(run.path), "--to", "hub", "--model", "baseline"]
    assert main(call) == main(call) == 0
    assert (run.path / "exports" / "baseline-hub" / "README.md").is_file()
    assert not list((run.path / "exports" / "baseline-hub").glob("*.py")), "transformers' own model needs no code"
    (tmp_path / "thesis.tex").write_text("years of work")
    capsys.readouterr()
    assert main([*call, "--out", str(tmp_path)]) == 1
    assert "exists already, and is no export: give --out a new or an empty folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "--to", "hub"], "no run with models at"),
        (["RUN", "--to", "hub", "--model", "finetuned"], "models/finetuned is missing in"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_sentence(run, capsys, words, said):
    assert main([str(run.path) if word == "RUN" else word for word in words]) == 1
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1
