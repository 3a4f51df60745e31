"""The latent twin computes what transformers' class computes, survives the disk, and says what it caches."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, WavLMConfig, WavLMForCTC, set_seed

from asrlib import convert, kv_cache_bytes, load
from asrlib.attention.latent import LatentKV
from asrlib.attention.widths import check_latent_dim, split_ranks
from asrlib.models.families.wav2vec2_conformer import Wav2Vec2ConformerMLAConfig, Wav2Vec2ConformerMLAForCTC
from asrlib.models.loading import resolve_model
from asrlib.models.registry import FAMILIES, attention_modules, frame_counts, frames_of
from asrlib.models.scratch import new_model

WIDTH, LAYERS = tiny.WIDTH, tiny.LAYERS
EXACT = {"joint": WIDTH, "split": 2 * WIDTH}  # latent_dim that loses nothing
KINDS = [
    ("relative", "joint"),
    ("relative", "split"),
    ("rotary", "split"),
    (None, "joint"),
    (None, "split"),
]


# ---- the same numbers as transformers' own class -----------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("positions", "layout"), KINDS)
def test_a_latent_of_full_rank_changes_nothing(positions, layout, attention):
    mha = tiny.conformer(positions, attention).double()
    mla = convert(mha, EXACT[layout], layout=layout)
    assert mla.config._attn_implementation == attention
    batch = tiny.padded_batch(torch.float64)
    with torch.no_grad():
        theirs, ours = mha(**batch), mla(**batch)
        unmasked = mla(batch["input_values"]).logits
    assert torch.allclose(ours.logits, theirs.logits, rtol=0, atol=1e-10)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-10)
    assert not torch.allclose(ours.logits, unmasked, atol=1e-2)  # so the mask did arrive


def test_a_narrower_latent_does_change_something(tiny_model):
    batch = tiny.padded_batch()
    with torch.no_grad():
        assert not torch.allclose(convert(tiny_model, 8)(**batch).logits, tiny_model(**batch).logits, atol=1e-2)


def test_attention_weights_can_be_looked_at():
    mha = tiny.conformer(attention="eager").double()
    batch = tiny.padded_batch(torch.float64)
    with torch.no_grad():
        theirs, ours = (m(**batch, output_attentions=True).attentions for m in (mha, convert(mha, WIDTH)))
    assert len(ours) == LAYERS
    for left, right in zip(ours, theirs, strict=True):
        assert torch.allclose(left, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("positions", "layout"), KINDS)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(positions, layout):
    plain = convert(tiny.conformer(positions), 6, layout=layout).train()
    frugal = convert(tiny.conformer(positions), 6, layout=layout).train()
    frugal.activation_checkpointing_enable()
    recomputed = []
    attention_modules(frugal)[0].register_forward_hook(lambda *_: recomputed.append(True))
    losses = []
    for model in (plain, frugal):
        set_seed(7)  # dropout and the masks of SpecAugment are on
        losses.append(model(**tiny.padded_batch()).loss)
        losses[-1].backward()
    assert len(recomputed) == 2
    assert losses[0].item() == losses[1].item()
    gradients = {name: p.grad for name, p in frugal.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name]), name


@pytest.mark.parametrize(("positions", "layout"), KINDS)
def test_every_latent_weight_learns(positions, layout):
    mla = convert(tiny.conformer(positions), 6, layout=layout).train()
    mla(**tiny.padded_batch()).loss.backward()
    weights = [(n, p) for n, p in mla.named_parameters() if "latent_kv" in n and not n.endswith("up_k.bias")]
    assert len(weights) == LAYERS * (4 if layout == "joint" else 5)
    for name, parameter in weights:  # up_k.bias is what softmax cancels
        assert parameter.grad.abs().max() > 1e-4, name


# ---- widths and layouts ------------------------------------------------------------------------------------


def test_one_rank_per_layer():
    mla = convert(tiny.conformer(), [5, 12])
    assert mla.config.latent_dim == [5, 12]
    assert [a.latent_kv.down.weight.shape for a in attention_modules(mla)] == [(5, WIDTH), (12, WIDTH)]
    assert not any(hasattr(a, "linear_k") and isinstance(a.linear_k, nn.Module) for a in attention_modules(mla))


@pytest.mark.parametrize("latent_dim", [2, 7, 32])
def test_a_split_latent_caches_as_many_numbers_as_it_says(latent_dim):
    layer = LatentKV(WIDTH, latent_dim, "split")
    rank_k, rank_v = split_ranks(latent_dim)
    assert rank_k + rank_v == latent_dim and 0 <= rank_v - rank_k <= 1
    assert layer.down_k.weight.shape == (rank_k, WIDTH) and layer.down_v.weight.shape == (rank_v, WIDTH)
    assert layer.keys(torch.randn(2, 3, WIDTH)).shape == layer.values(torch.randn(2, 3, WIDTH)).shape == (2, 3, WIDTH)


@pytest.mark.parametrize(
    ("latent_dim", "layout", "said"),
    [
        (0, "joint", "latent_dim is 0.*between 1 and 32"),
        (33, "joint", "latent_dim is 33.*between 1 and 32"),
        (1, "split", "latent_dim is 1.*between 2 and 32"),
        (-4, "split", "latent_dim is -4"),
        (8, "both", "'both': choose one of joint, split"),
    ],
)
def test_impossible_latents_are_refused(latent_dim, layout, said):
    with pytest.raises(ValueError, match=said):
        check_latent_dim(latent_dim, WIDTH, layout)
    with pytest.raises(ValueError, match=said):
        convert(tiny.conformer(), latent_dim, layout=layout)


def latent_config(**changes) -> Wav2Vec2ConformerMLAConfig:
    settings = tiny.conformer().config.to_dict()
    del settings["model_type"]
    return Wav2Vec2ConformerMLAConfig(**settings | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latent_dim": [8]}, "1 widths for 2 layers"),
        ({"latent_dim": [8, 0]}, "latent_dim is 0"),
        ({"latent_layout": "both"}, "choose one of joint, split"),
        ({"position_embeddings_type": "rotary"}, "rotary positions .* use layout: split"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes, said):
    with pytest.raises(StrictDataclassClassValidationError, match=said):
        latent_config(**changes)


@pytest.mark.parametrize("layout", EXACT)
def test_a_config_without_widths_is_the_uncompressed_floor(layout):
    config = latent_config(latent_layout=layout)
    assert config.latent_dim == [EXACT[layout]] * LAYERS
    again = AutoConfig.for_model(**json.loads(config.to_json_string(use_diff=False)))
    assert type(again) is type(config) and again.latent_dim == config.latent_dim


def test_rotary_positions_and_a_joint_latent_exclude_each_other():
    with pytest.raises(ValueError, match=r"rotary positions .* one joint latent cannot serve both: use layout: split"):
        convert(tiny.conformer("rotary"), 8, layout="joint")


# ---- what a cache would hold -------------------------------------------------------------------------------

MIB = 2**20


@pytest.mark.parametrize(
    ("layers", "width", "mha_mib", "mla_mib"), [(24, 1024, 187.5, 93.75), (18, 512, 70.3125, 35.15625)]
)
def test_cache_of_a_thousand_frames(layers, width, mha_mib, mla_mib):
    settings = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=8)
    mha, mla = AutoConfig.for_model("wav2vec2-conformer", **settings), Wav2Vec2ConformerMLAConfig(**settings)
    assert kv_cache_bytes(mha, 1000) == mha_mib * MIB
    assert kv_cache_bytes(mla, 1000) == mla_mib * MIB
    assert kv_cache_bytes(mha, 1000, "bfloat16") == mha_mib * MIB / 2
    assert isinstance(kv_cache_bytes(mla, 1000, "int8"), int)


def test_cache_adds_up_over_layers_of_different_widths():
    config = latent_config(latent_dim=[3, 8], latent_layout="split")
    assert kv_cache_bytes(config, frames=10) == 10 * (3 + 8) * 4
    assert kv_cache_bytes(config, frames=0) == 0


@pytest.mark.parametrize(
    ("frames", "dtype", "said"),
    [
        (-1, "float32", "frames is -1"),
        (10, "float33", "'float33' is no number format"),
        (10, "nn", "'nn' is no number format"),
    ],
)
def test_impossible_caches_are_refused(frames, dtype, said):
    with pytest.raises(ValueError, match=said):
        kv_cache_bytes(latent_config(), frames, dtype)


# ---- frames ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1_000, 4_000, 8_231])
def test_frames_of_is_the_length_of_the_logits(tiny_model, samples):
    with torch.no_grad():
        frames = tiny_model(torch.randn(1, samples)).logits.shape[1]
    assert frames_of(tiny_model)(samples) == frames
    assert frame_counts(tiny_model, torch.tensor([samples])).tolist() == [frames]


def test_audio_shorter_than_a_frame_has_none(tiny_model):
    assert frames_of(tiny_model)(10) == 0


# ---- on disk -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory, processor):
    """Folders of a standard and of two latent models."""
    root = tmp_path_factory.mktemp("models")
    mha = tiny.conformer()
    models = {"mha": mha, "joint": convert(mha, [5, 12]), "split": convert(tiny.conformer("rotary"), 7, layout="split")}
    for name, model in models.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root, models


IN_A_NEW_PROCESS = """
import sys, {imports}
assert "asrlib.models.registry" not in sys.modules
asrlib.register()
import torch
torch.set_num_threads(1)
batch = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCTC.from_pretrained(folder)
    assert model.config.model_type == transformers.AutoConfig.from_pretrained(folder).model_type
    assert transformers.AutoProcessor.from_pretrained(folder).tokenizer.pad_token_id == 0
    with torch.no_grad():
        torch.save([type(model).__name__, model(**batch).logits], folder + ".logits")
