"""What follows an encoder and writes the text: CTC, a decoder that attends to the encoder, or a transducer.

A head knows how to load a model of its kind, its loss, which of its posteriors belong to speech, and the text that they
spell. The rest of asrlib treats the three alike.

Shapes: B batch, T frames, L labels, K token ids, N positions that are no padding, V vocabulary, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCTC, AutoModelForRNNT, AutoModelForSpeechSeq2Seq, PreTrainedModel

from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.text import ENGLISH, ctc_problem, languages_told
from asrlib.models.transducer import transducer_loss

# The most tokens of Whisper for a second of speech, and as many for no speech. The fastest of 1,519 LibriSpeech
# utterances has 6.0 a second. Other scripts take several tokens for a letter.
ENGLISH_TOKENS_PER_SECOND, TOKENS_PER_SECOND = 10, 30
FEATURES_PER_SECOND = 100
TIMESTAMPS = 1501  # <|0.00|> to <|30.00|>, behind the token for none

Batch = dict[str, torch.Tensor]  # of the collator, on the device of the model


class Head(ABC):
    """The interface of all heads."""

    auto_model: type  # the class of transformers that loads models with this head
    reads_labels = True  # whether the posteriors are those of a given text
    batch_seconds = 60.0  # padded audio in a batch to transcribe, by default

    def prepare(self, model: PreTrainedModel, processor, language: str | None = None) -> None:
        """Makes a model and its processor agree once they are loaded. Raises ValueError for a language that the model
        cannot write."""
        if language is not None:
            raise ValueError(f"language is {language!r}, but a {model.config.model_type} is told none: leave it out")

    def forward(self, model: PreTrainedModel, batch: Batch, **how) -> Any:
        """transformers' output: logits, the loss if the batch has labels, and hidden states if asked for."""
        return model(**batch, **how)

    def layers(self, batch: Batch, output, frames_B: torch.Tensor) -> list[torch.Tensor]:
        """The output of each layer [N, D]; `frames_B` of its frames are speech."""
        return [_kept(states_BTD, frames_B) for states_BTD in output.hidden_states[1:]]

    @abstractmethod
    def spoken(self, batch: Batch, output, frames_B: torch.Tensor) -> list[torch.Tensor]:
        """Logits [N, V] of each utterance; `frames_B` of the encoder's frames are speech."""

    @abstractmethod
    def recognised(self, model: PreTrainedModel, processor, batch: Batch, output, frames_B: torch.Tensor):
        """Recognised token ids [B, K], padded with ids that spell nothing."""

    @abstractmethod
    def texts(self, processor, ids: Sequence[Sequence[int]]) -> list[str]:
        """The texts that recognised token ids spell."""

    @abstractmethod
    def references(self, processor, labels: Sequence[Sequence[int]]) -> list[str]:
        """The texts that labels spell."""

    @abstractmethod
    def problem(self, config, ids: list[int], samples: int, frames: int) -> str | None:
        """Why this head cannot write the labels `ids` for `samples` samples (`frames` frames) of audio, or None."""


class CTC(Head):
    """One posterior a frame. The text is the best symbol of each frame, without repetitions and blanks (Graves et al.
    2006)."""

    auto_model = AutoModelForCTC
    reads_labels = False

    def spoken(self, batch, output, frames_B):
        return [logits_TV[:frames] for logits_TV, frames in zip(output.logits, frames_B.tolist(), strict=True)]

    def recognised(self, model, processor, batch, output, frames_B):
        ids_BT = output.logits.argmax(-1)
        beyond_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) >= frames_B[:, None]
        return ids_BT.masked_fill(beyond_BT, processor.tokenizer.pad_token_id)  # the blank

    def texts(self, processor, ids):
        return processor.batch_decode([list(row) for row in ids])

    def references(self, processor, labels):
        # Labels are no frame-wise path: grouping would swallow their double letters.
        return processor.tokenizer.batch_decode(labels, group_tokens=False)

    def problem(self, config, ids, samples, frames):
        return ctc_problem(ids, samples, frames)


