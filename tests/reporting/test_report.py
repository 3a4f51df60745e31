"""Pages open from disk without network, show data as text, and say nothing that the metrics do not."""

import base64
import re

import matplotlib.colors
import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from markupsafe import Markup
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from asrlib.reporting import comparison, figures, method_figures, notebook_pages, pages, run_figures, tables
from asrlib.runs import MissingStep, Run, write_json

SCRIPT = "<script>alert('x')</script>"
PIXEL = base64.b64encode(bytes.fromhex("89504e470d0a1a0a")).decode()


# ---- a run with made-up metrics ----------------------------------------------------------------------------


def score(wer, low, high):
    counts = {"words": 1340, "utterances": 200, "seconds_audio": 588.0}
    return {"wer": wer, "cer": wer / 4, "wer_interval": [low, high], **counts}


def timing(latency, cache, peak, ratio):
    return {
        "parameters": 2_000_000,
        "latency_ms_mean": latency,
        "latency_ms_p50": latency,
        "latency_ms_p95": 2 * latency,
        "rtfx": 1000 / latency,
        "speed_ratio": ratio,
        "speed_ratio_interval": [ratio - 0.05, ratio + 0.05],
        "peak_memory_bytes": peak,
        "cache_bytes_per_second": cache,
        "cache_bytes_1000_frames": 20 * cache,
    }


SCORES = {
    "baseline": {"test-clean": score(0.0411, 0.031, 0.052), "test-other": score(0.12, 0.10, 0.14)},
    "converted": {"test-clean": score(0.0733, 0.061, 0.085), "test-other": score(0.2, 0.17, 0.23)},
    "finetuned": {"test-clean": score(0.0455, 0.035, 0.057), "test-other": score(0.13, 0.11, 0.15)},
}
TIMINGS = {
    "baseline": timing(60.0, 40_960, 200e6, 1.0),
    "converted": timing(50.0, 5_120, 180e6, 1.2),
    "finetuned": timing(48.0, 5_120, 170e6, 1.25),
}


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "trial")


def fill(run, scores=SCORES, timings=TIMINGS, paired=None):
    run.write_metrics("evaluate", {"systems": scores, "paired": {"test-clean": paired or {}}})
    if timings:
        facts = {"device": "cpu", "threads": 2, "dtype": "float32"}
        run.write_metrics("benchmark", {**facts, "systems": timings})
    return run


def complete(run, step, **facts):
    run.mark_started(step, "f")
    run.mark_completed(step, "f", **facts)


# ---- notebooks as pages ------------------------------------------------------------------------------------


def display_data(data, metadata=None):
    return new_output("display_data", data=data, metadata=metadata or {})


def render(tmp_path, *cells, name="02_analyze_svd_error"):
    notebook = new_notebook(cells=list(cells), metadata={"language_info": {"name": "python"}})
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {"a": 1}}}
    nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    page = notebook_pages.render_notebook(tmp_path / f"{name}.ipynb", tmp_path / f"{name}.html", tmp_path / "my run")
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


def requests_of(soup):
    """Whatever a browser would fetch or run: anything but data: in src and url(), and every script."""
    found = [str(script) for script in soup.select("script, iframe, object, embed")]
    for element in soup.find_all(True):
        for name, value in element.attrs.items():
            fetched = name in ("src", "srcset", "poster", "data") or (name == "href" and element.name == "link")
            if (fetched and not value.startswith("data:")) or name.startswith("on"):
                found.append(f"{element.name} {name}={value}")
    urls = re.findall(r"url\((.*?)\)|@import (.*?);", str(soup))
    return found + [url for pair in urls for url in pair if url and not url.strip("\"'").startswith("data:")]


def test_requests_are_noticed():
    page = "<style>a{background:url(http://a)}</style><img src='http://b'><script>1</script><b onclick='f()'>"
    assert len(requests_of(BeautifulSoup(page, "html.parser"))) == 4


