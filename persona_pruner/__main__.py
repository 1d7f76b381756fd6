"""`python -m persona_pruner` is the `persona-pruner` command."""

from persona_pruner.cli import main

main()
