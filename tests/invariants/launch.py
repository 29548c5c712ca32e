"""Several commands by two processes: the processes are started once, because importing takes them longer than the work.

Run by `torch.distributed.run`: reads a list of [module, words ...] from the file that is named and runs them in turn.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def launch(folder: Path, *commands: Sequence[str]) -> None:
    """Run commands in `folder`, one after the other, by two processes that hold together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    written = folder / "commands.json"
    written.write_text(json.dumps([list(map(str, command)) for command in commands]))
    # torchrun is what `accelerate launch` starts; for several processes on a CPU it has to be called by itself
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    words = [*command, "-m", __name__, str(written)]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def main(path: str) -> None:
    from accelerate.state import PartialState

    # a run takes leave of the others at its end; here the next one needs them
    PartialState.destroy_process_group = lambda self, group=None: None
    for module, *words in json.loads(Path(path).read_text()):
        sys.argv = [module, *words]
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise


if __name__ == "__main__":
    main(sys.argv[1])
