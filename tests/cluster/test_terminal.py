"""A real run on a pseudo-terminal, as somebody who watches it sees it, Ctrl-C while answers are generated, and the same
run again in a pipe."""

import fcntl
import os
import re
import secrets
import shutil
import struct
import subprocess
import sys
import termios
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import cluster_runs as runs
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.fault, pytest.mark.timeout(580)]

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")
PERSONAS = 6
SETTINGS = [
    "synthesis.max_questions=240", "synthesis.select.k=120", "synthesis.rewrite.samples_per_question=3",
    "synthesis.rewrite.batch_size=8", "learning.steps=6",
]  # fmt: skip
CTRL_C = b"\x03"


class Terminal:
    """A process with a terminal of its own, and what it shows there."""

    def __init__(self, command, env):
        self._end, other = os.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, cwd=runs.ROOT, env=env, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(other)
        self._shown = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        while True:
            try:
                data = os.read(self._end, 65536)
            except OSError:  # how Linux says that the other end is closed
                return
            self._shown += data.decode(errors="replace")

    @property
    def shown(self):
        return CONTROL.sub("", self._shown)

    def wait_for(self, pattern, count=1):
        """Until so many different matches of `pattern` were shown; the seconds from the start."""

        def seen():
            assert self.process.poll() is None, self.shown[-3000:]
            return len(set(re.findall(pattern, self.shown))) >= count

        runs.wait_for(seen, 300)
        return time.monotonic() - self.began

    def type(self, keys):
        os.write(self._end, keys)

    def end(self):
        status = self.process.wait(120)
        self._reader.join(10)
        return status


@dataclass
class Interrupted:
    """A run that was watched until answers were generated, and stopped then."""

    output: Path
    shown: str
    status: int
    seconds: dict[str, float]
    rays: int
    """Local Ray clusters that it has started."""
    left: list[int]
    """Processes that outlived it."""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    output = tmp_path_factory.mktemp("watched") / "out"
    # Ray's socket names must stay under 107 bytes, which pytest's own directories do not leave room for.
    ray_directory = Path(f"/tmp/pp-{secrets.token_hex(3)}")
    env = os.environ | {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(ray_directory), "TERM": "xterm-256color"}
    env.pop("RAY_ADDRESS", None)
    terminal = Terminal([sys.executable, *runs.command(output, *SETTINGS, personas=PERSONAS)], env)
    try:
        seconds = {
            "a phase": terminal.wait_for(r"checking the input"),
            "a moving time": terminal.wait_for(r"checking the input +(\S+ elapsed)", 2),
            "Ray starts": terminal.wait_for(r"starting Ray"),
            "scored": terminal.wait_for(r"scoring +([1-9][\d,]*) of", 3),
            "answered": terminal.wait_for(r"answering +([1-9][\d,]*) of", 2),
        }
        children = runs.children(terminal.process.pid)
        terminal.type(CTRL_C)
        status = terminal.end()
        time.sleep(3)  # a daemon's thread that touched Ray after its end would start another one now
        sessions = [path for path in ray_directory.glob("ray/session_*") if not path.is_symlink()]
        left = [pid for pid in children if Path(f"/proc/{pid}/exe").exists()]
        print("seconds to", {name: round(value, 1) for name, value in seconds.items()})
        yield Interrupted(output, terminal.shown, status, seconds, len(sessions), left)
    finally:
        if terminal.process.poll() is None:
            runs.kill_tree(terminal.process)
        shutil.rmtree(ray_directory, ignore_errors=True)


def test_the_phase_and_a_moving_time_show_before_anything_heavy_and_counts_move_from_then_on(interrupted):
    order = ["checking the input", "loading libraries", "starting Ray", "scoring", "answering"]
    assert sorted(order, key=interrupted.shown.index) == order
    assert re.search("✓ +starting Ray", interrupted.shown)  # not for as long as the run goes on
    seconds = list(interrupted.seconds.values())
    assert seconds[1] < seconds[2]


def test_ctrl_c_while_answers_are_generated_stops_the_run_in_one_line_and_starts_nothing(interrupted):
    assert interrupted.status == 75, interrupted.shown[-3000:]
    after = interrupted.shown[interrupted.shown.rindex("stopped") :]
    assert after.strip() == "stopped (SIGINT); submit again to go on"
    assert "Traceback" not in interrupted.shown
    assert interrupted.rays == 1
    assert interrupted.left == []
    assert runs.status(interrupted.output)["state"] == "stopped"
    assert not list(interrupted.output.glob("lease/*"))


def test_the_same_command_in_a_pipe_goes_on_and_never_says_a_line_twice(interrupted):
    done, masked = runs.data(interrupted.output), runs.masks(interrupted.output)
    assert len(done) < PERSONAS  # else it was not stopped while answers were generated
    code, text = runs.run(interrupted.output, *SETTINGS, personas=PERSONAS)
    assert code == 0, text
    assert f"{len(masked)} masked already, {len(done) - len(masked)} with data" in text
    assert f"{PERSONAS} of {PERSONAS} personas masked" in text
    assert runs.data(interrupted.output).items() >= done.items()
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == len(set(lines)), text
    assert "\x1b" not in text