"""


@pytest.mark.parametrize("imports", ["asrlib, transformers", "transformers, asrlib"])
def test_a_new_process_that_only_registers_gets_the_same_logits(saved, imports, tmp_path):
    root, models = saved
    batch = tiny.padded_batch()
    torch.save(batch, tmp_path / "batch.pt")
    folders = [shutil.copytree(root / name, tmp_path / name) for name in ("joint", "split")]
    code = IN_A_NEW_PROCESS.format(imports=imports)
    subprocess.run([sys.executable, "-c", code, tmp_path / "batch.pt", *folders], check=True, timeout=120)
    for folder in folders:
        kind, logits = torch.load(f"{folder}.logits")
        assert kind == "Wav2Vec2ConformerMLAForCTC"
        with torch.no_grad():
            assert torch.equal(logits, models[folder.name](**batch).logits)


def test_every_family_is_known_to_transformers():
    for model_type, family in FAMILIES.items():
        config = type(AutoConfig.for_model(model_type))
        assert config in (family.standard_model.config_class, family.latent_model.config_class)
        assert family.head.auto_model._model_mapping[config] in (family.standard_model, family.latent_model)


@pytest.mark.parametrize("name", ["mha", "joint", "split"])
def test_load_returns_what_was_saved(saved, name):
    root, models = saved
    assert {path.suffix for path in (root / name).iterdir()} == {".json", ".safetensors"}
    model, processor = load(root / name)
    assert type(model) is type(models[name]) and not model.training
    assert processor.decode(processor.tokenizer("HI THERE").input_ids, group_tokens=False) == "HI THERE"
    with torch.no_grad():
        assert torch.equal(model(**tiny.padded_batch()).logits, models[name](**tiny.padded_batch()).logits)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the joint model's folder, to be spoilt."""
    return shutil.copytree(saved[0] / "joint", tmp_path / "model")


