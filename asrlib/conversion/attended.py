"""Factors that are most exact where attention looks.

Softmax turns errors δs_ij of the scores into errors a_ij (δs_ij − Σ_k a_ik δs_ik) of the weights: attention to a frame
weighs the frame's error, and an error that all frames share does not count. Attention averages the errors of values
before anything reads them. With x̄_i = Σ_j a_ij x_j, the mean input that query i attends to, `attended` minimises

    keys      Σ_h E_i Σ_j a_ij ‖Q_h^½ ΔW_k,h (x_j − x̄_i)‖²,      so x counts by S = E_i Cov_{a_i}(x), mean over heads,
    values    Σ_h E_i ‖W_o,h ΔW_v,h (x̄_ih − E x̄_ih)‖²,           so x counts by C_h = Cov_i(x̄_ih),

each divided by its value at ΔW = W, then summed, with weight `balance`² on the values (Q_h, W_o,h: see factorize.py).
Given down, the best up is a regression: up_k = W_k S downᵀ (down S downᵀ)⁻¹, and for each head of up_v the same with
its C_h. The remaining error is a function of down alone (variable projection, Golub and Pereyra 1973). L-BFGS descends
from the directions of `two_sided` to a local minimum. The error depends on the span of down's rows, not on their
lengths, so lengths may be chosen to make the way short: to tilt direction r towards one that is dropped costs about λ_r
times the squared angle, and with a row of length √λ_r that is alike for all r.

Names: D width, R latent width, H heads, d_h = D / H, B inputs that are weighed each in its own way: the keys' one, or
those of the H heads' values. All float64, but the steps of the descent, which are float32 where that can tell.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from asrlib.conversion.factorize import (
    DRAFT,
    Decomposition,
    Directions,
    Factors,
    InputMoments,
    LayerWeights,
    Moments,
    Objective,
    Target,
    decompose_objectives,
    output_metric,
    threads_for,
    two_sided,
)

ITERATIONS = 60  # of L-BFGS
SHORTEST_ROW = 1e-3  # of the longest: a direction of no importance keeps a row


@dataclass(frozen=True)
class Term:
    """Errors to keep low: Σ_b E‖F_b (W_b x_b − up_b·down x_b)‖² for x_b of covariance S_b."""

    covariance: torch.Tensor  # S [B, D, D]
    pull: torch.Tensor  # S Wᵀ Fᵀ [B, D, n]
    weight: float

    def explained(self, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The part of the error that the best `up` removes, for `down` [R, D], and its gradient [R, D].

        With C = down S downᵀ, P the pull and X = C⁻¹ down P they are Σ_b tr(X Pᵀ downᵀ) and 2 Σ_b X (Pᵀ − Xᵀ down S).
        """
        seen, read = down @ self.covariance, down @ self.pull
        best = torch.cholesky_solve(read, torch.linalg.cholesky(seen @ down.T))  # X [B, R, n]
        left = self.pull.mT - best.mT @ seen
        gradient = best.transpose(0, 1).flatten(1) @ left.flatten(0, 1)  # summed over b
        return self.weight * (best * read).sum(), 2 * self.weight * gradient

    def to(self, device: torch.device | str) -> "Term":
        return Term(self.covariance.to(device), self.pull.to(device), self.weight)


