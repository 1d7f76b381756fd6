"""The `persona-pruner` command."""

import sys

from rich.console import Console

from persona_pruner.cli.app import app
from persona_pruner.errors import UserError


def main() -> None:
    """Run a command; a user's fault becomes its lines on stderr and its exit status, never a traceback."""
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(str(error), markup=False, highlight=False, style="red", soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
