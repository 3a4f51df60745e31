"""Transcripts do not depend on how they were batched; errors equal the ones counted by hand."""

import io

import numpy as np
import pytest
import soundfile
import torch
from commands import command
from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC

from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.corpus import Corpus, Utterance
from asrlib.data.text import normaliser_of
from asrlib.measuring.transcribing import evaluate, in_own_words, transcribe
from asrlib.measuring.word_errors import load_predictions, score, write_predictions
from asrlib.models.inference import choose_device, inference, padding_silenced, zero_attention
from asrlib.models.registry import attention_modules, frame_counts
from asrlib.models.scratch import new_processor

main = command("compare")

SECONDS = (0.5, 1.3, 0.8, 2.0, 0.8)  # neither sorted nor distinct


def conformer(**changes) -> Wav2Vec2ConformerForCTC:
    torch.manual_seed(0)
    config = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "conv_dim": [8, 8, 8], "conv_kernel": [10, 8, 4], "conv_stride": [10, 8, 4],
        "feat_extract_norm": "layer", "conv_depthwise_kernel_size": 7, "position_embeddings_type": "relative",
        "max_source_positions": 200, "num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 2,
        "vocab_size": 32,
        "initializer_range": 0.5,  # wide enough that random logits change from frame to frame
    }  # fmt: skip
    return Wav2Vec2ConformerForCTC(Wav2Vec2ConformerConfig(**config | changes)).eval()