def test_a_page_asks_for_nothing(tmp_path):
    hostile = f"<img src='https://example.org/a.png' onerror='x()'><iframe src='https://b'></iframe>{SCRIPT}<p>kept</p>"
    soup = render(
        tmp_path,
        new_markdown_cell("# Title\n\n![far](https://example.org/far.png) and [a link](https://example.org)"),
        new_code_cell("1", outputs=[display_data({"text/html": hostile, "text/plain": "plain"})]),
        new_code_cell("2", outputs=[display_data({"application/javascript": "alert(1)", "text/plain": "js"})]),
        new_code_cell("3", outputs=[display_data({"text/latex": "$x^2$", "text/plain": "<Math object>"})]),
    )
    assert requests_of(soup) == []
    policy = soup.select_one("meta[http-equiv=Content-Security-Policy]")["content"]
    assert "default-src 'none'" in policy and "script-src" not in policy and "http" not in policy
    assert "kept" in soup.main.text and "$x^2$" in soup.main.text and "js" not in soup.main.text
    assert soup.find("a", string="a link")["href"] == "https://example.org"


def test_data_is_shown_as_text(tmp_path):
    soup = render(
        tmp_path,
        new_code_cell(f"x = {SCRIPT!r}", outputs=[new_output("stream", name="stdout", text=SCRIPT)]),
        new_code_cell("x", outputs=[display_data({"text/plain": SCRIPT})]),
        new_code_cell("y", outputs=[new_output("stream", name="stderr", text=SCRIPT)]),
        new_code_cell("z", outputs=[new_output("error", ename="E", evalue=SCRIPT, traceback=["\x1b[31m" + SCRIPT])]),
        new_code_cell("t", outputs=[display_data({"text/html": tables.table_html(pd.DataFrame({SCRIPT: [SCRIPT]}))})]),
    )
    shown = {"pre.text": 2, "details.log pre": 1, ".error p": 1, ".error pre": 1, "td": 1, "th": 1}
    assert {where: sum(SCRIPT in element.text for element in soup.select(where)) for where in shown} == shown
    assert "\x1b" not in soup.text


def test_code_is_folded_and_figures_are_described(tmp_path):
    figure = display_data({"image/png": PIXEL}, {"image/png": {"alt": 'errors < 5 & "more"', "width": 800}})
    soup = render(tmp_path, new_markdown_cell("# A *title*"), new_code_cell("draw(1)", outputs=[figure]))
    assert soup.select_one("details.code:not([open]) .highlight").text.strip() == "draw(1)"
    image = soup.select_one("main img")
    assert image["alt"] == 'errors < 5 & "more"' and image["src"] == f"data:image/png;base64,{PIXEL}"
    assert soup.title.text == "A title · my run"
    assert len(str(soup)) < 40_000


def test_progress_bars_and_widgets_leave_no_litter(tmp_path):
    bar = ["\r  0%|  | 0/2", "\r 50%|# | 1/2", "\r100%|##| 2/2\n"]
    widget = {
        "application/vnd.jupyter.widget-view+json": {"model_id": "a"},
        "text/plain": "HBox(children=(…))",
    }
    outputs = [new_output("stream", name="stderr", text=text) for text in bar]
    outputs.insert(1, new_output("stream", name="stdout", text="between "))
    outputs += [display_data(widget), new_output("stream", name="stdout", text="bars\n")]
    soup = render(tmp_path, new_code_cell("work()", outputs=outputs))
    assert soup.select_one("details.log:not([open]) pre").text == "100%|##| 2/2"
    assert soup.select_one("pre.text").text == "between bars"
    assert "HBox" not in soup.text and "widget" not in soup.main.text


def test_a_bar_whose_cursor_moves_were_lost_is_shown_once(tmp_path):
    bars = "a:   0%| | 0/2\na:  50%|# | 1/2\na: 100%|##| 2/2\na:  50%|# | 1/2\nb:   0%| | 0/9\nan error\n"
    soup = render(tmp_path, new_code_cell("", outputs=[new_output("stream", name="stderr", text=bars)]))
    shown = soup.select_one("details.log pre").text.split("\n")
    assert shown == ["a: 100%|##| 2/2", "a:  50%|# | 1/2", "b:   0%| | 0/9", "an error"]


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ("a\nb\n", "a\nb"),
        ("10 %\r20 %\r100 %\ndone", "100 %\ndone"),
        ("long line\rshort", "shortline"),  # as a terminal shows it: what is not overwritten stays
        ("bar\r   \rnext", "next"),  # leave=False wipes with spaces
        ("outer 1\n inner 1\x1b[A\router 2\n inner 2", "outer 2\n inner 2"),  # nested bars
        ("\x1b[31mred\x1b[0m\x1b[K", "red"),
        ("windows\r\nlines", "windows\nlines"),
        ("", ""),
    ],
)
def test_final_terminal_text(written, seen):
    assert notebook_pages.final_terminal_text(written) == seen


