"""How an exported folder is loaded and asked for a text: Python for its card, by what writes the text."""

from transformers import AutoModelForRNNT, AutoModelForSpeechSeq2Seq, PreTrainedModel, ProcessorMixin

from asrlib.models.families import family_of


def loading_code(model: PreTrainedModel, processor: ProcessorMixin, known: str = "", trust: bool = False) -> str:
    """A block of Python for a card, in which FOLDER is the folder and `audio` what is heard; `known` is its first line,
    `trust` whether the folder's own code is needed."""
    auto, trusting = family_of(model.config).head.auto_model, ", trust_remote_code=True" * trust
    return "\n".join(
        [
            "```python",
            *filter(None, [known]),
            f"from transformers import {auto.__name__}, AutoProcessor",
            "",
            f'model = {auto.__name__}.from_pretrained("FOLDER"{trusting}).eval()',
            f'processor = AutoProcessor.from_pretrained("FOLDER"{trusting})',
            'inputs = processor(audio, sampling_rate=16_000, return_tensors="pt")  # float samples, mono',
            *_text(model, processor),
            "```",
        ]
    )


def _text(model: PreTrainedModel, processor: ProcessorMixin) -> list[str]:
    """Lines that print what a model says of `inputs`, as asrlib has it said."""
    head = family_of(model.config).head
    if head.auto_model is AutoModelForSpeechSeq2Seq:
        told = "".join(f', {name}="{value}"' for name, value in head.prompt(model, processor).items())
        return [
            f"ids = model.generate(**inputs{told})",
            "print(processor.batch_decode(ids, skip_special_tokens=True))",
        ]
    if head.auto_model is AutoModelForRNNT:
        return [
            *_lookahead(model.config),
            "said = model.generate(**inputs, decoder_start_token_id=model.config.blank_token_id)",
            "print(processor.batch_decode(said.sequences, skip_special_tokens=True, group_tokens=False))",
        ]
    return ["print(processor.batch_decode(model(**inputs).logits.argmax(-1)))"]


def _lookahead(config) -> list[str]:
    """The model's own, with which asrlib measures; its processor may name another."""
    ahead = getattr(config.encoder_config, "default_num_lookahead_tokens", None)
    return [] if ahead is None else [f'inputs["num_lookahead_tokens"] = {ahead}  # frames of the encoder']
