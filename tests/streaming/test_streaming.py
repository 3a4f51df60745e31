"""Speech recognised as it comes in is what a full pass gives that hears no more, and holds no more than it says."""

import re
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import tiny
import torch
from commands import command

from asrlib.attention.chunks import Chunks
from asrlib.data.audio import SAMPLE_RATE, UnusableAudio, read_audio, read_pieces
from asrlib.models.registry import family_of, frame_counts, frames_of
from asrlib.models.scratch import new_processor
from asrlib.streaming.streams import (
    AudioFrames,
    Recognition,
    RunningNormaliser,
    Streams,
    Transcript,
    chunked_pass,
    chunks_of,
    stream,
)

main = command("stream")

VARIANTS = tiny.variants()
CHUNKINGS = [Chunks(1, 3), Chunks(3, 4, 2), Chunks(4), Chunks(5, 0, 1), Chunks(2, 7, 5), Chunks(100), Chunks(9, 0, 4)]
CLOSE = dict(rtol=0, atol=1e-5)


def model_and_batch(name: str, encoder: str = "conformer", causal: bool = False):
    if name in VARIANTS:
        return tiny.encoder(encoder, causal=causal, **VARIANTS[name]), tiny.features()
    layout = name.removeprefix("wav2vec2").strip()
    return (tiny.latent_conformer(layout) if layout else tiny.conformer()), tiny.padded_batch()


def both(model, batch, chunks: Chunks, cache: str = "float32") -> tuple[torch.Tensor, torch.Tensor]:
    """(streamed, full pass): logits [frames of speech, V]."""
    inputs, mask = batch[model.main_input_name], batch["attention_mask"]
    ours_BTV, streams = tiny.streamed(model, inputs, chunks, mask, cache)
    full_BTV = chunked_pass(model, inputs, chunks, mask, cache)
    kept_BT = torch.arange(ours_BTV.shape[1]) < frame_counts(model, mask.sum(-1))[:, None]
    assert ours_BTV.shape == full_BTV.shape and streams.frames == ours_BTV.shape[1]
    return ours_BTV[kept_BT], full_BTV[kept_BT]


# ---- logits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("encoder", ["conformer", "branchformer"])
def test_streaming_is_the_full_pass_in_chunks(encoder, name, causal):
    model, batch = model_and_batch(name, encoder, causal)
    for chunks in CHUNKINGS:
        torch.testing.assert_close(*both(model, batch, chunks), **CLOSE)


@pytest.mark.parametrize("chunks", CHUNKINGS, ids=str)
@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2 joint", "wav2vec2 split"])
def test_streaming_of_transformers_conformer_is_the_full_pass_in_chunks(name, chunks):
    torch.testing.assert_close(*both(*model_and_batch(name), chunks), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["mha", "mla split", "linear", "wav2vec2"])