@pytest.mark.parametrize("injected", [None, "# Parameters\nlatent_dim = 18\n", "# Parameters\nstranger = 18\n"])
def test_parameters_become_one_table(tmp_path, injected):
    defaults = 'latent_dim: int = 72  # numbers <cached>\ncorpus: str = "synthetic"  # speech\n'
    cells = [new_code_cell(defaults, metadata={"tags": ["parameters"]})]
    if injected:
        cells.append(new_code_cell(injected, metadata={"tags": ["injected-parameters"]}))
    soup = render(tmp_path, *cells)
    rows = [[cell.text for cell in row.select("th, td")] for row in soup.select("details.parameters tbody tr")]
    value, default = ("18", "72") if "latent_dim = 18" in (injected or "") else ("72", "")
    assert rows == [
        ["latent_dim", value, default, "numbers <cached>"],
        ["corpus", '"synthetic"', "", "speech"],
    ]
    assert ("stranger" in soup.main.text) == ("stranger" in (injected or ""))  # nothing given is lost


def test_navigation(tmp_path):
    sections = "# T\n\n## One\n\n## Two `code`\n\n## Three"
    soup = render(tmp_path, new_markdown_cell(sections), name="06_compare")
    links = [link["href"] for link in soup.select("nav.pages a")]
    assert links == ["index.html", *(f"{stem}.html" for stem in notebook_pages.PAGES)]
    assert soup.select_one("nav.pages [aria-current=page]")["href"] == "06_compare.html"
    assert soup.select_one("a[rel=prev]")["href"] == "05_benchmark.html"
    assert soup.select_one("a[rel=next]")["href"] == "index.html"
    assert [link.text for link in soup.select("nav.sections a")] == ["One", "Two code", "Three"]
    assert all(soup.find(id=link["href"][1:]) for link in soup.select("nav.sections a"))


# ---- tables and transcripts --------------------------------------------------------------------------------


def test_table_escapes_aligns_and_formats():
    df = pd.DataFrame({"name": ["<b>", None], "wer": [0.0427, float("nan")], "mark": ["<i>a</i>", "<i>b</i>"]})
    soup = BeautifulSoup(tables.table_html(df, "A & B", {"wer": ".1%", "mark": Markup}, index=False), "html.parser")
    cells = [[cell.text for cell in row.select("td")] for row in soup.select("tbody tr")]
    assert cells == [["<b>", "4.3%", "a"], ["–", "–", "b"]]
    assert soup.caption.text == "A & B" and len(soup.select("td i")) == 2 and not soup.select("td b")
    assert [cell.get("class") for cell in soup.select("tbody tr:first-child td")] == [["short"], ["n"], None]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "marks"),
    [
        ("THE CAT SAT", "THE CAT SAT", []),
        ("THE CAT SAT", "THE BAT SAT", ["<del>CAT</del>", "<ins>BAT</ins>"]),
        ("THE CAT SAT", "THE SAT", ["<del>CAT</del>"]),
        ("THE SAT", "THE CAT SAT", ["<ins>CAT</ins>"]),
        ("", "A B", ["<ins>A</ins>", "<ins>B</ins>"]),
        ("A", "", ["<del>A</del>"]),
        ("", "", []),
        ("A", SCRIPT.replace(" ", ""), ["<del>A</del>", f"<ins>{Markup.escape(SCRIPT)}</ins>"]),
    ],
)
def test_diff_marks_words_without_needing_colour(reference, hypothesis, marks):
    diff = tables.diff_transcripts(reference, hypothesis)
    found = re.findall(r"<(?:del|ins)[ >].*?</(?:del|ins)>", re.sub(r' title="\w+"', "", diff))
    assert found == marks
    soup = BeautifulSoup(diff, "html.parser")
    kept = [word for word in reference.split() if f"<del>{word}</del>" not in marks]
    for element in soup.select("del, ins"):
        element.extract()
    assert soup.text.split() == kept


