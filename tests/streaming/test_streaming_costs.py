"""What streams cost, in words, bytes and time: tables say what was measured."""

import math

import pandas as pd
import pytest
import tiny
import torch
from commands import command

from asrlib import convert, kv_cache_bytes
from asrlib.attention.chunks import Chunks
from asrlib.attention.kinds import absorbing_pays
from asrlib.measuring.random_models import ENCODER_SIZES, kinds_of, random_encoders, size_of
from asrlib.measuring.stream_errors import ROTATED, streaming_errors
from asrlib.measuring.stream_steps import (
    RECOMPUTED,
    benchmark_forms,
    benchmark_steps,
    filled,
    recomputed,
    streams_in_real_time,
)
from asrlib.models.registry import attention_modules
from asrlib.models.scratch import new_processor
from asrlib.reporting.numbers import p_value
from asrlib.reporting.stream_tables import (
    bytes_table,
    errors_figure,
    errors_table,
    formats_table,
    multiplications_table,
    positions_sentence,
    steps_figure,
    steps_table,
    streams_table,
)
from asrlib.reporting.tables import as_rows
from asrlib.streaming.rotate import random_rotation, rotate_latents, rotated
from asrlib.streaming.streams import Streams, chunked_pass, chunks_of

main = command("steps")

SIZE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, conv_depthwise_kernel_size=5)


# ---- rotation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_turned_latents_give_the_same_logits_and_other_latents(layout):
    latent = convert(tiny.conformer(), latent_dim=6, layout=layout)
    turned = rotate_latents(latent)
    batch = tiny.padded_batch()
    x_BS = batch["input_values"]
    with torch.no_grad():
        torch.testing.assert_close(turned(x_BS).logits, latent(x_BS).logits, rtol=0, atol=1e-5)
        for ours, theirs in zip(attention_modules(turned), attention_modules(latent), strict=True):
            x_BTD = torch.randn(1, 5, tiny.WIDTH)
            for one, other in zip(ours.remembered(x_BTD), theirs.remembered(x_BTD), strict=True):
                assert (one - other).abs().max() > 0.01
                torch.testing.assert_close(one.norm(dim=-1), other.norm(dim=-1))


@pytest.mark.parametrize("make", [tiny.conformer, tiny.encoder, lambda: tiny.encoder(attention="gqa")])
def test_turned_keys_and_values_give_the_same_logits(make):
    model = make()
    turned, x_BTD = rotated(model), torch.randn(2, 9, tiny.WIDTH)
    chunks = Chunks(4, 8)
    with torch.no_grad():
        one_BTV, other_BTV = (Streams(each, chunks).step(x_BTD[:, :4]) for each in (turned, model))
        torch.testing.assert_close(one_BTV, other_BTV, rtol=0, atol=1e-5)
        for ours, theirs in zip(attention_modules(turned), attention_modules(model), strict=True):
            for one, other in zip(ours.remembered(x_BTD), theirs.remembered(x_BTD), strict=True):
                assert (one - other).abs().max() > 0.01
                by_head = (x.unflatten(-1, (-1, ours.head_size)).norm(dim=-1) for x in (one, other))
                torch.testing.assert_close(*by_head)


def test_positions_that_are_not_relative_can_not_be_turned():
    with pytest.raises(ValueError, match="positions are rotary"):
        rotated(tiny.conformer("rotary"))


def test_sums_of_linear_attention_can_not_be_turned():
    with pytest.raises(ValueError, match="linear attention keeps sums"):
        rotated(tiny.encoder(attention="linear"))


def test_a_random_rotation_is_orthogonal():
    turn_RR = random_rotation(7, torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn_RR @ turn_RR.T, torch.eye(7).double())


def test_only_latents_can_be_turned():
    with pytest.raises(ValueError, match="convert it to latent attention first"):
        rotate_latents(tiny.conformer())


