"""The panels of explore.ipynb, pressed without a browser."""

import io
import os
from datetime import UTC, datetime

import family_models
import numpy as np
import pytest
import soundfile
import tiny
from bs4 import BeautifulSoup

import asrlib
from asrlib.conversion.convert import convert
from asrlib.explore import Workbench, found_runs, workbench
from asrlib.explore.attention_panel import AttentionPanel
from asrlib.explore.conversion_panel import ConversionPanel
from asrlib.explore.own_speech_panel import OwnSpeechPanel
from asrlib.explore.run_panel import RunPanel
from asrlib.explore.streaming_panel import CONVERTED_HERE, StreamingPanel
from asrlib.measuring.speed import cache_bytes_per_second
from asrlib.measuring.transcribing import transcribe
from asrlib.models.inference import attention_of
from asrlib.models.scratch import new_processor
from asrlib.reporting.method_figures import attention_maps, error_by_layer
from asrlib.reporting.numbers import size
from asrlib.streaming.streams import stream


def saved(folder, model):
    model.save_pretrained(folder)
    new_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run's models."""
    folder = tmp_path_factory.mktemp("run")
    saved(folder / "baseline", tiny.conformer())
    saved(folder / "converted", tiny.latent_conformer("joint"))
    return folder


@pytest.fixture
def bench(run):
    bench = Workbench(tiny.corpus(3, "test"), tiny.corpus())
    bench.open(run)
    return bench


@pytest.fixture
def conversion(bench):
    panel = ConversionPanel(bench)
    panel.refresh()
    return panel


def text(widget) -> str:
    return BeautifulSoup(widget.value, "html.parser").get_text(" ", strip=True)


def alternative(widget) -> str:
    return BeautifulSoup(widget.value, "html.parser").img["alt"]


def locked(panel) -> list[bool]:
    return [control.disabled for control in panel.controls.values()]


def transcript(model, corpus, place=0) -> str:
    return transcribe(model, new_processor(), corpus[place : place + 1])[0]["hypothesis"].casefold()


# ---- runs --------------------------------------------------------------------------------------------------


def test_the_demo_run_comes_first_then_the_newest_and_shipped_models_last(tmp_path):
    for age, name in enumerate(["newest", "sweep/member", "demo"]):
        folder = tmp_path / "reports" / name / "models" / "baseline"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        os.utime(folder / "config.json", (1e9 - age, 1e9 - age))
    (tmp_path / "reports" / "begun").mkdir()
    runs = found_runs(tmp_path)
    assert list(runs) == ["demo", "newest", "sweep/member", "synthetic-conformer (shipped)"]
    assert runs["demo"] == tmp_path / "reports" / "demo" / "models"


def test_without_a_run_there_is_the_shipped_model(tmp_path):
    ((name, folder),) = found_runs(tmp_path).items()
    assert "shipped" in name and (folder / "config.json").is_file()


def test_a_run_is_opened_with_the_models_it_keeps(run):
    bench = Workbench(tiny.corpus(3, "test"), tiny.corpus())
    panel = RunPanel(bench, {"mine": run})
    panel.refresh()
    assert bench.baseline.config.model_type == "wav2vec2-conformer"
    assert "2 layers of width 16" in text(panel.about) and "baseline, converted" in text(panel.about)
    assert size(cache_bytes_per_second(bench.baseline.config)) in text(panel.about)


def test_a_model_that_cannot_be_loaded_is_said_in_the_panel_and_in_those_that_need_it(run, tmp_path, conversion, bench):
    saved(tmp_path / "baseline", tiny.conformer())
    (tmp_path / "baseline" / "vocab.json").unlink()
    panel = RunPanel(bench, {"mine": run, "broken": tmp_path})
    panel.run.value = tmp_path
    assert "holds no vocab.json" in text(panel.failure) and not any(locked(panel))
    assert "choose a run" in text(conversion.failure) and not conversion.transcripts.value
    panel.run.value = run
    assert not panel.failure.value and not conversion.failure.value and conversion.transcripts.value


