"""Features are the same in any batch, their statistics are those of the whole corpus, and speed changes the length."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from speech import tone
from transformers import AutoProcessor, LasrFeatureExtractor, Wav2Vec2Processor

from asrlib.data.audio import SAMPLE_RATE, change_speed
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.data.corpus import Corpus
from asrlib.data.features import SMALLEST_STD, feature_statistics, log_mel

SPEEDS = (0.9, 1.0, 1.1)


def mel_processor(processor, extractor: LasrFeatureExtractor | None = None) -> Wav2Vec2Processor:
    return Wav2Vec2Processor(feature_extractor=extractor or log_mel(), tokenizer=processor.tokenizer)


# ---- log mel -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mel_bins", "shift_ms", "frames"), [(80, 10.0, 98), (80, 5.0, 196), (64, 12.5, 79)])
def test_log_mel_has_the_shape_that_was_asked_for(mel_bins, shift_ms, frames, tmp_path, processor):
    mel = mel_processor(processor, log_mel(mel_bins, shift_ms))
    features = mel(tone(1.0), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    assert features.shape == (1, frames, mel_bins) and features.dtype == torch.float32
    loudest = log_mel(mel_bins, shift_ms).mel_filters[round(440 / (SAMPLE_RATE / 512))].argmax()  # bin of 440 Hz
    assert features[0].mean(0).argmax() == loudest

    mel.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded(tone(1.0), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features, features)


@pytest.mark.parametrize("shift_ms", [10.1, 0.0, -10.0, 0.01, float("nan"), float("inf")])
def test_a_shift_of_no_whole_samples_is_refused(shift_ms):
    with pytest.raises(ValueError, match=r"at 16000 Hz give a multiple of 0\.0625 ms"):
        log_mel(frame_shift_ms=shift_ms)


@pytest.mark.parametrize("shift_ms", [10.0, 5.0])
def test_features_in_a_padded_batch_are_those_of_the_utterance_alone(processor, shift_ms):
    mel = mel_processor(processor, log_mel(frame_shift_ms=shift_ms))
    items = list(SpeechDataset(tiny.corpus(5), mel))
    batch = SpeechCollator(mel)(items)
    assert batch["attention_mask"].dtype == torch.bool and not batch["attention_mask"].all()
    for item, features_TF, kept_T in zip(items, batch["input_features"], batch["attention_mask"], strict=True):
        alone = SpeechCollator(mel)([item])
        assert alone["attention_mask"].all()
        assert kept_T[: kept_T.sum()].all()
        torch.testing.assert_close(features_TF[kept_T], alone["input_features"][0])


# ---- statistics --------------------------------------------------------------------------------------------


def test_statistics_are_those_of_all_frames_at_once(processor):
    mel, corpus = mel_processor(processor), tiny.corpus(7)
    features = [mel(u.audio(), sampling_rate=SAMPLE_RATE, return_tensors="np").input_features[0] for u in corpus]
    frames_NF = np.concatenate(features).astype(np.float64)
    mean_F, std_F = feature_statistics(corpus, mel)
    assert mean_F.shape == std_F.shape == (80,) and mean_F.dtype == std_F.dtype == torch.float32
    np.testing.assert_allclose(mean_F, frames_NF.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std_F, frames_NF.std(0), rtol=1e-6)


def test_what_never_varies_has_a_small_spread_but_some(processor):
    silent = [replace(u, seconds=0.5, source=lambda: tiny.wave(np.zeros(8000))) for u in tiny.corpus(2)]
    mean_F, std_F = feature_statistics(Corpus("silence", "train", tuple(silent)), mel_processor(processor))
    torch.testing.assert_close(mean_F, torch.full((80,), np.log(1e-5).item()))
    assert torch.equal(std_F, torch.full((80,), SMALLEST_STD))


def test_statistics_of_nothing_are_refused(processor):
    with pytest.raises(ValueError, match="noise train is empty"):
        feature_statistics(tiny.corpus(2)[:0], mel_processor(processor))


# ---- speeds ------------------------------------------------------------------------------------------------


def loudest_hertz(samples: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * SAMPLE_RATE / len(samples))


@pytest.mark.parametrize("speed", [0.5, 0.9, 1.1, 2.0])
def test_faster_speech_is_as_much_shorter_and_higher(speed):
    faster = change_speed(tone(2.0, hertz=500.0), speed)
    assert faster.dtype == np.float32
    assert len(faster) == pytest.approx(2 * SAMPLE_RATE / speed, abs=1)
    assert loudest_hertz(faster) == pytest.approx(500 * speed, abs=1)
    assert np.abs(faster).max() == pytest.approx(0.5, abs=0.02)


def test_a_data_set_holds_every_utterance_at_every_speed(processor):
    corpus = tiny.corpus(4)
    plain, items = SpeechDataset(corpus, processor), SpeechDataset(corpus, processor, SPEEDS)
    assert (len(plain), len(items)) == (4, 12)
    assert plain.seconds == [utterance.seconds for utterance in corpus]
    for i, item in enumerate(items):
        utterance, speed = corpus[i // 3], SPEEDS[i % 3]
        assert item["text"] == plain[i // 3]["text"]
        assert items.seconds[i] == utterance.seconds / speed
        assert len(item["audio"]) / SAMPLE_RATE == pytest.approx(items.seconds[i], abs=1 / SAMPLE_RATE)
        np.testing.assert_array_equal(item["audio"], items[i]["audio"])  # the same every time
        if speed == 1:
            np.testing.assert_array_equal(item["audio"], utterance.audio())
    with pytest.raises(IndexError):
        items[12]


@pytest.mark.parametrize("speeds", [(), (0.0,), (1.0, -1.1), (float("inf"),), (float("nan"),)])
def test_speeds_that_mean_nothing_are_refused(processor, speeds):
    with pytest.raises(ValueError, match="give at least one, all positive"):
        SpeechDataset(tiny.corpus(1), processor, speeds)


def test_speech_too_fast_for_its_text_costs_nothing(processor):
    corpus = Corpus("noise", "train", (replace(tiny.corpus(1)[0], text="ATE " * 4),))
    model = tiny.conformer()
    slow, fast = (SpeechCollator(processor)([item]) for item in SpeechDataset(corpus, processor, (0.5, 4.0)))
    assert model(**slow).loss > 0
    assert model(**fast).loss == 0
