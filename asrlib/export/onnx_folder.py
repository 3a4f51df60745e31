"""A folder with ONNX graphs and the processor's files. Each graph is checked on speech of the run before it is kept."""

import argparse
import copy
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedModel, Wav2Vec2Processor

from asrlib.data.corpus import Corpus
from asrlib.data.opening import open_corpus
from asrlib.export.onnx_check import Heard, OnnxModel, check_agrees, compared, streamed, transcribed
from asrlib.export.onnx_graphs import write_int8, write_offline, write_streaming
from asrlib.reporting.numbers import percent, rate_interval, tested_points
from asrlib.runs import Run
from asrlib.streaming.streams import CHUNK_MS, LEFT_SECONDS, chunks_of

NEEDED = ("onnx", "onnxruntime", "onnxscript")


def check_installed() -> None:
    """Raises OSError where a package that writes or runs ONNX is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise OSError(f"{' and '.join(missing)} not installed: pip install -c constraints.txt -e '.[onnx]'")


def write(
    args: argparse.Namespace, run: Run, model: PreTrainedModel, processor: Wav2Vec2Processor, folder: Path
) -> dict:
    """Fills `folder`; returns the facts for export.json. Graphs come from copies of `model`, which stays unchanged for
    the comparison.

    Raises ValueError where a graph in float32 does not compute the same as the model, or the model cannot stream.
    """
    whole = speech_of(run)
    corpus = whole[: args.utterances]
    path, quantised, chunks = folder / "model.onnx", folder / "model_int8.onnx", None
    if args.to == "onnx":
        about = write_offline(copy.deepcopy(model), path)
    else:
        left = LEFT_SECONDS if args.left is None else args.left
        chunk = CHUNK_MS if args.chunk is None else args.chunk
        chunks = chunks_of(model.config, chunk, left, args.lookahead or 0.0)
        about = write_streaming(copy.deepcopy(model), chunks, path)

    def by_graph(graph: Path) -> Heard:
        if chunks is None:
            return transcribed(OnnxModel(graph, model), processor, corpus)
        return streamed(graph, about, model, processor, corpus)

    by_pytorch = transcribed(model, processor, corpus, chunks)
    checked = {
        "speech": f"{corpus.split} of {Path(corpus.name).name}",
        "of_utterances": len(whole),
        "float32": compared(by_graph(path), by_pytorch),
    }
    check_agrees(checked["float32"])
    if args.int8:
        about["int8"] = write_int8(path, quantised)
        checked["int8"] = compared(by_graph(quantised), by_pytorch)
    processor.save_pretrained(folder)
    return about | {"checked": checked}


def speech_of(run: Run) -> Corpus:
    """The run's first test split."""
    before = run.read_metrics("baseline")
    return open_corpus(before["corpus"], next(iter(before["splits"])))


def summary(about: dict) -> str:
    """The result of the check, in one line."""
    checked = about["checked"]
    exact = checked["float32"]
    parts = [
        f"{exact['equal_transcripts']} of {exact['utterances']} transcripts equal to PyTorch's ({checked['speech']}, "
        f"{_share(about)}), logits within {exact['largest_difference']:.1e}",
        f"WER {percent(exact['wer'])} ({rate_interval(exact['wer_interval'])})",
    ]
    if "int8" in checked:
        rounded = checked["int8"]
        change = rounded["change"]
        parts.append(
            f"int8 {percent(rounded['wer'])} ({rate_interval(rounded['wer_interval'])}), "
            f"{tested_points(change['difference'], change['interval'], unit=' points')}"
        )
    return "; ".join(parts)


def _share(about: dict) -> str:
    checked = about["checked"]
    used, total = checked["float32"]["utterances"], checked["of_utterances"]
    return f"all {total:,} utterances" if used == total else f"the first {used:,} of {total:,} utterances"


def described(model: PreTrainedModel, about: dict) -> tuple[str, str]:
    """(description of the folder, how to load it), for its card."""
    of_stream = "chunk_frames" in about
    kind = "a step of a stream, with its past as input and output" if of_stream else "whole utterances"
    free = "The batch and the length are free."
    if about.get("one_at_a_time"):
        free = "It takes one utterance at a time, of any length, because its feature encoder normalises over its input."
    exact = about["checked"]["float32"]
    lines = [
        f"A speech recogniser as an ONNX graph of opset {about['opset']}, for {kind}. {free} "
        "The largest logit of each frame gives the transcript, decoded as CTC.",
        "",
        "| graph | MB | WER | change, points | largest difference of logits from PyTorch | equal transcripts |",
        "|---|---|---|---|---|---|",
        *(_row(name, size, about["checked"][name]) for name, size in _graphs(about).items()),
        "",
        f"Measured on {about['checked']['speech']}, {_share(about)}. There PyTorch has a WER of "
        f"{100 * exact['wer_pytorch']:.2f} %{' in the same chunks' if of_stream else ''}. Brackets hold 95 % intervals "
        "(bootstrap over utterances, paired for the change). The rest of this card describes the run's model in PyTorch"
        f"{', over whole utterances' if of_stream else ''}.",
    ]
    return "\n".join(lines), _STREAMING if of_stream else _OFFLINE.format(inputs=model.main_input_name)


def _graphs(about: dict) -> dict[str, dict]:
    return {"float32": about} | ({"int8": about["int8"]} if "int8" in about else {})


def _row(name: str, size: dict, checked: dict) -> str:
    change = checked["change"]
    rate = f"{percent(checked['wer'])} ({rate_interval(checked['wer_interval'])})"
    return (
        f"| {name} | {size['bytes'] / 1e6:.2f} | {rate} | "
        f"{tested_points(change['difference'], change['interval'])} | "
        f"{checked['largest_difference']:.2g} | {checked['equal_transcripts']} of {checked['utterances']} |"
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
`export.json` describes a step. Frame i reads inputs from i·`hop` to i·`hop` + `reach`. A step takes `chunk_frames`
frames and then `lookahead_frames` more, which the next step takes again. A stream begins with zeros of the shapes in
`first_state`, and each `present_…` is the next step's `past_…`. If the processor normalises whole recordings, a stream
must normalise by the samples so far.

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