def rewrite_weights(folder, change, to_bin=False) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights = change(weights) or weights
    if to_bin:
        path.unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, path, {"format": "pt"})


def test_missing_weights_are_named(folder):
    lost = "wav2vec2_conformer.encoder.layers.1.self_attn.latent_kv.up_v.bias"
    rewrite_weights(folder, lambda weights: {name: w for name, w in weights.items() if name != lost})
    with pytest.raises(ValueError, match=f"lacks 1 weights .* {lost} first"):
        load(folder)


def test_an_encoder_without_a_ctc_head_is_no_recogniser(tiny_model, folder):
    tiny_model.wav2vec2_conformer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"lacks 2 weights .* lm_head\.bias first"):
        load(folder)


def cut_in_half(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda folder: cut_in_half(folder / "model.safetensors"), OSError, "cannot load"),
        (lambda folder: cut_in_half(folder / "config.json"), OSError, "not a valid JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), OSError, "no file named model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "holds no config.json"),
        (shutil.rmtree, FileNotFoundError, "no model at"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(folder, spoil, error, said):
    spoil(folder)
    with pytest.raises(error, match=said) as refusal:
        load(folder)
    assert str(folder) in str(refusal.value)


def test_an_unknown_architecture_is_refused(folder):
    settings = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    convolution = dict(conv_dim=[8], conv_kernel=[10], conv_stride=[5], num_conv_pos_embeddings=2)
    config = WavLMConfig(**settings, **convolution, num_conv_pos_embedding_groups=1)
    WavLMForCTC(config).save_pretrained(folder)
    with pytest.raises(ValueError, match="no family for model type 'wavlm': asrlib knows wav2vec2, "):
        load(folder)


def test_a_bin_is_read_too(folder, saved):
    rewrite_weights(folder, lambda weights: None, to_bin=True)
    with torch.no_grad():
        ours, theirs = (m(**tiny.padded_batch()).logits for m in (load(folder)[0], saved[1]["joint"]))
    assert torch.equal(ours, theirs)


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_bin_is_refused_and_does_not_run(folder, tmp_path):
    rewrite_weights(folder, lambda weights: weights | {"extra": Planted(tmp_path / "ran")}, to_bin=True)
    with pytest.raises(OSError, match="besides tensors, which could run code: get the model as safetensors"):
        load(folder)
    assert not (tmp_path / "ran").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the trap was live
    assert (tmp_path / "ran").exists()


def test_old_names_of_the_normalised_convolution_are_understood(saved, folder):
    shutil.copytree(saved[0] / "mha", folder, dirs_exist_ok=True)
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}

    def rename(weights):
        for new, old in names.items():
            [key] = [key for key in weights if key.endswith(new)]
            weights[key.replace(new, old)] = weights.pop(key)

    rewrite_weights(folder, rename, to_bin=True)
    theirs, ours = tiny.conformer().state_dict(), load(folder)[0].state_dict()
    assert theirs.keys() == ours.keys()
    for name in theirs:
        assert torch.equal(theirs[name], ours[name]), name


