"""Rows equal what is computed directly, a folder resumes, and break points are where they are by hand."""

import dataclasses
import json
import re

import family_models
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from commands import command

import asrlib.measuring.methods as bench
from asrlib import collect_statistics, convert, evaluate, open_corpus
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.data.text import label_ids
from asrlib.measuring.methods import BASELINE, ZEROED, Row, as_frame, benchmark, errors_by_width
from asrlib.measuring.recipes import RECIPES, Recipe, names_in, reachable
from asrlib.measuring.rows import break_point, first_broken, read_rows
from asrlib.measuring.transcribing import in_own_words, transcribe
from asrlib.measuring.word_errors import load_predictions
from asrlib.models.heard_once import KEPT
from asrlib.models.inference import spoken_logits, zero_attention
from asrlib.models.registry import attention_modules, frames_of
from asrlib.models.scratch import new_processor
from asrlib.reporting.method_tables import as_table

main = command("methods")

CALIBRATION = tiny.corpus(12)
SPEECH = tiny.corpus(6, "validation", seed=50)
SHORT = {"cuts": [0.75, 0.5, 0.875], "recipes": [RECIPES["two_sided"], RECIPES["split svd"]]}


def rows_of(model, out=None, speech=None, **changes) -> list[Row]:
    speech = speech or {"validation": SPEECH}
    return list(benchmark(model, new_processor(), CALIBRATION, speech, out=out, **SHORT | changes))


@pytest.fixture(scope="module")
def model():
    return tiny.conformer()


@pytest.fixture(scope="module")
def rows(model):
    return {(row.recipe, row.cut): row for row in rows_of(model)}


@pytest.fixture(scope="module")
def converted(model):
    statistics = collect_statistics(model, new_processor(), CALIBRATION)
    return convert(model, cache_cut=0.75, method="two_sided", ranks="uniform", statistics=statistics)


@pytest.fixture
def passes(monkeypatch):
    """The splits that were transcribed, one after the other; and "recipe: cut" for every conversion."""
    seen = []
    transcribe, converter = bench.transcribe, Recipe.converter

    def counted(*args, corpus, **how):
        seen.append(corpus.split)
        return transcribe(*args, corpus=corpus, **how)

    def watched(recipe, *args):
        convert_to = converter(recipe, *args)
        return lambda cut: seen.append(f"{recipe.name}: {cut}") or convert_to(cut)

    monkeypatch.setattr(bench, "transcribe", counted)
    monkeypatch.setattr(Recipe, "converter", watched)
    return seen


# ---- what is measured --------------------------------------------------------------------------------------


def logits_alone(model) -> list[torch.Tensor]:
    """[T, V] of every utterance by itself."""
    processor = new_processor()
    inputs = [processor(u.audio(), sampling_rate=16_000, return_tensors="pt").input_values for u in SPEECH]
    with torch.no_grad():
        return [model(samples_1S).logits[0].double() for samples_1S in inputs]


def test_logit_error_and_kl_against_a_direct_computation(model, rows, converted):
    theirs, ours = logits_alone(model), logits_alone(converted)
    row = rows["two_sided", 0.75]
    change = torch.cat(ours) - torch.cat(theirs)
    assert row.logit_error == pytest.approx((change.norm() / torch.cat(theirs).norm()).item(), rel=1e-3)
    assert row.logit_error > 0.01
    log_p, log_q = torch.cat(theirs).log_softmax(-1), torch.cat(ours).log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert row.kl == pytest.approx(kl.item(), rel=1e-3)
    of_utterances = [
        torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum").item()
        for p, q in zip(theirs, ours, strict=True)
    ]
    generator, frames = np.random.default_rng(0), np.array([len(p) for p in theirs])
    drawn = [generator.integers(len(frames), size=len(frames)) for _ in range(10_000)]
    resampled = [np.array(of_utterances)[picks].sum() / frames[picks].sum() for picks in drawn]
    assert row.kl_interval == pytest.approx(np.percentile(resampled, [2.5, 97.5]).tolist(), rel=1e-3)


def test_word_errors_are_those_of_evaluate(model, rows, converted):
    row = rows["two_sided", 0.75]
    result, baseline = evaluate(converted, new_processor(), SPEECH), evaluate(model, new_processor(), SPEECH)
    assert row.predictions == result.predictions != baseline.predictions
    assert (row.wer, row.wer_interval) == (result.wer, result.wer_interval)
    assert row.wer_difference == result.wer - baseline.wer
    assert row.difference_interval[0] <= row.wer_difference <= row.difference_interval[1]
    assert (row.utterances, row.words) == (6, 12)