# ---- word errors -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def errors():
    processor, corpus = new_processor(), tiny.corpus(4)
    baseline = tiny.conformer()
    systems = {"baseline": baseline, "finetuned": convert(baseline, latent_dim=6)}
    return systems, streaming_errors(systems, processor, corpus, [100, None], [0.1, 0.2], ["float32", "int4"])


def test_every_setting_is_measured_once(errors):
    _, table = errors
    assert list(table.columns[:5]) == ["chunk_ms", "left_seconds", "lookahead_ms", "cache", "system"]
    settings = table.groupby(["left_seconds", "cache"])["system"].apply(list)
    assert settings.to_dict() == {
        (0.1, "float32"): ["baseline", "finetuned"],
        (0.2, "float32"): ["baseline", "finetuned"],
        (0.2, "int4"): ["baseline", "finetuned"],
        (0.2, "int4" + ROTATED): ["baseline", "finetuned"],
    }
    assert table[table["chunk_ms"].isna()]["system"].tolist() == ["baseline", "finetuned"]
    assert (table["utterances"] == 4).all() and table["wer"].between(0, 5).all()


def test_the_first_system_is_compared_with_nothing(errors):
    _, table = errors
    first = (table["system"] == "baseline") & (table["cache"] == "float32")
    assert table[first]["p"].isna().all() and table[~first]["p"].notna().all()
    for _, group in table[table["cache"] != "x"].groupby(["left_seconds"]):
        reference = group["wer"].iloc[0]
        for row in group[group["p"].notna()].to_dict("records"):
            assert math.isclose(row["difference"], row["wer"] - reference, abs_tol=1e-12)


def test_bytes_are_those_of_a_full_left_context(errors):
    systems, table = errors
    row = table[(table["system"] == "finetuned") & (table["cache"] == "int4")].iloc[0]
    assert row["cache_bytes"] == kv_cache_bytes(systems["finetuned"].config, 10, "int4")


def test_errors_for_people(errors):
    _, table = errors
    shown = errors_table(table)
    assert len(shown) == len(table) / 2 and shown["chunk"].iloc[-1] == "full context"
    assert "int4" + ROTATED in set(shown["cache in"])
    rounded = table[table["cache"] == "int4"].set_index("system")
    row = shown[shown["cache in"] == "int4"].iloc[0]
    assert row["baseline (MHA): WER %"].startswith(f"{100 * rounded['wer']['baseline']:.2f} (")
    assert row["fine-tuned (MLA) − baseline (MHA), points"].endswith(f"; {p_value(rounded['p']['finetuned'])})")
    assert row["fine-tuned (MLA): cache"] == f"{rounded['cache_bytes']['finetuned']:.0f} B"
    figure = errors_figure(table)
    assert len(figure.axes) == 2 and "full context" in figure.get_label() and figure.axes[0].get_ylabel()
    alone = errors_figure(table[table["chunk_ms"].isna()])
    assert [tick.get_text() for tick in alone.axes[0].get_xticklabels()] == ["full"]
    assert all(row["p"] is None for row in as_rows(table) if row["system"] == "baseline" and row["cache"] == "float32")


# ---- time and bytes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps():
    systems = random_encoders(**SIZE)
    return systems, benchmark_steps(systems, [40, 100], [0.2, 0.4], repeats=2)


def test_encoders_share_all_but_their_attention():
    systems = random_encoders(**SIZE)
    assert list(systems) == list(kinds_of(16, 4))
    first, *others = systems.values()
    for other in others:
        assert other.layers[1].ffn1[1].weight is not None
        assert other.layers[1].ffn1[1].weight.data_ptr() == first.layers[1].ffn1[1].weight.data_ptr()
        assert not other.training and all(not p.is_meta for p in other.parameters())
    assert size_of(first.config) == SIZE | {"hop_length": 80} and size_of(tiny.conformer().config)["hop_length"] == 80


