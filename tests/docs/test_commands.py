"""The commands of README.md and docs/ run as they stand, and what they print has the figures that the pages show.

`make test-slow` runs this: minutes, of which `make quickstart` takes most. All run in one fresh copy of the checkout,
whose environment is this one, with a bucket `bucket` on a real S3 server that holds the quickstart's output as `run`.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
from pages import LANGUAGES, PAGES, ROOT, blocks_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
NUMBER = re.compile(r"\d[\d,]*\.?\d*")
NEAR = 0.05
"""How far a printed figure may be from that of another machine, as a part of it."""


class Workplace:
    def __init__(self, directory: Path, env: dict[str, str]) -> None:
        self.directory, self.env = directory, env

    def run(self, script: str, language: str = "sh") -> str:
        words = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
        done = subprocess.run(
            [*words, script], cwd=self.directory, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n{done.stdout[-4000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, real_s3):
    directory = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        to = directory / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to, follow_symlinks=False)
    environment = Path(sys.prefix)
    (directory / ".venv").symlink_to(environment)
    (environment / "ready").touch()  # make would install what is there
    client = boto3.client("s3", endpoint_url=real_s3["AWS_ENDPOINT_URL"], region_name="us-east-1",
                          aws_access_key_id=real_s3["AWS_ACCESS_KEY_ID"],
                          aws_secret_access_key=real_s3["AWS_SECRET_ACCESS_KEY"])  # fmt: skip
    client.create_bucket(Bucket="bucket")
    env = os.environ | real_s3 | {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "COLUMNS": "80"}
    env |= {"PYTHONPATH": str(directory), "OMP_NUM_THREADS": "1"}
    env.pop("RAY_ADDRESS", None)
    place = Workplace(directory, env)
    place.run("make quickstart")
    for file in sorted((directory / "runs/quickstart").rglob("*")):
        if file.is_file():
            client.upload_file(str(file), "bucket", f"run/{file.relative_to(directory / 'runs/quickstart')}")
    return place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_run_in_their_order_and_print_its_figures(page, workplace):
    printed = ""
    for block in blocks_of(page):
        if block.reason:
            continue
        if block.language in ("sh", "python"):
            printed += workplace.run(block.text, block.language)
        elif block.language == "text":
            for line in filter(NUMBER.search, block.text.splitlines()):
                assert any(is_near(line, other) for other in printed.splitlines()), f"{block}: nobody prints {line!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is_and_commands_are_run_or_have_a_reason(page):
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{block}: {block.language!r} is none of {LANGUAGES}"
        assert block.language == "sh" or not re.search(r"^(make|ray|\S*persona-pruner) [a-z]", block.text, re.M), block


def is_near(line: str, other: str) -> bool:
    """Whether two lines have the same words, and figures that are equal within NEAR."""
    if NUMBER.sub("#", line).split() != NUMBER.sub("#", other).split():
        return False
    pairs = zip(NUMBER.findall(line), NUMBER.findall(other), strict=True)
    values = [(float(one.replace(",", "")), float(two.replace(",", ""))) for one, two in pairs]
    return all(abs(one - two) <= NEAR * max(abs(one), 1e-2) for one, two in values)