# ---- the comparison ----------------------------------------------------------------------------------------


def test_comparison_table_reads_metrics_alone(run):
    table = comparison.comparison_table(fill(run))
    assert list(table.index) == ["baseline", "converted", "finetuned"]
    tuned = table.loc["finetuned"]
    assert (tuned["wer_test-clean"], tuned["wer_test-clean_low"], tuned["wer_test-other_high"]) == (
        0.0455,
        0.035,
        0.15,
    )
    assert tuned["cache_cut"] == 0.875 and tuned["latency_ms"] == 48 and tuned["attention"] == "MLA"
    assert [path.name for path in run.path.iterdir()] == ["metrics"]


def test_comparison_of_a_baseline_alone(run):
    run.write_metrics("baseline", {"parameters": 5, "splits": SCORES["baseline"]})
    table = comparison.comparison_table(run)
    assert list(table.index) == ["baseline"] and table.at["baseline", "parameters"] == 5
    readable = comparison.readable_comparison(table)
    assert list(readable.index) == [
        "WER test-clean",
        "WER test-other",
        "CER test-clean",
        "CER test-other",
        "parameters",
    ]


def test_readable_comparison(run):
    readable = comparison.readable_comparison(comparison.comparison_table(fill(run)))["fine-tuned (MLA)"]
    assert readable["WER test-clean"] == "4.55 % (3.50–5.70)"
    assert readable["K/V cache per second of audio"] == "5 KiB (−87.5 %)"
    assert readable["speed against the baseline"] == "×1.25 (1.20–1.30)"
    assert readable["peak memory"] == "162.1 MiB (−15 %)"


def paired(p=None, interval=None):
    return {"baseline vs finetuned": {"p": p, "interval": interval}}


CONVERTED = {name: SCORES[name] for name in ("baseline", "converted")}
BETTER = SCORES | {"finetuned": {"test-clean": score(0.03, 0.02, 0.04)}}
APART = SCORES | {"finetuned": {"test-clean": score(0.09, 0.08, 0.1)}}


@pytest.mark.parametrize(
    ("metrics", "said", "unsaid"),
    [
        (
            {"paired": paired(0.31)},
            "At 87.5 % less cache, WER on test-clean went from 4.11 to 4.55 % (95 % intervals 3.10–5.20 and "
            "3.50–5.70; no significant difference in the paired bootstrap, p = 0.31), "
            "speed ×1.25 (1.20–1.30), peak memory −15 %.",
            "fine-tuning",
        ),
        (
            {"paired": paired(0.001)},
            "; significantly worse in the paired bootstrap, p = 0.001)",
            "no significant",
        ),
        ({"paired": paired(0.01), "scores": BETTER}, "; significantly better in the paired bootstrap,", "worse"),
        ({"paired": paired(0.0001)}, "p < 0.001)", "no significant"),
        (
            {"paired": paired(None, [-0.01, 0.02])},
            "no significant difference in the paired bootstrap)",
            "p =",
        ),
        (
            {"paired": paired(None, [0.01, 0.02])},
            "significantly worse in the paired bootstrap)",
            "no significant",
        ),
        ({}, "they overlap)", "significant"),
        ({"scores": APART}, "they do not overlap)", "significant"),
        ({"scores": CONVERTED, "timings": None}, "to 7.33 % before any fine-tuning (", "less cache"),
        ({"timings": None}, "WER on test-clean went from 4.11 to 4.55 %", "speed"),
        (
            {"scores": {"baseline": SCORES["baseline"]}},
            "is 4.11 % (95 % interval 3.10–5.20); no converted",
            "went",
        ),
        ({"scores": {}, "timings": None}, "No word error rate has been measured yet.", "%"),
    ],
)
def test_headline_says_what_the_metrics_say(run, metrics, said, unsaid):
    sentence = comparison.headline(fill(run, **metrics))
    assert said in sentence and unsaid not in sentence and sentence.endswith(".")