def test_half_the_cache_is_free(model, rows):
    row = rows["two_sided", 0.5]
    assert row.logit_error < 1e-5
    assert abs(row.kl) < 1e-9
    assert row.predictions == rows[BASELINE, 0.0].predictions
    assert (row.wer_difference, row.p) == (0, 1)
    assert rows["split svd", 0.5].logit_error > 0.01  # a split latent is not exact there


def test_the_baseline_and_the_model_without_attention_are_rows_too(model, rows):
    baseline, zeroed = rows[BASELINE, 0.0], rows[ZEROED, 1.0]
    assert baseline.predictions == evaluate(model, new_processor(), SPEECH).predictions
    assert (baseline.logit_error, baseline.kl, baseline.kl_interval, baseline.p) == (0, 0, (0, 0), 1)
    assert (baseline.cut_reached, baseline.latent_dim) == (0, (32, 32))
    with zero_attention(model):
        assert zeroed.predictions == evaluate(model, new_processor(), SPEECH).predictions
    assert zeroed.logit_error > 0.1
    assert (zeroed.cut_reached, zeroed.latent_dim) == (1, (0, 0))


def test_the_cut_reached_is_that_of_the_widths(model):
    rows = rows_of(model, cuts=[0.7], recipes=[RECIPES["svd"], RECIPES["two_sided, energy"]])
    for row in rows[2:]:
        assert sum(row.latent_dim) <= 18  # 0.3 · 32 = 9.6 numbers a layer
        assert row.cut_reached == pytest.approx(1 - sum(row.latent_dim) / 64)
    assert rows[2].latent_dim == (9, 9)


def test_one_pass_over_a_split_for_every_system_in_order(model, passes):
    speech = {"validation": SPEECH, "dev": tiny.corpus(4, "dev", seed=9)}
    rows = rows_of(model, cuts=[0.75, 0.5], recipes=[RECIPES["svd"], RECIPES["whitened"]], speech=speech)
    both = ["validation", "dev"]
    expected = ["validation"] * 2 + ["dev"] * 2  # as it is, and without attention
    for cut in ("svd: 0.5", "svd: 0.75", "whitened: 0.5", "whitened: 0.75"):
        expected += [cut, *both]
    assert passes == expected
    assert [row.split for row in rows[4:]] == both * 4


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_gives_a_row(model, name):
    cut = 0.5 if name.startswith("GQA") else 0.75  # of two heads, one is left
    if "shared" in name:  # needs cross-attention
        with pytest.raises(ValueError, match="joint latent of cross-attention, not a joint latent of encoder"):
            rows_of(model, cuts=[cut], recipes=[RECIPES[name]])
        return
    row = rows_of(model, cuts=[cut], recipes=[RECIPES[name]])[-1]
    assert row.recipe == name
    assert cut <= row.cut_reached < cut + 0.05
    assert 0.001 < row.logit_error < 1.5  # random weights: not even their spectrum falls
    assert row.seconds > 0


def test_a_decomposition_serves_all_cuts(model, monkeypatch):
    import asrlib.measuring.recipes as recipes

    calls, decompose = [], recipes.decompose
    monkeypatch.setattr(recipes, "decompose", lambda *args: calls.append(args[2]) or decompose(*args))
    rows_of(model)
    assert calls == ["two_sided", "svd"]


# ---- cuts out of reach -------------------------------------------------------------------------------------


def test_a_recipe_has_no_row_at_a_cut_that_it_cannot_reach(model):
    with pytest.warns(UserWarning) as warned:
        rows = rows_of(model, cuts=[0.75, 0.96875])  # one number a layer is left of 32
    assert [(row.recipe, row.cut) for row in rows[2:]] == [
        ("two_sided", 0.75),
        ("two_sided", 0.96875),
        ("split svd", 0.75),
    ]
    said = [str(w.message) for w in warned if "no row" in str(w.message)]
    assert said == [said[0]]
    assert "no row for 'split svd' at a cut of 96.88 %: latent_dim is 1, but a split latent" in said[0]