def speech(seconds: float, seed: int) -> io.BytesIO:
    noise = np.random.default_rng(seed).normal(scale=0.1, size=round(seconds * SAMPLE_RATE))
    file = io.BytesIO()
    soundfile.write(file, noise, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    file.seek(0)
    return file


def corpus_of(durations=SECONDS, text="The  Cat <script> sat") -> Corpus:
    utterances = tuple(
        Utterance(f"u{i}", f"{text} {i}", f"s{i % 2}", s, "memory", lambda i=i, s=s: speech(s, i))
        for i, s in enumerate(durations)
    )
    return Corpus("noise", "test", utterances)


@pytest.fixture(scope="module")
def model():
    return conformer()


@pytest.fixture(scope="module")
def processor():
    return new_processor()


@pytest.fixture
def corpus():
    return corpus_of()


def alone(model, processor, utterance) -> str:
    """The transcript as transformers' documentation makes it: one utterance, no padding, no mask."""
    inputs = processor(utterance.audio(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
    with torch.no_grad():
        return processor.batch_decode(model(inputs.input_values).logits.argmax(-1))[0]


def pairs(*texts: tuple[str, str], first_id: int = 0) -> list[dict]:
    return [
        {"id": f"u{i}", "speaker": "s", "seconds": 1.5, "reference": reference, "hypothesis": hypothesis}
        for i, (reference, hypothesis) in enumerate(texts, start=first_id)
    ]


def edit_distance(a: list, b: list) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def babble(utterances: int, seed: int) -> list[dict]:
    generator = np.random.default_rng(seed)

    def sentence(shortest: int) -> str:
        return " ".join(generator.choice(["a", "bee", "sea", "deed"], size=generator.integers(shortest, 7)))

    return pairs(*[(sentence(1), sentence(0)) for _ in range(utterances)])


# ---- transcripts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_seconds", [0.1, 2.7, 100])
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_transcripts_are_those_of_each_utterance_alone(processor, corpus, norm, batch_seconds):
    model = conformer(feat_extract_norm=norm)
    expected = [alone(model, processor, utterance) for utterance in corpus]
    assert len(set(expected)) == len(expected), "all alike: the test would see no mistake"
    rows = transcribe(model, processor, corpus, batch_seconds=batch_seconds)
    assert [row["hypothesis"] for row in rows] == expected
    assert [row["id"] for row in rows] == [u.id for u in corpus]


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_the_logits_behind_the_transcripts_can_be_recorded(processor, corpus, norm):
    model = conformer(feat_extract_norm=norm)
    recorded = {}
    rows = transcribe(model, processor, corpus, batch_seconds=4, record=recorded.__setitem__)
    assert sorted(recorded) == list(range(len(corpus)))
    for i, utterance in enumerate(corpus):
        inputs = processor(utterance.audio(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(recorded[i], model(inputs.input_values).logits[0], atol=1e-4, rtol=1e-4)
        assert processor.decode(recorded[i].argmax(-1)) == rows[i]["hypothesis"]


@pytest.mark.parametrize("positions", ["relative", "rotary", None])
def test_padding_changes_logits_unless_it_is_silenced(processor, positions):
    model = conformer(position_embeddings_type=positions)
    short, long = torch.randn(1, 6_000), torch.randn(1, 16_000)
    inputs = torch.cat([torch.nn.functional.pad(short, (0, 10_000)), long])
    mask = (torch.arange(16_000) < torch.tensor([[6_000], [16_000]])).long()
    frames = frame_counts(model, mask.sum(-1))
    with torch.no_grad():
        expected = model(short).logits[0]
        leaking = model(inputs, attention_mask=mask).logits[0, : len(expected)]
        with padding_silenced(model, frames):
            silenced = model(inputs, attention_mask=mask).logits[0, : len(expected)]
        after = model(inputs, attention_mask=mask).logits[0, : len(expected)]
    torch.testing.assert_close(silenced, expected, atol=1e-5, rtol=1e-4)
    assert (leaking - expected).abs().max() > 0.01
    assert torch.equal(after, leaking)


def test_the_model_leaves_as_it_came(processor, corpus):
    model = conformer()
    model.train()
    frozen = model.wav2vec2_conformer.encoder.layers[0].conv_module.batch_norm
    frozen.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, processor, corpus, precision="bf16")
    assert model.training and not frozen.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    x = torch.ones(1, 8_000)
    assert torch.equal(model(x).logits, conformer()(x).logits), "bf16 left something rounded behind"


@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_a_model_can_be_trained_after_it_was_evaluated(processor, corpus, positions):
    model = conformer(position_embeddings_type=positions, max_source_positions=2)  # tables have to grow
    evaluate(model, processor, corpus)
    as_long_as_the_longest = torch.ones(1, 32_000)  # what was cached for it is used
    model.train()(as_long_as_the_longest).logits.sum().backward()
    assert all(attention.linear_k.weight.grad is not None for attention in attention_modules(model))


def test_batches_are_bounded_by_their_padded_audio(model, processor, corpus):
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, _, inputs: shapes.append(tuple(inputs[module.main_input_name].shape)), with_kwargs=True
    )
    transcribe(model, processor, corpus, batch_seconds=2.7)
    hook.remove()
    assert sorted(shapes) == [(1, 32_000), (2, 12_800), (2, 20_800)]


def test_an_error_restores_the_model_too():
    model = conformer().train()
    with pytest.raises(RuntimeError), inference(model, device=torch.device("cpu")):
        assert not model.training
        raise RuntimeError
    assert model.training


@pytest.mark.parametrize("device", [None, "auto", "cpu"])
def test_the_device_is_a_choice(model, device):
    chosen = choose_device(device, model)
    assert chosen.type == ("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")


def test_unknown_precision_is_refused(model, processor, corpus):
    with pytest.raises(ValueError, match="'int3': choose one of fp32, bf16, fp16"):
        transcribe(model, processor, corpus, precision="int3")


def test_without_attention_is_the_model_whose_attention_writes_zeros(model):
    silent = conformer()
    for attention in attention_modules(silent):
        torch.nn.init.zeros_(attention.linear_out.weight)
        torch.nn.init.zeros_(attention.linear_out.bias)
    x = torch.randn(1, 8_000)
    normal = model(x).logits
    with zero_attention(model):
        assert torch.equal(model(x).logits, silent(x).logits)
    assert torch.equal(model(x).logits, normal)
    assert not torch.allclose(normal, silent(x).logits)


# ---- predictions on disk -----------------------------------------------------------------------------------


def test_predictions_are_written_raw_and_read_back(model, processor, corpus, tmp_path):
    path = tmp_path / "predictions" / "test.jsonl"
    result = evaluate(model, processor, corpus, predictions=path)
    rows = load_predictions(path)
    assert rows == result.predictions
    assert [row["reference"] for row in rows] == [u.text for u in corpus]
    assert list(rows[0]) == ["id", "speaker", "seconds", "reference", "hypothesis"]
    assert score(rows).as_metrics() == result.as_metrics()
    assert [p.name for p in path.parent.iterdir()] == ["test.jsonl"]


def test_any_text_survives_the_file(tmp_path):
    rows = pairs(("naïve \u2028 “quoted”\n", ""), ("日本", "\\ \t"))
    write_predictions(tmp_path / "p.jsonl", rows)
    assert load_predictions(tmp_path / "p.jsonl") == rows


@pytest.mark.parametrize("line", ['{"id": "u1", "ref', "[]", '{"id": "u1", "reference": "a"}'])
def test_a_line_that_is_no_transcript_is_named(tmp_path, line):
    write_predictions(tmp_path / "p.jsonl", pairs(("a", "b")))
    with open(tmp_path / "p.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .*p\.jsonl is no transcript"):
        load_predictions(tmp_path / "p.jsonl")


# ---- word errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "substitutions", "deletions", "insertions", "words", "cer"),
    [
        ([("the cat sat", "the cat sat")], 0, 0, 0, 3, 0),
        ([("the cat sat", "the bat sat")], 1, 0, 0, 3, 1 / 11),
        ([("the cat sat", "the sat")], 0, 1, 0, 3, 4 / 11),
        ([("the cat sat", "the big cat sat")], 0, 0, 1, 3, 4 / 11),
        ([("the cat sat", "")], 0, 3, 0, 3, 1),
        ([("a b", "x y z w")], 2, 0, 2, 2, 6 / 3),
        ([("THE  CAT ", "the cat")], 0, 0, 0, 2, 0),  # case and spaces do not count
        ([("STRASSE", "straße")], 0, 0, 0, 1, 0),
        ([("it's", "its")], 1, 0, 0, 1, 1 / 4),  # punctuation does
        ([("a b c", "a b c"), ("", "no one spoke")], 0, 0, 3, 3, 12 / 5),
        ([("a b c d", "a b c d"), ("e", "f")], 1, 0, 0, 5, 1 / 8),  # no mean of the utterances' rates
    ],
)
def test_errors_counted_by_hand(texts, substitutions, deletions, insertions, words, cer):
    result = score(pairs(*texts))
    assert result.substitutions == substitutions
    assert result.deletions == deletions
    assert result.insertions == insertions
    assert result.words == words
    assert result.wer == pytest.approx((substitutions + deletions + insertions) / words)
    assert result.cer == pytest.approx(cer)
    assert result.seconds_audio == 1.5 * len(texts)


def test_errors_of_every_utterance_against_dynamic_programming():
    rows = babble(40, seed=1)
    result = score(rows)
    errors = [edit_distance(r["reference"].split(), r["hypothesis"].split()) for r in rows]
    letters = [edit_distance(list(r["reference"]), list(r["hypothesis"])) for r in rows]
    assert result.errors_N.tolist() == errors
    assert result.substitutions + result.deletions + result.insertions == sum(errors)
    assert result.wer == pytest.approx(sum(errors) / sum(len(r["reference"].split()) for r in rows))
    assert result.cer == pytest.approx(sum(letters) / sum(len(r["reference"]) for r in rows))


@pytest.mark.parametrize("rows", [[], pairs(("", "noise"), (" ", ""))])
def test_no_reference_word_is_an_error(rows):
    with pytest.raises(ValueError, match=f"no word in the references of {len(rows)} utterances"):
        score(rows)


def test_metrics_are_plain_data():
    import json

    metrics = score(babble(5, seed=0)).as_metrics()
    assert json.loads(json.dumps(metrics)) == metrics
    assert metrics["wer_interval"][0] <= metrics["wer"] <= metrics["wer_interval"][1]
    assert {"wer", "cer", "substitutions", "deletions", "insertions", "words", "utterances"} < set(metrics)


def test_two_files_of_transcripts_are_compared_from_the_command_line(tmp_path, capsys):
    said = [("ONE TWO THREE FOUR", "ONE TWO THREE FOUR"), ("FIVE SIX", "FIVE")] * 4
    rows = [
        {"id": str(i), "speaker": "s", "seconds": 1.0, "reference": said[i][0], "hypothesis": said[i][1]}
        for i in range(len(said))
    ]
    write_predictions(tmp_path / "a.jsonl", rows)
    write_predictions(tmp_path / "b.jsonl", [{**row, "hypothesis": row["reference"]} for row in rows])
    assert main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 0
    a, b, difference, matched = capsys.readouterr().out.splitlines()
    assert a.startswith("A: 16.67 % (") and b == "B: 0.00 % (0.00–0.00)"
    assert difference.startswith("B − A: −16.67 points (") and "p = 0.0" in difference
    assert matched == "matched pairs: z = 0.000, p = 1, 4 segments"  # all alike: no spread to compare with
    write_predictions(tmp_path / "b.jsonl", [{**row, "speaker": str(i)} for i, row in enumerate(rows)])
    assert main([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]) == 0
    assert capsys.readouterr().out.splitlines()[3] == "B − A: ±0.00 points (±0.00 to ±0.00; p = 1), over speakers"


# ---- text with case and punctuation --------------------------------------------------------------------------


def transcripts(*pairs: tuple[str, str], normaliser: str | None = "english") -> list[dict]:
    """Of (reference, hypothesis)."""
    form = {"normaliser": normaliser} if normaliser else {}
    return [
        {"id": f"{i}", "speaker": "s", "seconds": 1.0, "reference": reference, "hypothesis": hypothesis} | form
        for i, (reference, hypothesis) in enumerate(pairs)
    ]


def test_a_normalised_transcript_is_counted_after_normalisation_and_once_more_as_it_stands():
    result = score(transcripts(("MISTER BROWN COULD NOT COLOUR IT", "Mr. Brown couldn't color it!")))
    assert (result.wer, result.words) == (0.0, 6)
    assert result.others["raw WER %"] == pytest.approx(100 * 5 / 6)
    assert "normalised WER %" not in result.others
    raw = score(transcripts(("MISTER BROWN COULD NOT COLOUR IT", "Mr. Brown couldn't color it!"), normaliser=None))
    assert raw.wer == pytest.approx(5 / 6) and raw.others == {"normalised WER %": 0.0}


def test_other_languages_are_not_judged_by_the_rules_of_english():
    pairs = [("Schon zwanzig Farben, mister", "schön zwanzig farben mister")]
    assert score(transcripts(*pairs, normaliser="basic")).substitutions == 1
    assert score(transcripts(("colour", "color"), normaliser="basic")).wer == 1.0


def test_the_vocabulary_and_the_language_choose_the_normaliser(processor):
    import family_models

    whisper = family_models.processor_of("whisper")
    assert normaliser_of(processor) is None
    whisper.tokenizer.set_prefix_tokens(language="english")
    assert normaliser_of(whisper) == "english"
    whisper.tokenizer.language = None
    assert normaliser_of(whisper) == "english"
    whisper.tokenizer.language = "german"
    assert normaliser_of(whisper) == "basic"
    whisper.tokenizer.language = "english"


def test_loops_are_counted_where_the_reference_has_none():
    text = "and the cat sat"
    looping = ["and the cat the cat the cat the cat", "no no no no no", "and the cat and the cat and the cat sat"]
    assert score(transcripts(*((text, hypothesis) for hypothesis in looping))).others["loops"] == 2
    assert score(transcripts(("no no no no", "no no no no"))).others["loops"] == 0


def test_a_corpus_in_a_models_own_words_lacks_what_it_does_not_write(model, processor):
    speech = corpus_of()
    heard = [prediction["hypothesis"] for prediction in transcribe(model, processor, speech)]
    own = in_own_words(model, processor, speech)
    assert [utterance.text for utterance in own] == [text for text in heard if text]
    assert own.fingerprint() != speech.fingerprint()
