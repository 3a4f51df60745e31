"""A folder with ONNX graphs, each checked on speech of the run before it is kept, and with the processor's files."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedModel, Wav2Vec2Processor

from asrlib.data.corpus import Corpus, open_corpus
from asrlib.export.onnx_check import check_agrees, check_offline, check_streaming
from asrlib.export.onnx_graphs import write_int8, write_offline, write_streaming
from asrlib.runs import Run
from asrlib.streaming import CHUNK_MS, LEFT_SECONDS, chunks_of

NEEDED = ("onnx", "onnxruntime", "onnxscript")


def check_installed() -> None:
    """Raises OSError where what writes and runs ONNX is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise OSError(f"{' and '.join(missing)} not installed: pip install -c constraints.txt -e '.[onnx]'")


def write(
    args: argparse.Namespace, run: Run, model: PreTrainedModel, processor: Wav2Vec2Processor, folder: Path
) -> dict:
    """Fills `folder`; returns what export.json says of it. Takes `model` over.

    Raises ValueError where a graph in float32 does not compute what the model does, or the model cannot stream.
    """
    corpus = speech_of(run, args.utterances)
    path, quantised = folder / "model.onnx", folder / "model_int8.onnx"
    if args.to == "onnx":
        about = write_offline(model, path)

        def check(of: Path) -> dict:
            return check_offline(of, model, processor, corpus)
    else:
        left = LEFT_SECONDS if args.left is None else args.left
        chunk = CHUNK_MS if args.chunk is None else args.chunk
        chunks = chunks_of(model.config, chunk, left, args.lookahead or 0.0)
        about = write_streaming(model, chunks, path)

        def check(of: Path) -> dict:
            return check_streaming(of, about, model, processor, corpus, chunks)

    checked = {"speech": f"{corpus.split} of {Path(corpus.name).name}", "float32": check(path)}
    check_agrees(checked["float32"])
    if args.int8:
        about["int8"] = write_int8(path, quantised)
        checked["int8"] = check(quantised)
    processor.save_pretrained(folder)
    return about | {"checked": checked}


def speech_of(run: Run, utterances: int) -> Corpus:
    """The first `utterances` of the run's first test split."""
    before = run.read_metrics("baseline")
    corpus = open_corpus(before["corpus"], next(iter(before["splits"])))
    return corpus[:utterances]


def described(model: PreTrainedModel, about: dict) -> tuple[str, str]:
    """(what the folder holds, how it is loaded), for its card."""
    of_stream = "chunk_frames" in about
    kind = "a step of a stream, whose past is input and output" if of_stream else "whole utterances"
    found = about["checked"]["float32"]
    lines = [
        f"A speech recogniser as an ONNX graph of opset {about['opset']}, of {kind}; batch and length are free. "
        "Transcripts are the largest logit of each frame, decoded as CTC.",
        "",
        "| graph | MB | WER | largest difference of logits from PyTorch | equal transcripts |",
        "|---|---|---|---|---|",
        *(_row(name, size, about["checked"][name]) for name, size in _graphs(about).items()),
        "",
        f"Measured on {found['utterances']} utterances of {about['checked']['speech']}, where PyTorch has a WER of "
        f"{100 * found['wer_pytorch']:.2f} %. What follows is of the run's model in PyTorch.",
    ]
    return "\n".join(lines), _STREAMING if of_stream else _OFFLINE.format(inputs=model.main_input_name)


def _graphs(about: dict) -> dict[str, dict]:
    return {"float32": about} | ({"int8": about["int8"]} if "int8" in about else {})


def _row(name: str, size: dict, found: dict) -> str:
    return (
        f"| {name} | {size['bytes'] / 1e6:.2f} | {100 * found['wer']:.2f} % | {found['largest_difference']:.2g} | "
        f"{found['equal_transcripts']} of {found['utterances']} |"
    )


_OFFLINE = """\
```python
import onnxruntime
from transformers import AutoProcessor

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
processor = AutoProcessor.from_pretrained("FOLDER")
heard = processor(audio, sampling_rate=16_000, return_tensors="np")  # float samples, mono
mask = heard.get("attention_mask", heard["{inputs}"][..., 0] * 0 + 1)
logits, frames = session.run(None, {{"{inputs}": heard["{inputs}"], "attention_mask": mask.astype(bool)}})
print(processor.batch_decode([row[:count].argmax(-1) for row, count in zip(logits, frames)]))
```"""

_STREAMING = """\
`export.json` says what a step takes: frame i reads inputs from i·`hop` to i·`hop` + `reach`, a step takes
`chunk_frames` frames and `lookahead_frames` behind them (which the next step takes again), and `first_state` is the
shape of what a stream begins with, zeros. Each `present_…` is the next step's `past_…`. Where the processor normalises
whole recordings, a stream must normalise by what it has heard so far.

```python
import json

import numpy
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
about = json.load(open("FOLDER/export.json"))
state = {name: numpy.zeros([1, *shape[1:]], "float32") for name, shape in about["first_state"].items()}
for heard in steps:  # of a stream [1, length] or, of features, [1, length, bins]
    fed = {about["inputs"][0]: heard, "attention_mask": numpy.ones(heard.shape[:2], bool)}
    logits, frames, *kept = session.run(None, fed | state)
    state = dict(zip(state, kept))
```"""
