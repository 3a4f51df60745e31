"""New models have the sizes that were asked for, read what their processor gives, and cache what was published."""

import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassError

import asrlib
from asrlib import kv_cache_bytes
from asrlib.attention.kinds import KINDS
from asrlib.attention.latent import LatentKV
from asrlib.data.text import label_ids
from asrlib.measuring.transcribing import transcribe
from asrlib.models.blocks import BLOCKS
from asrlib.models.encoder import SpeechEncoderConfig, SpeechEncoderForCTC
from asrlib.models.registry import attention_modules
from asrlib.models.scratch import SIZES, architectures, new_config, new_model, new_processor

MIB = 2**20
SMALL = dict(hidden_size=32, num_layers=2, num_heads=4, depthwise_kernel=7, subsampling_channels=8)


@pytest.fixture(scope="module")
def processors():
    return {name: new_processor(name) for name in architectures()}


# ---- published caches: a thousand frames of float32 --------------------------------------------------------

PRESETS = {  # the sizes they were published for
    "conformer-large": dict(hidden_size=1024, num_layers=24, num_heads=16),
    "branchformer-large": dict(hidden_size=512, num_layers=18, num_heads=8),
}


@pytest.mark.parametrize(
    ("preset", "mha_mib", "mla_mib"),
    [("conformer-large", 187.5, 93.75), ("branchformer-large", 70.3125, 35.15625)],
)
def test_presets_cache_what_was_published(preset, mha_mib, mla_mib, processors):
    architecture, sizes = preset.split("-")[0], PRESETS[preset]
    config = {kind: new_config(architecture, processors[architecture], kind, **sizes) for kind in KINDS}
    width, layers, heads = sizes["hidden_size"], sizes["num_layers"], sizes["num_heads"]
    assert kv_cache_bytes(config["mha"], 1000) == mha_mib * MIB
    for kind in ("mla", "mla_simple"):
        exact = new_config(architecture, processors[architecture], kind, latent_dim=width, **sizes)
        assert kv_cache_bytes(exact, 1000) == mla_mib * MIB
        assert kv_cache_bytes(exact, 1000, "bfloat16") == mla_mib * MIB / 2
        assert kv_cache_bytes(config[kind], 1000) == mha_mib * MIB / 4  # unless told otherwise
    size = width // heads
    assert kv_cache_bytes(config["gqa"], 1000) == layers * 2 * 2 * size * 1000 * 4
    for frames in (1, 1000, 100_000):
        assert kv_cache_bytes(config["linear"], frames) == layers * heads * size * (size + 1) * 4
    for kind in KINDS:
        assert isinstance(kv_cache_bytes(config[kind], 1000), int)


# ---- new models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("architecture", BLOCKS)
def test_a_new_encoder_is_reproducible_and_as_large_as_asked(architecture, attention, processors):
    processor = processors[architecture]
    first, again, other = (new_model(architecture, processor, s, attention=attention, **SMALL) for s in (0, 0, 1))
    assert isinstance(first, SpeechEncoderForCTC)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same) and not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight.shape == (len(processor.tokenizer), 32)
    assert len(first.layers) == 2 and type(first.layers[0]) is BLOCKS[architecture]
    assert type(attention_modules(first)[0]) is KINDS[attention]
    assert first.config.pad_token_id == processor.tokenizer.pad_token_id
    assert first.config.num_mel_bins == 80 and first.config.inputs_to_logits_ratio == 640
    assert first.config.intermediate_size == {"conformer": 128, "branchformer": 96}[architecture]
    heard = processor(torch.randn(8_000).numpy(), sampling_rate=16_000, return_tensors="pt")
    logits_BTV = first.eval()(**heard).logits
    assert torch.isfinite(logits_BTV).all() and logits_BTV.std() < 2  # no layer blows up what it reads