# ---- conversion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_dim", [1, 5])
def test_a_latent_dim_leads_to_its_cache_its_errors_and_its_transcript(bench, conversion, latent_dim):
    conversion.latent_dim.value = latent_dim
    assert bench.converted.config.latent_dim == [latent_dim, latent_dim]
    ours, theirs = (size(cache_bytes_per_second(model.config)) for model in (bench.converted, bench.baseline))
    assert f"{ours} instead of {theirs}" in text(conversion.cache)
    assert f"at latent_dim {latent_dim}. layer 0: keys" in alternative(conversion.figure)
    heard = BeautifulSoup(conversion.transcripts.value, "html.parser").find_all("tr")[2]
    for struck in heard.find_all("del"):
        struck.decompose()
    assert heard.td.get_text(" ").split() == transcript(bench.converted, bench.utterances).split()


def test_at_full_width_nothing_is_lost(bench, conversion):
    conversion.latent_dim.value = conversion.latent_dim.max
    assert conversion.latent_dim.max == tiny.WIDTH
    assert "no word changes" in text(conversion.transcripts) and "excellent" in text(conversion.figure)


@pytest.mark.parametrize("method", ["svd", "whitened", "two_sided", "attended"])
@pytest.mark.parametrize("layout", ["joint", "split"])
def test_every_method_and_layout_converts(bench, conversion, method, layout):
    conversion.method.value, conversion.latent_layout.value = method, layout
    wanted = asrlib.convert(bench.baseline, 4, method=method, layout=layout, statistics=bench.statistics)
    conversion.latent_dim.value = 4
    assert not conversion.failure.value
    inputs = bench.inputs()["input_values"]
    assert (bench.converted(inputs).logits - wanted(inputs).logits).abs().max() < 1e-5


def test_a_split_latent_may_be_twice_as_wide_and_needs_two_numbers(bench, conversion):
    conversion.latent_dim.value = 1
    conversion.latent_layout.value = "split"
    assert (conversion.latent_dim.min, conversion.latent_dim.value, conversion.latent_dim.max) == (2, 2, 32)
    conversion.latent_dim.value = 32
    conversion.latent_layout.value = "joint"
    assert conversion.latent_dim.value == conversion.latent_dim.max == 16 == bench.converted.config.latent_dim[0]


def test_statistics_are_collected_once_for_a_run(monkeypatch, run, conversion, bench):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return asrlib.collect_statistics(*args, **kwargs)

    monkeypatch.setattr(workbench, "collect_statistics", counted)
    conversion.latent_dim.value, conversion.method.value = 3, "svd"
    assert not calls
    bench.open(run)
    conversion.latent_dim.value = 4
    assert len(calls) == 1


def test_controls_are_locked_and_a_bar_moves_while_it_works(run):
    bench = Workbench(tiny.corpus(3, "test"), tiny.corpus())
    bench.open(run)
    panel, seen = ConversionPanel(bench), []
    panel.doing.observe(
        lambda change: seen.append((change["new"], all(locked(panel)), panel.work.layout.visibility)), "value"
    )
    panel.refresh()
    assert {"calibration speech …", "decomposing …", "drawing …"} <= {doing for doing, *_ in seen}
    assert all(was_locked for _, was_locked, _ in seen) and {shown for *_, shown in seen} == {"visible"}
    assert not any(locked(panel)) and panel.work.layout.visibility == "hidden"


def test_what_cannot_be_converted_is_said_in_one_sentence(tmp_path, conversion, bench):
    bench.open(saved(tmp_path / "rotary", tiny.conformer("rotary")))
    assert "split" in text(conversion.failure) and not conversion.transcripts.value and not any(locked(conversion))
    conversion.latent_layout.value = "split"
    assert not conversion.failure.value and conversion.transcripts.value


def test_a_defect_is_said_and_not_hidden(monkeypatch, bench, conversion):
    monkeypatch.setattr(bench, "latent", lambda *args: {}["missing"])
    with pytest.raises(KeyError):
        conversion.refresh()
    assert "KeyError: 'missing'" in text(conversion.failure) and not any(locked(conversion))


def test_another_utterance_is_measured_without_another_conversion(bench, conversion):
    converted = bench.converted
    conversion.utterance.value = 2
    assert bench.place == 2 and bench.converted is converted
    assert text(conversion.transcripts).startswith(f"said {bench.utterances[2].text.casefold()}")
    samples, _ = soundfile.read(io.BytesIO(conversion.speech.children[0].value))
    assert len(samples) == len(bench.utterances[2].audio())


