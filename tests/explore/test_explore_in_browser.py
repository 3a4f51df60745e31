"""explore.ipynb in JupyterLab, in a browser: every knob is turned, and what is shown is what it should be.

The notebook is run once, and the tests go on with it one after the other.
"""

import re
import shutil
from pathlib import Path

import pytest
import soundfile
import soxr
from browser import launch, new_page
from lab import copied_notebook, jupyterlab, run_all_cells
from playwright.sync_api import Locator, Page, expect

import asrlib
from asrlib.data.audio import SAMPLE_RATE
from asrlib.measuring.speed import cache_bytes_per_second
from asrlib.models.loading import PRETRAINED
from asrlib.reporting.numbers import size

SECONDS = 1000  # Playwright counts milliseconds
PATIENCE = 60 * SECONDS
WIDTH = 144  # of the shipped model

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def speech():
    return asrlib.open_corpus("synthetic", "test-clean").sample(3, seed=0)


@pytest.fixture(scope="module")
def recording(speech, tmp_path_factory):
    """The second utterance in stereo at 48 kHz."""
    path = tmp_path_factory.mktemp("recording") / "speech.wav"
    samples_S = soxr.resample(speech[1].audio(), SAMPLE_RATE, 48_000)
    soundfile.write(path, samples_S[:, None].repeat(2, axis=1), 48_000, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def local(playwright, recording, tmp_path_factory):
    """The notebook, all its cells run, with a demo run, and `recording` for a microphone."""
    project = tmp_path_factory.mktemp("project")
    copied_notebook(project, "explore", utterances=3, calibration_seconds=40.0)
    shutil.copytree(PRETRAINED / "synthetic-conformer", project / "reports" / "demo" / "models" / "baseline")
    browser = launch(playwright, f"--use-file-for-fake-audio-capture={recording}")
    with jupyterlab(project) as address:
        local = new_page(browser, viewport={"width": 1280, "height": 900}, permissions=["microphone"])
        local.page.set_default_timeout(PATIENCE)
        local.page.goto(address.format("explore"))
        run_all_cells(local.page)
        start = local.page.locator(".StreamingPanel button", has_text="Stream")
        expect(start).to_be_enabled(timeout=4 * PATIENCE)  # of the last cell
        yield local
        browser.close()


@pytest.fixture
def page(local) -> Page:
    return local.page


def test_it_opens_on_the_demo_run(page):
    panel = page.locator(".RunPanel")
    expect(widget(panel, "run").locator("select")).to_have_value("demo")
    expect(panel).to_contain_text("4 layers of width 144")
    expect(panel).to_contain_text("Models of this run: baseline.")


def test_every_panel_shows_its_result_at_once(page, speech):
    conversion = page.locator(".ConversionPanel")
    done(conversion)
    expect(conversion).to_contain_text(bytes_at(18))
    expect(row(conversion, "said")).to_have_text(speech[0].text.casefold())
    expect(picture(conversion)).to_have_attribute("alt", re.compile("at latent_dim 18. layer 0: keys"))
    assert plays(conversion) == pytest.approx(speech[0].seconds, abs=0.01)
    expect(picture(page.locator(".AttentionPanel"))).to_have_attribute("alt", re.compile("layer 0, head 0 in"))


def test_the_slider_of_latent_dim_changes_cache_errors_and_transcript(page):
    panel = page.locator(".ConversionPanel")
    before, drawn = row(panel, "heard by MLA").inner_text(), picture(panel).get_attribute("src")
    slide(panel, "latent_dim", "Home")
    expect(panel).to_contain_text(bytes_at(1))
    expect(picture(panel)).to_have_attribute("alt", re.compile("at latent_dim 1. "))
    done(panel)
    expect(row(panel, "heard by MLA")).not_to_have_text(before)
    expect(picture(panel)).not_to_have_attribute("src", drawn)
    expect(row(panel, "heard by MLA").locator("del").first).to_be_visible()
    type_in(panel, "latent_dim", WIDTH)
    expect(panel).to_contain_text(bytes_at(WIDTH))
    expect(row(panel, "from MHA to MLA")).to_have_text("no word changes")


def test_every_method_can_be_chosen_and_has_errors_of_its_own(page):
    panel = page.locator(".ConversionPanel")
    done(panel)
    type_in(panel, "latent_dim", 9)
    expect(panel).to_contain_text(bytes_at(9))
    errors = []
    for method in ("svd", "whitened", "two_sided", "attended"):
        done(panel)
        errors.append(picture(panel).get_attribute("alt"))
        choose(panel, "method", method)
        expect(picture(panel)).not_to_have_attribute("alt", errors[-1])
    expect(picture(panel)).to_have_attribute("alt", errors[0])  # attended, as in the beginning
    assert len(set(errors)) == 4


def test_a_split_layout_can_be_chosen_and_left(page):
    panel = page.locator(".ConversionPanel")
    done(panel)
    joint = picture(panel).get_attribute("alt")
    choose(panel, "layout", "split")
    expect(picture(panel)).not_to_have_attribute("alt", joint)
    done(panel)
    type_in(panel, "latent_dim", 2 * WIDTH)
    expect(panel).to_contain_text(bytes_at(2 * WIDTH))
    done(panel)
    choose(panel, "layout", "joint")
    expect(panel).to_contain_text(bytes_at(WIDTH))


def test_controls_are_locked_while_it_works(page):
    panel = page.locator(".ConversionPanel")
    done(panel)
    type_in(panel, "latent_dim", 1)
    expect(panel.locator(".widget-hprogress")).to_be_visible()
    expect(widget(panel, "method").locator("select")).to_be_disabled()
    expect(widget(panel, "method").locator("select")).to_be_enabled()
    expect(panel.locator(".widget-hprogress")).to_be_hidden()


def test_another_utterance_is_another_everywhere(page, speech):
    panel = page.locator(".ConversionPanel")
    done(panel)
    choose(panel, "utterance", f"{speech[2].id}: {speech[2].text}")
    expect(row(panel, "said")).to_have_text(speech[2].text.casefold())
    done(panel)
    assert plays(panel) == pytest.approx(speech[2].seconds, abs=0.01)
    expect(picture(page.locator(".AttentionPanel"))).to_have_attribute("alt", re.compile(f"in {speech[2].id}, "))
    elsewhere = widget(page.locator(".StreamingPanel"), "utterance").locator("select")
    expect(elsewhere).to_have_js_property("selectedIndex", 2)  # told last, when the panels above are done


@pytest.mark.parametrize(("name", "most"), [("layer", 3), ("head", 3)])
def test_every_layer_and_head_can_be_looked_at(page, name, most):
    panel = page.locator(".AttentionPanel")
    done(panel)
    drawn = picture(panel).get_attribute("src")
    type_in(panel, name, most)
    expect(picture(panel)).to_have_attribute("alt", re.compile(f"{name} {most}.*MHA beside MLA"))
    expect(picture(panel)).not_to_have_attribute("src", drawn)
    done(panel)
    slide(panel, name, "ArrowLeft")
    expect(picture(panel)).to_have_attribute("alt", re.compile(f"{name} {most - 1}"))


def test_an_upload_is_transcribed_by_both_models(page, speech, recording):
    panel = page.locator(".OwnSpeechPanel")
    upload(panel, recording)
    expect(row(panel, "heard by MHA")).to_be_visible()
    expect(row(panel, "heard by MLA")).to_be_visible()
    assert plays(panel) == pytest.approx(speech[1].seconds, abs=0.01)
    assert shared_words(row(panel, "heard by MHA").inner_text(), speech[1].text) > 0.6


def test_an_upload_that_is_no_audio_is_said_and_the_next_is_taken(page, recording, tmp_path):
    panel = page.locator(".OwnSpeechPanel")
    (tmp_path / "letter.wav").write_text("no audio")
    upload(panel, tmp_path / "letter.wav")
    expect(panel.get_by_role("alert")).to_contain_text("letter.wav: audio cannot be decoded")
    expect(panel.locator("tr")).to_have_count(0)
    upload(panel, recording)
    expect(row(panel, "heard by MHA")).to_be_visible()
    expect(panel.get_by_role("alert")).to_have_count(0)


def test_the_microphone_is_recorded_and_transcribed_by_both_models(page, speech):
    panel = page.locator(".OwnSpeechPanel")
    former = panel.locator("audio").evaluate("it => it.src")
    panel.get_by_role("button", name="Record").click()
    stop = panel.get_by_role("button", name="Stop")
    expect(stop).to_be_visible()
    page.wait_for_timeout(1000 * speech[1].seconds + 300)
    stop.click()
    page.wait_for_function("was => document.querySelector('.OwnSpeechPanel audio')?.src != was", arg=former)
    expect(row(panel, "heard by MLA")).to_be_visible()
    assert speech[1].seconds < plays(panel) < speech[1].seconds + 3
    assert shared_words(row(panel, "heard by MHA").inner_text(), speech[1].text) > 0.4
    expect(panel.get_by_role("button", name="Record")).to_be_enabled()


@pytest.mark.parametrize("model", ["baseline", "converted here"])
def test_an_utterance_is_streamed(page, speech, model):
    panel = page.locator(".StreamingPanel")
    choose(panel, "model", model)
    choose(panel, "cache in", "int8")
    for name in ("chunk, ms", "lookahead, ms", "left context, s"):
        slide(panel, name, "ArrowLeft")
    start = panel.get_by_role("button", name="Stream")
    start.click()
    expect(start).to_be_disabled()
    expect(panel.locator(".asrlib p").first).to_have_text(re.compile(r"\w+ \w+"))  # before it has heard all
    expect(start).to_be_disabled()
    expect(start).to_be_enabled()
    expect(row(panel, "said")).to_have_text(speech[2].text.casefold())
    expect(panel).to_contain_text("frames kept: attention")
    assert shared_words(row(panel, "heard").inner_text(), speech[2].text) > 0.4
    expect(panel.get_by_role("alert")).to_have_count(0)


def test_another_run_can_be_chosen(page):
    runs, conversion = page.locator(".RunPanel"), page.locator(".ConversionPanel")
    choose(runs, "run", "synthetic-conformer (shipped)")
    expect(runs).to_contain_text("Models of this run: synthetic-conformer.")
    done(runs)
    expect(picture(conversion)).to_be_visible()
    done(conversion)
    offered = widget(page.locator(".StreamingPanel"), "model").locator("option")
    expect(offered).to_have_text(["synthetic-conformer", "converted here"])


def test_nothing_was_asked_for_elsewhere_and_no_error_is_on_the_console(local):
    assert local.refused == [] and local.errors == []


# ---- what a user does, and sees ----------------------------------------------------------------------------


def widget(panel: Locator, name: str) -> Locator:
    """The control that has this description."""
    return panel.locator(f'*:has(> .widget-label:text-is("{name}"))')


def choose(panel: Locator, name: str, option: str) -> None:
    widget(panel, name).locator("select").select_option(option)


def slide(panel: Locator, name: str, key: str) -> None:
    widget(panel, name).locator(".noUi-handle").press(key)


def type_in(panel: Locator, name: str, value: int) -> None:
    readout = widget(panel, name).locator(".widget-readout")
    readout.fill(str(value))
    readout.press("Enter")


def done(panel: Locator) -> None:
    """Waits until a panel that shows its result is no longer at work, and all is well."""
    expect(panel.locator("select:disabled, button:disabled, .noUi-target[disabled]")).to_have_count(0)
    expect(panel.locator(".widget-hprogress").first).to_be_hidden()
    expect(panel.get_by_role("alert")).to_have_count(0)


def picture(panel: Locator) -> Locator:
    return panel.locator(".asrlib img")


def plays(panel: Locator) -> float:
    """How long the panel's audio is, in seconds."""
    loaded = "it => it.readyState ? it.duration : new Promise(then => it.onloadedmetadata = () => then(it.duration))"
    return panel.locator("audio").evaluate(loaded)


def upload(panel: Locator, path: Path) -> None:
    with panel.page.expect_file_chooser() as chooser:
        panel.get_by_role("button", name="Upload audio").click()
    chooser.value.set_files(path)


def shared_words(heard: str, said: str) -> float:
    """The share of what was said that is among the words heard."""
    said = said.casefold().split()
    return sum(word in heard.split() for word in said) / len(said)


def bytes_at(latent_dim: int) -> str:
    """What the panel says of a width."""
    model, _ = asrlib.load("synthetic-conformer")
    theirs = cache_bytes_per_second(model.config)
    return f"{size(theirs * latent_dim / (2 * WIDTH))} instead of {size(theirs)}"


def row(panel: Locator, name: str) -> Locator:
    return panel.locator("tr", has=panel.page.get_by_role("rowheader", name=name, exact=True)).locator("td")
