"""The panels of explore.ipynb, pressed."""

import tiny

from asrlib.explore import found_models, streaming_panel
from asrlib.models.scratch import new_processor
from asrlib.streaming import stream


def saved(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    new_processor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def press(panel, **values):
    controls = {control.description: control for control in panel.children[:6]}
    for name, value in values.items():
        controls[name.replace("_", " ")].value = value
    panel.children[6].click()
    return [child.value for child in panel.children[7:10]]


def test_an_utterance_is_recognised_at_the_pace_of_speech(tmp_path):
    folder, corpus, waits = saved(tmp_path, tiny.conformer()), tiny.corpus(2), []
    panel = streaming_panel({"mine": folder}, corpus, waits.append)
    heard, text, account = press(panel, utterance=1)
    assert heard == 1 and 0 < sum(waits) <= corpus[1].seconds + 0.04 and min(waits) >= 0
    *_, expected = stream(tiny.conformer(), new_processor(), [corpus[1].audio()], 640, 10, 640)
    assert all(word in text for word in expected.upper().split())
    assert "attention" in account and "convolutions" in account
    assert "frames kept" in press(panel, utterance=0)[2]


def test_what_does_not_work_is_said(tmp_path):
    folder = saved(tmp_path, tiny.conformer("rotary"))
    panel = streaming_panel({"mine": folder}, tiny.corpus(1), lambda seconds: None)
    assert "only relative ones can stream" in press(panel)[2] and not panel.children[6].disabled


def test_kept_models_come_before_shipped_ones(tmp_path):
    kept = tmp_path / "reports" / "mine" / "models" / "baseline"
    kept.mkdir(parents=True)
    (kept / "config.json").write_text("{}")
    assert list(found_models(tmp_path)) == ["mine/models/baseline", "synthetic-conformer"]
