"""What a search that knows no formula finds: the reference for closed forms."""

import math
from collections.abc import Callable, Sequence

import torch


def descend(loss: Callable, starts: Sequence[Sequence[torch.Tensor]], steps: int = 200) -> float:
    """The lowest of what L-BFGS makes of loss(*factors), from each of several starts."""
    best = math.inf
    for start in starts:
        factors = [factor.clone().requires_grad_() for factor in start]
        optimizer = torch.optim.LBFGS(factors, max_iter=steps, history_size=30, line_search_fn="strong_wolfe")

        def closure(factors=factors, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(*factors)
            value.backward()
            return value

        optimizer.step(closure)
        best = min(best, loss(*factors).item())
    return best