class Decoder(Head):
    """An autoregressive decoder that attends to the encoder's frames, as Whisper has (Radford et al. 2022).

    Posteriors are those of the labels' tokens, each given the tokens before it. Transcripts come from greedy
    generation, in the languages that labels name, or else in that of the processor's tokenizer, or else in English. A
    transcript has at most `most_tokens` tokens, so that a model that repeats itself ends.
    """

    auto_model = AutoModelForSpeechSeq2Seq
    batch_seconds = 480.0  # sixteen windows: a step reads all weights, for however many utterances

    def prepare(self, model, processor, language=None):
        told = self.prompt(model, processor)
        if language is not None and not told and language.lower() not in ENGLISH:
            raise ValueError(f"language is {language!r}, but this model writes English alone: leave it out")
        if told:
            told |= {"language": language.lower()} if language else {}
            processor.tokenizer.set_prefix_tokens(**told, predict_timestamps=False)

    def spoken(self, batch, output, frames_B):
        kept_BL = batch["labels"] >= 0
        return [logits_LV[kept_L] for logits_LV, kept_L in zip(output.logits, kept_BL, strict=True)]

    def layers(self, batch, output, frames_B):
        kept_BL = batch["labels"] >= 0
        decoder = [states_BLD[kept_BL] for states_BLD in output.decoder_hidden_states[1:]]
        return [states_BTD.flatten(0, 1) for states_BTD in output.encoder_hidden_states[1:]] + decoder

    def recognised(self, model, processor, batch, output, frames_B):
        features_BFS, mask_BS = batch[model.main_input_name], batch.get("attention_mask")
        heard_BS = torch.ones_like(features_BFS[:, 0]) if mask_BS is None else mask_BS
        prompt = self.prompt(model, processor, batch.get("labels"))
        most_B = self.most_tokens(prompt, heard_BS.sum(-1) / FEATURES_PER_SECOND)
        unwritten = suppressed_tokens(model)
        settings = {"attention_mask": mask_BS, "num_beams": 1, "suppress_tokens": unwritten} | prompt
        longest = min(int(most_B.max()), model.generation_config.max_length or model.config.max_target_positions)
        ids_BK = model.generate(features_BFS, max_length=longest, **settings)
        beyond_BK = torch.arange(ids_BK.shape[1], device=ids_BK.device) >= most_B[:, None]
        return ids_BK.masked_fill(beyond_BK, model.generation_config.pad_token_id)  # whatever its neighbours may write

    def own_labels(self, model: PreTrainedModel, processor, batch: Batch) -> torch.Tensor:
        """Labels [B, L] of what the model writes of a batch now."""
        ids_BK = self.recognised(model, processor, batch, None, None)
        end, told = processor.tokenizer.eos_token_id, len(processor.tokenizer.prefix_tokens) - 1
        written = [[token for token in row if token != end] for row in ids_BK.tolist()]
        longest = model.config.max_target_positions - told - 1
        prompts = batch["labels"][:, :told].tolist()
        each = zip(prompts, written, strict=True)
        labels = [torch.tensor([*prompt, *row[:longest], end]) for prompt, row in each]
        return torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100).to(ids_BK.device)

    def most_tokens(self, prompt: dict, seconds_B: torch.Tensor) -> torch.Tensor:
        """The most tokens [B] for so many seconds of speech: 10 a second and 10 more in English, 30 and 30 in other
        languages."""
        told = prompt.get("language", "english")
        told = [told] * len(seconds_B) if isinstance(told, str) else told
        rates = [ENGLISH_TOKENS_PER_SECOND if language in ENGLISH else TOKENS_PER_SECOND for language in told]
        return (seconds_B.new_tensor(rates) * (seconds_B + 1)).ceil().long()

    def prompt(self, model, processor, labels_BL: torch.Tensor | None = None) -> dict[str, str | list[str]]:
        """The language, of each of the labels if they are given, and the task for `generate`, where the model knows
        several."""
        if not getattr(model.generation_config, "is_multilingual", False):
            return {}
        own = processor.tokenizer.language or "english"
        told = own if labels_BL is None else [told or own for told in languages_told(labels_BL, processor)]
        return {"language": told, "task": "transcribe"}

    def texts(self, processor, ids):
        return [text.strip() for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    references = texts

    def problem(self, config, ids, samples, frames):
        seconds, longest = samples / SAMPLE_RATE, 2 * config.max_source_positions / 100  # two features of 10 ms a frame
        if seconds > longest:
            return f"{seconds:.1f} s of audio, and this model hears {longest:g} s at once: cut it"
        if len(ids) > config.max_target_positions:
            return (
                f"text too long: {len(ids)} tokens with its prompt, and this model writes {config.max_target_positions}"
            )
        return None


class Transducer(Head):
    """A joint network of each frame and each text so far, as Nemotron and Parakeet have (Graves 2012).

    Posteriors are those of the whole lattice of an utterance: frames × (labels + 1). Transcripts are greedy.
    """

    auto_model = AutoModelForRNNT

    def forward(self, model, batch, **how):
        own, labels_BL = getattr(model, "module", model), batch["labels"]  # `model` may be wrapped for many processes
        heard, blank = {name: values for name, values in batch.items() if name != "labels"}, own.config.blank_token_id
        said_BU = torch.nn.functional.pad(labels_BL.masked_fill(labels_BL < 0, blank), (1, 0), value=blank)
        output = model(**heard, decoder_input_ids=said_BU, **how)
        if output.logits.dim() < 4:  # transformers drops an axis of one
            output.logits = output.logits[:, :, None]
        frames_B = own._get_subsampling_output_length(batch["attention_mask"].sum(-1)).long()
        labels_B = labels_BL.ge(0).sum(-1)
        losses_B = transducer_loss(output.logits.float().log_softmax(-1), labels_BL, frames_B, labels_B, blank)
        output.loss = losses_B.sum() / labels_B.sum().clamp(min=1)  # a label's, as NeMo's mean_volume
        return output

    def spoken(self, batch, output, frames_B):
        points_B = batch["labels"].ge(0).sum(-1) + 1
        each = zip(output.logits, frames_B.tolist(), points_B.tolist(), strict=True)
        return [logits_TUV[:frames, :points].flatten(0, 1) for logits_TUV, frames, points in each]

    def recognised(self, model, processor, batch, output, frames_B):
        heard = {name: batch[name] for name in (model.main_input_name, "attention_mask") if name in batch}
        most = model.config.max_symbols_per_step * int(frames_B.max())  # blanks included
        blank = model.config.blank_token_id
        said = model.generate(**heard, decoder_start_token_id=blank, max_new_tokens=most)
        # transformers continues an utterance past its end while another one of the batch goes on.
        frame_BK = said.durations.cumsum(-1) - said.durations
        return said.sequences.masked_fill(frame_BK >= frames_B[:, None], blank)

    def texts(self, processor, ids):
        nothing = {processor.blank_token_id, processor.tokenizer.pad_token_id}
        said = [[token for token in row if token not in nothing] for row in ids]
        return processor.tokenizer.batch_decode(said, group_tokens=False)

    def references(self, processor, labels):
        return self.texts(processor, labels)

    def problem(self, config, ids, samples, frames):
        most = frames * config.max_symbols_per_step
        if len(ids) <= most:
            return None
        return f"text too long for its audio: {len(ids)} tokens, {samples / SAMPLE_RATE:.2f} s give at most {most}"


def suppressed_tokens(model) -> list[int] | None:
    """Token ids that a transcript of a Whisper never has: those of its generation config, and timestamps.

    A model that is told to write no timestamps and does so all the same is read again from that time on by
    transformers, and a broken one may do so a thousand times.
    """
    config = model.generation_config
    if (before := getattr(config, "no_timestamps_token_id", None)) is None:
        return config.suppress_tokens
    timestamps = range(before + 1, min(before + 1 + TIMESTAMPS, model.config.vocab_size))
    return [*(config.suppress_tokens or ()), *timestamps] or None


def _kept(states_BTD: torch.Tensor, frames_B: torch.Tensor) -> torch.Tensor:
    """The frames of speech [N, D]."""
    return states_BTD[torch.arange(states_BTD.shape[1], device=states_BTD.device) < frames_B[:, None]]