def test_what_no_folder_is_called_is_taken_for_a_hub_id():
    assert resolve_model("facebook/wav2vec2-conformer-rel-pos-large-960h-ft").startswith("facebook/")
    with pytest.raises(FileNotFoundError, match="hub id"):
        resolve_model("no-such-model")


# ---- new models --------------------------------------------------------------------------------------------


def test_a_new_conformer_is_small_reproducible_and_can_be_converted(processor):
    settings = dict(hidden_size=32, num_layers=2, num_heads=4, depthwise_kernel=7, dropout=0.1)
    first, again, other = (new_model("wav2vec2-conformer", processor, **settings, seed=s) for s in (0, 0, 1))
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same) and not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.config.inputs_to_logits_ratio == 320
    assert first.config.pad_token_id == processor.tokenizer.pad_token_id
    assert first.config.vocab_size == len(processor.tokenizer)
    assert isinstance(convert(first, 8), Wav2Vec2ConformerMLAForCTC)


def test_heads_must_divide_the_width(processor):
    with pytest.raises(ValueError, match="hidden_size 30 is not divisible by num_heads 4"):
        new_model("wav2vec2-conformer", processor, hidden_size=30, num_heads=4)
    with pytest.raises(ValueError, match="architecture is 'lstm': choose one of"):
        new_model("lstm", processor)


# ---- a split latent whose keys and values have widths of their own -----------------------------------------