def test_write_comparison(run):
    complete(run, "03_finetune", seconds=141.0)
    table = comparison.write_comparison(fill(run))
    written = pd.read_csv(run.tables / "comparison_table.csv", index_col="system")
    pd.testing.assert_frame_equal(written, table)
    names = {"wer_bars", "wer_vs_cache", "cache_comparison", "inference_time_comparison"}
    assert {path.stem for path in run.figures.iterdir()} == names
    summary = (run.path / "summary.txt").read_text()
    assert "2 min 21 s" in summary and "4.55 % (3.50–5.70)" in summary and "peak memory" in summary
    claims = summary[summary.index("Claimed") :]
    assert "2.4–2.6 %" in claims and "2.4–2.6 %" not in summary.removesuffix(claims)
    assert all("claimed" in column for column in comparison.CLAIMED.columns)


@pytest.mark.parametrize(("present", "missing"), [("evaluate", "05_benchmark"), ("benchmark", "04_evaluate")])
def test_write_comparison_names_the_missing_step(run, present, missing):
    run.write_metrics(present, {"systems": {}})
    with pytest.raises(MissingStep, match=missing):
        comparison.write_comparison(run)
    assert not (run.path / "summary.txt").exists()


# ---- figures -----------------------------------------------------------------------------------------------


def drawn(run):
    """Each figure with something its description says and the labels its axes carry."""
    table = comparison.comparison_table(fill(run))
    history = [
        {"step": 5, "loss": 0.5, "learning_rate": 1e-5},
        {"step": 10, "eval_loss": 0.4, "eval_wer": 0.08},
    ]
    rows = [
        {"layer": layer, "latent_dim": n, "key_error": 3 / n, "value_error": 1 / n, "output_error": 2 / n}
        for layer in range(2)
        for n in (18, 36)
    ]
    errors = pd.DataFrame(rows)
    layouts = pd.concat([errors.assign(layout=layout) for layout in ("joint", "split")])
    spectra = {0: [3, 1, 0.5], 1: [2, 1, 1]}
    wer, layer = "word error rate (%)", {"layer", "relative error (%)", "latent_dim (numbers per frame)"}
    return [
        (run_figures.wer_bars(table), "4.55 %", {wer}),
        (run_figures.wer_vs_cache(table), "fine-tuned (MLA) 12.5 %", {wer, "K/V cache (% of the baseline's)"}),
        (run_figures.cache_comparison(table), "converted (MLA): 5 KiB", {"K/V cache per second of audio (KiB)"}),
        (
            run_figures.inference_time_comparison(table),
            "fine-tuned (MLA): 48.0",
            {"latency per utterance (ms)", "RTFx: seconds of audio per second of compute"},
        ),
        (
            figures.training_curves(history, best_step=10),
            "8.00 %",
            {"loss", "validation WER (%)", "learning rate", "training step"},
        ),
        (
            method_figures.spectrum_figure(spectra, latent_dim=2),
            "2 layers, 2 marked",
            {"direction, the largest first", "singular value ÷ the largest", "directions kept", "energy kept (%)"},
        ),
        (method_figures.error_heatmap(errors), "11.1 % at latent_dim 18", layer),
        (method_figures.error_heatmap(layouts), "5.6 % at latent_dim 36", layer),
        (
            method_figures.cost_of_cut(costs()),
            "At 87.50 %, clean: svd 30.00 %, attended 12.00 %",
            {"WER (%)", "KL divergence (nats per frame)", "cut of the cache (%), not to scale"},
        ),
        (
            method_figures.allocation_figure(costs(), ["attended"]),
            "each of 2 layers, by attended",
            {"layer", "cut of the cache (%)", "÷ the mean of all layers"},
        ),
        (
            method_figures.error_against_wer(costs(), (0.05, 0.1)),
            "4 conversions; the largest error without a significant change is 40 %",
            {"error of the attention outputs (%)", "WER − baseline's (points)"},
        ),
    ]