def test_streaming_without_a_mask_is_the_same(name):
    model, batch = model_and_batch(name)
    inputs, chunks = batch[model.main_input_name][:1], Chunks(3, 4, 2)
    expected = chunked_pass(model, inputs, chunks)
    torch.testing.assert_close(tiny.streamed(model, inputs, chunks)[0], expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        tiny.streamed(model, inputs, chunks, batch["attention_mask"][:1])[0], expected, rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("name", ["mha", "mla", "gqa", "linear", "wav2vec2 joint"])
def test_streaming_with_weights_of_attention_is_the_same(name):
    model, batch = model_and_batch(name)
    plain, _ = both(model, batch, Chunks(3, 4, 2))
    model.set_attn_implementation("eager")
    torch.testing.assert_close(both(model, batch, Chunks(3, 4, 2))[0], plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize("cache", ["bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("name", ["mha", "mla", "mla_simple split", "gqa", "wav2vec2", "wav2vec2 split"])
def test_a_smaller_cache_is_the_full_pass_with_it(name, cache):
    """And not that without it."""
    model, batch = model_and_batch(name)
    for chunks in (Chunks(1, 3), Chunks(3, 4, 2), Chunks(4)):
        ours, full = both(model, batch, chunks, cache)
        # Both round what is off by 1e-7, now and then to another step.
        assert (ours - full).abs().median() < 1e-5 and (ours - full).norm() < 0.2 * (
            ours - both(model, batch, chunks)[0]
        ).norm()


def test_smaller_caches_are_further_off_and_none_is_far():
    model, batch = model_and_batch("mha")
    exact, _ = both(model, batch, Chunks(3, 4))
    errors = [
        float((both(model, batch, Chunks(3, 4), cache)[0] - exact).norm() / exact.norm())
        for cache in ("float32", "float16", "bfloat16", "int8", "int4")
    ]
    assert errors[0] == 0 and errors[1] < errors[2] and errors[3] < errors[4]
    assert 1e-6 < errors[1] < 1e-3 and errors[2] < 0.02 and errors[3] < 0.05 and errors[4] < 0.5


def test_linear_attention_is_the_same_in_any_format():
    model, batch = model_and_batch("linear")
    assert torch.equal(both(model, batch, Chunks(3), "int4")[0], both(model, batch, Chunks(3))[0])


def test_streams_leave_the_model_as_it_was():
    model, batch = model_and_batch("mha")
    inputs = batch["input_features"]
    with torch.no_grad():
        before = model(inputs).logits
        tiny.streamed(model, inputs, Chunks(3, 4, 2))
        assert torch.equal(model(inputs).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    broken = Streams(model, Chunks(3))
    with pytest.raises(RuntimeError):
        broken.step(torch.zeros(1, 3, 5))  # no such width
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_two_streams_of_one_model_do_not_hear_each_other():
    model, batch = model_and_batch("mla_simple")
    with torch.no_grad():
        x_BTD = model.frames(batch["input_features"])
    chunks = Chunks(4, 6)
    alone = [tiny.streamed(model, batch["input_features"][one, None], chunks)[0] for one in (0, 1)]
    streams, logits = [Streams(model, chunks) for _ in range(2)], [[], []]
    for first in range(0, 14, 4):
        for one in (0, 1):
            logits[one].append(streams[one].step(x_BTD[one, None, first : first + 4]))
    for ours, theirs in zip(logits, alone, strict=True):
        torch.testing.assert_close(torch.cat(ours, dim=1), theirs, **CLOSE)


# ---- what cannot stream ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tiny.conformer().train(), r"the model is in training mode: call model\.eval\(\)"),
        (lambda: tiny.encoder().train(), "training mode"),
        (lambda: tiny.conformer("rotary"), "positions are rotary: only relative ones can stream"),
        (lambda: tiny.conformer(None), "positions are None"),
        (
            lambda: tiny.conformer(feat_extract_norm="group"),
            "normalises over .*: only feat_extract_norm: layer can stream",
        ),
        (
            lambda: tiny.conformer(add_adapter=True, output_hidden_size=16),
            "the adapter behind the encoder cannot stream",
        ),
    ],
)
def test_a_model_that_cannot_stream_is_refused(make, said, processor):
    model = make()
    for attempt in (
        lambda: Streams(model, Chunks(3)),
        lambda: chunked_pass(model, torch.zeros(1, 4000), Chunks(3)),
        lambda: list(stream(model, processor, [np.zeros(4000, np.float32)])),
    ):
        with pytest.raises(ValueError, match=said):
            attempt()


def test_an_unknown_format_is_refused(processor):
    for attempt in (
        lambda: Streams(tiny.conformer(), Chunks(3), "int5"),
        lambda: chunked_pass(tiny.conformer(), torch.zeros(1, 4000), Chunks(3), cache="int5"),
        lambda: list(stream(tiny.conformer(), processor, [np.zeros(4000, np.float32)], cache="int5")),
    ):
        with pytest.raises(ValueError, match="'int5' is no number format of a cache: choose one of float32"):
            attempt()


@pytest.mark.parametrize(
    ("piece", "said"),
    [
        (
            np.zeros(100, np.int16),
            r"a piece of audio is int16 \[100\]: give floats from −1 to 1, \[samples\], mono, 16000",
        ),
        (np.zeros((100, 2), np.float32), r"a piece of audio is float32 \[100, 2\]"),
        (np.float32(0.5), r"a piece of audio is float32 \[\]"),
        (np.zeros(4, np.complex64), "a piece of audio is complex64"),
        (np.array([0.0, np.nan], np.float32), "a piece of audio holds NaN or infinite samples"),
        (np.array([0.0, -np.inf], np.float32), "a piece of audio holds NaN or infinite samples"),
    ],
)
def test_what_is_no_audio_is_refused(piece, said, processor):
    with pytest.raises(UnusableAudio, match=said):
        list(stream(tiny.conformer(), processor, [np.zeros(1000, np.float32), piece]))


# ---- audio -------------------------------------------------------------------------------------------------


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Louder and quieter by turns, with an offset."""
    random = np.random.default_rng(seed)
    samples = random.normal(size=round(seconds * SAMPLE_RATE))
    return (0.02 + 0.1 * samples * (1.2 + np.sin(np.arange(len(samples)) / 1000))).astype(np.float32)


def cut(samples: np.ndarray, lengths) -> list[np.ndarray]:
    """Pieces of these lengths in turn, until nothing is left."""
    pieces, first = [], 0
    while first < len(samples):
        length = lengths[len(pieces) % len(lengths)]
        pieces.append(samples[first : first + length])
        first += length
    return pieces


def test_the_running_normaliser_is_its_formula():
    samples = noise(0.05)
    ours = RunningNormaliser()(samples)
    assert ours.dtype == np.float32
    wide = samples.astype(np.float64)
    for s in [0, 1, 2, 57, 799]:
        count = 16_000 + s + 1
        mean = sum(wide[: s + 1]) / count
        variance = (16_000 * 0.05**2 + sum(x * x for x in wide[: s + 1])) / count - mean**2
        assert ours[s] == pytest.approx((wide[s] - mean) / (variance + 1e-7) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("lengths", [[1], [7, 0, 300], [799], [10_000]])
def test_the_running_normaliser_does_not_know_pieces(lengths):
    samples = noise(0.3)
    whole, normaliser = RunningNormaliser()(samples), RunningNormaliser()
    pieces = [normaliser(piece) for piece in cut(samples, lengths)]
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=1e-6, atol=1e-6)


def test_the_running_normaliser_ends_near_that_of_the_whole_recording():
    samples = 0.4 * noise(30)
    ours = RunningNormaliser()(samples)[-16_000:]
    whole = ((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7))[-16_000:]
    assert np.abs(ours - whole).max() < 0.2 and np.isfinite(RunningNormaliser()(np.zeros(9, np.float32))).all()
    assert RunningNormaliser()(np.zeros(0, np.float32)).shape == (0,)


def heard(kind: str):
    """(model, processor) of a kind of input."""
    if kind == "samples":
        return tiny.conformer(), new_processor()
    return tiny.encoder("conformer", "mla_simple"), new_processor("conformer", tiny.MEL_BINS)


def in_chunks(model, processor, samples: np.ndarray, chunks: Chunks, cache: str = "float32") -> torch.Tensor:
    """Logits [T, V] of a full pass over what a stream makes of all samples."""
    if model.main_input_name == "input_values":
        inputs = torch.from_numpy(RunningNormaliser()(samples))[None]
    else:
        inputs = processor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    return chunked_pass(model, inputs, chunks, cache=cache)[0]


@pytest.mark.parametrize("lengths", [[1], [160, 1, 0, 3_000], [399, 641], [16_000]], ids=str)
@pytest.mark.parametrize("kind", ["samples", "features"])
def test_frames_of_pieces_are_those_of_the_whole(kind, lengths):
    model, processor = heard(kind)
    samples = noise(0.12 if lengths == [1] else 0.9)
    audio = AudioFrames(model, processor)
    whole_1TD = AudioFrames(model, processor).add(samples)
    assert whole_1TD.shape[1] == frames_of(model)(len(samples)) > 0
    pieces, given = [], 0
    for piece in cut(samples, lengths):
        pieces.append(audio.add(piece))
        given += len(piece)
        assert sum(x_1TD.shape[1] for x_1TD in pieces) == frames_of(model)(given)  # as soon as they can be
        assert len(audio.waiting_S) < 3 * model.config.inputs_to_logits_ratio
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole_1TD, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["samples", "features"])
def test_a_stream_does_not_hold_the_audio_that_it_has_heard(kind):
    model, processor = heard(kind)
    recognition = Recognition(model, processor, Chunks(4, 8, 2))
    for seed in range(10):
        for _ in recognition.hear(noise(0.5, seed)):
            pass
        for waiting in (recognition.audio.waiting_S, recognition.waiting_1TD):
            assert waiting.shape[-1 if waiting.ndim == 1 else 1] < (6 if waiting.ndim == 3 else 3_000)
    list(recognition.hear(noise(4)))
    assert memory_behind(recognition.audio.waiting_S) < 4 * 3_000


def memory_behind(samples: np.ndarray) -> int:
    while samples.base is not None:
        samples = samples.base
    return samples.nbytes


# ---- text --------------------------------------------------------------------------------------------------


def words(text: str) -> str:
    """The tokenizer writes a space for every delimiter, also where there is no word between two."""
    return " ".join(text.split())


@pytest.mark.parametrize("settings", [dict(), dict(left_seconds=0.2, lookahead_ms=40.0), dict(cache="int8")], ids=str)
@pytest.mark.parametrize("kind", ["samples", "features"])
def test_text_is_that_of_a_full_pass_however_the_audio_comes(kind, settings):
    model, processor = heard(kind)
    samples = noise(0.9)
    chunks = chunks_of(model.config, 100.0, settings.get("left_seconds", 10.0), settings.get("lookahead_ms", 0.0))
    logits_TV = in_chunks(model, processor, samples, chunks, settings.get("cache", "float32"))
    expected = words(processor.batch_decode(logits_TV.argmax(-1)[None])[0])
    assert len(expected) > 3
    for lengths in ([1_600], [16_000], [100, 0, 5_000]):
        texts = list(stream(model, processor, cut(samples, lengths), chunk_ms=100.0, **settings))
        assert words(texts[-1]) == expected
        assert len(texts) == -(-frames_of(model)(len(samples)) // chunks.size)  # one a chunk
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


@pytest.mark.parametrize("kind", ["samples", "features"])
def test_text_of_single_samples(kind):
    model, processor = heard(kind)
    samples = noise(0.2)
    (*_, expected) = stream(model, processor, [samples], chunk_ms=40.0)
    (*_, ours) = stream(model, processor, cut(samples, [1]), chunk_ms=40.0)
    assert ours == expected != ""


def test_text_comes_while_audio_is_still_coming():
    model, processor = heard("samples")
    given = []

    def microphone():
        for piece in cut(noise(0.9), [1_600]):
            given.append(len(piece))
            yield piece

    after = [sum(given) for _ in stream(model, processor, microphone(), chunk_ms=100.0)]
    assert after[:4] == [1_600 * pieces for pieces in (2, 3, 4, 5)]  # 5 frames of 320, of which the last reads on


def test_a_lookahead_is_waited_for():
    model, processor = heard("samples")
    chunks = Chunks(5, None, 3)
    recognition = Recognition(model, processor, chunks)
    samples = noise(1)
    assert len(list(recognition.hear(samples[: 7 * 320 + 854]))) == 0  # a frame reads 855 samples
    assert len(list(recognition.hear(samples[:1]))) == 1
    assert len(list(recognition.finish())) == 1 and recognition.streams.frames == 8


@pytest.mark.parametrize("kind", ["samples", "features"])
def test_no_audio_is_no_text(kind):
    model, processor = heard(kind)
    for pieces in ([], [np.zeros(0, np.float32)], [np.zeros(100, np.float32)]):
        assert list(stream(model, processor, pieces)) == []


def test_audio_shorter_than_a_chunk_is_heard_at_the_end():
    model, processor = heard("samples")
    assert len(list(stream(model, processor, [noise(0.1)], chunk_ms=320.0))) == 1


def test_a_transcript_in_pieces_is_that_of_the_tokenizer(processor):
    """Whatever the symbols: blanks, repetitions and delimiters at the edge of a piece too."""
    random = np.random.default_rng(0)
    blank, bar = processor.tokenizer.pad_token_id, processor.tokenizer.convert_tokens_to_ids("|")
    for round in range(100):
        symbols = random.choice([blank, bar, 5, 6, 7], size=25, p=[0.3, 0.2, 0.2, 0.2, 0.1]).tolist()
        transcript, before = Transcript(processor), ""
        for first in range(0, 25, 1 + round % 7):
            text = transcript.add(symbols[first : first + 1 + round % 7])
            assert text.startswith(before)
            assert text == words(processor.batch_decode([symbols[: first + 1 + round % 7]])[0])
            before = text
    assert Transcript(processor).add([]) == ""


def test_finished_words_are_not_decoded_again(processor, monkeypatch):
    transcript, longest = Transcript(processor), []
    decode = processor.tokenizer.decode
    monkeypatch.setattr(
        processor.tokenizer, "decode", lambda symbols, **how: longest.append(len(symbols)) or decode(symbols, **how)
    )
    for _ in range(200):
        transcript.add([5, 6, 0, 4])
    assert max(longest) <= 3 and len(transcript.add([]).split()) == 200


# ---- files -------------------------------------------------------------------------------------------------


def wave(path, samples: np.ndarray, rate: int = SAMPLE_RATE, subtype: str = "FLOAT"):
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def source(path):
    return lambda: open(path, "rb")


@pytest.mark.parametrize("seconds", [1e-9, 0.1, 0.32, 5.0])
def test_pieces_of_a_file_are_the_file(seconds, tmp_path):
    length = 0.9 if seconds > 0.01 else 0.01
    mono, stereo = noise(length), np.stack([noise(length), noise(length, 1)], axis=1)
    for name, samples in (("mono", mono), ("stereo", stereo)):
        path = wave(tmp_path / f"{name}.wav", samples)
        pieces = list(read_pieces(source(path), seconds))
        assert len(pieces) == -(-len(samples) // max(1, round(seconds * SAMPLE_RATE)))
        assert all(piece.dtype == np.float32 and piece.ndim == 1 for piece in pieces)
        assert np.array_equal(np.concatenate(pieces), read_audio(source(path)))


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_pieces_of_another_rate_are_the_file_nearly(rate, tmp_path):
    times = np.arange(round(0.7 * rate)) / rate
    stereo = np.stack([np.sin(2 * np.pi * 440 * times), np.sin(2 * np.pi * 1000 * times)], axis=1) / 3
    path = wave(tmp_path / "tones.wav", stereo, rate)
    whole = read_audio(source(path))
    for seconds in (0.05, 0.32, 5.0):
        ours = np.concatenate(list(read_pieces(source(path), seconds)))
        assert ours.dtype == np.float32 and abs(len(ours) - len(whole)) <= 1
        length = min(len(ours), len(whole))
        assert np.abs(ours[:length] - whole[:length]).max() < 1e-3


def test_a_piece_is_decoded_when_it_is_asked_for(tmp_path, monkeypatch):
    read = []
    real = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, frames, **how: read.append(frames) or real(self, frames, **how)
    )
    pieces = read_pieces(source(wave(tmp_path / "x.wav", noise(1.0))), 0.1)
    assert read == []
    next(pieces)
    assert read == [1_600]


def test_a_file_that_is_no_audio_is_refused(tmp_path):
    (tmp_path / "text.wav").write_text("no audio at all")
    empty = wave(tmp_path / "empty.wav", np.zeros(0, np.float32))
    broken = wave(tmp_path / "nan.wav", np.array([0.0] * 3_000 + [np.nan], np.float32))
    for path, said in (
        (tmp_path / "text.wav", "audio cannot be decoded: "),
        (empty, "audio holds no samples"),
        (broken, "audio holds NaN or infinite samples"),
        (tmp_path / "none.wav", "audio cannot be decoded: .*none"),
    ):
        with pytest.raises(UnusableAudio, match=said):
            list(read_pieces(source(path), 0.1))
    pieces = read_pieces(source(broken), 0.1)
    assert len(next(pieces)) == 1_600  # what comes before is audio


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.latent_conformer("joint").save_pretrained(folder)
    new_processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("cache", ["float32", "int8"])
def test_a_file_is_recognised_from_the_command_line(saved, tmp_path, capsys, cache):
    path = wave(tmp_path / "speech.wav", noise(1.5))
    assert main([str(path), "--model", str(saved), "--chunk", "320", "--left", "0.5", "--cache", cache]) == 0
    out, _ = capsys.readouterr()
    model, processor = tiny.latent_conformer("joint"), new_processor()
    (*_, expected) = stream(model, processor, [noise(1.5)], 320, 0.5, cache=cache)
    text, account = out.split("\n\n")
    assert text == expected != ""
    bytes_a_frame = {"float32": 4 * (11 + 7), "int8": 11 + 2 + 7 + 2}[cache]
    assert (
        f"cache of attention: {25 * bytes_a_frame} bytes (as by the formula) for 25 frames, 0.5 s, in {cache}"
        in account
    )
    assert f"1/{25 * 4 * 4 * 16 / (25 * bytes_a_frame):.1f} of multi-head attention's in float32" in account
    assert "cache of convolutions: 384 bytes" in account  # 2 layers · 3 frames · 16 numbers
    assert re.search(r"1\.5 s of audio in \d+\.\d s, the slowest chunk \d+ ms", account)
    assert "chunks of 320 ms, 0 ms ahead" in account


def test_a_file_of_another_rate_is_recognised_from_the_command_line(saved, tmp_path, capsys):
    path = wave(tmp_path / "speech.flac", np.stack([noise(0.5)] * 2, axis=1), 44_100, "PCM_16")
    assert main([str(path), "--model", str(saved), "--lookahead", "80"]) == 0
    assert "80 ms ahead" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["none.wav"], "none.wav"),
        (["damaged.wav"], "damaged.wav: audio cannot be decoded"),
        (["empty.wav"], "empty.wav: audio holds no samples"),
        (["speech.wav", "--cache", "int3"], "'int3' is no number format of a cache: choose one of float32"),
        (["speech.wav", "--left", "-1"], "left_seconds is -1.0: give 0 or more"),
        (["speech.wav", "--left", "nan"], "left_seconds is nan: give 0 or more"),
        (["speech.wav", "--lookahead", "inf"], "lookahead_ms is inf: it must be 0 or more"),
        (["speech.wav", "--model", "/no/model"], "no model at /no/model"),
        (["speech.wav", "--model", "rotary"], "positions are rotary: only relative ones can stream"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_a_sentence(saved, tmp_path, capsys, changes, said):
    wave(tmp_path / "speech.wav", noise(0.3))
    wave(tmp_path / "empty.wav", np.zeros(0, np.float32))
    (tmp_path / "damaged.wav").write_bytes((tmp_path / "speech.wav").read_bytes()[50:])
    if "rotary" in changes:
        tiny.conformer("rotary").save_pretrained(tmp_path / "rotary")
        new_processor().save_pretrained(tmp_path / "rotary")
        changes[changes.index("rotary")] = str(tmp_path / "rotary")
    assert main([str(tmp_path / changes[0]), "--model", str(saved), *changes[1:]]) == 1
    out, err = capsys.readouterr()
    assert said in err.splitlines()[-1] and "Traceback" not in err and out == ""


@pytest.mark.parametrize("chunk", ["0", "-320", "nan"])
def test_a_chunk_of_no_length_is_refused(saved, tmp_path, capsys, chunk):
    path = wave(tmp_path / "speech.wav", noise(0.1))
    assert main([str(path), "--model", str(saved), f"--chunk={chunk}"]) == 1
    assert "chunk" in capsys.readouterr().err


def test_layers_of_a_family_are_all_that_a_stream_needs():
    """frames, then layers, then logits: nothing of the model is left out."""
    for model, inputs in (
        (tiny.conformer(), tiny.padded_batch()["input_values"][:1]),
        (tiny.encoder(), tiny.features()["input_features"][:1]),
    ):
        family = family_of(model.config)
        with torch.no_grad():
            whole = model(inputs).logits
            x_BTD = family.frames(model, inputs)
            ours = Streams(model, Chunks(1000)).step(x_BTD)
        torch.testing.assert_close(ours, whole, **CLOSE)
