"""Tables and sentences that notebooks 01, 02 and 05 show, from figures that are worked out by hand."""

import pandas as pd
import pytest
import tiny

from asrlib.conversion.convert import convert
from asrlib.reporting.benchmark_tables import speeds_shown
from asrlib.reporting.method_figures import by_width, errors_sentence
from asrlib.reporting.tables import sizes_shown, table_html


def test_sizes_of_models_before_and_after_conversion():
    model = tiny.conformer()
    latent = convert(model, latent_dim=8)
    table, title, formats = sizes_shown({"MHA": model, "MLA": latent}, {"MHA": 2 * tiny.WIDTH, "MLA": 8}, "a title")
    cached, kib, parameters = table.columns
    assert title == "a title" and list(formats) == list(table.columns)
    assert table[cached].to_dict() == {"MHA": 32, "MLA": 8}
    assert table[kib].to_dict() == {
        name: tiny.LAYERS * numbers * 1000 * 4 / 1024 for name, numbers in (("MHA", 32), ("MLA", 8))
    }
    assert table.at["MHA", parameters] == sum(p.numel() for p in model.parameters()) / 1e6
    assert table.at["MLA", parameters] != table.at["MHA", parameters]
    assert "<td" in table_html(table, title, formats)


@pytest.fixture
def measured():
    systems = {
        name: {
            "parameters": 2_000_000, "latency_ms_mean": ms, "latency_ms_p95": 2 * ms, "rtfx": 1000 / ms,
            "speed_ratio": 60 / ms, "speed_ratio_interval": [60 / ms - 0.1, 60 / ms + 0.1],
            "peak_memory_bytes": 3 * 2**20, "cache_bytes_per_second": cache,
        }
        for name, ms, cache in (("baseline", 60.0, 4096), ("finetuned", 48.0, 1024))
    }  # fmt: skip
    circumstances = {"utterances": 4, "seconds_audio": 9.4, "device": "cpu", "threads": 1, "dtype": "float32"}
    return {"systems": systems, **circumstances}


def test_speeds_of_a_run(measured):
    table, caption, formats = speeds_shown(measured)
    assert caption == "4 utterances, 9 s of audio, cpu, 1 threads, float32"
    row = table.loc["fine-tuned (MLA)"]
    assert (row["ms per utterance"], row["cache, KiB per second"], row["peak memory, MiB"]) == (48, 1, 3)
    assert row["its 95 % interval"] == "1.15–1.35" and "its 95 % interval" not in formats
    assert "1.25" in table_html(table, caption, formats)


def test_speeds_of_a_sweep_are_against_its_first_member(measured):
    table, caption, formats = speeds_shown(measured | {"members": {}})
    assert caption.endswith("float32; speed against baseline")
    row = table.loc["finetuned"]
    assert row["speed"] == "×1.25 (1.15–1.35)" and row["ms per utterance"] == "48.0 (95th percentile 96.0)"
    assert list(formats) == list(table.columns)
    assert "<small>1.15" in table_html(table, caption, formats)


def test_word_errors_by_width_stand_above_what_was_claimed():
    rates = [("svd", 0.5, 0.10), ("svd", 0.875, 0.30), ("attended", 0.5, 0.05), ("attended", 0.9, 0.2)]
    frame = pd.DataFrame(rates, columns=["recipe", "cut", "wer"])
    table = by_width(frame, ["attended", "unknown", "svd"])
    assert list(table.index) == ["attended", "svd", "claimed"]
    assert list(table.columns) == ["d/4 (cut 0.875)", "d (cut 0.5)"], "the narrowest first; 0.9 is no simple share"
    assert table["d (cut 0.5)"].tolist() == ["5.00 %", "10.00 %", "cut 50 %"]
    assert table["d/4 (cut 0.875)"].tolist() == ["–", "30.00 %", "cut 87.5 %"]


def test_how_many_conversions_are_worse_on_either_side_of_a_limit():
    rows = [
        # attention error, change of WER, p
        (0.01, 0.02, 0.2),
        (0.02, 0.02, 0.01),
        (0.03, -0.02, 0.01),  # significantly better
        (0.05, 0.02, 0.049),
        (0.06, 0.02, 0.05),
    ]
    frame = pd.DataFrame(rows, columns=["output_error", "wer_difference", "p"])
    assert errors_sentence(frame, 0.05) == (
        "Of 3 conversions with an error below 5 %, 1 had significantly more word errors than the baseline; "
        "of the 2 above, 1."
    )
