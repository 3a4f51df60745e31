"""What stands behind an encoder and writes: CTC, a decoder that attends to the encoder, or a transducer.

A head says how a model of its kind is loaded, what it learns from, which of its posteriors are of speech and which text
they spell. Everything else of asrlib treats the three alike.

Shapes: B batch, T frames, L labels, K token ids, N positions that are no padding, V vocabulary, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCTC, AutoModelForRNNT, AutoModelForSpeechSeq2Seq, PreTrainedModel

from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.text import ctc_problem
from asrlib.models.transducer import transducer_loss

# Whisper's tokens that a second of speech can take, and as many for none at all. The fastest of LibriSpeech's readers
# takes 6.0 in English; scripts that are spelt in bytes take several tokens for a letter.
ENGLISH_TOKENS_PER_SECOND, TOKENS_PER_SECOND = 10, 30
FEATURES_PER_SECOND = 100

Batch = dict[str, torch.Tensor]  # as the collator makes it, on the device of the model


class Head(ABC):
    """What every head can be asked."""

    auto_model: type  # of transformers, which loads models with such a head
    reads_labels = True  # whether posteriors need a text that they are of
    batch_seconds = 60.0  # of padded audio in a batch that is transcribed, where nothing else is said

    def prepare(self, model: PreTrainedModel, processor, language: str | None = None) -> None:
        """What a model and its processor must agree on, as soon as they are loaded. Raises ValueError for a language
        that the model cannot be told."""
        if language is not None:
            raise ValueError(f"language is {language!r}, but a {model.config.model_type} is told none: leave it out")

    def forward(self, model: PreTrainedModel, batch: Batch, **how) -> Any:
        """transformers' output: logits, with labels in the batch also the loss; with output_hidden_states these too."""
        return model(**batch, **how)

    def layers(self, batch: Batch, output, frames_B: torch.Tensor) -> list[torch.Tensor]:
        """What each layer gives [N, D], of `frames_B` of its frames that are of speech."""
        return [_kept(states_BTD, frames_B) for states_BTD in output.hidden_states[1:]]

    @abstractmethod
    def spoken(self, batch: Batch, output, frames_B: torch.Tensor) -> list[torch.Tensor]:
        """Logits [N, V] of each utterance, where `frames_B` of the encoder's frames are of speech."""

    @abstractmethod
    def recognised(self, model: PreTrainedModel, processor, batch: Batch, output, frames_B: torch.Tensor):
        """Token ids [B, K] of what was recognised, with what stands for nothing behind it."""

    @abstractmethod
    def texts(self, processor, ids: Sequence[Sequence[int]]) -> list[str]:
        """What recognised token ids spell."""

    @abstractmethod
    def references(self, processor, labels: Sequence[Sequence[int]]) -> list[str]:
        """What labels spell."""

    @abstractmethod
    def problem(self, config, ids: list[int], samples: int, frames: int) -> str | None:
        """Why this head cannot write these labels of audio that long, or None."""


class CTC(Head):
    """A posterior a frame, the best of each frame without repetitions and blanks is the text (Graves et al. 2006)."""

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
        # They are no paths: grouping would swallow their doubled letters.
        return processor.tokenizer.batch_decode(labels, group_tokens=False)

    def problem(self, config, ids, samples, frames):
        return ctc_problem(ids, samples, frames)


class Decoder(Head):
    """An autoregressive decoder that attends to the encoder's frames: of Whisper (Radford et al. 2022).

    Posteriors are those of the labels' tokens, each told all before it. Transcripts are what greedy generation
    gives, in the language of the processor's tokenizer; English where it says none. A model that repeats itself without
    end is stopped: a transcript has at most `most_tokens`.
    """

    auto_model = AutoModelForSpeechSeq2Seq
    batch_seconds = 480.0  # sixteen windows: a step reads all weights, for however many utterances

    def prepare(self, model, processor, language=None):
        told = self.prompt(model, processor)
        if language is not None and not told and language.lower() not in ("en", "english"):
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
        most_B = self.most_tokens(model, processor, heard_BS.sum(-1) / FEATURES_PER_SECOND)
        settings = {"attention_mask": mask_BS, "num_beams": 1} | self.prompt(model, processor)
        longest = min(int(most_B.max()), model.generation_config.max_length or model.config.max_target_positions)
        ids_BK = model.generate(features_BFS, max_length=longest, **settings)
        beyond_BK = torch.arange(ids_BK.shape[1], device=ids_BK.device) >= most_B[:, None]
        return ids_BK.masked_fill(beyond_BK, model.generation_config.pad_token_id)  # whatever its neighbours may write

    def most_tokens(self, model, processor, seconds_B: torch.Tensor) -> torch.Tensor:
        """How many tokens [B] speech of so many seconds can have: 10 a second and 10 more in English, 30 and 30 in
        other languages."""
        english = self.prompt(model, processor).get("language", "english") == "english"
        rate = ENGLISH_TOKENS_PER_SECOND if english else TOKENS_PER_SECOND
        return (rate * (seconds_B + 1)).ceil().long()

    def prompt(self, model, processor) -> dict[str, str]:
        """What `generate` is told of the language and the task, where the model knows several."""
        if not getattr(model.generation_config, "is_multilingual", False):
            return {}
        return {"language": processor.tokenizer.language or "english", "task": "transcribe"}

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
    """A joint network of each frame and of each text so far: of Nemotron and Parakeet (Graves 2012).

    Posteriors are those of the whole lattice of an utterance, frames × labels and one more. Transcripts are greedy.
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
        most = model.config.max_symbols_per_step * int(frames_B.max())  # at each frame so many, a blank among them
        blank = model.config.blank_token_id
        said = model.generate(**heard, decoder_start_token_id=blank, max_new_tokens=most)
        # transformers writes on behind the end of an utterance as long as another of the batch goes on.
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


def _kept(states_BTD: torch.Tensor, frames_B: torch.Tensor) -> torch.Tensor:
    """The frames of speech [N, D]."""
    return states_BTD[torch.arange(states_BTD.shape[1], device=states_BTD.device) < frames_B[:, None]]
