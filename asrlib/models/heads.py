"""What stands behind an encoder and writes: CTC, a decoder that attends to the encoder, or a transducer.

A head says how a model of its kind is loaded, what it learns from, which of its posteriors are of speech and which text
they spell. Everything else of asrlib treats the three alike.

Shapes: B batch, T frames, L labels, K token ids, N positions that are no padding, V vocabulary, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq, PreTrainedModel

from asrlib.data.audio import SAMPLE_RATE
from asrlib.data.text import ctc_problem

Batch = dict[str, torch.Tensor]  # as the collator makes it, on the device of the model


class CTC:
    """A posterior a frame, the best of each frame without repetitions and blanks is the text (Graves et al. 2006)."""

    auto_model = AutoModelForCTC
    reads_labels = False  # whether posteriors need a text that they are of

    def prepare(self, model: PreTrainedModel, processor) -> None:
        """What a model and its processor must agree on, as soon as they are loaded."""

    def forward(self, model: PreTrainedModel, batch: Batch, **how) -> Any:
        """transformers' output: logits, with labels in the batch also the loss; with output_hidden_states these too."""
        return model(**batch, **how)

    def spoken(self, batch: Batch, output, frames_B: torch.Tensor) -> list[torch.Tensor]:
        """Logits [N, V] of each utterance, where `frames_B` of the logits are of speech."""
        return [logits_TV[:frames] for logits_TV, frames in zip(output.logits, frames_B.tolist(), strict=True)]

    def layers(self, batch: Batch, output, frames_B: torch.Tensor) -> list[torch.Tensor]:
        """What each layer gives [N, D], of `frames_B` of its frames that are of speech."""
        return [_kept(states_BTD, frames_B) for states_BTD in output.hidden_states[1:]]

    def recognised(self, model: PreTrainedModel, processor, batch: Batch, output, frames_B: torch.Tensor):
        """Token ids [B, K] of what was recognised, with what stands for nothing behind it."""
        ids_BT = output.logits.argmax(-1)
        beyond_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) >= frames_B[:, None]
        return ids_BT.masked_fill(beyond_BT, processor.tokenizer.pad_token_id)  # the blank

    def texts(self, processor, ids: Sequence[Sequence[int]]) -> list[str]:
        """What recognised token ids spell."""
        return processor.batch_decode([list(row) for row in ids])

    def references(self, processor, labels: Sequence[Sequence[int]]) -> list[str]:
        """What labels spell: they are no paths, and grouping would swallow their doubled letters."""
        return processor.tokenizer.batch_decode(labels, group_tokens=False)

    def problem(self, config, ids: list[int], samples: int, frames: int) -> str | None:
        """Why this head cannot write these labels of audio that long, or None."""
        return ctc_problem(ids, samples, frames)


class Decoder(CTC):
    """An autoregressive decoder that attends to the encoder's frames: of Whisper (Radford et al. 2022).

    Posteriors are those of the labels' tokens, each told all before it. Transcripts are what greedy generation
    gives, in the language of the processor's tokenizer; English where it says none.
    """

    auto_model = AutoModelForSpeechSeq2Seq
    reads_labels = True

    def prepare(self, model, processor):
        if getattr(model.generation_config, "is_multilingual", False):
            language = processor.tokenizer.language or "english"
            processor.tokenizer.set_prefix_tokens(language=language, task="transcribe", predict_timestamps=False)

    def spoken(self, batch, output, frames_B):
        kept_BL = batch["labels"] >= 0
        return [logits_LV[kept_L] for logits_LV, kept_L in zip(output.logits, kept_BL, strict=True)]

    def layers(self, batch, output, frames_B):
        kept_BL = batch["labels"] >= 0
        decoder = [states_BLD[kept_BL] for states_BLD in output.decoder_hidden_states[1:]]
        return [states_BTD.flatten(0, 1) for states_BTD in output.encoder_hidden_states[1:]] + decoder

    def recognised(self, model, processor, batch, output, frames_B):
        language = {}
        if getattr(model.generation_config, "is_multilingual", False):
            language = {"language": processor.tokenizer.language or "english", "task": "transcribe"}
        inputs = batch[model.main_input_name]
        return model.generate(inputs, attention_mask=batch.get("attention_mask"), num_beams=1, **language)

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


def _kept(states_BTD: torch.Tensor, frames_B: torch.Tensor) -> torch.Tensor:
    """The frames of speech [N, D]."""
    return states_BTD[torch.arange(states_BTD.shape[1], device=states_BTD.device) < frames_B[:, None]]