def test_a_split_latent_gives_the_keys_what_it_is_told():
    layer = LatentKV(WIDTH, 9, "split", key_dim=7)
    assert layer.ranks == (7, 2)
    assert layer.down_k.weight.shape == (7, WIDTH) and layer.down_v.weight.shape == (2, WIDTH)
    assert LatentKV(WIDTH, 9, "split").ranks == split_ranks(9)
    assert LatentKV(WIDTH, 9).ranks == (9, 9)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"latent_dim": [5, 32], "latent_layout": "split"}, [2, 16]),  # an odd number is the value's
        ({"latent_layout": "split"}, [WIDTH, WIDTH]),
        ({"latent_dim": [5, 20], "latent_layout": "split", "latent_key_dim": [4, 16]}, [4, 16]),
        ({"latent_dim": [5, 20], "latent_layout": "split", "latent_key_dim": (1, 4)}, [1, 4]),
        ({"latent_dim": [5, 20]}, []),
    ],
)
def test_a_config_says_what_is_the_keys(changes, keys):
    config = latent_config(**changes)
    assert config.latent_key_dim == keys
    again = AutoConfig.for_model(**json.loads(config.to_json_string()))
    assert again.latent_key_dim == keys and again.latent_dim == config.latent_dim
    assert kv_cache_bytes(config, frames=10) == 10 * sum(config.latent_dim) * 4


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([4], "latent_key_dim has 1 widths for 2 layers: give one a layer"),
        ([4, 4, 4], "latent_key_dim has 3 widths for 2 layers"),
        ([0, 8], "latent_key_dim is 0, but of a latent of 6 numbers the keys take between 1 and 5"),
        ([6, 8], "latent_key_dim is 6, but of a latent of 6 numbers the keys take between 1 and 5"),
        ([3, 17], "latent_key_dim is 17, but of a latent of 20 numbers the keys take between 4 and 16"),
        ([3, 3], "latent_key_dim is 3, but of a latent of 20 .* between 4 and 16 .in a model of width 16"),
        ([-1, 8], "latent_key_dim is -1"),
    ],
)
def test_keys_of_an_impossible_width_are_refused(keys, said):
    with pytest.raises(StrictDataclassClassValidationError, match=said):
        latent_config(latent_dim=[6, 20], latent_layout="split", latent_key_dim=keys)


def test_a_joint_latent_has_no_width_for_keys_alone():
    said = "latent_key_dim is 3, but keys and values share all of a joint latent: leave it out, or use layout"
    with pytest.raises(StrictDataclassClassValidationError, match=said):
        latent_config(latent_dim=[6, 8], latent_key_dim=[3, 4])
    with pytest.raises(ValueError, match=said):
        LatentKV(WIDTH, 6, key_dim=3)


@pytest.mark.parametrize("positions", ["relative", "rotary", None])
def test_unequal_widths_survive_the_disk(positions, processor, tmp_path):
    mla = Wav2Vec2ConformerMLAForCTC(
        latent_config(
            position_embeddings_type=positions, latent_layout="split", latent_dim=[7, 20], latent_key_dim=[6, 5]
        )
    ).eval()
    assert [layer.latent_kv.ranks for layer in attention_modules(mla)] == [(6, 1), (5, 15)]
    mla.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert again.config.latent_key_dim == [6, 5] and again.config.latent_dim == [7, 20]
    with torch.no_grad():
        assert torch.equal(again(**tiny.padded_batch()).logits, mla(**tiny.padded_batch()).logits)


def test_a_split_model_saved_before_there_were_widths_for_keys_loads_as_it_was(saved, tmp_path):
    folder = shutil.copytree(saved[0] / "split", tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    assert settings.pop("latent_key_dim") == [3, 3]
    (folder / "config.json").write_text(json.dumps(settings))
    model, _ = load(folder)
    assert [layer.latent_kv.ranks for layer in attention_modules(model)] == [(3, 4)] * LAYERS
    with torch.no_grad():
        assert torch.equal(model(**tiny.padded_batch()).logits, saved[1]["split"](**tiny.padded_batch()).logits)


def test_a_model_that_another_params_file_makes_is_told_with_its_command(tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "mine.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"reports/mine/models/baseline: `python run_all.py mine` makes it"):
        resolve_model(tmp_path / "reports/mine/models/baseline")
    with pytest.raises(FileNotFoundError, match="reports/other/models/baseline: give a folder"):
        resolve_model(tmp_path / "reports/other/models/baseline")
