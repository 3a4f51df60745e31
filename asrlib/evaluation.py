"""What a recogniser writes down, and how many of its words are wrong.

Transcripts are greedy. Error rates are fractions over a whole corpus (errors of all utterances divided by
words of all utterances); intervals and tests are those of significance.py.

    python -m asrlib.evaluation A.jsonl B.jsonl    # transcripts of one corpus by two models: is B better?

Shapes: N utterances, B batch, S what a model reads (samples of audio, or frames of features), T frames,
V tokens of the vocabulary.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jiwer
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from asrlib.attention.chunks import Chunks
from asrlib.command_line import add_debug, sentence, tell
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.data.corpus import Corpus, check_corpus
from asrlib.data.normalising import HeardSoFar
from asrlib.data.text import folded, whisper_normalised
from asrlib.models.families import check_loaded, family_of, frame_counts
from asrlib.models.inference import choose_device, inference, recognise, spoken_logits, without_padding
from asrlib.out_of_memory import out_of_memory_explained
from asrlib.runs import atomic_write, resolve
from asrlib.significance import compare_errors, rate_interval, sums_by_speaker
from asrlib.streaming import chunked_pass

FIELDS = {"id", "speaker", "seconds", "reference", "hypothesis"}  # of a transcript


# ---- transcripts -------------------------------------------------------------------------------------------


def transcribe(
    model: nn.Module,
    processor,
    corpus: Corpus,
    batch_seconds: float = 60.0,
    device: str | None = None,
    precision: str = "fp32",
    record: Callable[[int, torch.Tensor], None] | None = None,
    chunks: Chunks | None = None,
    cache: str = "float32",
) -> list[dict]:
    """Greedy transcripts in the order of the corpus: {id, speaker, seconds, reference, hypothesis} each.

    The reference is the text of the corpus as it stands. `batch_seconds` bounds the padded audio in a batch and changes
    the speed, not the transcripts: each is that of the utterance alone. `record` is called once for every utterance, in
    no particular order, with its place in the corpus and its logits [T, V], unpadded frames alone, on the device (where
    no CTC writes the text, those of the reference's tokens: see models.heads). With `chunks` they are what a stream
    would give, whose cache is held in that format. Raises UnusableAudio where an utterance cannot be decoded,
    torch.OutOfMemoryError where a batch is too large, with what to lower.
    """
    check_loaded(model, processor)
    check_corpus(corpus)
    device = choose_device(device, model)
    limits = {"batch_seconds": batch_seconds, "precision": precision}
    writes = family_of(model.config).head.reads_labels  # token by token, instead of frame by frame
    dataset = SpeechDataset(corpus, processor)
    if getattr(model.config, "feat_extract_norm", "layer") == "group":
        batches = [[i] for i in range(len(corpus))]  # this norm averages over the padding too
    else:
        batches = list(dataset.batches(batch_seconds, shuffle=False))
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=SpeechCollator(processor) if chunks is None else HeardSoFar(processor),
        # Decode the next batch while the accelerator computes.
        num_workers=0 if device.type == "cpu" else dataset.workers(4),
    )
    hypotheses = [""] * len(corpus)
    with (
        inference(model, device=device, precision=precision),
        # leave=None: below another bar it goes when it is done
        tqdm(total=len(corpus), desc=f"transcribing {corpus.split}", unit="utt", leave=None) as progress,
    ):
        for indices, batch in zip(batches, loader, strict=True):
            named = [(corpus[i].id, corpus[i].seconds) for i in indices]
            with out_of_memory_explained(f"transcribing {corpus.split}", named, limits):
                batch = _on_device(model, batch, device)
                texts = recognise(model, processor, batch) if writes else None
                logits = [] if writes and record is None else _logits(model, batch, chunks, cache)
            if texts is None:
                texts = processor.batch_decode([logits_TV.argmax(-1).tolist() for logits_TV in logits])
            for i, text in zip(indices, texts, strict=True):
                hypotheses[i] = text
            if record is not None:
                for i, logits_TV in zip(indices, logits, strict=True):
                    record(i, logits_TV)
            progress.update(len(indices))
    return [
        {"id": u.id, "speaker": u.speaker, "seconds": u.seconds, "reference": u.text, "hypothesis": text}
        for u, text in zip(corpus, hypotheses, strict=True)
    ]


def _on_device(model: nn.Module, batch: dict, device: torch.device) -> dict:
    moved = {name: values.to(device) for name, values in batch.items()}
    name = model.main_input_name
    return moved | {name: moved[name].to(model.dtype)}


def _logits(model: nn.Module, batch: dict, chunks: Chunks | None, cache: str) -> list[torch.Tensor]:
    """Logits [T, V] of the unpadded frames of each utterance: B tensors of different lengths."""
    if chunks is None:
        return spoken_logits(model, batch)
    inputs_BS, mask_BS = batch[model.main_input_name], batch["attention_mask"]  # [B, S, F] of features
    return without_padding(chunked_pass(model, inputs_BS, chunks, mask_BS, cache), frame_counts(model, mask_BS.sum(-1)))


def write_predictions(path: str | Path, predictions: list[dict]) -> None:
    """One JSON object a line, in one atomic write."""
    with atomic_write(path) as file:
        for prediction in predictions:
            file.write(json.dumps(prediction, ensure_ascii=False) + "\n")


def load_predictions(path: str | Path) -> list[dict]:
    """Reads back what `evaluate` or `write_predictions` wrote; ValueError names a line that is none of it."""
    predictions = []
    with open(resolve(path), encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                prediction = json.loads(line)
            except json.JSONDecodeError:
                prediction = None
            if not isinstance(prediction, dict) or FIELDS - prediction.keys():
                raise ValueError(f"line {number} of {path} is no transcript: evaluate again to write it anew")
            predictions.append(prediction)
    return predictions


# ---- metrics of one's own ---------------------------------------------------------------------------------


def normalised_wer(predictions: list[dict]) -> float | None:
    """WER in per cent after Whisper's English normaliser, which changes the number of words; None if it leaves none."""
    references, hypotheses = (
        [whisper_normalised(prediction[side]) for prediction in predictions] for side in ("reference", "hypothesis")
    )
    return 100 * jiwer.wer(references, hypotheses) if any(references) else None


# Beside word and character errors: name → what it makes of transcripts as `transcribe` gives them, a number. Each is in
# the tables, in metrics/*.json and in what --verify counts again. docs/extending.md has another one worked out.
METRICS: dict[str, Callable[[list[dict]], float | None]] = {"normalised WER %": normalised_wer}


# ---- word errors -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Errors of one model on one corpus; `as_metrics` is what metrics/*.json holds."""

    wer: float  # fraction of the reference words; above 1 where much is inserted
    wer_interval: tuple[float, float]  # 95 %, over utterances
    wer_interval_by_speaker: tuple[float, float] | None  # 95 %, over speakers; None where there is only one
    cer: float  # fraction of the reference characters, spaces between words included
    substitutions: int  # words
    deletions: int
    insertions: int
    words: int  # in the references
    utterances: int
    speakers: int
    seconds_audio: float
    others: dict[str, float | None]  # by METRICS
    predictions: list[dict] = field(repr=False)
    errors_N: np.ndarray = field(repr=False)  # word errors of each utterance, in the order of predictions
    words_N: np.ndarray = field(repr=False)  # reference words of each utterance
    alignments: list[list[jiwer.AlignmentChunk]] = field(repr=False)  # words of each utterance

    def as_metrics(self) -> dict:
        apart = ("predictions", "errors_N", "words_N", "alignments", "others")
        values = {name: value for name, value in self.__dict__.items() if name not in apart} | self.others
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def score(predictions: list[dict]) -> EvaluationResult:
    """Corpus WER and CER of transcripts as `transcribe` gives them; case and repeated spaces do not count.

    An utterance with an empty reference counts its insertions, one with an empty hypothesis its deletions.
    Raises ValueError where there is no reference word at all: error rates are undefined then.
    """
    references = [folded(p["reference"]) for p in predictions]
    hypotheses = [folded(p["hypothesis"]) for p in predictions]
    if not any(references):
        raise ValueError(f"no word in the references of {len(predictions)} utterances: the WER is undefined")
    words = jiwer.process_words(references, hypotheses)
    errors_N = np.array([_word_errors(alignment) for alignment in words.alignments])
    words_N = np.array([len(reference) for reference in words.references])
    errors_words_N2 = np.stack([errors_N, words_N], axis=1)
    of_speakers_G2 = sums_by_speaker(errors_words_N2, predictions)
    return EvaluationResult(
        wer=words.wer,
        wer_interval=rate_interval(errors_words_N2),
        wer_interval_by_speaker=rate_interval(of_speakers_G2) if len(of_speakers_G2) > 1 else None,
        cer=jiwer.process_characters(references, hypotheses).cer,
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        words=int(words_N.sum()),
        utterances=len(predictions),
        speakers=len(of_speakers_G2),
        seconds_audio=sum(p["seconds"] for p in predictions),
        others={name: metric(predictions) for name, metric in METRICS.items()},
        predictions=predictions,
        errors_N=errors_N,
        words_N=words_N,
        alignments=words.alignments,
    )


def error_table(results: dict[tuple[str, str], EvaluationResult]) -> pd.DataFrame:
    """One row per (split, system): rates in per cent with their 95 % intervals, over utterances and over speakers."""
    rows = [
        {
            "split": split,
            "system": system,
            "WER %": f"{100 * result.wer:.2f} ({in_per_cent(result.wer_interval)})",
            "over speakers": f"{in_per_cent(result.wer_interval_by_speaker)} ({result.speakers})",
            "CER %": f"{100 * result.cer:.2f}",
            **{name: _metric(name, value) for name, value in result.others.items()},
            "sub / del / ins": f"{result.substitutions} / {result.deletions} / {result.insertions}",
            "words": result.words,
            "utterances": result.utterances,
        }
        for (split, system), result in results.items()
    ]
    return pd.DataFrame(rows)


def paired_table(paired: dict[str, dict[str, dict]]) -> pd.DataFrame:
    """One row per split and pair of systems, changes in points; `paired[split]["a vs b"]` is of `compare_errors`."""
    rows = []
    for split, tests in paired.items():
        for name, test in tests.items():
            of_speakers = test["by_speaker"]
            found = "worse" if test["difference"] > 0 else "better"
            rows.append(
                {
                    "split": split,
                    "from → to": name.replace(" vs ", " → ").replace("finetuned", "fine-tuned"),
                    "change, points": f"{in_points(test['difference'])} ({in_per_cent(test['interval'], '+.2f')})",
                    "p": _shown(test["p"]),
                    "over speakers": _with_p(of_speakers) if of_speakers else "–",
                    "p matched pairs": _shown(test["matched_pairs"]["p"]),
                    "verdict": "no significant difference" if test["p"] > 0.05 else found,
                }
            )
    return pd.DataFrame(rows)


def _metric(name: str, value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if name.endswith("%") else f"{value:.4g}"


def _with_p(test: dict) -> str:
    p = _shown(test["p"])
    return f"{in_per_cent(test['interval'], '+.2f')}, p {p if p.startswith('<') else f'= {p}'}"


def _shown(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def in_per_cent(interval: Sequence[float] | None, form: str = ".2f") -> str:
    """An interval of fractions, written in per cent or points."""
    return "–" if interval is None else " to ".join(format(100 * end, form) for end in interval).replace("-", "−")


def in_points(change: float) -> str:
    """A change of a fraction, in points, with the minus sign, as wide as the plus."""
    return f"{100 * change:+.2f}".replace("-", "−")


def _word_errors(alignment: list[jiwer.AlignmentChunk]) -> int:
    return sum(
        max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        for chunk in alignment
        if chunk.type != "equal"
    )


def evaluate(
    model: nn.Module,
    processor,
    corpus: Corpus,
    batch_seconds: float = 60.0,
    device: str | None = None,
    precision: str = "fp32",
    predictions: str | Path | None = None,
) -> EvaluationResult:
    """Transcribes the corpus and scores it; `predictions` is the .jsonl the transcripts are written to.

    `device`: see `choose_device`. `precision`: fp32, bf16 or fp16.
    """
    transcripts = transcribe(model, processor, corpus, batch_seconds, device, precision)
    if predictions is not None:
        write_predictions(predictions, transcripts)
    return score(transcripts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m asrlib.evaluation", description="Compares transcripts, by words.")
    parser.add_argument("a", metavar="A.jsonl", help="transcripts as `evaluate` and the notebooks keep them")
    parser.add_argument("b", metavar="B.jsonl", help="another model's, of the same utterances")
    add_debug(parser)
    args = parser.parse_args(argv)
    try:
        a, b = (score(load_predictions(Path(name).absolute())) for name in (args.a, args.b))
        test = compare_errors(a, b)
    except Exception as error:
        tell(sentence(error), error, args.debug)
        return 1
    lines = [f"{name}: {100 * one.wer:.2f} % ({in_per_cent(one.wer_interval)})" for name, one in (("A", a), ("B", b))]
    for over, of in (("utterances", test), ("speakers", test["by_speaker"])):
        if of is not None:
            change = f"{in_points(of['difference'])} points ({in_per_cent(of['interval'], '+.2f')})"
            lines.append(f"B − A: {change}, p = {of['p']:.4f}, over {over}")
    pairs = test["matched_pairs"]
    lines.append("matched pairs: z = {z:.3f}, p = {p:.4f}, {segments:,} segments".format(**pairs))
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
