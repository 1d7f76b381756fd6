"""Every key that a run reads or writes under its output prefix."""

import hashlib

RUN = "run.json"
CATALOG = "catalog/"
CATALOG_OF_FORMAT_1 = "catalog.parquet"
STATUS = "progress/status.json"
TENSORBOARD = "progress/tensorboard"
CURVES = "progress/curves/"

SYNTHESIS = "synthesis/personas/"
ANSWERS = "synthesis/answers/"
REWRITER_COSTS = "synthesis/costs/"
"""What endpoints were paid for answers, one object for each process that asked."""
CHECKPOINTS = "checkpoints/"
MASKS = "masks/"
ERRORS = "errors/"
EVALUATION = "evaluation/"
EVALUATION_SUMMARY = "evaluation/summary.parquet"
GLOBAL_MASKS = "evaluation/global/"
EVALUATION_TABLES = "evaluation/tables/"
"""Tables for the report, one JSON object each: `columns` and `rows`."""
EVALUATION_COSTS = f"{EVALUATION_TABLES}costs.json"
EVALUATION_ABILITIES = f"{EVALUATION_TABLES}abilities.json"
EVALUATION_TURNS = f"{EVALUATION_TABLES}turns.json"
EVALUATION_BENCHMARKS = f"{EVALUATION_TABLES}benchmarks.json"
REPORT = "report.html"
LEASES = "lease/"


POOLED_SAMPLE = "pooled/sample.json"
"""Ids of the personas whose rows the pooled mask is learned from: decided once, so that a manifest may grow."""
POOLED_MASK = "pooled/mask.safetensors"
POOLED_SCORES = "pooled/scores.safetensors"
POOLED_CHECKPOINT = "pooled/checkpoint.safetensors"
RECOVERY = "recovery/"
RECOVERED = "recovery/results/"


def persona_data(persona_id: str) -> str:
    return f"{SYNTHESIS}{persona_id}/data.parquet"


def stored_answers(persona_id: str) -> str:
    """Paid answers of a persona whose data are not whole yet; gone once `persona_data` is committed."""
    return f"{ANSWERS}{persona_id}/"


def checkpoint(persona_id: str) -> str:
    return f"{CHECKPOINTS}{persona_id}.safetensors"


def curve(persona_id: str) -> str:
    """How the learning of its mask went."""
    return f"{CURVES}{_spread(persona_id)}/{persona_id}.json"


def mask(persona_id: str) -> str:
    return f"{MASKS}{_spread(persona_id)}/{persona_id}/mask.safetensors"


def _spread(persona_id: str) -> str:
    """Two hex digits of the id's hash: object storage spreads its load by the beginning of keys, and a directory with
    100,000 entries is slow."""
    return hashlib.sha256(persona_id.encode()).hexdigest()[:2]


def mask_of_format_1(persona_id: str) -> str:
    return f"{MASKS}{persona_id}/mask.safetensors"


# Patterns for `Storage.match`.
EVERY_MASK = (mask_of_format_1("*/*"), mask_of_format_1("*"))
EVERY_DATA = persona_data("*")


def persona_of_mask(key: str) -> str | None:
    """The persona id in the key of a mask, of this format or of format 1; None where it is another object's key."""
    name = key.removesuffix("/mask.safetensors").rpartition("/")[2]
    return name if key in (mask(name), mask_of_format_1(name)) else None


def catalog_part(digest: str) -> str:
    return f"{CATALOG}part-{digest}.parquet"


def error(persona_id: str) -> str:
    return f"{ERRORS}{persona_id}.json"


def evaluation(persona_id: str) -> str:
    return f"{EVALUATION}{persona_id}.json"


def evaluation_rows(kind: str, persona_id: str = "", digest: str = "") -> str:
    """What a persona said under every arm, asked for one kind of thing (such as answers), named by what decided it;
    without a digest, where that of the persona lies, without a persona, where that of all lies."""
    place = f"{EVALUATION}{kind}/"
    return f"{place}{f'{persona_id}/' if persona_id else ''}{f'{digest}.parquet' if digest else ''}"


def user_turns(persona_id: str = "", digest: str = "") -> str:
    """What an endpoint said as the simulated user, some at a time; without a digest, where they lie."""
    return f"{EVALUATION}user/{f'{persona_id}/' if persona_id else ''}{f'{digest}.json' if digest else ''}"


def judgements(persona_id: str, digest: str = "") -> str:
    """Verdicts of judges on a persona's answers, some at a time; without a digest, where they lie."""
    return f"{EVALUATION}judgements/{persona_id}/{f'{digest}.json' if digest else ''}"


def global_mask(digest: str) -> str:
    """The evaluation's one mask for all personas, named by the data that it was learned from."""
    return f"{GLOBAL_MASKS}{digest}.safetensors"


def lease(epoch: int, part: str = "") -> str:
    """`part` names a part of the manifest that has leases of its own."""
    return f"{LEASES}{part}{'/' if part else ''}{epoch:08d}.json"


def status(part: str = "") -> str:
    return STATUS if not part else f"{STATUS.removesuffix('.json')}-{part}.json"


def persona_of(key: str, prefix: str) -> str:
    """The persona id in a key below `prefix`, one of those above whose next part begins with the id."""
    name, below, _ = key.removeprefix(prefix).partition("/")
    return name if below else name.rpartition(".")[0]


def recovered(persona_id: str) -> str:
    """What the tuning after the mask came to; written last, when its files are there."""
    return f"{RECOVERED}{persona_id}.json"


def recovery_file(persona_id: str, name: str) -> str:
    """A file of the tuned adapter or checkpoint."""
    return f"{RECOVERY}files/{persona_id}/{name}"


def recovery_checkpoint(persona_id: str) -> str:
    return f"{RECOVERY}checkpoints/{persona_id}.safetensors"