@dataclass(frozen=True, eq=False)
class Aim:
    """What one latent should keep, at any width and balance: of one layer, or of all that share it."""

    layers: tuple[tuple[LayerWeights, Moments], ...]
    objectives: tuple[Objective, ...]  # of `two_sided`, where the search begins
    layout: str

    def terms(
        self, which: int, inverse: torch.Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> tuple[list[Term], list[Term]]:
        """Of keys, and of values, layer by layer; each layer's errors without a latent sum to one. In a split layout
        of one of the two (`which`: 0 keys, −1 values). `inverse` [D, D]: of the root of the covariance that shall be
        the identity."""
        keys, values = [], []
        for weights, moments in self.layers:
            key, *heads = _targets(weights, moments)
            if self.layout == "joint" or which == 0:
                weighed = _weighed(key.weight, moments.query).flatten(0, 1)[None]
                keys.append(_term(weighed, [moments.attended_key], inverse, dtype))
            if self.layout == "joint" or which == -1:
                weighed = _weighed(torch.cat([head.weight for head in heads]), output_metric(weights))
                values.append(_term(weighed, moments.attended_values, inverse, dtype))
        return keys, values


_at_hand: WeakKeyDictionary[Aim, dict] = WeakKeyDictionary()  # what was computed for the last latent; it may be large


def _computed_once(compute: Callable) -> Callable:
    """Keeps the results for an aim until another is asked for, or the aim is gone."""

    def known(aim: Aim, argument: float) -> Any:
        if aim not in _at_hand:
            _at_hand.clear()
        results, key = _at_hand.setdefault(aim, {}), (compute, argument)
        if key not in results:
            results[key] = compute(aim, argument)
        return results[key]

    return known


@_computed_once
def _whitened(aim: Aim, which: int) -> tuple[torch.Tensor, torch.Tensor, list[Term], list[Term]]:
    """The root of the input's covariance, its inverse, and the terms in coordinates that make the covariance the
    identity, in float32."""
    root = aim.objectives[0].roots[which]
    inverse = torch.linalg.inv(root)
    return root, inverse, *aim.terms(which, inverse, torch.float32)


@_computed_once
def _starts(aim: Aim, balance: float) -> list[Decomposition]:
    """Those of `two_sided`, of each layer."""
    with threads_for(len(aim.objectives[0].grams[0])):
        return decompose_objectives(aim.objectives, aim.layout, balance)


@dataclass(frozen=True)
class AttendedDecomposition:
    """Stands in for a `Decomposition`; each width is a search of its own."""

    aim: Aim
    place: int  # of the layer, among those of the aim
    balance: float
    found: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)  # by (which, R, steps)

    @property
    def layout(self) -> str:
        return self.aim.layout

    @property
    def start(self) -> Decomposition:
        return _starts(self.aim, self.balance)[self.place]

    @property
    def directions(self) -> tuple[Directions, ...]:
        return self.start.directions

    def cut(self, rank_k: int, rank_v: int, steps: int | None = None) -> Factors:
        """See `Decomposition.cut`; without steps it is that of `two_sided`."""
        weights, moments = self.aim.layers[self.place]
        width, steps = len(weights.key_bias), ITERATIONS if steps is None else steps
        plain = self.start.cut(rank_k, rank_v)
        if min(rank_k, rank_v) >= width or not steps:
            return plain  # exact, or the start
        with threads_for(width):
            if self.layout == "joint":
                down_k = down_v = self._searched(plain.down_k, 0, steps)
            else:
                down_k, down_v = plain.down_k, plain.down_v
                if rank_k < width:
                    down_k = self._searched(down_k, 0, steps)
                if rank_v < width:
                    down_v = self._searched(down_v, -1, steps)
            key, *values = _targets(weights, moments)
            up_k, key_bias = _regressed(key, moments.attended_key, down_k)
            heads = [_regressed(*head, down_v) for head in zip(values, moments.attended_values, strict=True)]
        up_v, value_bias = (torch.cat(of_heads) for of_heads in zip(*heads, strict=True))
        return Factors(down_k, down_v, up_k, up_v, key_bias, value_bias)

    def _searched(self, start: torch.Tensor, which: int, steps: int) -> torch.Tensor:
        """The rows after so many steps from those of `two_sided`, which continue those of a draft. `which`: 0 keys, or
        all; −1 values."""
        if (which, len(start), steps) not in self.found:
            if steps > DRAFT:
                found = self._search(self._searched(start, which, DRAFT), which, steps - DRAFT)
                terms = self._balanced(*self.aim.terms(which))
                if not _explained(found, terms) >= _explained(start, terms):  # float32 cannot tell widths near D apart
                    found = self._search(start, which, steps, torch.float64)
            else:
                found = self._search(start, which, steps)
            if steps > DRAFT and len(self.aim.layers) == 1:
                return found  # nobody asks again
            self.found[which, len(start), steps] = found
        return self.found[which, len(start), steps]

    def _search(
        self, down: torch.Tensor, which: int, iterations: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The `down` [R, D] with less error, after steps where the speech was heard, or on the CPU where that has no
        room; in float64 where float32 cannot tell the covariances from singular ones. Raises ValueError where they are
        singular."""
        root, inverse, *terms = _whitened(self.aim, which)
        if dtype == torch.float64:
            terms = self.aim.terms(which, inverse)
        terms = self._balanced(*terms)
        values = self.directions[which].values[: len(down)]
        lengths = (values / values[0].clamp(min=torch.finfo(values.dtype).tiny)).clamp(min=SHORTEST_ROW)
        rows = torch.linalg.qr((down @ root).T)[0].T * lengths[:, None]
        try:
            try:
                there = self.aim.layers[self.place][1].device
                found = _descend(rows.to(there, dtype), [term.to(there) for term in terms], iterations)
            except torch.OutOfMemoryError:
                found = _descend(rows.to(dtype), terms, iterations)
        except torch.linalg.LinAlgError:
            found = torch.full_like(rows, torch.nan)
        if not found.isfinite().all():
            if dtype == torch.float64:
                raise ValueError("what attention reads hardly varies: take more calibration speech")
            return self._search(down, which, iterations, torch.float64)
        return torch.linalg.qr(found.to(rows).T)[0].T @ inverse  # the same directions

    def _balanced(self, keys: list[Term], values: list[Term]) -> list[Term]:
        return keys + [replace(term, weight=self.balance**2 * term.weight) for term in values]


def decompose_attended(
    layers: Sequence[tuple[LayerWeights, Moments]], layout: str, balances: Sequence[float]
) -> list[tuple[AttendedDecomposition, ...]]:
    """See `methods.Method`. Raises ValueError where the statistics were taken without attention."""
    if any(moments.attended_key is None for _, moments in layers):
        raise ValueError("method 'attended' needs statistics of attention: collect_statistics(..., attention=True)")
    aim = Aim(tuple(layers), tuple(two_sided(*layer) for layer in layers), layout)
    found = {balance: {} for balance in balances}
    return [
        tuple(AttendedDecomposition(aim, place, balance, found[balance]) for balance in balances)
        for place in range(len(layers))
    ]


def _explained(rows: torch.Tensor, terms: list[Term]) -> float:
    return sum(term.explained(rows)[0].item() for term in terms)


@torch.no_grad()
def _descend(rows: torch.Tensor, terms: list[Term], iterations: int) -> torch.Tensor:
    rows = rows.clone()
    optimizer = torch.optim.LBFGS([rows], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    def left() -> torch.Tensor:
        explained, gradients = zip(*(term.explained(rows) for term in terms), strict=True)
        rows.grad = -sum(gradients)
        return -sum(explained)

    optimizer.step(left)
    return rows


def _targets(weights: LayerWeights, moments: Moments) -> list[Target]:
    """Of the keys, then of each head's values."""
    key = Target.of(weights.key, weights.key_bias, moments.attended_key)
    rows = zip(weights.value.chunk(weights.heads), weights.value_bias.chunk(weights.heads), strict=True)
    return [key] + [Target.of(*row, of_head) for row, of_head in zip(rows, moments.attended_values, strict=True)]


def _weighed(weight: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """F_h W_h [H, d_h, D] of a weight [D, D] and its heads' metrics Fᵀ F [H, d_h, d_h]."""
    values, vectors = torch.linalg.eigh(metric)
    half = vectors * values.clamp(min=0).sqrt()[:, None]  # metric = half halfᵀ
    return half.mT @ weight.unflatten(0, (len(metric), -1))


def _term(
    weighed: torch.Tensor,
    moments: Sequence[InputMoments],
    inverse: torch.Tensor | None,
    dtype: torch.dtype,
) -> Term:
    """The term of F W [B, n, D] and inputs x_b; without a latent its error is one. `inverse`: see `Aim.terms`."""
    covariances, pulls, total = [], [], 0.0
    for rows, inputs in zip(weighed, moments, strict=True):
        covariance, pull = inputs.covariance, inputs.covariance @ rows.T
        total += (pull * rows.T).sum().item()
        if inverse is not None:
            covariance, pull = inverse @ covariance @ inverse, inverse @ pull
        covariances.append(covariance.to(dtype))
        pulls.append(pull.to(dtype))
    return Term(torch.stack(covariances), torch.stack(pulls), 1 / max(total, torch.finfo(torch.float64).tiny))


def _regressed(target: Target, moments: InputMoments, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(up [n, R], bias [n]) that best reproduce `target` from the latent."""
    seen = down @ moments.covariance  # [R, D]
    up = torch.linalg.solve(seen @ down.T, seen @ target.weight.T).T
    return up, target.bias - up @ (down @ target.mean)
