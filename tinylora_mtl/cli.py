"""What the commands share: a user's mistake ends in one line on stderr and exit status 2, without a traceback."""

import argparse
import sys


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that keeps the lines of its description and answers a mistake in one line, not in a page."""

    def __init__(self, module, description):
        super().__init__(prog=f"python -m tinylora_mtl.{module}", description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; --help lists the flags\n")


def run_command(command):
    """Run a command; ValueError, OSError and FloatingPointError carry a message for the user and end in that line."""
    try:
        command()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
