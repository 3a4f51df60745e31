"""How an exported folder is loaded and asked for a text: Python for its card, by what writes the text."""

from transformers import AutoModelForRNNT, AutoModelForSpeechSeq2Seq, PreTrainedModel, ProcessorMixin

from asrlib.export.graphs import can_stream
from asrlib.models.registry import family_of


def loading(model: PreTrainedModel, processor: ProcessorMixin, register: bool = False, trust: bool = False) -> str:
    """For a card: `loading_code`, and what else must be known of a folder with (`trust`) or without code."""
    return "\n\n".join([loading_code(model, processor, register, trust), *_remarks(model.config, trust)])


def loading_code(model: PreTrainedModel, processor: ProcessorMixin, register: bool = False, trust: bool = False) -> str:
    """A block of Python for a card, in which FOLDER is the folder and `audio` what is heard; `register` says whether
    asrlib's classes are needed, `trust` whether the folder's own code is."""
    auto, trusting = family_of(model.config).head.auto_model, ", trust_remote_code=True" * trust
    return "\n".join(
        [
            "```python",
            *["import asrlib"] * register,
            f"from transformers import {auto.__name__}, AutoProcessor",
            "",
            *["asrlib.register()  # transformers' Auto classes know the model from here on"] * register,
            f'model = {auto.__name__}.from_pretrained("FOLDER"{trusting}).eval()',
            f'processor = AutoProcessor.from_pretrained("FOLDER"{trusting})',
            'inputs = processor(audio, sampling_rate=16_000, return_tensors="pt")  # float samples, mono',
            *_text(model, processor),
            "```",
        ]
    )


def generation_settings(model: PreTrainedModel, processor: ProcessorMixin) -> dict[str, str | int]:
    """What asrlib tells `generate` whoever speaks: the language and the task, or where a transducer starts."""
    head = family_of(model.config).head
    if head.auto_model is AutoModelForSpeechSeq2Seq:
        return head.prompt(model, processor)
    if head.auto_model is AutoModelForRNNT:
        return {"decoder_start_token_id": model.config.blank_token_id}
    return {}


def _text(model: PreTrainedModel, processor: ProcessorMixin) -> list[str]:
    """Lines that print what a model says of `inputs`, as asrlib has it said."""
    auto = family_of(model.config).head.auto_model
    if auto is AutoModelForSpeechSeq2Seq:
        told = "".join(f', {name}="{value}"' for name, value in generation_settings(model, processor).items())
        return [
            f"ids = model.generate(**inputs{told})",
            "print(processor.batch_decode(ids, skip_special_tokens=True))",
        ]
    if auto is AutoModelForRNNT:
        return [
            *_lookahead(model.config),
            "said = model.generate(**inputs)",
            "print(processor.batch_decode(said.sequences, skip_special_tokens=True, group_tokens=False))",
        ]
    return ["print(processor.batch_decode(model(**inputs).logits.argmax(-1)))"]


def _lookahead(config) -> list[str]:
    """The model's own, with which asrlib measures; its processor may name another."""
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
`trust_remote_code` lets transformers run the Python files of this folder: read them first. Where asrlib is
installed, `asrlib.register()` has its own code used instead{streams}."""

_PIPELINE = """\
transformers' `pipeline` knows Whisper by the name of its model type, which this one has not: use `generate`."""

_CHUNKS = """\
It streams, too: given a generator of chunks of features as `input_features`, `generate` hears them one by one."""

_EAGER = """\
Leave `attn_implementation` as it is: eager attention of transformers 5.23 hears other frames than it should in this
class, unless `asrlib.register()` was called."""
