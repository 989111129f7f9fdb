"""Four processes joined by gloo, started once, that run what a test gives them."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SIZE = 4
# Of a collective that not all ranks take part in: "none hangs" is tested by waiting this long.
TIMEOUT = datetime.timedelta(seconds=60)


class Ranks:
    """``run`` calls a program on the first ``size`` ranks, with their process group, and gives what each returns."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._ends, self._processes = [], []
        for rank in range(SIZE):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, theirs), daemon=True)
            process.start()
            self._ends.append(mine)
            self._processes.append(process)

    def run(self, program: Callable[..., Any], *args: Any, size: int = SIZE) -> list[Any]:
        for end in self._ends:
            end.send_bytes(pickle.dumps((program, args, size)))
        answers = []
        for rank, end in enumerate(self._ends):
            assert end.poll(2 * TIMEOUT.total_seconds()), f"rank {rank} hangs"
            answers.append(pickle.loads(end.recv_bytes()))
        for rank, (error, _) in enumerate(answers):
            assert error is None, f"rank {rank}: {error}"
        return [result for _, result in answers[:size]]

    def close(self) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(10)
            process.kill()


def _serve(rank: int, port: int, end: Connection) -> None:
    """Until the other end is closed."""
    sys.path.append(str(ROOT))  # for `import tests.…`
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    import traceback

    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=SIZE, timeout=TIMEOUT)
    groups = {size: distributed.new_group(list(range(size)), timeout=TIMEOUT) for size in range(1, SIZE)}
    groups[SIZE] = distributed.group.WORLD
    while True:
        try:
            program, args, size = pickle.loads(end.recv_bytes())
        except EOFError:
            break
        answer: tuple[str | None, Any] = None, None
        if rank < size:
            try:
                answer = None, program(groups[size], *args)
            except Exception:
                answer = traceback.format_exc(), None
        end.send_bytes(pickle.dumps(answer))
    distributed.destroy_process_group()
