"""The process that compiles: it ends when the command that started it is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = """
import os
import time

from t5x_like.planning.plan import Compiler

if __name__ == "__main__":
    compiler = Compiler(on_cpu=True)
    print(compiler(os.getpid), flush=True)
    compiler(time.sleep, 600)
"""


def runs(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_a_compiler_does_not_outlive_a_killed_command(tmp_path: Path) -> None:
    script = tmp_path / "compile.py"
    script.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        compiler = int(command.stdout.readline())
        assert runs(compiler)
        os.kill(command.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while runs(compiler) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs(compiler)