def test_a_row_for_every_setting_and_system(steps):
    systems, table = steps
    assert len(table) == 2 * 2 * (len(systems) + 1) and set(table["system"]) == {*systems, RECOMPUTED}
    assert (table["ms_low"] <= table["ms"]).all() and (table["ms"] <= table["ms_high"]).all()
    for row in table.to_dict("records"):
        assert math.isclose(row["rtfx"], row["chunk_ms"] / row["ms"])


def test_what_is_kept_is_the_formula_to_the_byte(steps):
    systems, table = steps
    cached = table[table["system"] != RECOMPUTED]
    assert (cached["cache_bytes"] == cached["formula_bytes"]).all() and (cached["cache_bytes"] > 0).all()
    for row in cached.to_dict("records"):
        frames = round(row["left_seconds"] * 50)
        assert row["cache_bytes"] == kv_cache_bytes(systems[row["system"]].config, frames)


def test_a_filled_stream_is_one_that_heard_as_much():
    model = random_encoders(**SIZE)["MLA 8"]
    running = filled(model, Chunks(2, 6), streams=3)
    x_BnD = torch.randn(3, 2, 16)
    logits_BcV = running.step(x_BnD)
    assert logits_BcV.shape[:2] == (3, 2) and running.held_frames == 6
    assert sum(running.attention_bytes) == 3 * kv_cache_bytes(model.config, 6)
    assert not torch.allclose(logits_BcV, filled(model, Chunks(2, 0), streams=3).step(x_BnD))


def test_reserved_memory_is_an_eighth_more_at_most_than_frames_worked_on(steps):
    _, table = steps
    for row in table[~table["system"].isin([RECOMPUTED, "linear"])].to_dict("records"):
        kept, new = round(row["left_seconds"] * 50), round(row["chunk_ms"] / 20)
        assert row["cache_bytes"] < row["reserved_bytes"] <= row["cache_bytes"] * (kept + new) / kept * 9 / 8


def test_multiplications_are_those_of_the_formula(steps):
    """Of a layer that remembers 8 numbers and of one that remembers 32, all else the same."""
    _, table = steps
    row = {name: rows.iloc[0] for name, rows in table.groupby("system")}
    queries, frames, width, heads = 2, 12, 16, 4
    kept = round(row["MHA"]["left_seconds"] * 50)
    assert (queries, frames) == (round(row["MHA"]["chunk_ms"] / 20), kept + queries)
    mha = queries * width * 2 * width + 2 * queries * frames * width
    absorbed = queries * 8 * width + 2 * queries * 8 * width + 2 * queries * frames * heads * 8
    expanded = queries * 8 * width + 2 * frames * 8 * width + 2 * queries * frames * width
    mla = absorbed if absorbing_pays(queries, frames, heads, 4, (8, 8)) else expanded
    assert row["MHA"]["multiplications"] - row["MLA 8"]["multiplications"] == 2 * (mha - mla)


def test_lookahead_and_precision_reach_the_streams():
    systems = {"MLA 8": random_encoders(**SIZE)["MLA 8"]}
    how = {"repeats": 1, "recompute_seconds": 0.0, "cache": "bfloat16"}
    short = benchmark_steps(systems, [40], [0.2], **how).iloc[0]
    ahead = benchmark_steps(systems, [40], [0.2], lookahead_ms=100, precision="bf16", **how)
    assert ahead.attrs["dtype"] == "bfloat16" and ahead["lookahead_ms"].tolist() == [100]
    assert ahead.iloc[0]["multiplications"] > 2 * short["multiplications"]
    assert ahead.iloc[0]["cache_bytes"] == short["cache_bytes"] == short["formula_bytes"]


def test_formats_for_people():
    shown = formats_table(random_encoders(**SIZE)).set_index(["system", "held in"])
    assert shown.loc[("MHA", "float32"), "times less"] == "1.0"
    assert shown.loc[("MLA 2", "int8"), "bits per number"] == "16.00"  # a scale of 16 bits for 2 numbers of 8
    assert shown.loc[("MLA 2", "int8"), "times less"] == f"{32 * 4 / 4:.1f}"
    assert "in all" in shown.loc[("linear", "float32"), "bytes per second"]


