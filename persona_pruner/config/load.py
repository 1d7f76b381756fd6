"""A run configuration from YAML and `--set key=value` overrides, every rule checked before anything starts."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key.sub=value` overrides (values are YAML), check everything.

    Relative local paths inside the file count from the file's directory, those in overrides from the working
    directory. Raises ConfigError with one line a fault.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{file}:{mark.line + 1}" if mark else str(file)
        problem = getattr(error, "problem", None) or str(error)
        hint = "; YAML allows no tabs, indent with spaces" if "\\t" in problem else ""
        raise ConfigError(f"{line}: not valid YAML: {problem}{hint}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: must be a mapping of settings, not {type(tree).__name__}")
    try:
        _resolve_paths(tree, file.parent)
    except ValueError as error:
        raise ConfigError(f"{file}: a path cannot be used: {error}") from None
    for override in overrides:
        _override(tree, override)
    return check_config(tree, str(file))


def check_config(tree: Mapping[str, Any], where: str = "configuration") -> RunConfig:
    """A RunConfig from plain values. Raises ConfigError with one line a fault, each with the nearest right key."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        # A setting that takes several types has a fault for each of them, which are one to the user.
        faults: dict[str, list[str]] = {}
        for fault in error.errors():
            setting, problem = _explain(fault)
            problems = faults.setdefault(setting, [])
            if problem not in problems:
                problems.append(problem)
        lines = [f"{where}: {setting}{' or '.join(problems)}" for setting, problems in faults.items()]
        raise ConfigError("\n".join(lines[:20])) from None


def _explain(fault: Mapping[str, Any]) -> tuple[str, str]:
    """(which setting and value, what is wrong with it)."""
    keys = [str(part) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        names = _section_at(keys[:-1])
        near = difflib.get_close_matches(keys[-1], names, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*keys[:-1], near[0]])}?" if near else f"known keys: {', '.join(names)}"
        return f"unknown key {'.'.join(keys)}; ", hint
    keys = [key for key in keys if key not in ("constrained-float", "literal['auto']", "float")]
    setting = ".".join(keys)
    message = fault["msg"].removeprefix("Value error, ")
    match fault["type"]:
        case "value_error":
            return f"{setting}: " if setting else "", message
        case "missing":
            return f"{setting}: ", "is missing"
        case "model_type" | "model_attributes_type":
            message = "must be a mapping of settings"
        case "tuple_type":
            message = "must be a list"
    return f"{setting} = {fault['input']!r}: ", message.replace("Input should be", "must be")


def _section_at(keys: Sequence[str]) -> list[str]:
    """Field names of the section at `keys`."""
    section: type[BaseModel] = RunConfig
    for key in keys:
        field = section.model_fields.get(key)
        if field is None:
            continue
        candidates = [field.annotation, *get_args(field.annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: must look like learning.ratio=0.5")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is not valid YAML") from None
    *parents, last = key.strip().split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {parent} is no section")
    node[last] = parsed
    _resolve_paths(tree, Path.cwd())


_PATH_KEYS = (
    ("backbone", "path"),
    ("synthesis", "references", "path"),
    ("learning", "objective", "generic_rows"),
    ("evaluation", "conversations"),
    ("evaluation", "abilities", "tasks"),
    ("evaluation", "benchmarks", "include_path"),
    ("evaluation", "questions"),
)


def _resolve_paths(tree: dict[str, Any], base: Path) -> None:
    """Make the relative local paths of a file count from `base`."""
    for *parents, last in _PATH_KEYS:
        node: Any = tree
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(node.get(last), str):
            node[last] = _resolve(node[last], base)
    synthesis = tree.get("synthesis")
    sources = synthesis.get("sources") if isinstance(synthesis, dict) else None
    for source in sources if isinstance(sources, list) else ():
        if isinstance(source, dict) and isinstance(source.get("path"), str):
            source["path"] = _resolve(source["path"], base)


def _resolve(path: str, base: Path) -> str:
    """`path` from the working directory where it lies inside it (a job's working directory is shipped to every node,
    under another name on each), else absolute. A name that is no file below `base` may be a hub name: unchanged."""
    if "://" in path or Path(path).is_absolute() or not path:
        return path
    local = (base / path).resolve()
    if not local.exists() and not path.startswith(".") and path.count("/") <= 1:
        return path
    return str(local.relative_to(Path.cwd())) if local.is_relative_to(Path.cwd()) else str(local)
