"""Corrects the eager attention of transformers' own Nemotron in this process, once nemotron.py is imported.

The latent twin does not need it, so it is a file of its own: the code of an exported model must change no class of
transformers.
"""

from functools import wraps

import torch
from transformers.models.nemotron_asr_streaming.modeling_nemotron_asr_streaming import (
    NemotronAsrStreamingEncoderAttention,
)

from asrlib.attention.chunks import heard


def _reading_its_mask(forward):
    """transformers 5.23 reads the mask of eager attention, 0 where a query may attend, as a boolean one, and so attends
    to the wrong frames. Padding that attends to no frame attends to all here, since it would become NaN and spread."""

    @wraps(forward)
    def corrected(self, hidden_states, position_embeddings, attention_mask=None, **others):
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            attention_mask = heard(attention_mask)
            attention_mask = attention_mask | ~attention_mask.any(-1, keepdim=True)
        return forward(self, hidden_states, position_embeddings, attention_mask, **others)

    return corrected


NemotronAsrStreamingEncoderAttention.forward = _reading_its_mask(NemotronAsrStreamingEncoderAttention.forward)
