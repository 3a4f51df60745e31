"""A command that fails writes one sentence to stderr; with --debug the traceback too."""

import argparse
import sys
import traceback

EXPECTED = (OSError, ValueError)  # their messages say what is wrong, where, and what to do


def add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show where in the code an error arose")


def sentence(error: BaseException) -> str:
    """The message of an expected error; of any other its kind too, and how to see where it arose."""
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("asrlib"):
        return f'{error.name} is not installed: pip install "asrlib[notebooks]"'  # ray and onnx are asked for earlier
    if isinstance(error, EXPECTED) and not isinstance(error, UnicodeError) and str(error):
        return str(error)
    advice = "This error was not expected. The same command with --debug shows where in the code it arose."
    return f"{type(error).__name__}: {error}\n{advice}"


def tell(message: str, error: BaseException, debug: bool = False) -> None:
    """Write `message` to stderr, with `debug` below the traceback of `error`."""
    if debug:
        traceback.print_exception(error)
    sys.stderr.write(f"{message}\n")