def test_the_figure_shows_every_error_of_every_layer(bench, conversion):
    errors = bench.errors(bench.converted)
    fig = error_by_layer(errors, {"limit": 0.1})
    heights = sorted(bar.get_height() for bar in fig.axes[0].patches)
    wanted = errors[["key_error", "value_error", "score_error", "output_error"]].to_numpy()
    assert np.allclose(heights, np.sort(100 * wanted.flatten()))


# ---- attention ---------------------------------------------------------------------------------------------


@pytest.fixture
def attention(bench, conversion):
    panel = AttentionPanel(bench)
    panel.refresh()
    return panel


def test_every_layer_and_head_is_shown_before_and_after_conversion(bench, attention):
    assert (attention.layer.max, attention.head.max) == (1, 1)
    attention.layer.value, attention.head.value = 1, 1
    about = alternative(attention.map)
    assert f"layer 1, head 1 in {bench.utterance.id}, MHA beside MLA, latent_dim 2" in about
    first, second = (attention_of(model, bench.inputs())[1][1] for model in (bench.baseline, bench.converted))
    apart = (first - second).abs().sum(-1).mean().item() / 2
    assert f"On average {100 * apart:.1f} %" in about


def test_the_map_follows_the_conversion_and_the_utterance(bench, conversion, attention):
    conversion.latent_dim.value = 7
    assert "MLA, latent_dim 7" in alternative(attention.map)
    conversion.utterance.value = 1
    assert bench.utterances[1].id in alternative(attention.map)


def test_both_maps_have_one_scale_and_seconds_on_both_axes():
    random = np.random.default_rng(0)
    weights = {"a": random.dirichlet(np.ones(20), 20), "b": random.dirichlet(np.full(20, 0.1), 20)}
    first, second = (ax.images[0] for ax in attention_maps(weights, 2.5, "a head").axes[:2])
    assert first.get_clim() == second.get_clim() and first.norm is second.norm
    assert first.get_extent() == second.get_extent() == [0, 2.5, 2.5, 0]
    assert np.array_equal(first.get_array(), weights["a"]) and np.array_equal(second.get_array(), weights["b"])


def test_a_decoders_rows_are_tokens_and_cross_attention_looks_over_its_window():
    model, processor = family_models.whisper(), family_models.processor_of("whisper")
    bench = Workbench(tiny.corpus(2), tiny.corpus(2))
    bench.baseline, bench.processor = model, processor
    bench.converted = convert(model, [3, 4, 5, 6])
    panel = AttentionPanel(bench)
    panel.refresh()
    assert panel.layer.max == 5 and panel.names[:2] == ["encoder 0", "encoder 1"]
    panel.layer.value = panel.names.index("cross 1")
    about = alternative(panel.map)
    assert "layer cross 1, head 0" in about and "MLA, latent_dim 6" in about and "over 1.0 s" in about
    assert "of the attention of a token" in about
    panel.layer.value = 0
    assert "MLA, unchanged in this layer" in alternative(panel.map)


def test_weights_of_attention_are_distributions(bench):
    for weights_HTT in attention_of(bench.baseline, bench.inputs()):
        assert weights_HTT.shape[0] == 2 and weights_HTT.shape[1] == weights_HTT.shape[2] > 20
        assert (weights_HTT.sum(-1) - 1).abs().max() < 1e-5


# ---- one's own speech --------------------------------------------------------------------------------------


@pytest.fixture
def own(bench, conversion):
    return OwnSpeechPanel(bench)


def upload(panel, content: bytes, name="mine.wav"):
    about = {"name": name, "type": "audio/wav", "size": len(content), "content": memoryview(content)}
    panel.upload.value = ({**about, "last_modified": datetime.now(UTC)},)


def wave(samples, rate, **how) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", **how)
    return file.getvalue()


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (8_000, 1)])
def test_an_upload_is_heard_by_both_models(bench, own, rate, channels):
    noise = 0.1 * np.random.default_rng(0).normal(size=(rate, channels))
    upload(own, wave(noise, rate))
    assert not own.failure.value and own.upload.value == ()
    samples, played_rate = soundfile.read(io.BytesIO(own.speech.children[0].value))
    assert played_rate == 16_000 and len(samples) == 16_000
    assert "heard by MHA" in text(own.transcripts) and "heard by MLA" in text(own.transcripts)


