"""The published checkpoint, met before it is there: its files, its hub repository, `quick` and `full` from end to end.

Weights are random and narrow; layers, names and files are the published ones (see hub_folders).
"""

import json
import pickle
import shutil
from functools import cached_property
from pathlib import Path

import datasets
import hub_folders
import numpy as np
import pytest
import soundfile
import tiny
import torch
from commands import run_all
from hub_folders import NARROW
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments, Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC

import asrlib
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.data.opening import open_corpus
from asrlib.models.scratch import new_processor
from asrlib.running.parameters import read_params_file
from asrlib.runs import read_json
from asrlib.training.training import SpeechTrainer, TrainingSettings, train

ROOT = Path(__file__).resolve().parents[2]
STEPS = [path.stem for path in sorted((ROOT / "notebooks").glob("0*.ipynb"))]
REAL_SPEECH = ROOT.parent / "shared" / "data" / "LibriSpeech"
SHALLOW = NARROW | {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def published() -> Wav2Vec2ConformerForCTC:
    return hub_folders.recogniser(**NARROW)


@pytest.fixture(scope="module")
def folders(published, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    return {kind: hub_folders.write_folder(root / kind, published, kind, **NARROW) for kind in ("bin", "safetensors")}


def assert_equal_tensors(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert ones.keys() == others.keys()
    for name, values in ones.items():
        assert torch.equal(values, others[name]), name


# ---- the files ---------------------------------------------------------------------------------------------


def test_the_folder_is_the_published_one(tmp_path):
    with torch.device("meta"):
        model = Wav2Vec2ConformerForCTC(Wav2Vec2ConformerConfig(**hub_folders.CONFIG))
    assert sum(parameter.numel() for parameter in model.parameters()) == 618_591_904
    folder = hub_folders.write_folder(tmp_path / "model", hub_folders.recogniser(**SHALLOW), "bin")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix == ".json"}
    assert round(sizes.pop("config.json"), -1) == 2240
    assert sizes == {
        "preprocessor_config.json": 254,
        "special_tokens_map.json": 85,
        "tokenizer_config.json": 257,
        "vocab.json": 291,
    }


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_every_weight_is_the_published_one(published, folders, kind):
    model, processor = asrlib.load(folders[kind])
    assert_equal_tensors(model.state_dict(), published.state_dict())
    begun = hub_folders.recogniser(seed=1, **NARROW).state_dict()  # so that equality says something
    assert not any(torch.equal(values, begun[name]) for name, values in model.state_dict().items())
    written, read = read_json(folders[kind] / "config.json"), model.config.to_dict()
    renamed = {"torch_dtype", "transformers_version"}
    assert {name: read[name] for name in written.keys() - renamed} == {n: written[n] for n in written.keys() - renamed}
    assert (model.config.num_hidden_layers, model.config.position_embeddings_type) == (24, "relative")
    tokenizer, extractor = processor.tokenizer, processor.feature_extractor
    assert tokenizer.get_vocab() == read_json(folders[kind] / "vocab.json") and len(tokenizer) == 32
    assert tokenizer("DON'T STOP").input_ids == [14, 8, 9, 27, 6, 4, 12, 6, 8, 23]
    assert processor.decode([14, 14, 8, 0, 8, 9, 27, 6, 4, 4, 12]) == "DOON'T S"
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    assert extractor.do_normalize and extractor.return_attention_mask and extractor.sampling_rate == 16_000


@pytest.mark.parametrize("changes", [{}, {"add_adapter": True}, {"add_adapter": True, "output_hidden_size": 16}])
def test_all_but_keys_and_values_survive_conversion_and_the_disk(tmp_path, changes):
    published = hub_folders.recogniser(**SHALLOW | changes)
    folder = hub_folders.write_folder(tmp_path / "published", published, "bin", **SHALLOW | changes)
    model, processor = asrlib.load(folder)
    latent = asrlib.convert(model, cache_cut=0.75)
    latent.save_pretrained(tmp_path / "latent")
    processor.save_pretrained(tmp_path / "latent")
    again, _ = asrlib.load(tmp_path / "latent")
    assert_equal_tensors(again.state_dict(), latent.state_dict())
    replaced = (".linear_k.", ".linear_v.")
    kept = {name: w for name, w in published.state_dict().items() if not any(part in name for part in replaced)}
    assert_equal_tensors(kept, {name: w for name, w in again.state_dict().items() if ".latent_kv." not in name})
    assert any(".adapter." in name for name in kept) == bool(changes)
    assert {"wav2vec2_conformer.masked_spec_embed", "lm_head.bias"} < kept.keys()
    batch = tiny.padded_batch()
    with torch.no_grad():
        theirs, exact = published(**batch), asrlib.convert(model, 32)(**batch)
        assert torch.allclose(exact.logits, theirs.logits, rtol=0, atol=1e-4 * theirs.logits.abs().max())


# ---- what may be wrong with them ---------------------------------------------------------------------------


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def in_shards(folder: Path) -> None:
    """Two files and their index, of which the second is lost."""
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    shards = {name: f"pytorch_model-0000{1 + place % 2}-of-00002.bin" for place, name in enumerate(weights)}
    torch.save(
        {name: w for name, w in weights.items() if "00001" in shards[name]}, folder / "pytorch_model-00001-of-00002.bin"
    )
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("kind", "spoil", "said"),
    [
        ("bin", lambda folder: cut(folder / "pytorch_model.bin", 0.5), "its weights are cut short or damaged"),
        ("bin", lambda folder: cut(folder / "pytorch_model.bin", 0.99), "its weights are cut short or damaged"),
        ("bin", lambda folder: cut(folder / "pytorch_model.bin", 0), "its weights are cut short or damaged"),
        ("safetensors", lambda folder: cut(folder / "model.safetensors", 0.99), "its weights are cut short or damaged"),
        ("bin", in_shards, "No such file .*pytorch_model-00002-of-00002.bin"),
        (
            "bin",
            lambda folder: (folder / "vocab.json").unlink(),
            "holds no vocab.json or tokenizer.json, so the model cannot spell: get",
        ),
        ("bin", lambda folder: (folder / "preprocessor_config.json").unlink(), "containing a preprocessor_config.json"),
    ],
)
def test_a_folder_that_did_not_arrive_whole_is_refused(tmp_path, kind, spoil, said):
    folder = hub_folders.write_folder(tmp_path / "model", hub_folders.recogniser(**SHALLOW), kind, **SHALLOW)
    spoil(folder)
    with pytest.raises(OSError, match=said) as refusal:
        asrlib.load(folder)
    assert str(folder) in str(refusal.value)


# ---- the hub -----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> dict[str, Wav2Vec2ConformerForCTC]:
    """{revision: its model}, as downloaded, the network gone: main has a .bin alone, pull request 3 safetensors too."""
    models = {"main": hub_folders.recogniser(seed=0, **SHALLOW), "refs/pr/3": hub_folders.recogniser(seed=1, **SHALLOW)}
    kinds = {"main": "bin", "refs/pr/3": "both"}
    downloaded = {
        revision: hub_folders.write_folder(tmp_path / kinds[revision], model, kinds[revision], **SHALLOW)
        for revision, model in models.items()
    }
    hub_folders.write_cache(tmp_path / "hub", hub_folders.NAME, downloaded)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return models


def test_a_revision_is_what_is_loaded(hub):
    for revision, wanted in ((None, "main"), ("main", "main"), ("refs/pr/3", "refs/pr/3"), (f"{2:040x}", "refs/pr/3")):
        model, processor = asrlib.load(hub_folders.NAME, revision)
        assert_equal_tensors(model.state_dict(), hub[wanted].state_dict())
        assert len(processor.tokenizer) == 32
    with pytest.raises(OSError, match=f"cannot load {hub_folders.NAME}: "):
        asrlib.load(hub_folders.NAME, "refs/pr/4")


def test_nobody_is_asked_to_convert_a_bin(hub, monkeypatch):
    asked = []
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    for name, answer in (("is_offline_mode", False), ("has_file", False), ("auto_conversion", None)):
        where = f"transformers.modeling_utils.{name}"
        monkeypatch.setattr(where, lambda *_, name=name, answer=answer, **__: asked.append(name) or answer)
    asrlib.load(hub_folders.NAME)
    assert "is_offline_mode" in asked and "auto_conversion" not in asked


# ---- as a GPU would train it -------------------------------------------------------------------------------


def fine_tune(folder: Path, monkeypatch, model=None, **changes) -> tuple[nn.Module, list]:
    """Two steps of the settings of params/quick.yaml on the CPU → (the model, what the trainer wraps around it)."""
    wrapped, original = [], SpeechTrainer.training_step

    def training_step(self, given, *args, **kwargs):
        wrapped.append(type(given))
        return original(self, given, *args, **kwargs)

    monkeypatch.setattr(SpeechTrainer, "training_step", training_step)
    quick = read_params_file(ROOT / "params" / "quick.yaml")
    names = ("trainable", "ctc_weight", "kl_weight", "hidden_weight", "warmup_ratio", "precision")
    settings = {name: quick[name] for name in (*names, "gradient_checkpointing")}
    settings |= dict(epochs=2, batch_seconds=30.0, learning_rate=1e-2, patience=9, device="cpu")
    teacher = hub_folders.recogniser(**SHALLOW)
    model = model or asrlib.convert(teacher, cache_cut=0.75)
    train(model, new_processor(), tiny.corpus(6), tiny.corpus(2, "validation"), folder,
          TrainingSettings(**settings | changes), teacher)  # fmt: skip
    return model, wrapped


def test_layerdrop_leaves_every_layer_its_teacher(tmp_path, monkeypatch):
    """In bf16, with gradient checkpointing."""
    model = asrlib.convert(hub_folders.recogniser(**SHALLOW), cache_cut=0.75)
    model.config.layerdrop = 0.9
    model, wrapped = fine_tune(tmp_path, monkeypatch, model)
    assert len(wrapped) == 2 and model.config.layerdrop == 0.9
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    untrained = asrlib.convert(hub_folders.recogniser(**SHALLOW), cache_cut=0.75).state_dict()
    moved = {name for name, values in model.state_dict().items() if not torch.equal(values, untrained[name])}
    trained = {name for name, _ in model.named_parameters() if ".self_attn." in name}
    assert moved <= trained and trained - moved <= {name for name in trained if name.endswith("up_k.bias")}


def test_a_teacher_computes_in_the_precision_of_the_training_and_stays_as_it_was(tmp_path, monkeypatch):
    seen, original = set(), nn.Linear.forward

    def forward(self, x):
        if not self.weight.requires_grad:
            seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return original(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    fine_tune(tmp_path / "bf16", monkeypatch, ctc_weight=0.0)
    assert seen == {torch.bfloat16}


def test_gradients_end_where_nothing_is_trained(tmp_path, monkeypatch):
    reached, convolution = [], nn.Conv1d.forward

    def forward(self, x):
        reached.append((self.in_channels, x.requires_grad))
        return convolution(self, x)

    monkeypatch.setattr(nn.Conv1d, "forward", forward)
    fine_tune(tmp_path, monkeypatch)
    assert (1, False) in reached and (1, True) not in reached  # the first reads the samples of audio


def test_gradient_checkpointing_moves_batch_norm_as_far_as_it_should(tmp_path, monkeypatch):
    statistics = {}
    for frugal in (True, False):
        how = dict(trainable="all", precision="fp32", gradient_checkpointing=frugal, learning_rate=1e-4)
        model, _ = fine_tune(tmp_path / str(frugal), monkeypatch, **how)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
        statistics[frugal] = torch.cat([values for norm in norms for values in (norm.running_mean, norm.running_var)])
        assert {norm.momentum for norm in norms} == {0.1}
    before = hub_folders.recogniser(**SHALLOW).state_dict()
    begun = torch.cat([before[name] for name in before if "running_" in name])
    assert torch.allclose(statistics[True], statistics[False], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(statistics[True], begun, atol=1e-2)


def test_of_several_gpus_one_trains(tmp_path, monkeypatch):
    def devices(self, found=TrainingArguments._setup_devices.func):
        device = found(self)
        self._n_gpu = 2
        return device

    patched = cached_property(devices)
    patched.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", patched)
    model, wrapped = fine_tune(tmp_path, monkeypatch)
    assert set(wrapped) == {type(model)}


@pytest.mark.parametrize("stored", ["folder", "table"])
def test_processes_that_load_data_can_be_sent_all_they_need(librispeech, tmp_path, stored):
    corpus = open_corpus(librispeech, "test-other")
    if stored == "table":
        rows = [{"audio": {"bytes": Path(u.where).read_bytes(), "path": None}, "text": u.text} for u in corpus]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "test.other.parquet")
        corpus = open_corpus(tmp_path, "test-other")
    loaded = SpeechDataset(corpus, new_processor()), SpeechCollator(new_processor())
    batches = [collate([dataset[0]]) for dataset, collate in (loaded, pickle.loads(pickle.dumps(loaded)))]
    assert_equal_tensors(*batches)


# ---- from end to end ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def librispeech(tmp_path_factory) -> Path:
    """A folder as LibriSpeech unpacks: noise with a text, and in dev-clean real speech where there is any."""
    root, random = tmp_path_factory.mktemp("corpus") / "LibriSpeech", np.random.default_rng(0)
    for speaker, split in enumerate(("train-clean-100", "dev-clean", "test-clean", "test-other"), 100):
        chapter = root / split / str(speaker) / "7"
        chapter.mkdir(parents=True)
        lines = []
        for number in range(4):
            noise, words = random.normal(scale=0.1, size=20_000 + 2_000 * number), random.choice(["A", "TEA"], size=3)
            soundfile.write(chapter / f"{speaker}-7-{number:04d}.flac", noise, 16_000)
            lines.append(f"{speaker}-7-{number:04d} {' '.join(words)}\n")
        (chapter / f"{speaker}-7.trans.txt").write_text("".join(lines))
    if real := sorted(REAL_SPEECH.glob("dev-clean/*/*/*.flac"), key=lambda path: path.stat().st_size)[:4]:
        shutil.rmtree(root / "dev-clean")
        for path in real:
            chapter = root / path.parent.relative_to(REAL_SPEECH)
            chapter.mkdir(parents=True, exist_ok=True)
            (chapter / path.name).symlink_to(path)
            for transcripts in path.parent.glob("*.trans.txt"):
                shutil.copy(transcripts, chapter)
    return root


FEW = {  # of what a notebook does again and again; the rest of a params file stays
    "epochs": 1,
    "validation_samples": 2,
    "benchmark_samples": 2,
    "analysis_samples": 1,
    "analysis_eval_samples": 2,
    "analysis_cuts": [0.75],
}


@pytest.mark.parametrize(
    ("name", "kind", "layers", "changes"),
    [
        ("quick", "bin", 24, {"train_samples": 3, "eval_samples": 2, "analysis_methods": ["svd"]}),
        ("full", "safetensors", 6, {"precision": "fp32", "analysis_methods": ["svd", "two_sided, energy"]}),
    ],
)
def test_a_run_on_the_published_checkpoint(project, librispeech, tmp_path, name, kind, layers, changes):
    published = hub_folders.recogniser(**NARROW | {"num_hidden_layers": layers})
    folder = hub_folders.write_folder(tmp_path / kind, published, kind, **NARROW | {"num_hidden_layers": layers})
    values = {"model": str(folder), "corpus": str(librispeech), **FEW, **changes}
    done = run_all(project, name, "--set", *(f"{key}={json.dumps(v)}" for key, v in values.items()))
    assert done.returncode == 0, done.stdout + done.stderr
    run = project / "reports" / name
    for step in STEPS:
        assert (run / f"{step}.html").is_file()
    asked = read_params_file(ROOT / "params" / f"{name}.yaml") | values
    for step, wanted in (("00_baseline", "precision"), ("03_finetune", "gradient_checkpointing")):
        assert read_json(run / ".completed" / f"{step}.json")["parameters"][wanted] == asked[wanted]

    converted = read_json(run / "metrics" / "convert.json")
    assert converted["cache_cut"] >= 0.75 and all(width % 8 == 0 for width in converted["latent_dim"])
    assert len(converted["latent_dim"]) == layers
    systems = read_json(run / "metrics" / "evaluate.json")["systems"]
    assert set(systems) == {"baseline", "converted", "finetuned"}
    for splits in systems.values():
        assert {split: result["utterances"] for split, result in splits.items()} == dict.fromkeys(
            ["test-clean", "test-other"], asked["eval_samples"] or 4
        )
    # Attention alone was trained: everything else is what was published, BatchNorm's statistics included.
    weights = hub_folders.as_published(asrlib.load(run / "models" / "finetuned")[0].state_dict())
    for key, values in hub_folders.as_published(published.state_dict()).items():
        if ".self_attn." not in key:
            assert torch.equal(weights[key], values), key
    before = load_file(run / "models" / "converted" / "model.safetensors")
    first = "wav2vec2_conformer.encoder.layers.0.self_attn.linear_q.weight"
    learnt = read_json(run / "metrics" / "finetune.json")
    assert torch.equal(before[first], weights[first]) == (learnt["best_step"] == 0)