def test_sizes_reach_the_config(processors):
    asked = dict(
        attention="mla", hidden_size=48, num_layers=3, num_heads=6, kv_heads=3, latent_dim=7, query_latent_dim=5,
        feedforward_size=40, depthwise_kernel=9, subsampling_channels=12, dropout=0.3, time_masks=4, frequency_masks=1,
        causal=True, largest_chunk=8,
    )  # fmt: skip
    assert asked.keys() == set(SIZES)
    config = new_config("conformer", processors["conformer"], **asked)
    named = dict(
        attention="mla", hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        latent_dim=[7] * 3, query_latent_dim=5, intermediate_size=40, conv_depthwise_kernel_size=9,
        subsampling_channels=12, hidden_dropout=0.3, attention_dropout=0.3, time_masks=4, frequency_masks=1,
        causal=True, largest_chunk=8,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in named} == named
    model = SpeechEncoderForCTC(config)
    assert model.subsampling.conv2.weight.shape == (12, 12, 3, 3)
    assert model.layers[0].conv_module.depthwise.kernel_size == (9,)
    assert model.layers[2].self_attn.latent_kv.down.weight.shape == (7, 48)
    assert model.layers[2].self_attn.linear_q.down.weight.shape == (5, 48)


def test_frames_are_those_of_the_processor():
    processor = new_processor("branchformer", 40, 12.5)
    config = new_config("branchformer", processor, **SMALL)
    assert (config.num_mel_bins, config.hop_length, config.win_length) == (40, 200, 400)
    assert config.inputs_to_logits_ratio == 800


def test_what_only_one_kind_looks_at_does_not_hinder_another(processors):
    for attention in KINDS:
        sizes = SMALL | dict(attention=attention, latent_dim=8, query_latent_dim=8, kv_heads=2)
        config = new_config("conformer", processors["conformer"], **sizes)
        assert config.latent_dim == ([8, 8] if attention.startswith("mla") else [])


def test_the_usual_size_is_that_of_a_medium_conformer():
    with torch.device("meta"):
        parameters = {
            kind: sum(p.numel() for p in SpeechEncoderForCTC(SpeechEncoderConfig(attention=kind)).parameters())
            for kind in KINDS
        }
    assert 55e6 < parameters["mha"] < 90e6
    latent = 12 * sum(p.numel() for p in LatentKV(512, 256).parameters())
    plain = 12 * 2 * (512 * 512 + 512)
    assert parameters["mla_simple"] - parameters["mha"] == latent - plain
    assert parameters["mla"] == parameters["mla_simple"]  # a latent of half the width saves queries nothing
    assert parameters["gqa"] == parameters["mha"] - plain * 3 // 4
    assert parameters["linear"] == parameters["mha"] - 12 * (512 * 512 + 2 * 512)


# ---- a new Whisper -----------------------------------------------------------------------------------------

TEXTS = ["HELLO THERE", "THE OTHER ONE", "HELLO OTHER"] * 4
WHISPER = dict(hidden_size=32, num_layers=2, num_heads=4, feedforward_size=40)


@pytest.fixture(scope="module")
def whisper_processor():
    return new_processor("whisper", 20, texts=TEXTS, window_seconds=2)


def test_a_new_whisper_is_reproducible_and_as_large_as_asked(whisper_processor):
    first, again, other = (new_model("whisper", whisper_processor, seed, **WHISPER) for seed in (0, 0, 1))
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same) and not torch.equal(first.proj_out.weight, other.proj_out.weight)
    named = dict(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=40, decoder_ffn_dim=40, num_mel_bins=20, max_source_positions=100, max_target_positions=64,
        dropout=0.1, vocab_size=len(whisper_processor.tokenizer),
    )  # fmt: skip
    assert {name: getattr(first.config, name) for name in named} == named
    assert new_config("whisper", whisper_processor).encoder_ffn_dim == 4 * 512


