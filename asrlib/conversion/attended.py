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

Names: D width, R latent width, H heads, d_h = D / H. All float64, but the steps of the descent, which are float32.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from asrlib.conversion.factorize import (
    DRAFT,
    Decomposition,
    Directions,
    Factors,
    InputMoments,
    LayerWeights,
    Moments,
    Target,
    decompose_objective,
    decompose_together,
    output_metric,
    symmetric_root,
    two_sided,
)

ITERATIONS = 60  # of L-BFGS
SHORTEST_ROW = 1e-3  # of the longest: a direction of no importance keeps a row
SMALL = 512  # below this width, one thread multiplies faster than several, above all on a busy machine


@dataclass(frozen=True)
class Term:
    """One error to keep low: E‖F (W x − up·down x)‖² for x of covariance S."""

    covariance: torch.Tensor  # S [D, D]
    pull: torch.Tensor  # S Wᵀ Fᵀ [D, n]
    weight: float

    def explained(self, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The part of the error that the best `up` removes, for `down` [R, D], and its gradient [R, D].

        With C = down S downᵀ, P the pull and X = C⁻¹ down P they are tr(X Pᵀ downᵀ) and 2 (X Pᵀ − X Xᵀ down S).
        """
        seen, read = down @ self.covariance, down @ self.pull
        best = torch.cholesky_solve(read, torch.linalg.cholesky(seen @ down.T))  # [R, n]
        gradient = best @ self.pull.T - best @ (best.T @ seen)
        return self.weight * (best * read).sum(), 2 * self.weight * gradient


@dataclass(frozen=True)
class AttendedDecomposition:
    """Stands in for a `Decomposition`; each width is a search of its own."""

    start: Decomposition  # two_sided
    weights: LayerWeights
    moments: Moments
    balance: float
    sharing: tuple[tuple[LayerWeights, Moments], ...]  # the layers of a joint latent, this one among them
    found: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)  # by (which, R, steps)

    @property
    def layout(self) -> str:
        return self.start.layout

    @property
    def directions(self) -> tuple[Directions, ...]:
        return self.start.directions

    def cut(self, rank_k: int, rank_v: int, steps: int | None = None) -> Factors:
        """See `Decomposition.cut`; without steps it is that of `two_sided`."""
        width, steps = len(self.weights.key_bias), ITERATIONS if steps is None else steps
        plain = self.start.cut(rank_k, rank_v)
        if min(rank_k, rank_v) >= width or not steps:
            return plain  # exact, or the start
        with _threads(1 if width < SMALL else torch.get_num_threads()):
            if self.layout == "joint":
                down_k = down_v = self._searched(plain.down_k, 0, steps)
            else:
                down_k, down_v = plain.down_k, plain.down_v
                if rank_k < width:
                    down_k = self._searched(down_k, 0, steps)
                if rank_v < width:
                    down_v = self._searched(down_v, -1, steps)
        key, *values = _targets(self.weights, self.moments)
        up_k, key_bias = _regressed(key, self.moments.attended_key, down_k)
        heads = [_regressed(*head, down_v) for head in zip(values, self.moments.attended_values, strict=True)]
        up_v, value_bias = (torch.cat(of_heads) for of_heads in zip(*heads, strict=True))
        return Factors(down_k, down_v, up_k, up_v, key_bias, value_bias)

    def _searched(self, down: torch.Tensor, which: int, steps: int) -> torch.Tensor:
        """The rows after so many steps, which continue those of a draft. `which`: 0 keys, or all; −1 values."""
        if (which, len(down), steps) not in self.found:
            if steps > DRAFT:
                down, left = self._searched(down, which, DRAFT), steps - DRAFT
            else:
                left = steps
            inputs, values = (self.moments.key, self.moments.value)[which], self.directions[which].values[: len(down)]
            found = search(down, values, self._terms(which), inputs.covariance, left, self.moments.device)
            if steps > DRAFT and len(self.sharing) == 1:
                return found  # nobody asks again
            self.found[which, len(down), steps] = found
        return self.found[which, len(down), steps]

    def _terms(self, which: int) -> list[Term]:
        if self.layout == "split":
            return _terms(self.weights, self.moments)[which]
        terms = []
        for layer in self.sharing:
            keys, values = _terms(*layer)
            terms += [*_scaled(keys, 1.0), *_scaled(values, self.balance**2)]
        return terms


def decompose_attended(
    layers: Sequence[tuple[LayerWeights, Moments]], layout: str, balance: float = 1.0
) -> list[AttendedDecomposition]:
    """Those of one layer, or of several with one joint latent: see `layers.decompose_layer` and `decompose_shared`.

    Raises ValueError where the statistics were taken without attention.
    """
    if any(moments.attended_key is None for _, moments in layers):
        raise ValueError("method 'attended' needs statistics of attention: collect_statistics(..., attention=True)")
    objectives = [two_sided(*layer) for layer in layers]
    if layout == "joint":
        starts = decompose_together(objectives, balance)
    else:
        starts = [decompose_objective(objective, layout, balance) for objective in objectives]
    found = {}
    return [
        AttendedDecomposition(start, *layer, balance, tuple(layers), found)
        for start, layer in zip(starts, layers, strict=True)
    ]


def search(
    down: torch.Tensor,
    values: torch.Tensor,
    terms: list[Term],
    covariance: torch.Tensor,
    iterations: int = ITERATIONS,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The `down` [R, D] with the least error, found from a first guess whose directions have the singular values
    `values` [R], in coordinates that make `covariance` the identity. The steps are taken on `device`,
    or on the CPU where that has no room."""
    root = symmetric_root(covariance)
    inverse = torch.linalg.inv(root)
    terms = [Term(inverse @ t.covariance @ inverse, inverse @ t.pull, t.weight) for t in terms]
    lengths = (values / values[0].clamp(min=torch.finfo(values.dtype).tiny)).clamp(min=SHORTEST_ROW)
    start = torch.linalg.qr((down @ root).T)[0].T * lengths[:, None]
    try:
        try:
            rows = _rounded(start, terms, iterations, device)
        except torch.OutOfMemoryError:
            rows = _rounded(start, terms, iterations, "cpu")
        better = _explained(rows, terms) >= _explained(start, terms)  # not so where it is not finite
    except torch.linalg.LinAlgError:
        better = False
    if not better:  # covariances that float32 cannot tell from singular ones
        rows = _descend(start, terms, iterations)
    rows = torch.linalg.qr(rows.T)[0].T  # the same directions
    return rows @ inverse


def _rounded(start: torch.Tensor, terms: list[Term], iterations: int, device: torch.device | str) -> torch.Tensor:
    """The rows after steps in float32."""
    there = {"dtype": torch.float32, "device": device}
    rounded = [Term(t.covariance.to(**there), t.pull.to(**there), t.weight) for t in terms]
    return _descend(start.to(**there), rounded, iterations).to(start)


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


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _targets(weights: LayerWeights, moments: Moments) -> list[Target]:
    """Of the keys, then of each head's values."""
    key = Target.of(weights.key, weights.key_bias, moments.attended_key)
    rows = zip(weights.value.chunk(weights.heads), weights.value_bias.chunk(weights.heads), strict=True)
    return [key] + [Target.of(*row, of_head) for row, of_head in zip(rows, moments.attended_values, strict=True)]


def _terms(weights: LayerWeights, moments: Moments) -> tuple[list[Term], list[Term]]:
    """Of the keys, and of each head's values."""
    key, *values = _targets(weights, moments)
    heads = zip(values, output_metric(weights)[:, None], moments.attended_values, strict=True)
    key_term = _term(key.weight, moments.query, moments.attended_key)
    return [key_term], [_term(target.weight, metric, of_head) for target, metric, of_head in heads]


def _term(weight: torch.Tensor, metric: torch.Tensor, moments: InputMoments) -> Term:
    """The term of a weight [n·d_h, D] and its heads' metrics [n, d_h, d_h]."""
    values, vectors = torch.linalg.eigh(metric)
    half = vectors * values.clamp(min=0).sqrt()[:, None]  # metric = half halfᵀ
    seen = torch.einsum("hij,hid->hjd", half, weight.unflatten(0, (len(metric), -1))).flatten(0, 1)
    return Term(moments.covariance, moments.covariance @ seen.T, 1.0)


def _scaled(terms: list[Term], weight: float) -> list[Term]:
    """The terms, scaled so that their errors without a latent sum to `weight`."""
    total = sum((term.pull * torch.linalg.solve(term.covariance, term.pull)).sum() for term in terms)
    scale = weight / max(total.item(), torch.finfo(torch.float64).tiny)
    return [Term(term.covariance, term.pull, scale) for term in terms]


def _regressed(target: Target, moments: InputMoments, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(up [n, R], bias [n]) that best reproduce `target` from the latent."""
    seen = down @ moments.covariance  # [R, D]
    up = torch.linalg.solve(seen @ down.T, seen @ target.weight.T).T
    return up, target.bias - up @ (down @ target.mean)
