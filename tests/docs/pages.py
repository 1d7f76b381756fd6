"""Fenced blocks of README.md and docs/: what a reader is told to run, and what that prints.

`sh` blocks are commands, `text` blocks what they print. A block after `<!-- not run: reason -->` is left out.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"sh", "text", "python", "yaml", "json", "mermaid"}
COMMAND = re.compile(r"(?:^|[\s/`])persona-pruner +([a-z]+)([^#|`]*)")

_FENCE = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.S | re.M)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    reason: str
    """Why it is not run; "" where it is."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text, name = page.read_text(), page.relative_to(ROOT).as_posix()
    return [
        Block(name, text.count("\n", 0, at.start()) + 1, at["language"], at["text"], (at["reason"] or "").strip())
        for at in _FENCE.finditer(text)
    ]


def commands_of(page: Path) -> list[tuple[str, str]]:
    """(command, rest) of every `persona-pruner` line and every inline mention with a command."""
    text = page.read_text()
    code = [block.text for block in blocks_of(page)] + re.findall(r"`(persona-pruner [^`]+)`", _FENCE.sub("", text))
    lines = [line for each in code for line in each.replace("\\\n", " ").splitlines()]
    return [(found[1], found[2]) for line in lines if (found := COMMAND.search(line))]
