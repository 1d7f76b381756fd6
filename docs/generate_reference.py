"""Reference pages made from the code while the site is built: commands and configuration."""

import subprocess
import sys

import mkdocs_gen_files

from persona_pruner.cli.settings import all_settings

commands = subprocess.run(
    [sys.executable, "-m", "typer", "persona_pruner.cli", "utils", "docs", "--name", "persona-pruner"],
    capture_output=True,
    text=True,
    check=True,
).stdout
with mkdocs_gen_files.open("reference/commands.md", "w") as page:
    page.write(commands)

with mkdocs_gen_files.open("reference/configuration.md", "w") as page:
    page.write("# Configuration\n\nEvery setting of a run, as `persona-pruner config` explains it.\n\n")
    page.write("| setting | default | meaning |\n|---|---|---|\n")
    for name, default, text in all_settings():
        meaning = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
        page.write(f"| `{name}` | {f'`{default}`' if default else 'required'} | {meaning} |\n".replace("\\n", " "))