@pytest.mark.parametrize(
    ("cuts", "names", "message"),
    [
        ([0.5, 0.99], ["svd", "split svd"], "no recipe reaches a cut of 99 %: .* the deepest cut is 0.96875"),
        ([0.96875], ["split svd"], "no recipe reaches a cut of 96.88 %: latent_dim is 1"),
        ([1.0], ["svd"], "a cut is 100 %: it must lie between 0 and 100 %"),
        ([-0.5], ["svd"], "a cut is -50 %"),
        ([float("nan")], ["svd"], "a cut is nan %"),
        ([], ["svd"], "at least one recipe and one cut"),
        ([0.5], [], "at least one recipe and one cut"),
        ([0.5], ["svd", "svd"], "two recipes have the same name"),
    ],
)
def test_what_is_impossible_is_refused(model, cuts, names, message):
    with pytest.raises(ValueError, match=message):
        reachable(model.config, [RECIPES[name] for name in names], cuts)


def test_positions_can_forbid_a_recipe():
    config = tiny.conformer("rotary").config
    plan = reachable(config, [RECIPES["svd"], RECIPES["split svd"]], [0.5])
    assert plan == {RECIPES["svd"]: [], RECIPES["split svd"]: [0.5]}
    with pytest.raises(ValueError, match=r"no recipe reaches a cut of 50 %: .*rotary"):
        reachable(config, [RECIPES["svd"]], [0.5])


def test_a_latent_model_is_refused(converted):
    with pytest.raises(ValueError, match="latent already"):
        benchmark(converted, new_processor(), CALIBRATION, {"validation": SPEECH})


# ---- resuming ----------------------------------------------------------------------------------------------


def test_rows_that_are_there_are_not_measured_again(model, tmp_path, passes):
    first = rows_of(model, tmp_path)
    passes.clear()
    assert rows_of(model, tmp_path) == first
    assert passes == []
    kept = load_predictions(tmp_path / "predictions" / "two_sided_87.5_validation.jsonl")
    assert kept == next(row for row in first if (row.recipe, row.cut) == ("two_sided", 0.875)).predictions
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table.csv"), as_frame(first))


def test_a_half_written_line_is_measured_again(model, tmp_path, passes):
    first = rows_of(model, tmp_path)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])
    passes.clear()
    again = rows_of(model, tmp_path)
    assert passes == ["validation", "split svd: 0.875", "validation"]  # first the baseline, for its logits
    assert [dataclasses.replace(row, seconds=0) for row in again] == [
        dataclasses.replace(row, seconds=0) for row in first
    ]
    assert len([json.loads(line) for line in (tmp_path / "rows.jsonl").open()]) == len(first)


def test_an_interrupted_benchmark_goes_on_and_may_ask_for_more(model, tmp_path, passes):
    measuring = benchmark(model, new_processor(), CALIBRATION, {"validation": SPEECH}, out=tmp_path, **SHORT)
    first = [next(measuring) for _ in range(3)]
    measuring.close()
    assert len(pd.read_csv(tmp_path / "table.csv")) == 3
    passes.clear()
    more = {"cuts": [0.5, 0.75], "recipes": [RECIPES["two_sided"], RECIPES["svd"]]}
    speech = {"validation": SPEECH, "dev": tiny.corpus(4, "dev", seed=9)}
    rows = rows_of(model, tmp_path, speech, **more)
    assert len(rows) == 2 * (2 + 4)
    assert [row for row in rows if row in first] == first
    assert [seen for seen in passes if ":" in seen] == ["two_sided: 0.5", "two_sided: 0.75", "svd: 0.5", "svd: 0.75"]
    assert passes.count("validation") == 4 and passes.count("dev") == 6


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"calibration_seconds": 5.0}, r"calibration_seconds \(600.0 there, 5.0 now\)"),
        ({"speech": {"validation": tiny.corpus(7, "validation")}}, "speech of validation"),
        ({"recipes": [Recipe("two_sided", method="whitened")]}, "recipe 'two_sided'"),
    ],
)
def test_rows_of_another_benchmark_are_refused(model, tmp_path, changes, differs):
    rows_of(model, tmp_path, cuts=[0.5])
    with pytest.raises(ValueError, match=f"rows of another benchmark, which differs in {differs}: give another folder"):
        rows_of(model, tmp_path, **{"cuts": [0.5]} | changes)


def test_rows_of_another_model_or_code_are_refused(model, tmp_path, monkeypatch):
    rows_of(model, tmp_path, cuts=[0.5])
    other = tiny.conformer()
    other.lm_head.bias.data[0] += 1e-3
    with pytest.raises(ValueError, match="differs in weights of the model: "):
        rows_of(other, tmp_path, cuts=[0.5])
    monkeypatch.setattr(bench, "_code_fingerprint", lambda: "of other code")
    with pytest.raises(ValueError, match="differs in code of asrlib"):
        rows_of(model, tmp_path, cuts=[0.5])


