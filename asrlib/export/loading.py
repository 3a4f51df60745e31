"""Python code for a card: how to load an exported folder and transcribe, for each kind of head."""

from transformers import AutoModelForRNNT, AutoModelForSpeechSeq2Seq, PreTrainedModel, ProcessorMixin

from asrlib.export.graphs import can_stream
from asrlib.models.registry import family_of


def loading(model: PreTrainedModel, processor: ProcessorMixin, register: bool = False, trust: bool = False) -> str:
    """For a card: `loading_code`, and remarks on a folder with (`trust`) or without code."""
    return "\n\n".join([loading_code(model, processor, register, trust), *_remarks(model.config, trust)])


def loading_code(model: PreTrainedModel, processor: ProcessorMixin, register: bool = False, trust: bool = False) -> str:
    """A block of Python for a card; FOLDER stands for the folder, and `audio` for the samples. `register`: the model
    needs asrlib's classes. `trust`: it needs the folder's own code."""
    auto, trusting = family_of(model.config).head.auto_model, ", trust_remote_code=True" if trust else ""
    registering = ["asrlib.register()  # now transformers' Auto classes know the model"] if register else []
    return "\n".join(
        [
            "```python",
            *(["import asrlib"] if register else []),
            f"from transformers import {auto.__name__}, AutoProcessor",
            "",
            *registering,
            f'model = {auto.__name__}.from_pretrained("FOLDER"{trusting}).eval()',
            f'processor = AutoProcessor.from_pretrained("FOLDER"{trusting})',
            'inputs = processor(audio, sampling_rate=16_000, return_tensors="pt")  # float samples, mono',
            *_text(model, processor),
            "```",
        ]
    )


def generation_settings(model: PreTrainedModel, processor: ProcessorMixin) -> dict[str, str | int]:
    """asrlib's arguments of `generate` for any speech: language and task, or the start token of a transducer."""
    head = family_of(model.config).head
    if head.auto_model is AutoModelForSpeechSeq2Seq:
        return head.prompt(model, processor)
    if head.auto_model is AutoModelForRNNT:
        return {"decoder_start_token_id": model.config.blank_token_id}
    return {}


def _text(model: PreTrainedModel, processor: ProcessorMixin) -> list[str]:
    """Lines that print a model's transcript of `inputs`, the same as asrlib's."""
    auto = family_of(model.config).head.auto_model
    if auto is AutoModelForSpeechSeq2Seq:
        settings = "".join(f', {name}="{value}"' for name, value in generation_settings(model, processor).items())
        return [
            f"ids = model.generate(**inputs{settings})",
            "print(processor.batch_decode(ids, skip_special_tokens=True))",
        ]
    if auto is AutoModelForRNNT:
        return [
            *_lookahead(model.config),
            "output = model.generate(**inputs)",
            "print(processor.batch_decode(output.sequences, skip_special_tokens=True, group_tokens=False))",
        ]
    return ["print(processor.batch_decode(model(**inputs).logits.argmax(-1)))"]


def _lookahead(config) -> list[str]:
    """A line that sets the model's own lookahead, the one of asrlib's measurements; its processor may have another."""
    ahead = getattr(config.encoder_config, "default_num_lookahead_tokens", None)
    return [] if ahead is None else [f'inputs["num_lookahead_tokens"] = {ahead}  # frames of the encoder']


def _remarks(config, trust: bool) -> list[str]:
    remarks = []
    if trust:
        streams = ", and the model also streams (`asrlib.stream`)" if can_stream(config) else ""
        remarks.append(_TRUSTED.format(streams=streams))
    if family_of(config).head.auto_model is AutoModelForSpeechSeq2Seq and trust:
        remarks.append(_PIPELINE)
    if hasattr(getattr(config, "encoder_config", None), "sliding_window"):
        remarks.append(_CHUNKS)
        if not trust:
            remarks.append(_EAGER)
    return remarks


_TRUSTED = """\
`trust_remote_code` lets transformers run the Python files of this folder: read them first. If asrlib is installed,
call `asrlib.register()`, and transformers uses asrlib's own code instead{streams}."""

_PIPELINE = """\
transformers' `pipeline` recognises Whisper by its model type, and this model has another one: use `generate`."""

_CHUNKS = """\
The model also streams: give `generate` a generator of chunks of features as `input_features`."""

_EAGER = """\
Do not change `attn_implementation`: in this class, eager attention of transformers 5.23 attends to wrong frames, unless
`asrlib.register()` was called."""
