"""Transcribing speech with any recogniser, and its word errors."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from asrlib.attention.chunks import Chunks
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.data.corpus import Corpus, check_corpus
from asrlib.data.text import normaliser_of
from asrlib.measuring.word_errors import EvaluationResult, score, write_predictions
from asrlib.models.inference import choose_device, inference, recognise, spoken_logits, without_padding
from asrlib.models.loading import check_loaded
from asrlib.models.out_of_memory import out_of_memory_explained
from asrlib.models.registry import family_of, frame_counts, frames_of
from asrlib.streaming.normalising import HeardSoFar
from asrlib.streaming.streams import chunked_pass

# ---- transcripts -------------------------------------------------------------------------------------------


def transcribe(
    model: nn.Module,
    processor,
    corpus: Corpus,
    batch_seconds: float | None = None,
    device: str | None = None,
    precision: str = "fp32",
    record: Callable[[int, torch.Tensor], None] | None = None,
    chunks: Chunks | None = None,
    cache: str = "float32",
    told: Corpus | None = None,
) -> list[dict]:
    """Greedy transcripts in the order of the corpus: {id, speaker, seconds, reference, hypothesis} each, and normaliser
    where one makes them comparable (see `data.text.normaliser_of`).

    The reference is the unchanged text of the corpus. `batch_seconds` limits the padded audio in a batch, by default to
    what the head says. It changes the speed and not the transcripts, which are those of each utterance alone. `record`
    is called once for every utterance, in any order, with its place in the corpus and its logits [T, V] without
    padding, on the device. For heads other than CTC they are those of the reference's tokens (see models.heads), or of
    the texts of `told`, the same utterances with other texts. With `chunks`, results are those of a stream whose cache
    has the format `cache`. Raises UnusableAudio where an utterance cannot be decoded, and torch.OutOfMemoryError, which
    says what to lower, where a batch is too large.
    """
    check_loaded(model, processor)
    check_corpus(corpus)
    device = choose_device(device, model)
    if batch_seconds is None:
        batch_seconds = family_of(model.config).head.batch_seconds
    limits = {"batch_seconds": batch_seconds, "precision": precision}
    writes = family_of(model.config).head.reads_labels  # token by token, instead of frame by frame
    dataset = SpeechDataset(told or corpus, processor)
    if getattr(model.config, "feat_extract_norm", "layer") == "group":
        batches = [[i] for i in range(len(corpus))]  # this norm averages over padding too
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
        # leave=None: inside another bar it disappears when it is done
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
        | ({"normaliser": name} if (name := normaliser_of(processor, u.language)) else {})
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


def evaluate(
    model: nn.Module,
    processor,
    corpus: Corpus,
    batch_seconds: float | None = None,
    device: str | None = None,
    precision: str = "fp32",
    predictions: str | Path | None = None,
) -> EvaluationResult:
    """Transcribes the corpus and scores it; `predictions` is a .jsonl file for the transcripts.

    `device`: see `choose_device`. `precision`: fp32, bf16 or fp16.
    """
    transcripts = transcribe(model, processor, corpus, batch_seconds, device, precision)
    if predictions is not None:
        write_predictions(predictions, transcripts)
    return score(transcripts)


def in_own_words(
    model: nn.Module, processor, corpus: Corpus, device: str | None = None, precision: str = "fp32"
) -> Corpus:
    """The corpus with what `model` writes in place of its texts, without utterances of which it writes nothing or more
    than it can learn from.

    A decoder that was trained to write case and punctuation finds references without them unlikely from the first
    token on: what is measured or learnt there is not what it does when it writes.
    """
    transcripts = transcribe(model, processor, corpus, device=device, precision=precision)
    written = zip(corpus, (transcript["hypothesis"] for transcript in transcripts), strict=True)
    own = tuple(replace(utterance, text=text) for utterance, text in written if text)
    return replace(corpus, utterances=own).usable(processor, frames_of(model), check_audio=False)