# ---- errors inside the layers ------------------------------------------------------------------------------


def test_recipes_go_by_their_own_names():
    assert [recipe.name for recipe in RECIPES.values()] == list(RECIPES)


@pytest.mark.parametrize("name", ["split svd", "two_sided"])
def test_errors_of_a_recipe_fall_with_the_width_of_its_latent(model, name):
    statistics = collect_statistics(model, new_processor(), CALIBRATION)
    table = errors_by_width(model, tiny.padded_batch(), RECIPES[name], statistics)
    assert set(table["method"]) == {name} and set(table["layout"]) == {RECIPES[name].layout}
    widths = sorted({max(2, int(tiny.WIDTH / share)) for share in (32, 16, 8, 4, 2, 4 / 3, 1)})
    assert sorted(table["latent_dim"].unique()) == widths and set(table["layer"]) == set(range(tiny.LAYERS))
    errors = table.groupby("latent_dim")["output_error"].mean()
    assert errors.is_monotonic_decreasing and errors.iloc[0] > 2 * errors.iloc[-1]


# ---- tables ------------------------------------------------------------------------------------------------


def row(recipe: str, cut: float, difference: float = 0.0, p: float = 1.0, split: str = "test") -> Row:
    return Row(
        recipe, cut, cut, (8, 8), split, 0.3, 0.1, 0.01, (0.005, 0.02), 0.1 + difference, (0.05, 0.2), difference,
        (difference - 0.01, difference + 0.01), p, 1.0, 40, 351, []
    )  # fmt: skip


def test_tables_go_by_split_then_cut_then_recipe():
    rows = [row(name, cut, split=split) for name in ("svd", "a") for split in ("y", "x") for cut in (0.9, 0.5)]
    rows = [row(BASELINE, 0.0, split="y"), row(ZEROED, 1.0, split="y"), *rows]
    expected = [
        ("y", 0.0, BASELINE), ("y", 0.5, "svd"), ("y", 0.5, "a"), ("y", 0.9, "svd"), ("y", 0.9, "a"), ("y", 1, ZEROED),
        ("x", 0.5, "svd"), ("x", 0.5, "a"), ("x", 0.9, "svd"), ("x", 0.9, "a"),
    ]  # fmt: skip
    frame, table = as_frame(rows), as_table(rows)
    assert list(zip(frame["split"], frame["cut"], frame["recipe"], strict=True)) == expected
    assert list(zip(table["split"], table["method"], strict=True)) == [(split, name) for split, _, name in expected]
    assert frame.drop(columns=["split", "recipe", "latent_dim"]).dtypes.map(pd.api.types.is_numeric_dtype).all()


def test_a_table_reads_as_it_should():
    rows = [row(BASELINE, 0.0), row("svd", 0.984375, 0.0123, 0.0004)]
    line = as_table(rows).to_dict("records")[1]
    assert line == {
        "split": "test", "cut %": "98.44", "method": "svd", "cached": "8",
        "attention error": "0.3", "logit error": "0.1", "KL": "0.01",
        "WER %": "11.23", "95 % interval": "5.00–20.00", "difference": "+1.23 (+0.23 to +2.23)",
        "p": "< 0.001", "seconds": "1.0",
    }  # fmt: skip
    assert as_table([dataclasses.replace(rows[1], latent_dim=(3, 17))])["cached"][0] == "3–17"
    assert as_table([row("svd", 0.5, -0.01)])["difference"][0] == "−1.00 (−2.00 to ±0.00)"


@pytest.mark.parametrize(
    ("steps", "cut", "broken_at"),
    [
        ({0.5: (0, 1), 0.75: (0.01, 0.2), 0.875: (0.02, 0.01)}, 0.75, 0.875),
        ({0.75: (0.0, 1), 0.875: (0.02, 0.01), 0.9375: (0.01, 0.3)}, 0.75, 0.875),  # deeper and no worse: too late
        ({0.5: (0.02, 0.049), 0.75: (0, 1)}, 0, 0.5),
        ({0.5: (0, 1), 0.75: (0.02, 0.05)}, 0.75, None),  # p must be below
        ({0.5: (-0.05, 0.001), 0.75: (0, 1)}, 0.75, None),  # better is no break
        ({0.9: (0.5, 0.001), 0.5: (0, 1)}, 0.5, 0.9),  # measured in another order
    ],
)
def test_break_points_by_hand(steps, cut, broken_at):
    rows = [row(BASELINE, 0.0), *(row("svd", at, *outcome) for at, outcome in steps.items()), row(ZEROED, 1.0, 0.3, 0)]
    found = break_point(rows)
    assert len(found) == 1
    found = found.iloc[0]
    assert (found["split"], found["recipe"], found["cut"], found["cache"]) == ("test", "svd", cut, 1 - cut)
    assert found["deepest_tried"] == (broken_at is None)
    assert np.isnan(found["broken_at"]) if broken_at is None else found["broken_at"] == broken_at


