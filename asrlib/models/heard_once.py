"""Encoder states that are computed once: every system with the same encoder, and every pass, reads the same ones.

Converting a decoder leaves its encoder as it is. What that gives of an utterance is then the same for the baseline,
for each candidate and probe, for the teacher, and for each system that is evaluated; and it is most of the time of a
Whisper, whose window is 30 s whatever was said.

Shapes: B batch, F mel bands, S features, T frames, D width.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from asrlib.models.registry import family_of

TRANSFORMERS_HOOK = "output_capturing_hook"  # stays once states of all layers were asked for, and does nothing then
ASKED_FOR_MORE = ("output_hidden_states", "output_attentions")  # than the states of the last layer


class EncoderStates:
    """What encoders gave, by their weights and by what they heard, in the memory of the CPU.

    Takes at most `limit_bytes`, without which nothing is kept. When it is full, states go by chance: where all are read
    in turn and do not fit, those read longest ago would each go just before they are read again.
    """

    def __init__(self, limit_bytes: float):
        self.limit_bytes, self.bytes = limit_bytes, 0
        self.computed = self.read = 0  # utterances
        self._states: dict[bytes, torch.Tensor] = {}  # [T, D]
        self._chance = random.Random(0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Every call computes: what is timed must do its work."""
        limit, self.limit_bytes = self.limit_bytes, 0
        try:
            yield
        finally:
            self.limit_bytes = limit

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """The encoder of `model`, where a decoder attends to one, computes only what is not kept.

        Its other calls go through as they are: those with gradients or chance in them, those that want more than the
        last layer's states, and all while a hook watches or changes what its modules do.
        """
        find = family_of(model.config).encoder
        encoder = find(model) if find and self.limit_bytes else None
        if encoder is None or "forward" in vars(encoder):  # is remembered already
            yield
            return
        forward = encoder.forward

        @wraps(forward)  # generate looks at its parameters
        def remembered(input_features, *args, **kwargs):
            more = args or any(kwargs.get(name) for name in ASKED_FOR_MORE)
            if more or not self.limit_bytes or not _certain(encoder):
                return forward(input_features, *args, **kwargs)
            weights, own = weights_fingerprint(encoder), encoder.config._attn_implementation
            device = input_features.device
            autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
            kind = _digest(f"{weights} {own} {device} {input_features.dtype} {autocast}".encode())
            keys = [_digest(_bytes(row_FS), kind) for row_FS in input_features]
            return BaseModelOutput(self._states_of(keys, input_features, forward))

        encoder.forward = remembered
        try:
            yield
        finally:
            del encoder.forward

    def _states_of(self, keys: list[bytes], input_BFS: torch.Tensor, forward) -> torch.Tensor:
        states = {key: self._states[key] for key in keys if key in self._states}
        missing = [row for row, key in enumerate(keys) if key not in states]
        self.computed, self.read = self.computed + len(missing), self.read + len(states)
        if missing:
            with torch.no_grad():
                new_MTD = forward(input_BFS[missing]).last_hidden_state
            new = {keys[row]: states_TD for row, states_TD in zip(missing, new_MTD, strict=True)}
            self._keep(new)
            if not states:  # all are new, in the order of the batch
                return new_MTD
            states |= new
        return torch.stack([states[key].to(input_BFS.device) for key in keys])

    def _keep(self, states: dict[bytes, torch.Tensor]) -> None:
        for key, states_TD in states.items():
            if key not in self._states and states_TD.nbytes <= self.limit_bytes:
                self._states[key] = states_TD.detach().cpu().clone()  # not a view of its batch
                self.bytes += states_TD.nbytes
        self.fit()

    def fit(self) -> None:
        """Drops states until the others fit."""
        keys = list(self._states)
        while self.bytes > self.limit_bytes:
            dropped = keys.pop(self._chance.randrange(len(keys)))
            self.bytes -= self._states.pop(dropped).nbytes


def _certain(encoder: nn.Module) -> bool:
    """Whether a call gives what every other call with the same weights and input gives, and nobody asks how."""
    hooks = (hook for m in encoder.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    if any(getattr(hook, "__name__", "") != TRANSFORMERS_HOOK for hook in hooks):
        return False
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters())
    chance = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop")
    return not learns and not (encoder.training and any(getattr(encoder.config, name, 0) for name in chance))


_fingerprints: WeakKeyDictionary[nn.Module, tuple[tuple, str]] = WeakKeyDictionary()


def weights_fingerprint(module: nn.Module) -> str:
    """Of the names, types, shapes and numbers of all parameters and buffers; read again only where one has changed.

    A fused optimizer changes parameters without counting their versions, but not without changing their sums.
    """
    state = module.state_dict()
    sums = [(t.data_ptr(), t._version, t.sum(dtype=torch.float64).item()) for t in state.values()]
    known = _fingerprints.get(module)
    if known is None or known[0] != sums:
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in state.items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
        known = _fingerprints[module] = sums, digest.hexdigest()
    return known[1]


def _digest(numbers, kind: bytes = b"") -> bytes:
    return hashlib.blake2b(numbers, key=kind, digest_size=32).digest()


def _bytes(tensor: torch.Tensor):
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


KEPT = EncoderStates(0)


def keep_encoder_states(gib: float) -> None:
    """From now on `inference` and `train` compute an encoder's states of an utterance once, and keep up to so many
    GiB of them in KEPT; 0: none. A Whisper's are 2 to 8 MB an utterance."""
    KEPT.limit_bytes = gib * 2**30
    KEPT.fit()
