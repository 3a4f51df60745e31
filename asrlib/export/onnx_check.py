"""Graphs at work: whole utterances and streams through onnxruntime, beside what PyTorch makes of the same speech.

Shapes: B batch, S samples or frames of features, T frames, V tokens.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, Wav2Vec2Processor

from asrlib.attention.chunks import Chunks
from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.corpus import Corpus
from asrlib.data.normalising import RunningNormaliser
from asrlib.evaluation import score, transcribe
from asrlib.models.families import family_of, frame_counts
from asrlib.streaming import Streams

LARGEST_DIFFERENCE = 1e-4  # of logits, that rounding in another order may make


# ---- running -----------------------------------------------------------------------------------------------


class OnnxModel(nn.Module):
    """A graph of whole utterances, as something that `asrlib.evaluate` takes in the place of `model`."""

    def __init__(self, path: Path, model: PreTrainedModel):
        super().__init__()
        self.session = session(path)
        self.config, self.main_input_name, self.dtype = model.config, model.main_input_name, torch.float32
        self._get_feat_extract_output_lengths = model._get_feat_extract_output_lengths

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        fed = {self.main_input_name: inputs.numpy(), "attention_mask": attention_mask.bool().numpy()}
        return SimpleNamespace(logits=torch.from_numpy(self.session.run(["logits"], fed)[0]))


def session(path: Path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def stream_logits(running, about: dict, inputs: np.ndarray, frames: int) -> np.ndarray:
    """Logits [B, T, V] of `frames` frames of inputs [B, S(, F)], chunk by chunk, what is kept handed on as it comes.

    `about` is what `write_streaming` returned; these dozen lines are all that a client needs.
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


def check_offline(path: Path, model: PreTrainedModel, processor: Wav2Vec2Processor, corpus: Corpus) -> dict:
    """What a graph makes of `corpus` beside what `model` does: see `_compared`."""
    found = []
    for one in (OnnxModel(path, model), model):
        logits = [None] * len(corpus)
        predictions = transcribe(one, processor, corpus, device="cpu", record=logits.__setitem__)
        found.append(([logits_TV.numpy() for logits_TV in logits], predictions))
    return _compared(*found)


def check_streaming(
    path: Path, about: dict, model: PreTrainedModel, processor: Wav2Vec2Processor, corpus: Corpus, chunks: Chunks
) -> dict:
    """The same of a graph of streams, beside `asrlib.streaming`."""
    running, found = session(path), (([], []), ([], []))
    for utterance in corpus:
        inputs = _heard(processor, utterance.audio())
        frames = int(frame_counts(model, torch.tensor(inputs.shape[1])))
        both = stream_logits(running, about, inputs.numpy(), frames), _streamed(model, inputs, chunks)
        for (logits, predictions), (logits_TV,) in zip(found, both, strict=True):
            (text,) = processor.batch_decode([logits_TV.argmax(-1).tolist()])
            facts = {"id": utterance.id, "speaker": utterance.speaker, "seconds": utterance.seconds}
            logits.append(logits_TV)
            predictions.append(facts | {"reference": utterance.text, "hypothesis": text})
    return _compared(*found)


def _heard(processor: Wav2Vec2Processor, samples_S: np.ndarray) -> torch.Tensor:
    """What a stream of these samples reads [1, S(, F)], all of it at once."""
    extractor = processor.feature_extractor
    if getattr(extractor, "do_normalize", False):
        return torch.from_numpy(RunningNormaliser()(samples_S))[None]
    return extractor(samples_S, sampling_rate=SAMPLE_RATE, return_tensors="pt")[extractor.model_input_names[0]]


@torch.no_grad()
def _streamed(model: PreTrainedModel, inputs: torch.Tensor, chunks: Chunks) -> np.ndarray:
    """Logits [1, T, V] of `asrlib.streaming`, step by step."""
    streams, x_1TD = Streams(model, chunks), family_of(model.config).frames(model, inputs)
    firsts = range(0, x_1TD.shape[1], chunks.size)
    return torch.cat([streams.step(x_1TD[:, first : first + chunks.block]) for first in firsts], dim=1).numpy()


def _compared(ours: tuple[list, list[dict]], theirs: tuple[list, list[dict]]) -> dict:
    """{utterances, largest_difference (of logits), equal_transcripts, wer, wer_pytorch} of (logits, predictions)."""
    differences = [np.abs(a - b).max(initial=0) for a, b in zip(ours[0], theirs[0], strict=True)]
    texts = [[prediction["hypothesis"] for prediction in predictions] for predictions in (ours[1], theirs[1])]
    return {
        "utterances": len(differences),
        "largest_difference": float(max(differences)),
        "equal_transcripts": sum(a == b for a, b in zip(*texts, strict=True)),
        "wer": score(ours[1]).wer,
        "wer_pytorch": score(theirs[1]).wer,
    }


def check_agrees(found: dict) -> None:
    """Raises ValueError where a graph in float32 does not compute what PyTorch does."""
    if found["largest_difference"] > LARGEST_DIFFERENCE or found["equal_transcripts"] < found["utterances"]:
        raise ValueError(
            f"the graph does not compute what the model does: logits differ by {found['largest_difference']:.2g}, and "
            f"{found['utterances'] - found['equal_transcripts']} of {found['utterances']} transcripts; nothing is kept"
        )
