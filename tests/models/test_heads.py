"""A head of each kind is loaded, taught, and writes what it would write of each utterance alone."""

import json
from functools import partial
from unittest.mock import Mock

import family_models
import numpy as np
import pytest
import soundfile
import tiny
import torch
from safetensors.torch import load_file
from transformers import (
    EvalPrediction,
    NemotronAsrStreamingForRNNT,
    ParakeetForRNNT,
    WhisperForConditionalGeneration,
)

import asrlib
from asrlib import evaluate
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.data.corpus import Corpus, Utterance
from asrlib.data.text import label_ids, normalise_text, unknown_characters
from asrlib.measuring.lengths import benchmark_lengths
from asrlib.measuring.speed import compiled_beside_eager
from asrlib.measuring.timing import best_symbols, inputs_of_each
from asrlib.measuring.transcribing import transcribe
from asrlib.models.heads import Decoder, Transducer, suppressed_tokens
from asrlib.models.inference import attention_of, spoken_logits, zero_attention
from asrlib.models.registry import attention_modules, attention_parts, family_of, frames_of
from asrlib.training import training
from asrlib.training.checkpoints import last_checkpoint
from asrlib.training.training import SpeechTrainer, TrainingSettings, train

HEADS = {"whisper": Decoder, "nemotron": Transducer, "parakeet_rnnt": Transducer}
TRANSDUCERS = [name for name, head in HEADS.items() if head is Transducer]
KINDS = {
    "whisper": WhisperForConditionalGeneration,
    "nemotron": NemotronAsrStreamingForRNNT,
    "parakeet_rnnt": ParakeetForRNNT,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model beside its processor, whose tokenizer knows of no prompt."""
    folder = tmp_path_factory.mktemp("models")
    for name in HEADS:
        model = getattr(family_models, name)()
        if name == "parakeet_rnnt":  # else it says nothing
            model.joint.head.bias.data[model.config.blank_token_id] = 10.0
        model.save_pretrained(folder / name)
        family_models.processor_of(name).save_pretrained(folder / name)
    return folder


@pytest.fixture
def loaded(folders):
    return lambda name: asrlib.load(folders / name)


@pytest.fixture(scope="module")
def processors(folders):
    return {name: asrlib.load(folders / name)[1] for name in HEADS}


def batch_of(processor, corpus) -> dict[str, torch.Tensor]:
    return SpeechCollator(processor)([item for item in SpeechDataset(corpus, processor)])


def spoken(text: str, seconds: float = 0.5) -> Utterance:
    return Utterance(text, text, "s", seconds, "memory", partial(tiny._noise, seconds, 1))


def settings(**changes) -> TrainingSettings:
    usual = dict(trainable="all", epochs=2, learning_rate=0.01, batch_seconds=4.0, patience=100, device="cpu")
    return TrainingSettings(**usual | changes)


# ---- loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_a_model_is_loaded_by_the_class_of_its_head(loaded, name):
    model, _ = loaded(name)
    assert type(model) is KINDS[name] and type(family_of(model.config).head) is HEADS[name]


def test_a_tokenizer_is_told_the_language_and_the_task(tmp_path):
    model, processor = family_models.whisper(), family_models.processor_of("whisper")
    processor = type(processor)(processor.feature_extractor, family_models.byte_pairs.__wrapped__())
    processor.tokenizer.set_prefix_tokens(predict_timestamps=True)
    processor.tokenizer.language = processor.tokenizer.task = None
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    tokenizer = asrlib.load(tmp_path)[1].tokenizer
    prompt = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.prefix_tokens) == prompt


# ---- labels ------------------------------------------------------------------------------------------------


def test_labels_of_a_whisper_are_prompt_text_and_end_and_its_loss_is_of_them(loaded):
    model, processor = loaded("whisper")
    ids = label_ids("A THE", processor)
    spelt = ["<|en|>", "<|transcribe|>", "<|notimestamps|>", "A", "ĠT", "H", "E", "<|endoftext|>"]
    found = processor.tokenizer.convert_ids_to_tokens(ids)
    assert (found[:3], found[-1]) == (spelt[:3], spelt[-1])
    assert "".join(found[3:-1]) == "ĠAĠTHE"  # as a transcript begins
    batch = batch_of(processor, tiny.corpus(3))
    with torch.no_grad():
        said = family_of(model.config).head.forward(model, batch)
        theirs = model(input_features=batch["input_features"], labels=batch["labels"])
    assert said.loss == theirs.loss and (batch["labels"] == -100).any()


def test_a_whisper_spells_everything_and_no_special_token_by_its_name(processors):
    processor = processors["whisper"]
    text = normalise_text("  Déjà 😀  vu <|endoftext|> ", processor)
    assert text == "Déjà 😀 vu <|endoftext|>" and unknown_characters(text, processor) == []
    ids = label_ids(text, processor)
    special = set(processor.tokenizer.all_special_ids)
    assert [one for one in ids if one in special] == [*ids[:3], ids[-1]]
    assert Decoder().texts(processor, [ids]) == [text]


@pytest.mark.parametrize("name", TRANSDUCERS)
def test_a_batch_without_a_label_has_a_loss(loaded, name):
    model, processor = loaded(name)
    batch = batch_of(processor, tiny.corpus(2))
    loss = family_of(model.config).head.forward(model, batch | {"labels": batch["labels"][:, :0]}).loss
    loss.backward()
    assert torch.isfinite(loss) and loss > 0


@pytest.mark.parametrize("name", HEADS)
def test_features_are_not_rounded_where_the_model_computes_in_bf16(processors, name):
    plain = batch_of(processors[name], tiny.corpus(3))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = batch_of(processors[name], tiny.corpus(3))
    assert all(torch.equal(plain[key], rounded[key]) and plain[key].dtype == rounded[key].dtype for key in plain)


# ---- what cannot be heard or written -----------------------------------------------------------------------


def test_audio_beyond_the_window_is_rejected_and_so_is_a_text_beyond_the_tokens(loaded):
    model, processor = loaded("whisper")
    rows = spoken("A"), spoken("E", seconds=1.0), spoken("O", seconds=1.1), spoken("T" * 28), spoken("T" * 29)
    found = Corpus("noise", "train", rows).usable(processor, frames_of(model))
    assert [one.text for one in found] == ["A", "E", "T" * 28]
    assert [row.reason for row in found.rejected] == [
        "1.1 s of audio, and this model hears 1 s at once: cut it",
        "text too long: 33 tokens with its prompt, and this model writes 32",
    ]
    assert len(transcribe(model, processor, found)) == 3
    with pytest.raises(ValueError, match=r"noise train has no usable row: 1 rejected, the first: O: 1.1 s of audio"):
        Corpus("noise", "train", rows[2:3]).usable(processor, frames_of(model))


def test_speech_whose_end_would_not_be_heard_is_an_error(loaded, tmp_path):
    model, processor = loaded("whisper")
    with pytest.raises(ValueError, match=r"O lasts 1.1 s, and this model hears 1 s at once: Corpus.usable leaves"):
        transcribe(model, processor, Corpus("noise", "train", (spoken("A"), spoken("O", seconds=1.1))))
    speech = Corpus("noise", "train", (spoken("A"), spoken("O", seconds=0.95)))
    with pytest.raises(ValueError, match=r"O lasts 1.1 s at speed 0.9, .* leave this speed out"):
        train(model, processor, speech, speech, tmp_path, settings(speeds=(0.9, 1.0)))


@pytest.mark.parametrize("name", TRANSDUCERS)
def test_a_text_that_its_frames_cannot_say_is_rejected(loaded, name):
    model, processor = loaded(name)
    most = model.config.max_symbols_per_step * frames_of(model)(8_000)
    rows = spoken("A " * (most // 2)), spoken("T " * 2 * most)
    found = Corpus("noise", "train", rows).usable(processor, frames_of(model))
    assert [one.id for one in found] == [rows[0].id]
    assert f"text too long for its audio: {2 * most * 1} tokens, 0.50 s give at most {most}" in found.rejected[0].reason


# ---- transcripts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_transcripts_of_a_batch_are_those_of_each_utterance_alone(loaded, name):
    model, processor = loaded(name)
    speech = tiny.corpus(8)
    together, apart = ([row["hypothesis"] for row in transcribe(model, processor, speech, s)] for s in (60.0, 0.01))
    assert together == apart and len(set(together)) > 1


@pytest.mark.parametrize("name", HEADS)
def test_recorded_logits_are_of_the_tokens_of_the_reference(loaded, name):
    model, processor = loaded(name)
    speech, recorded = tiny.corpus(4), {}
    transcribe(model, processor, speech, record=recorded.__setitem__)
    assert sorted(recorded) == [0, 1, 2, 3]
    for index, utterance in enumerate(speech):
        tokens = len(label_ids(utterance.text, processor))
        frames = frames_of(model)(round(16_000 * utterance.seconds))
        points = tokens if name == "whisper" else frames * (tokens + 1)
        assert recorded[index].shape == (points, model.config.vocab_size)
        alone = spoken_logits(model, batch_of(processor, speech[index : index + 1]))[0]
        torch.testing.assert_close(recorded[index], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["whisper", "nemotron"])  # a parakeet's features are padded by a frame
def test_a_benchmark_times_what_is_written(loaded, name):
    model, processor = loaded(name)
    speech = tiny.corpus(3)
    for row, utterance in zip(transcribe(model, processor, speech), speech, strict=True):
        inputs = inputs_of_each({"it": model}, processor, utterance.audio(), torch.device("cpu"))
        with torch.no_grad():
            ids = best_symbols(model, processor, inputs["it"], utterance.seconds)
        assert family_of(model.config).head.texts(processor, ids.tolist()) == [row["hypothesis"]]


def test_what_does_not_fit_a_head_is_not_timed(loaded):
    model, processor = loaded("whisper")
    with pytest.raises(ValueError, match="benchmark_seconds times lengths of audio, and whisper has one"):
        benchmark_lengths({"it": model}, processor, tiny.corpus(1), [0.5])
    with pytest.raises(ValueError, match="benchmark_compiled times models with CTC, and whisper has none"):
        compiled_beside_eager({"it": model}, processor, tiny.corpus(1), backend="eager")


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taught", [{}, {"kl_weight": 1.0, "hidden_weight": 1.0}], ids=["alone", "taught"])
@pytest.mark.parametrize("name", HEADS)
def test_training_lowers_the_loss_and_its_word_errors_are_those_of_evaluation(loaded, tmp_path, name, taught):
    (model, processor), teacher = loaded(name), loaded(name)[0]
    if taught:
        with torch.no_grad():
            for module in attention_modules(model):
                for values in module.parameters():
                    values.mul_(0.5)
    speech = tiny.corpus(8)
    result = train(model, processor, speech, speech, tmp_path, settings(epochs=3, **taught), taught and teacher)
    losses = [row["eval_loss"] for row in result.history if "eval_loss" in row]
    assert losses[-1] < losses[0]
    assert result.best_wer == evaluate(model, processor, speech).wer


def test_a_whisper_learns_on_what_it_writes_itself(loaded, tmp_path):
    (model, processor), teacher = loaded("whisper"), loaded("whisper")[0]
    batch = batch_of(processor, tiny.corpus(3))
    labels = Decoder().own_labels(model, processor, batch)
    written = transcribe(model, processor, tiny.corpus(3))
    assert Decoder().texts(processor, [[token for token in row if token >= 0] for row in labels.tolist()]) == [
        row["hypothesis"] for row in written
    ]
    prompt = processor.tokenizer.prefix_tokens[1:]
    ends = [[token for token in row if token >= 0][-1] for row in labels.tolist()]
    assert labels[:, : len(prompt)].tolist() == [prompt] * 3 and set(ends) == {processor.tokenizer.eos_token_id}
    model.model.decoder.layers[0].self_attn.v_proj.weight.data *= 0.5
    how = settings(ctc_weight=0.0, kl_weight=1.0, on_policy=1.0, epochs=4, trainable="attention")
    result = train(model, processor, tiny.corpus(8), tiny.corpus(8), tmp_path, how, teacher)
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert losses[-1] < losses[0]


def test_who_writes_no_tokens_cannot_learn_on_them(loaded, tmp_path):
    (model, processor), teacher = loaded("parakeet_rnnt"), loaded("parakeet_rnnt")[0]
    with pytest.raises(ValueError, match="on_policy is for a model with a decoder and a teacher"):
        how = settings(kl_weight=1.0, on_policy=1.0)
        train(model, processor, tiny.corpus(4), tiny.corpus(2), tmp_path, how, teacher)


def test_a_language_is_told_to_who_knows_several(folders, loaded):
    with pytest.raises(ValueError, match="language is 'german', but a parakeet_rnnt is told none"):
        asrlib.load(folders / "parakeet_rnnt", language="german")
    model, processor = asrlib.load(folders / "whisper", language="English")
    assert Decoder().prompt(model, processor)["language"] == "english"
    model.generation_config.is_multilingual = False
    with pytest.raises(ValueError, match="this model writes English alone"):
        Decoder().prepare(model, processor, "german")
    Decoder().prepare(model, processor, "en")


def test_each_row_of_a_manifest_may_name_its_language(loaded, tmp_path, monkeypatch):
    model, processor = loaded("whisper")
    german = len(processor.tokenizer)
    processor.tokenizer.add_tokens("<|de|>", special_tokens=True)
    model.resize_token_embeddings(german + 1)
    model.generation_config.lang_to_id |= {"<|de|>": german}
    for name in "abcde":
        soundfile.write(tmp_path / f"{name}.flac", np.random.default_rng(0).uniform(-0.1, 0.1, 8_000), 16_000)
    rows = [("a", "A", "en"), ("b", "A.", "German"), ("c", "E", None), ("d", "E", "klingon"), ("e", "A.", "de")]
    lines = [{"audio": f"{name}.flac", "text": text, "language": language} for name, text, language in rows]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    speech = asrlib.open_corpus(tmp_path / "m.jsonl").usable(processor, frames_of(model))
    assert [u.language for u in speech] == ["en", "German", None, "de"]
    assert [row.reason for row in speech.rejected] == ["language is 'klingon', which this model does not know"]
    generate = Mock(wraps=model.generate)
    monkeypatch.setattr(model, "generate", generate)
    scored = transcribe(model, processor, speech)
    told = generate.call_args.kwargs["language"]
    assert told == ["<|en|>", "<|de|>", "<|en|>", "<|de|>"]
    assert [row["normaliser"] for row in scored] == ["english", "basic", "english", "basic"]
    batch = batch_of(processor, speech)
    assert batch["labels"][:, 0].tolist() == processor.tokenizer.convert_tokens_to_ids(told)
    assert torch.equal(Decoder().own_labels(model, processor, batch)[:, :3], batch["labels"][:, :3])


def test_a_transcript_has_no_more_tokens_than_its_seconds_allow(loaded):
    model, processor = loaded("whisper")
    head, seconds = Decoder(), torch.tensor([0.5, 1.0, 12.0])
    assert head.most_tokens({}, seconds).tolist() == [15, 20, 130]
    assert head.most_tokens({"language": "german"}, seconds).tolist() == [45, 60, 390]
    assert head.most_tokens({"language": ["<|en|>", "<|de|>", "en"]}, seconds).tolist() == [15, 60, 130]
    end = model.generation_config.eos_token_id
    model.generation_config.suppress_tokens = [end]  # it would write for ever
    ids = head.recognised(model, processor, batch_of(processor, [spoken("A", 0.1), spoken("E", 0.9)]), None, None)
    assert (ids != end).sum(-1).tolist() == [11, 19] == head.most_tokens({}, torch.tensor([0.1, 0.9])).tolist()


def test_a_whisper_that_wants_to_write_timestamps_reads_its_window_once(loaded):
    model, processor = loaded("whisper")
    words = len(processor.tokenizer)
    processor.tokenizer.add_tokens(["<|0.00|>", "<|0.02|>"], special_tokens=True)
    model.resize_token_embeddings(words + 2)
    model.proj_out.register_forward_hook(
        lambda module, given, logits: logits.index_add(
            -1, torch.tensor([words, words + 1]), torch.full((*logits.shape[:-1], 2), 1e4)
        )
    )
    passes = []

    def counted(*_):
        passes.append(1)
        assert len(passes) <= 32, "the window is read again"

    model.model.decoder.register_forward_hook(counted)
    ids = Decoder().recognised(model, processor, batch_of(processor, [spoken("A", 0.5)]), None, None)
    assert ids.max() < words and passes
    assert suppressed_tokens(model) == [words, words + 1]
    model.generation_config.suppress_tokens = [3]
    assert suppressed_tokens(model) == [3, words, words + 1]


def test_a_trained_whisper_keeps_what_it_attends_to_while_it_writes(loaded, tmp_path):
    model, processor = loaded("whisper")
    train(model, processor, tiny.corpus(4), tiny.corpus(2), tmp_path, settings(epochs=1))
    assert model.config.use_cache


def test_neither_case_nor_white_space_counts_in_training(processors):
    tokenizer = processors["whisper"]
    said, wanted = (np.array([label_ids(text, tokenizer)]) for text in ("a e", "A E"))
    assert training._word_error_rate(EvalPrediction(said, wanted), tokenizer, Decoder()) == 0.0
    wrong = np.array([label_ids("a o", tokenizer)])
    assert training._word_error_rate(EvalPrediction(wrong, wanted), tokenizer, Decoder()) == 0.5
    odd = np.array([label_ids("A\x1cE", tokenizer)])  # white space too, as in the tables
    assert training._word_error_rate(EvalPrediction(odd, wanted), tokenizer, Decoder()) == 0.0


@pytest.mark.parametrize("name", HEADS)
def test_accumulated_batches_are_averaged(loaded, tmp_path, name):
    same = Corpus("noise", "train", tiny.corpus(1).utterances * 4)
    norms = []
    for count in (1, 4):
        model, processor = loaded(name)
        model.config.dropout = 0.0
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        padded = sum(SpeechDataset(same, processor).seconds)
        how = dict(epochs=1, batch_seconds=1.001 * padded / count, gradient_accumulation=count, trainable="attention")
        result = train(model, processor, same, same[:1], tmp_path / str(count), settings(**how))
        assert result.steps == 1
        norms.append([(row["loss"], row["grad_norm"]) for row in result.history if "loss" in row])
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-3)


def test_a_whisper_interrupted_ends_with_the_same_weights(loaded, tmp_path, monkeypatch):
    original = SpeechTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    def run(folder):
        model, processor = loaded("whisper")
        model.config.dropout = 0.1
        result = train(model, processor, tiny.corpus(8), tiny.corpus(2), folder, settings(batch_seconds=3.0))
        return result, load_file(last_checkpoint(folder) / "model.safetensors"), model.state_dict()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SpeechTrainer, "training_step", interrupted)
        run(tmp_path / "cut")
    assert last_checkpoint(tmp_path / "cut") is not None
    (cut, *resumed), (whole, *undisturbed) = run(tmp_path / "cut"), run(tmp_path / "whole")
    assert cut.steps == whole.steps > 3 and cut.best_wer == whole.best_wer
    for ours, theirs in zip(resumed, undisturbed, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", HEADS)
def test_parts_are_known_without_a_model(loaded, name):
    model, _ = loaded(name)
    family = family_of(model.config)
    assert tuple(attention_parts(model)) == family.part_names and set(family.cached_parts) <= set(family.part_names)


# ---- attention ---------------------------------------------------------------------------------------------


def test_attention_of_a_decoder_is_in_the_order_of_its_modules(loaded):
    model, processor = loaded("whisper")
    batch = batch_of(processor, tiny.corpus(1))
    tokens, heads = batch["labels"].shape[1], model.config.encoder_attention_heads
    shapes = {"encoder": (50, 50), "decoder": (tokens, tokens), "cross": (tokens, 50)}
    weights = attention_of(model, batch)
    expected = [(heads, *shapes[part]) for part, modules in attention_parts(model).items() for _ in modules]
    assert [tuple(one.shape) for one in weights] == expected
    assert all(torch.allclose(one.sum(-1), torch.ones(())) for one in weights)


@pytest.mark.parametrize("name", HEADS)
def test_without_attention_a_model_says_something_else(loaded, name):
    model, processor = loaded(name)
    batch = batch_of(processor, tiny.corpus(2))
    with torch.no_grad():
        before = torch.cat(spoken_logits(model, batch))
        with zero_attention(model):
            without = torch.cat(spoken_logits(model, batch))
            assert len(transcribe(model, processor, tiny.corpus(2))) == 2
        after = torch.cat(spoken_logits(model, batch))
    assert not torch.allclose(before, without) and torch.equal(before, after)
