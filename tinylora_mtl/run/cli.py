"""What the commands share: a user's mistake ends in one line on stderr and exit status 2, without a traceback."""

import argparse
import signal
import sys
import warnings

import torch

from .distributed import process_rank

# These carry a message for the user. Any other exception is a defect of this package, and shows where it was.
USER_ERRORS = (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that keeps the lines of its description and answers a mistake in one line, not in a page."""

    def __init__(self, module, description):
        super().__init__(prog=f"python -m tinylora_mtl.{module}", description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, None if process_rank() > 0 else f"{self.prog}: error: {message}; --help lists the flags\n")


def whole(low, high=2 ** 63 - 1):
    """A `type` for a flag: a whole number from `low` to `high`."""
    def number(text):
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text:.20}")
        return int(text)
    number.__name__ = "int"  # argparse says "invalid int value" for what is none
    return number


class Stopped(KeyboardInterrupt):
    """A signal ended the command. `number` is the signal's; the text, if any, says how to go on."""

    def __init__(self, number, text=""):
        super().__init__(text)
        self.number = number


class StopSignals:
    """Within `with StopSignals() as stop`, SIGINT (Ctrl-C) and SIGTERM raise Stopped, wherever the program is.

    While `stop.wait` is true the first of them is only noted, in `stop.number`, so that the work at hand can be
    finished; a second one raises all the same. After the block the handlers are those from before.
    """

    def __init__(self):
        self.number, self.wait, self.before = 0, False, {}

    def __enter__(self):
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        first, self.number = not self.number, number
        if not (first and self.wait):
            raise Stopped(number)


def run_command(command):
    """Run a command; one of USER_ERRORS ends in its line and status 2, a signal in a line and 128 + its number.

    A warning is a line too, and what the console cannot show is printed as \\uXXXX.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *more: f"warning: {one_line(message)}\n"
    try:
        command()
    except USER_ERRORS as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:  # without StopSignals it is Python's own, and carries nothing
        number = getattr(stop, "number", signal.SIGINT)
        if process_rank() == 0:
            print(f"stopped by {signal.Signals(number).name}{one_line(stop) and '; '}{one_line(stop)}", file=sys.stderr)
        sys.exit(128 + number)


def one_line(error):
    """The text of an error without line breaks, and without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