def test_every_split_and_recipe_has_its_break_point():
    rows = [row(name, 0.5, 0.1, p, split) for name, split, p in [("svd", "a", 0), ("svd", "b", 1), ("x", "a", 1)]]
    found = break_point(rows)
    assert found[["split", "recipe", "cut"]].values.tolist() == [["a", "svd", 0], ["a", "x", 0.5], ["b", "svd", 0.5]]


# ---- command line ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(model, tmp_path_factory):
    """A folder with a model and a corpus of two splits."""
    folder = tmp_path_factory.mktemp("project")
    model.save_pretrained(folder / "model")
    new_processor().save_pretrained(folder / "model")
    for corpus in (CALIBRATION, SPEECH):
        lines = []
        for utterance in corpus:
            (folder / f"{utterance.id}.wav").write_bytes(utterance.source().getvalue())
            lines.append(json.dumps({"audio": f"{utterance.id}.wav", "text": utterance.text, "id": utterance.id}))
        (folder / f"{corpus.split}.jsonl").write_text("\n".join(lines))
    return folder


def command(project, *more: str) -> list[str]:
    return [str(project / "model"), str(project), "--calibration", "train", "--splits", "validation", *more]


def test_the_command_prints_the_table_and_the_break_points(project, rows, tmp_path, capsys):
    more = ["--cuts", "50,75,87.5", "--methods", "two_sided,split svd", "--out", str(tmp_path / "out")]
    assert main(command(project, *more)) == 0
    printed = capsys.readouterr().out
    assert "validation: 6 utterances, 12 words" in printed
    for (name, cut), measured in rows.items():
        assert re.search(rf"{100 * cut:.4g} {name} .* {100 * measured.wer:.2f} ", printed), (name, cut)
    assert "not seen" in printed or "breaks at" in printed
    assert (tmp_path / "out" / "table.csv").is_file()
    assert main(command(project, *more)) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "svd,two-sided"], "unknown method 'two-sided': did you mean 'two_sided'?"),
        (["--methods", "zzz"], "unknown method 'zzz': split svd; svd; "),
        (["--cuts", "50,150"], "a cut is 150 %: it must lie between 0 and 100 %"),
        (["--cuts", "50;75"], "--cuts is '50;75': give percentages with commas between them"),
        (["--cuts", "99"], "no recipe reaches a cut of 99 %"),
        (["--splits", "validation,nowhere"], "has no split 'nowhere'"),
        (["--cuts", "50", "--samples", "0"], "at least one utterance"),
        (["--cuts", "50", "--parts", "decoder"], "parts is ['decoder'], but the parts of wav2vec2-conformer"),
    ],
)
def test_a_mistake_is_one_clear_line(project, capsys, more, message):
    assert main(command(project, *more)) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert captured.out == ""


def test_the_command_converts_the_parts_of_a_decoder_on_its_own_words(project, tmp_path, capsys):
    model, processor = family_models.whisper(), family_models.processor_of("whisper")
    model.generation_config.max_length = 8
    for part in (model, processor):
        part.save_pretrained(tmp_path / "whisper")
    more = ["--parts", "cross", "--own-words", "--cuts", "50", "--methods", "svd", "--out", str(tmp_path / "out")]
    assert main([str(tmp_path / "whisper"), *command(project, *more)[1:]]) == 0
    assert " svd " in capsys.readouterr().out and KEPT.limit_bytes == KEPT.bytes == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["parts"] == "cross"
    own = in_own_words(model, processor, open_corpus(project, "train").usable(processor, frames_of(model)))
    assert settings["calibration speech"].endswith(own.fingerprint())
    (svd,) = (row for row in read_rows(tmp_path / "out").values() if row.recipe == "svd")
    width = model.config.d_model
    assert sorted(set(svd.latent_dim)) == [width, 2 * width], "the decoder's own attention is left as it was"


