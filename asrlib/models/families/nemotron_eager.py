"""Mends eager attention of transformers' own Nemotron, in this process, wherever nemotron.py is imported.

It stands apart from the latent twin, which does without: code that goes along with an exported model changes no class
of transformers.
"""

from functools import wraps

import torch
from transformers.models.nemotron_asr_streaming.modeling_nemotron_asr_streaming import (
    NemotronAsrStreamingEncoderAttention,
)

from asrlib.attention.chunks import heard


def _reading_its_mask(forward):
    """transformers 5.23 takes the mask of eager attention, 0 where a frame is heard, for a boolean one, and so hears
    what it should not and nothing else. Frames of padding that hear nothing hear all here: no number would spread."""

    @wraps(forward)
    def corrected(self, hidden_states, position_embeddings, attention_mask=None, **others):
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            attention_mask = heard(attention_mask)
            attention_mask = attention_mask | ~attention_mask.any(-1, keepdim=True)
        return forward(self, hidden_states, position_embeddings, attention_mask, **others)

    return corrected


NemotronAsrStreamingEncoderAttention.forward = _reading_its_mask(NemotronAsrStreamingEncoderAttention.forward)
