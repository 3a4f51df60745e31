"""Graphs at work: whole utterances and streams through onnxruntime, compared with PyTorch on the same speech.

Shapes: B batch, S samples or frames of features, T frames, V tokens.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, Wav2Vec2Processor

from asrlib.attention.chunks import Chunks
from asrlib.data.batches import SpeechDataset
from asrlib.data.corpus import Corpus
from asrlib.measuring.significance import paired_bootstrap
from asrlib.measuring.transcribing import transcribe
from asrlib.measuring.word_errors import score
from asrlib.models.registry import frame_counts
from asrlib.streaming.normalising import HeardSoFar

LARGEST_DIFFERENCE = 1e-4  # of logits: the effect of rounding in another order


# ---- running -----------------------------------------------------------------------------------------------


class OnnxModel(nn.Module):
    """A graph of whole utterances that stands in for `model` in `asrlib.evaluate`."""

    def __init__(self, path: Path, model: PreTrainedModel):
        super().__init__()
        self.session = session(path)
        self.config, self.main_input_name, self.dtype = model.config, model.main_input_name, torch.float32
        for lengths in ("_get_feat_extract_output_lengths", "_get_subsampling_output_length"):  # they count frames
            if hasattr(model, lengths):
                setattr(self, lengths, getattr(model, lengths))

    def forward(self, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> SimpleNamespace:
        fed = {name: tensor.numpy() for name, tensor in inputs.items()} | {
            "attention_mask": attention_mask.bool().numpy()
        }
        return SimpleNamespace(logits=torch.from_numpy(self.session.run(["logits"], fed)[0]))


def session(path: Path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def stream_logits(running, about: dict, inputs: np.ndarray, frames: int) -> np.ndarray:
    """Logits [B, T, V] of `frames` frames of inputs [B, S(, F)], chunk by chunk; each step gets the last one's state.

    `about` is the result of `write_streaming`. A client needs no more than these dozen lines.
    """
    hop, reach, size = about["hop"], about["reach"], about["chunk_frames"]
    state = {name: np.zeros([len(inputs), *shape[1:]], np.float32) for name, shape in about["first_state"].items()}
    logits = []
    for first in range(0, frames, size):
        count = min(size + about["lookahead_frames"], frames - first)
        heard = inputs[:, first * hop : (first + count - 1) * hop + reach]
        fed = {about["inputs"][0]: heard, "attention_mask": np.ones(heard.shape[:2], bool)}
        chunk_BcV, _, *kept = running.run(None, fed | state)
        state = dict(zip(state, kept, strict=True))
        logits.append(chunk_BcV)
    return np.concatenate(logits, axis=1)


# ---- checking ----------------------------------------------------------------------------------------------


Heard = tuple[list[np.ndarray], list[dict]]  # logits [T, V] of each utterance, and transcripts


def transcribed(model: nn.Module, processor: Wav2Vec2Processor, corpus: Corpus, chunks: Chunks | None = None) -> Heard:
    """Logits and transcripts, of whole utterances or in chunks; `model` may be an `OnnxModel`."""
    logits = [None] * len(corpus)
    predictions = transcribe(model, processor, corpus, device="cpu", record=logits.__setitem__, chunks=chunks)
    return [logits_TV.numpy() for logits_TV in logits], predictions


def streamed(path: Path, about: dict, model: PreTrainedModel, processor: Wav2Vec2Processor, corpus: Corpus) -> Heard:
    """The same for a graph of streams, one after the other; `about` is the result of `write_streaming`."""
    running, collate = session(path), HeardSoFar(processor)
    logits, predictions = [], []
    for utterance, item in zip(tqdm(corpus, desc="streams", unit="utt"), SpeechDataset(corpus, processor), strict=True):
        batch = collate([item])
        frames = int(frame_counts(model, batch["attention_mask"].sum(-1)))
        (logits_TV,) = stream_logits(running, about, batch[model.main_input_name].numpy(), frames)
        (text,) = processor.batch_decode([logits_TV.argmax(-1).tolist()])
        logits.append(logits_TV)
        facts = {"id": utterance.id, "speaker": utterance.speaker, "seconds": utterance.seconds}
        predictions.append(facts | {"reference": utterance.text, "hypothesis": text})
    return logits, predictions


def compared(ours: Heard, theirs: Heard) -> dict:
    """A graph compared with PyTorch: {utterances, largest_difference (of logits), equal_transcripts, wer, wer_interval,
    wer_pytorch, change: {difference, interval, p} (of the WER, by paired bootstrap)}."""
    differences = [np.abs(a - b).max(initial=0) for a, b in zip(ours[0], theirs[0], strict=True)]
    texts = [[prediction["hypothesis"] for prediction in predictions] for predictions in (ours[1], theirs[1])]
    graph, pytorch = score(ours[1]), score(theirs[1])
    return {
        "utterances": len(differences),
        "largest_difference": float(max(differences)),
        "equal_transcripts": sum(a == b for a, b in zip(*texts, strict=True)),
        "wer": graph.wer,
        "wer_interval": list(graph.wer_interval),
        "wer_pytorch": pytorch.wer,
        "change": paired_bootstrap(pytorch, graph),
    }


def check_agrees(checked: dict) -> None:
    """Raises ValueError where a graph in float32 does not compute the same as PyTorch; `checked` is of `compared`."""
    differing = checked["utterances"] - checked["equal_transcripts"]
    if checked["largest_difference"] > LARGEST_DIFFERENCE or differing:
        raise ValueError(
            f"the graph does not compute the same as the model: logits differ by {checked['largest_difference']:.2g}, "
            f"and {differing} of {checked['utterances']} transcripts; nothing was written"
        )