def test_what_is_heard_is_what_the_same_speech_of_a_corpus_is_heard_as(bench, own):
    upload(own, wave(bench.utterance.audio(), 16_000, subtype="FLOAT"))
    first = BeautifulSoup(own.transcripts.value, "html.parser").td.get_text()
    assert first == transcript(bench.baseline, bench.utterances)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no audio", "mine.wav: audio cannot be decoded"),
        (wave(np.zeros(0), 16_000), "mine.wav: audio holds no samples"),
        (wave(np.zeros(100), 16_000), "less than a frame of the model: give a longer one"),
        (wave(np.zeros(61 * 1000), 1000), "mine.wav is 61 s long: give 60 s at most"),
        (wave(np.full(16_000, np.nan), 16_000, subtype="FLOAT"), "NaN or infinite"),
    ],
)
def test_an_upload_that_is_no_speech_is_said_in_one_sentence(own, content, said):
    upload(own, content)
    assert said in text(own.failure) and not own.transcripts.value and not any(locked(own))


def test_a_recording_is_heard(own):
    samples_S = (0.1 * np.random.default_rng(0).normal(size=24_000)).astype("<f4")
    own.microphone._handle_custom_msg({"rate": 16_000}, [memoryview(samples_S.tobytes())])
    played, _ = soundfile.read(io.BytesIO(own.speech.children[0].value))
    assert np.abs(played - samples_S).max() < 1e-4 and "heard by MLA" in text(own.transcripts)


def test_why_nothing_was_recorded_is_said(own):
    own.microphone._handle_custom_msg({"problem": "Permission denied"}, [])
    assert text(own.failure) == "Error: nothing was recorded: Permission denied"


def test_own_speech_is_heard_again_after_another_conversion(own, conversion):
    upload(own, wave(0.1 * np.random.default_rng(0).normal(size=16_000), 16_000))
    before = own.transcripts.value
    conversion.latent_dim.value = 16
    assert own.transcripts.value != before and not BeautifulSoup(own.transcripts.value, "html.parser").find("del")


# ---- streaming ---------------------------------------------------------------------------------------------


@pytest.fixture
def streaming(bench):
    panel = StreamingPanel(bench, lambda seconds: None)
    panel.refresh()
    return panel


def test_an_utterance_is_recognised_at_the_pace_of_speech(bench):
    waits = []
    panel = StreamingPanel(bench, waits.append)
    panel.refresh()
    bench.place = 1
    panel.start.click()
    utterance = bench.utterances[1]
    assert panel.heard.value == 1 and 0 < sum(waits) <= utterance.seconds + 0.04 and min(waits) >= 0
    *_, expected = stream(tiny.conformer(), new_processor(), [utterance.audio()], 640, 10, 640)
    assert all(word in text(panel.text) for word in expected.casefold().split())
    assert "frames kept: attention" in text(panel.account) and not any(locked(panel))


def test_models_of_the_run_and_the_one_converted_here_can_stream(bench, conversion, streaming):
    assert streaming.model.options == ("baseline", "converted", CONVERTED_HERE)
    kept = {}
    for name in streaming.model.options:
        streaming.model.value = name
        streaming.start.click()
        assert not streaming.failure.value
        kept[name] = text(streaming.account)
    assert len(set(kept.values())) == 3 and "against MHA" not in kept["baseline"]
    assert "(−93.8 % against MHA in float32)" in kept[CONVERTED_HERE]
    assert attention_of(bench.converted, bench.inputs()), "streaming left it as it was"


def test_the_choice_of_model_stays_when_another_is_converted(conversion, streaming):
    streaming.model.value = "converted"
    conversion.latent_dim.value = 9
    assert streaming.model.value == "converted"


def test_what_cannot_stream_is_said(tmp_path, bench, streaming):
    bench.open(saved(tmp_path / "rotary", tiny.conformer("rotary")))
    streaming.start.click()
    assert "only relative ones can stream" in text(streaming.failure) and not any(locked(streaming))