def costs() -> pd.DataFrame:
    """What conversion.rows.as_frame makes of a benchmark: one split, two methods, two cuts."""
    rows = [
        # recipe, cut, numbers per layer, attention error, KL, WER, p
        ("baseline", 0.0, "32 32", 0.0, 0.0, 0.10, 1.0),
        ("svd", 0.75, "8 8", 0.2, 0.02, 0.11, 0.5),
        ("attended", 0.75, "6 10", 0.1, 0.01, 0.10, 1.0),
        ("svd", 0.875, "4 4", 0.6, 0.3, 0.30, 0.0),
        ("attended", 0.875, "3 5", 0.4, 0.1, 0.12, 0.3),
        ("attention zeroed", 1.0, "0 0", 1.0, 2.0, 0.90, 0.0),
    ]
    frame = pd.DataFrame(rows, columns=["recipe", "cut", "latent_dim", "output_error", "kl", "wer", "p"])
    ends = {f"{name}_{end}": frame[name] * by for name in ("kl", "wer") for end, by in (("low", 0.8), ("high", 1.3))}
    return frame.assign(split="clean", wer_difference=frame["wer"] - 0.1, **ends)


def test_costs_are_drawn_where_they_were_measured():
    words, output = method_figures.cost_of_cut(costs()).axes
    changes = [container[0].get_ydata().tolist() for container in output.containers]
    assert changes == [[0.02, 0.3], [0.01, 0.1]]
    measured = [c[0].get_ydata().round(1).tolist() for c in words.containers]
    assert measured == [[11.0, 30.0], [10.0, 12.0]]
    reach = words.containers[0][2][0].get_segments()[1][:, 1]  # of svd's deeper cut
    assert reach.round(1).tolist() == [24.0, 39.0]
    grid = method_figures.allocation_figure(costs(), ["attended"]).axes[0]
    assert [text.get_text() for text in grid.texts] == ["6", "3", "10", "5"]
    points = method_figures.error_against_wer(costs(), (0.05,)).axes[0].collections
    assert [part.get_offsets()[:, 0].tolist() for part in points] == [[20.0, 10.0, 40.0], [60.0]]


def test_figures_are_labelled_and_described(run):
    for figure, said, labels in drawn(run):
        assert isinstance(figure, Figure) and said in figure.get_label()
        assert {text for ax in figure.axes for text in (ax.get_xlabel(), ax.get_ylabel()) if text} == labels


def test_bars_show_the_values_and_their_intervals(run):
    ax = run_figures.wer_bars(comparison.comparison_table(fill(run))).axes[0]
    assert [round(bar.get_height(), 2) for bar in ax.patches] == [4.11, 12.0, 7.33, 20.0, 4.55, 13.0]
    reaches = [line.get_segments()[0][:, 1].round(2).tolist() for line in ax.collections]
    assert reaches[0] == [3.1, 5.2] and reaches[-1] == [11.0, 15.0]
    colours = {matplotlib.colors.to_hex(bar.get_facecolor()) for bar in ax.patches}
    assert len(colours) == 3


def test_a_saved_figure_keeps_its_description_and_appears_whole(tmp_path, run):
    figure = run_figures.wer_bars(comparison.comparison_table(fill(run)))
    path = tmp_path / "figures" / "wer.png"
    figures.save_figure(figure, path)
    with Image.open(path) as image:
        assert image.info["Description"] == figure.get_label() and image.width > 1000
    assert Markup.escape(figure.get_label()) in tables.figure_html(path)
    before = path.read_bytes()
    figure.savefig = None  # a drawing that fails
    with pytest.raises(TypeError):
        figures.save_figure(figure, path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_display_carries_the_alternative_text(monkeypatch, run):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **how: shown.append((data, how)))
    figure = run_figures.cache_comparison(comparison.comparison_table(fill(run)))
    figures.show_figure(figure)
    tables.display_table(pd.DataFrame({"a": [SCRIPT]}))
    (image, how), (table, _) = shown
    assert base64.b64decode(image["image/png"])[1:4] == b"PNG"
    assert how["metadata"]["image/png"]["alt"] == figure.get_label()
    assert SCRIPT not in table["text/html"] and SCRIPT in table["text/plain"]


# ---- the index page ----------------------------------------------------------------------------------------