@pytest.mark.parametrize(("seconds", "tokens"), [(1, 64), (5, 64), (6, 128), (30, 384)])
def test_a_new_whisper_hears_its_window_and_writes_what_may_be_said_in_it(seconds, tokens):
    processor = new_processor("whisper", texts=TEXTS, window_seconds=seconds)
    model = new_model("whisper", processor, **WHISPER)
    assert model.config.max_source_positions == 50 * seconds
    assert model.config.max_target_positions == model.generation_config.max_length == tokens
    heard = processor(torch.randn(8_000).numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    assert heard.shape == (1, 80, 100 * seconds)


def test_pieces_of_a_new_whisper_are_frequent_ones_and_spell_everything(whisper_processor):
    tokenizer = whisper_processor.tokenizer
    text = "HELLO Déjà 😀"
    assert tokenizer.decode(label_ids(text, tokenizer), skip_special_tokens=True) == f" {text}"
    plain = new_processor("whisper").tokenizer
    spelt = [len(one("HELLO", add_special_tokens=False).input_ids) for one in (tokenizer, plain)]
    assert spelt[0] < spelt[1] == len("HELLO")
    assert len(plain) == 256 + 8 < len(tokenizer)


def test_a_new_whisper_saved_and_loaded_writes_the_same(whisper_processor, tmp_path):
    model = new_model("whisper", whisper_processor, **WHISPER).eval()
    model.save_pretrained(tmp_path)
    whisper_processor.save_pretrained(tmp_path)
    loaded, processor = asrlib.load(tmp_path)
    found, wanted = (transcribe(*one, tiny.corpus(3)) for one in ((loaded, processor), (model, whisper_processor)))
    assert found == wanted and all(row["hypothesis"] for row in found)
    assert label_ids("HELLO", processor) == label_ids("HELLO", whisper_processor)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()


@pytest.mark.parametrize(
    "sizes",
    [{"attention": "mla"}, {"causal": True}, {"largest_chunk": 4}, {"time_masks": 1}, {"frequency_masks": 1}],
    ids=str,
)
def test_what_a_new_whisper_cannot_be_is_refused(sizes, whisper_processor):
    with pytest.raises(ValueError, match="a new whisper has attention mha, hears whole windows and masks nothing"):
        new_config("whisper", whisper_processor, **sizes)


def test_a_window_shorter_than_a_second_is_refused():
    with pytest.raises(ValueError, match="window_seconds is 0: a window lasts at least 1 s"):
        new_processor("whisper", window_seconds=0)


# ---- what contradicts itself -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "sizes", "said"),
    [
        ("whisper", {"hidden_size": 30, "num_heads": 4}, "hidden_size 30 is not divisible by num_heads 4"),
        ("lstm", {}, "architecture is 'lstm': choose one of wav2vec2-conformer, conformer, branchformer"),
        ("wav2vec2-conformer", {"attention": "mla"}, "attention is 'mla', but a new wav2vec2-conformer has 'mha'"),
        ("conformer", {"hidden_size": 30, "num_heads": 4}, "hidden_size 30 is not divisible by num_heads 4"),
        ("conformer", {"hidden_size": 15, "num_heads": 3}, "must be even and divide into 3 heads"),
        ("wav2vec2-conformer", {"time_masks": 2}, "masks spans of its own"),
        ("conformer", {"attention": "flash"}, "attention is 'flash': choose one of"),
        ("conformer", {"attention": "flash", "latent_dim": 8}, "attention is 'flash': choose one of"),
        ("branchformer", {"attention": "gqa", "kv_heads": 3}, "is not divisible by kv_heads 3"),
        ("branchformer", {"attention": "mla_simple", "latent_dim": 4_000}, "latent_dim is 4000"),
        ("branchformer", {"depthwise_kernel": 30}, "kernel_size is 30: it must be odd"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(architecture, sizes, said, processors):
    processor = processors.get(architecture, processors["conformer"])
    with pytest.raises((ValueError, StrictDataclassError), match=said):
        new_config(architecture, processor, **sizes)


def test_processors_write_the_same_symbols_and_read_what_the_model_does(processors):
    vocabularies = [one.tokenizer.get_vocab() for name, one in processors.items() if name != "whisper"]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies) and len(vocabularies[0]) == 32
    names = {name: processor.feature_extractor.model_input_names[0] for name, processor in processors.items()}
    assert names == {
        "wav2vec2-conformer": "input_values", "conformer": "input_features", "branchformer": "input_features",
        "whisper": "input_features",
    }  # fmt: skip
    with pytest.raises(ValueError, match="architecture is 'lstm'"):
        new_processor("lstm")