def test_recomputing_is_the_full_pass():
    model = random_encoders(**SIZE)["MHA"]
    features = torch.randn(1, 60, 80)
    with torch.no_grad():
        frames_1TD = model.frames(features)
        full = chunked_pass(model, features, Chunks(100))
        torch.testing.assert_close(recomputed(model, frames_1TD), full, rtol=1e-4, atol=1e-4)


def test_steps_for_people(steps):
    _, table = steps
    shown = steps_table(table)
    assert len(shown) == len(multiplications_table(table)) == 4
    one = table[(table["left_seconds"] == 0.2) & (table["chunk_ms"] == 40)].set_index("system")
    speed = one["ms"]["MHA"] / one["ms"]["MLA 8"]
    assert shown["MLA 8"].iloc[0].endswith(f"×{speed:.2f}") and "×" not in shown["MHA"].iloc[0]
    assert multiplications_table(table)["MHA"].iloc[0] == f"{one['multiplications']['MHA'] / 1e6:,.1f}"
    kept = bytes_table(table)
    assert set(kept["by the formula"]) == {"the same"} and len(kept) == 2 * len(kinds_of(16, 4))
    assert kept[kept["system"] == "MLA 8"]["times less than MHA"].tolist() == ["4.0", "4.0"]
    sentence = positions_sentence(table)
    assert sentence.startswith(f"Projected positions take {2 * 16 * 4 * (20 + 5 + 4) / 1024:.4g} KiB more at 0.4 s")
    figure = steps_figure(table)
    assert len(figure.axes) == 2 and "MLA 8 at 0.2 s" in figure.get_label()


def test_streams_at_once():
    systems = {name: model for name, model in random_encoders(**SIZE).items() if name in ("MHA", "MLA 8")}
    room = (1000 + 500) * 9 // 8  # frames: of 20 s kept, of 10 s new, and an eighth
    memory = 3 * (kv_cache_bytes(systems["MHA"].config, room) + 2 * 4 * 4 * 16)  # of three streams, convolutions too
    table = streams_in_real_time(systems, 10_000, 20, memory, most=4)
    assert table["system"].tolist() == ["MHA", "MLA 8"] and table["in_memory"].tolist()[0] == 3
    assert table["in_memory"][1] > 3 and table["in_real_time"].tolist() == [3, 4]
    assert streams_table(table, memory).iloc[1].iloc[-1] == "×1.3"


def test_absorbing_is_chosen_by_what_it_multiplies():
    table = benchmark_forms(16, 4, queries=(1, 64), frames=(10,), repeats=1)
    assert set(table["rank"]) == {8, 4, 2}
    for row in table.to_dict("records"):
        assert (row["chosen"] == "absorbed") == (row["multiplications"] < 1)
        assert row["loss"] >= 0
        pays = absorbing_pays(row["queries"], row["frames"] + row["queries"], 4, 4, (row["rank"],) * 2)
        assert pays == (row["multiplications"] < 1)


def test_the_command_prints_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ENCODER_SIZES, "shipped", SIZE)
    out = tmp_path / "steps.csv"
    assert main(["--chunk", "40", "--left", "0.2", "--repeats", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "MLA 8" in printed and len(pd.read_csv(out)) == len(kinds_of(16, 4)) + 1
    assert main(["--forms", "--repeats", "1"]) == 0 and "multiplications" in capsys.readouterr().out


def test_a_benchmark_needs_something_to_measure():
    with pytest.raises(ValueError, match="at least one system"):
        benchmark_steps({}, [100], [1])
    with pytest.raises(ValueError, match="have an end"):
        benchmark_steps(random_encoders(**SIZE), [100], [math.inf])


def test_a_chunk_is_a_frame_at_least():
    config = tiny.conformer().config
    assert chunks_of(config, 1, 0.2, 40) == Chunks(1, 10, 2) and chunks_of(config, 160, None) == Chunks(8, None)
