"""The commands of asrlib, as somebody gives them."""

from collections.abc import Callable, Sequence

from asrlib.__main__ import main


def command(verb: str) -> Callable[[Sequence[str]], int]:
    """`python -m asrlib VERB WORDS`, in this process: words → exit status."""
    return lambda words: main([verb, *map(str, words)])
