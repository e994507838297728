"""The processes of torchrun, one a GPU. A single process takes the same path."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def ranks_here() -> int:
    """Processes on this machine; torchrun starts as many on each."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def start_processes(threads: int = 0) -> torch.device:
    """Join torchrun's processes, if any. -> this rank's GPU, or the CPU"""
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = own_gpu(torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if rank_and_world()[1] > 1 and not dist.is_initialized():
        # Two hours: the ranks wait for one that downloads. One that dies is noticed in seconds, by
        # torchrun: docs/gpu.md.
        dist.init_process_group(backend, timeout=timedelta(hours=2))
        dist.all_reduce(torch.zeros(1, device=device))  # NCCL connects, or fails, before the load
    return device


def own_gpu(there: int) -> torch.device:
    """One GPU for each process of this machine, of the `there` that it has."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if rank >= there:
        count = os.environ.get("LOCAL_WORLD_SIZE", rank + 1)
        raise SystemExit(
            f"{Path(sys.argv[0]).name}: {count} processes and {there} GPUs on this machine: start "
            f"torchrun with --nproc_per_node {there}"
        )
    return torch.device("cuda", rank)


def gather(items: list) -> list:
    """The lists of all ranks, one after another, on every rank."""
    world = rank_and_world()[1]
    if world == 1:
        return items
    parts = [None] * world
    dist.all_gather_object(parts, items)
    return sum(parts, [])


def barrier() -> None:
    """No rank passes before all have arrived."""
    gather([])


def reduce_(value: Tensor, op: str = "SUM") -> Tensor:
    """All-reduce in place."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(value, getattr(dist.ReduceOp, op))
    return value


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """Rank 0 of each machine does the block before its siblings do: one download, not eight."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    yield
    if first:
        barrier()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """All ranks leave the block, then the processes part; one that fails leaves at once."""
    try:
        yield
        if not dist.is_initialized():
            return
        barrier()
        # vLLM's engine destroys the group, and all of its own groups, when it ends. Else it is
        # ours to do: left to the end of the interpreter, its threads now and then abort it.
        if "vllm" not in sys.modules:
            dist.destroy_process_group()
    except BaseException as error:
        wanted = isinstance(error, SystemExit)
        if rank_and_world()[1] == 1 or (wanted and not error.code):
            raise
        if wanted:
            print(error)
        else:
            traceback.print_exc()
        # The others may wait for this rank in a collective, so it waits for nobody.
        sys.stdout.flush()
        os._exit(1)


def stop_on_signals() -> list[float]:
    """-> a list that Ctrl-C and SIGTERM append to.

    A second Ctrl-C, over a second later, ends the program at once: torchrun passes Ctrl-C on, so
    that a pair within a second is one.
    """
    stopped = []

    def note(number: int, _: object) -> None:
        now = time.monotonic()
        if stopped and number == signal.SIGINT and now - stopped[0] > 1:
            raise KeyboardInterrupt
        stopped.append(now)

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return stopped