def index_of(run, **how):
    return BeautifulSoup(pages.write_index(run.path, **how).read_text(encoding="utf-8"), "html.parser")


def test_index_of_a_finished_run(run):
    comparison.write_comparison(fill(run, paired=paired(0.31)))
    run.write_metrics("baseline", {"model": SCRIPT, "splits": SCORES["baseline"]})
    write_json(run.path / "params.json", {"corpus": SCRIPT, "latent_dim": 18})
    for step in notebook_pages.PAGES:
        (run.path / f"{step}.html").touch()
        complete(run, step, seconds=61.0, commit="abc123", versions={"torch": "2.13.0"}, time="2025-01-02")
    soup = index_of(run)
    assert requests_of(soup) == []
    plain = soup.select_one(".lead").text.replace("\u00a0", " ").replace("\u2060", "")
    assert plain == comparison.headline(run)
    head = [cell.text for cell in soup.select(".comparison thead th")]
    assert head == ["baseline (MHA)", "converted (MLA)", "fine-tuned (MLA)"]
    wer = [cell.text.replace("\u00a0", " ") for cell in soup.select(".comparison tbody tr:first-child td")]
    assert [text.split(" ")[0] for text in wer] == ["4.11", "7.33", "4.55"]
    assert [link["href"] for link in soup.select("ol.steps a")] == [f"{step}.html" for step in notebook_pages.PAGES]
    assert {time.text for time in soup.select("ol.steps .time")} == {"1 min 01 s"}
    assert not soup.select(".notice") and len(soup.select("figure img[alt]")) == 4
    facts = soup.select_one("dl.facts").text
    assert all(fact in facts for fact in ("python run_all.py trial", "abc123", "torch 2.13.0", "2 threads", SCRIPT))
    assert SCRIPT in soup.select_one("details.parameters").text
    assert "06_compare                  1 min 01 s" in (run.path / "summary.txt").read_text()


def test_index_of_a_run_half_done(run):
    run.write_metrics("baseline", {"model": "m", "splits": SCORES["baseline"]})
    (run.path / "00_baseline.html").touch()
    complete(run, "00_baseline", seconds=5.0)
    soup = index_of(run, command="python run_all.py trial --set seed=1")
    assert "WER of the baseline on test-clean is 4.11" in soup.select_one(".lead").text.replace("\u00a0", " ")
    assert "Baseline" not in soup.select_one(".notice").text and "Compare" in soup.select_one(".notice").text
    assert [link["href"] for link in soup.select("ol.steps a")] == ["00_baseline.html"]
    assert [link["href"] for link in soup.select("nav.pages a")] == ["index.html", "00_baseline.html"]
    assert len(soup.select("figure img")) == 1
    assert "--set seed=1" in soup.select_one("dl.facts").text


def test_index_of_a_run_of_some_steps(run):
    fill(run)
    complete(run, "00_baseline", seconds=3.0)
    write_json(run.path / "params.json", {"steps": ["00_baseline"]})
    soup = index_of(run)
    assert len(soup.select("ol.steps li")) == 1 and not soup.select(".notice")
    assert soup.h1.text.endswith(": one recogniser")


def test_index_forgets_what_is_out_of_date(run):
    comparison.write_comparison(fill(run))
    run.write_metrics("baseline", {"model": "m", "splits": SCORES["baseline"]})
    for step in notebook_pages.PAGES:
        (run.path / f"{step}.html").touch()
        complete(run, step, seconds=1.0)
    for step in list(notebook_pages.PAGES)[1:]:  # they are to run again
        run.mark_started(step, "changed")
    soup = index_of(run)
    assert "no converted model has been evaluated yet" in soup.select_one(".lead").text
    assert [link["href"] for link in soup.select("ol.steps a, .muted a")] == ["00_baseline.html"]
    assert len(soup.select("figure img")) == 1 and "tuned" not in soup.select_one("figure img")["alt"]
    assert "4.55" not in soup.main.text


def test_index_of_a_run_not_begun(run):
    soup = index_of(run)
    assert soup.select_one(".lead").text == "No word error rate has been measured yet."
    assert not soup.select(".comparison, figure")
