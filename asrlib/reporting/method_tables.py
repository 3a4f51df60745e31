"""Every method at every cut, to read: one table of what `asrlib.measuring.methods` measured, and the break points.

    python -m asrlib methods synthetic-conformer synthetic --calibration train --splits validation

prints them: of every recipe at every cut on every split how far the logits are from the baseline's (relative error, KL
divergence), word errors with intervals and significance, and the seconds of the conversion. With --out FOLDER the rows
are kept, and the same command, given again, measures only those that are missing:

    settings.json  what the rows belong to     rows.jsonl            one row a line
    table.csv      the numbers, for figures    predictions/*.jsonl   transcripts
"""

import argparse
import functools
import sys
import warnings
from collections.abc import Iterable, Iterator

import pandas as pd

import asrlib
from asrlib.data.opening import check_splits, open_usable
from asrlib.measuring.methods import CUTS, benchmark
from asrlib.measuring.recipes import RECIPES, names_in, reachable
from asrlib.measuring.rows import BASELINE, ZEROED, Row, break_point, in_order
from asrlib.measuring.transcribing import in_own_words
from asrlib.models.heard_once import keep_encoder_states
from asrlib.models.registry import chosen_parts, frames_of
from asrlib.reporting.numbers import p_number, rate_interval, tested_points
from asrlib.runs import BadParameter

ENCODER_MEMORY = 4.0  # GiB for the states of a Whisper's encoder


def as_table(rows: Iterable[Row]) -> pd.DataFrame:
    """The rows to read, in the order of `in_order`; `cached` counts the numbers per frame and layer."""
    table = []
    for row in in_order(rows):
        kept = [width for width in row.latent_dim if width] or [0]  # layers that share a latent keep none of their own
        low, high = min(kept), max(kept)
        compared, made = row.recipe != BASELINE, row.recipe not in (BASELINE, ZEROED)
        values = {
            "split": row.split,
            "cut %": f"{100 * row.cut:.4g}",
            "method": row.recipe,
            "cached": f"{low}" if low == high else f"{low}–{high}",
            "attention error": f"{row.output_error:.2g}" if made else "",
            "logit error": f"{row.logit_error:.2g}" if compared else "",
            "KL": f"{row.kl:.2g}" if compared else "",
            "WER %": f"{100 * row.wer:.2f}",
            "95 % interval": rate_interval(row.wer_interval),
            "difference": tested_points(row.wer_difference, row.difference_interval) if compared else "",
            "p": p_number(row.p) if compared else "",
            "seconds": f"{row.seconds:.1f}" if made else "",
        }
        table.append(values)
    return pd.DataFrame(table)


def readable_break_points(breaks: pd.DataFrame) -> pd.DataFrame:
    """`break_point` to read."""
    table = []
    for row in breaks.itertuples():
        cut = f"{100 * row.cut:.4g} %" if row.cut else "none"
        values = {"split": row.split, "method": row.recipe, "holds to": cut, "cache left": f"{100 * row.cache:.4g} %"}
        table.append(values | {"breaks at": "not seen" if row.deepest_tried else f"{100 * row.broken_at:.4g} %"})
    return pd.DataFrame(table)


# ---- command line ------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m asrlib methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a shipped model, a folder, or a hub id")
    add("corpus", metavar="CORPUS", help="synthetic, a LibriSpeech folder, a manifest, or a hub id")
    add("--calibration", required=True, metavar="SPLIT", help="of the corpus, no test split")
    add("--splits", required=True, metavar="a,b", help="of the corpus, to measure on")
    add("--cuts", metavar="50,75,…", help="%% of the cache (default: halved six times, 50 to 98.44)")
    add("--methods", metavar="svd,…", help=f"default: all, which are: {'; '.join(RECIPES)}")
    add("--samples", type=int, metavar="N", help="utterances a split (default: all)")
    add("--calibration-seconds", type=float, default=600.0, metavar="S", help="speech for statistics (default: 600)")
    add("--parts", metavar="decoder,cross", help="of a model with a decoder, to convert (default: what keeps a cache)")
    add("--own-words", action="store_true", help="of a model with a decoder: calibrate on what it writes itself")
    add("--out", metavar="FOLDER", help="keeps rows, transcripts and table, and resumes (default: print only)")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--seed", type=int, default=0, help="of the choice of utterances (default: 0)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """What was measured is printed, whatever happens. Raises BadParameter before anything was measured."""
    args = parse(argv)
    rows: list[Row] = []
    keep_encoder_states(ENCODER_MEMORY)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(message, file=sys.stderr)  # noqa: T201
        try:
            for row in _asked_for(args):
                rows.append(row)
        except (OSError, ValueError) as error:
            raise error if rows else BadParameter(str(error)) from error
        finally:
            keep_encoder_states(0)
            if rows:
                print(_report(rows))  # noqa: T201
    return 0


def _asked_for(args: argparse.Namespace) -> Iterator[Row]:
    recipes = [RECIPES[name] for name in names_in(args.methods, RECIPES)] if args.methods else list(RECIPES.values())
    cuts = cuts_in(args.cuts) if args.cuts else CUTS
    splits = [split.strip() for split in args.splits.split(",")]
    check_splits(args.corpus, [args.calibration, *splits])
    model, processor = asrlib.load(args.model)
    parts = chosen_parts(model.config, [part.strip() for part in args.parts.split(",")] if args.parts else None)
    reachable(model.config, recipes, cuts, parts)  # before the speech is decoded, which may take long
    usable = functools.partial(open_usable, args.corpus, processor=processor, frames=frames_of(model), seed=args.seed)
    calibration = usable(split=args.calibration, seconds=args.calibration_seconds)
    corpora = {split: usable(split=split, samples=args.samples) for split in splits}
    if args.own_words:
        calibration = in_own_words(model, processor, calibration, args.device)
    how = {"device": args.device, "parts": parts}
    return benchmark(model, processor, calibration, corpora, cuts, recipes, args.calibration_seconds, args.out, **how)


def cuts_in(text: str) -> list[float]:
    """Per cents with commas between them, as fractions. Raises ValueError."""
    try:
        return [round(float(word.strip().removesuffix("%")) / 100, 8) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--cuts is {text!r}: give percentages with commas between them, like 50,87.5") from None


def _report(rows: list[Row]) -> str:
    table, breaks = as_table(rows), readable_break_points(break_point(rows))
    sizes = {row.split: f"{row.split}: {row.utterances} utterances, {row.words} words" for row in rows}
    legend = "cached: numbers per frame and layer · KL: nats per frame · difference: points of WER, to the baseline's"
    parts = [_text(table), "\n".join([*sizes.values(), legend])]
    if len(breaks):
        parts += ["How far the cache can be cut before word errors rise significantly (p < 0.05)", _text(breaks)]
    return "\n\n".join(parts)


def _text(table: pd.DataFrame) -> str:
    """Method names start at the left, numbers end at the right."""
    names = table["method"].str.len().max()
    return table.assign(method=table["method"].str.ljust(names)).to_string(index=False)
