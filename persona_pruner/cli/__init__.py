"""The `persona-pruner` command: each command calls one function of the package and prints what it gives."""

import json
import logging
import sys

from rich.console import Console

from persona_pruner.cli import cluster, evaluation, masks, publishing, runs, settings
from persona_pruner.cli import serving as serving
from persona_pruner.cli.app import app
from persona_pruner.errors import UserError

_MODULES = (runs, masks, evaluation, publishing, serving, cluster, settings)
_ORDER = {module.__name__: position for position, module in enumerate(_MODULES)}
app.registered_commands.sort(key=lambda command: _ORDER.get(getattr(command.callback, "__module__", ""), len(_ORDER)))

__all__ = ["app", "cluster", "evaluation", "main", "masks", "publishing", "runs", "settings"]


def main() -> None:
    """Run a command; a user's fault becomes its lines on stderr and its exit status, never a traceback.

    With --json the fault is one JSON object on stderr: `error` and `exit_status`.
    """
    # transformers imports DeepSpeed, which warns on every machine without a GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())
    try:
        app(prog_name="persona-pruner")
    except UserError as error:
        if "--json" in sys.argv:
            print(json.dumps({"error": str(error), "exit_status": error.exit_code}), file=sys.stderr)
        else:
            Console(stderr=True).print(str(error), markup=False, highlight=False, style="red", soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