def test_calibration_on_a_test_split_is_refused(project, tmp_path, capsys):
    for file in project.glob("*.wav"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "test.jsonl").write_bytes((project / "train.jsonl").read_bytes())
    arguments = [str(project / "model"), str(tmp_path), "--calibration", "test", "--splits", "test", "--cuts", "50"]
    assert main(arguments) == 2
    assert "calibration on 'test' would spoil the test" in capsys.readouterr().err


def test_interrupted_it_prints_what_there_is(project, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Recipe, "converter", interrupted)
    assert main(command(project, "--cuts", "50")) == 130
    captured = capsys.readouterr()
    assert BASELINE in captured.out and "Interrupted." in captured.err


def test_names_with_commas_are_found_in_a_list_with_commas():
    assert names_in("svd, two_sided", RECIPES) == ["svd", "two_sided"]
    assert names_in("two_sided, energy,svd,two_sided", RECIPES) == ["two_sided, energy", "svd", "two_sided"]
    longest = "attended, sensitivity, sequential"
    assert names_in(f"{longest},two_sided,sensitivity", RECIPES) == [longest, "two_sided, sensitivity"]


def said(*hypotheses: str) -> list[dict]:
    return [
        {"id": str(i), "speaker": "s", "seconds": 1.0, "reference": "A B", "hypothesis": text}
        for i, text in enumerate(hypotheses)
    ]


def test_what_breaks_first_is_of_an_utterance_that_was_right():
    heard = {0.5: ("A C", "A B", "A B"), 0.75: ("X Y", "A B", "A X"), 0.875: ("A B", "X Y", "A B")}
    rows = [dataclasses.replace(row(BASELINE, 0.0), predictions=said("A C", "A B", "A B"))]
    rows += [dataclasses.replace(row("svd", cut), predictions=said(*texts)) for cut, texts in heard.items()]
    first = first_broken(rows, "svd")
    assert [label for label, _ in first] == ["baseline", "50 %", "75 %", "87.5 %"]
    assert [p["hypothesis"] for _, p in first] == ["A B", "A B", "A X", "A B"]
    assert first_broken(rows[:2], "svd") == []


def test_the_attention_error_is_that_on_calibration_speech(model, rows, converted):
    statistics = collect_statistics(model, new_processor(), CALIBRATION)
    squares = []
    for ours, theirs, layer in zip(*map(attention_modules, (converted, model)), statistics.layers, strict=True):
        kept_BT, arguments = layer.sample.kept_BT, layer.sample.arguments
        with torch.no_grad():
            wanted, found = theirs(**arguments)[0][kept_BT], ours(**arguments)[0][kept_BT]
        squares.append((found - wanted).square().sum() / wanted.square().sum())
    assert rows["two_sided", 0.75].output_error == pytest.approx(torch.stack(squares).mean().sqrt().item(), rel=1e-4)


@pytest.mark.parametrize(("cut", "reached"), [(0.5, True), (0.75, True), (0.25, False), (0.875, False), (0.6, False)])
def test_heads_are_grouped_where_their_number_makes_just_the_cut(cut, reached):
    config = tiny.conformer(num_attention_heads=4).config
    assert (RECIPES["GQA, mean of heads"].obstacle(config, cut) is None) == reached


def test_posteriors_of_a_decoder_are_compared_on_what_the_baseline_writes():
    model, processor, speech = family_models.whisper(), family_models.processor_of("whisper"), tiny.corpus(3)
    model.generation_config.max_length = 8  # random bytes are spelt in more tokens than they were written in
    reference = bench._Reference(model, speech, {"processor": processor})
    written = [row["hypothesis"] for row in transcribe(model, processor, speech)]
    assert [utterance.text for utterance in reference.told] == written != [utterance.text for utterance in speech]
    outcome = reference.compare(lambda: (convert(model, 4), 0.0, 0.0))
    labels = [label_ids(text, processor) for text in written]
    assert [len(reference.logits[place]) for place in range(3)] == [len(ids) for ids in labels]
    with torch.no_grad():
        batch = SpeechCollator(processor)(list(SpeechDataset(reference.told, processor)))
        ours, theirs = (torch.cat(spoken_logits(each, batch)).log_softmax(-1) for each in (convert(model, 4), model))
    expected = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean").item()
    assert outcome["kl"] == pytest.approx(expected, rel=1e-3) and outcome["kl"] > 0
    assert bench._Reference(tiny.conformer(), speech, {}).told is None
