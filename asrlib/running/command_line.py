"""How a command ends that cannot go on: with a sentence on stderr. The traceback is for those who ask for it."""

import argparse
import sys
import traceback

FORESEEN = (OSError, ValueError)  # whose messages are sentences: what, where, what to do


def add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="of an error, show where in the code it arose")


def sentence(error: BaseException) -> str:
    """What the error says; of one that nobody foresaw its kind too, and how to see where it arose."""
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("asrlib"):
        return f'{error.name} is not installed: pip install "asrlib[notebooks]"'  # ray and onnx are asked for earlier
    if isinstance(error, FORESEEN) and not isinstance(error, UnicodeError) and str(error):
        return str(error)
    kind = type(error).__name__
    return f"{kind}: {error}\nNobody foresaw this: the same command with --debug shows where in the code it arose."


def tell(said: str, error: BaseException, debug: bool = False) -> None:
    """Write `said` to stderr, with `debug` after the traceback of `error`."""
    if debug:
        traceback.print_exception(error)
    sys.stderr.write(f"{said}\n")
