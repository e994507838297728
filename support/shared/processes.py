"""The processes of torchrun, one a GPU. A single process takes the same path."""

import atexit
import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
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


def start_processes(threads: int = 0, rank_timeout: float = 0) -> torch.device:
    """Join torchrun's processes, if any. -> this rank's GPU, or the CPU

    A rank that hangs ends all of them after `rank_timeout` seconds, 0 = never; see watch_others.
    """
    end_with_torchrun()
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = own_gpu(torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if rank_and_world()[1] > 1 and not dist.is_initialized():
        # torchrun's store is there already. Without torchrun rank 0 holds it, and may come late.
        wait = timedelta(minutes=1 if under_torchrun() else 30)
        store, rank, world = next(dist.rendezvous("env://", timeout=wait))
        watch_others(store.clone(), rank_timeout)
        # A day: the ranks wait for one that downloads, or that has longer completions to evaluate.
        # One that dies or hangs is noticed by the watch: docs/gpu.md.
        day = timedelta(days=1)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=day)
        store.set_timeout(day)  # by which later groups, vLLM's too, exchange their addresses
        reduce_(torch.zeros(1, device=device))  # NCCL connects, or fails, before the load
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
    with meeting():
        dist.all_gather_object(parts, items)
    return sum(parts, [])


def barrier() -> None:
    """No rank passes before all have arrived."""
    gather([])


def reduce_(value: Tensor, op: str = "SUM") -> Tensor:
    """All-reduce in place."""
    if rank_and_world()[1] > 1:
        with meeting():
            dist.all_reduce(value, getattr(dist.ReduceOp, op))
            if value.is_cuda:
                # NCCL returns once the work is queued: only here does this rank wait for the
                # others, as the watch must know. Who calls this reads the value next anyway.
                torch.cuda.current_stream().synchronize()
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
        enter("end")
        barrier()
        part()
        # vLLM's engine destroys the group, and all of its own groups, when it ends. Else it is
        # ours to do: left to the end of the interpreter, its threads now and then abort it.
        if "vllm" not in sys.modules:
            dist.destroy_process_group()
        # gloo's threads let go of the last tensors, for which they need the interpreter: one that
        # still waits for it as it ends aborts the process (2 of 34 runs with nothing left to do).
        time.sleep(0.5)
    except BaseException as error:
        wanted = isinstance(error, SystemExit)
        if rank_and_world()[1] == 1 or (wanted and not error.code):
            raise
        # A collective breaks where another rank has died. The watch is about to name that one.
        if not wanted and _here["waits"] and _told.wait(3 * TICK):
            part()
            os._exit(1)
        code = 1
        if wanted and isinstance(error.code, int):  # argparse has said why
            code = error.code
        elif wanted:
            print(error)
        else:
            traceback.print_exc()
            print(f"rank {rank_and_world()[0]} ended in the phase '{_here['phase']}': {error!r}")
        # The others may wait for this rank in a collective, so it waits for nobody.
        sys.stdout.flush()
        part(f"{error}" if wanted else f"{error!r}")
        os._exit(code)


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
        first = not stopped
        stopped.append(now)
        if first and rank_and_world()[0] == 0:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping once this step is saved; Ctrl-C again ends at once\n")

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return stopped


# --------------------------------------------------------------------------------------------------
# The watch. A collective that does not end cannot say for whom it waits, and the main thread in it
# can do nothing. So each rank has a thread that tells the others, through torchrun's store, what
# the rank does, and reads what they do.

TICK = 1.0  # seconds from look to look
GRACE = 10.0  # seconds that the main thread still has: to write a checkpoint, or to fail by itself
PATIENCE = {"loading": 7_200, "engine start": 7_200}  # seconds: downloads and compilers, unseen

# What the others may know of this rank: what it does; how many collectives it has come to, whether
# it waits in one; its tokens and micro-batches so far, and how many seconds since anything of this
# changed; how it ended, if it did; where its process is.
_here = {"phase": "loading", "came": 0, "waits": False, "moves": 0, "still": 0.0}
_here |= {"ended": None, "machine": "", "pid": 0}
_told = threading.Event()  # the watch has said who died or hangs
_parted = threading.Event()  # there is nothing to watch any more
_watch: list[threading.Thread] = []


def enter(phase: str) -> float:
    """Name what this rank does from now on: for the others, should it die or hang. -> the clock"""
    _here["phase"] = phase
    return time.perf_counter()


def note_progress() -> None:
    """Called for each token and micro-batch: a long phase is no hang while it moves."""
    _here["moves"] += 1


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Around each collective. One that breaks stays marked, for ending_together."""
    _here["came"] += 1
    _here["waits"] = True
    yield
    _here["waits"] = False


def watch_others(store: dist.Store, rank_timeout: float) -> None:
    """Start the thread that ends this process when another rank has died or hangs.

    Died: its process is gone (looked up on the same machine), or it says that it failed. Hangs: no
    sign of life from its thread for `rank_timeout` seconds, as when it is stopped; or the others
    wait in a collective to which it has not come, and nothing of it moves, for so long, in some
    phases for longer (PATIENCE); or nothing of any moves for so long, as when all hang in a
    collective of the engine's own.
    """
    store = dist.PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    _here.update(pid=os.getpid(), machine=this_machine())
    thread = threading.Thread(target=watch, args=(store, rank_timeout), daemon=True)
    _watch.append(thread)
    thread.start()
    atexit.register(part)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end_when_told)


def this_machine() -> str:
    """Ranks with the same see each other's processes. By more than torchrun's numbers, which other
    launchers do not set."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux alone: containers of one machine may differ in these
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def end_when_told(number: int, _: object) -> None:
    """SIGTERM where nothing is to be saved. Torchrun sends it when a rank died: the watch says."""
    _told.wait(3 * TICK)
    part()
    os._exit(128 + number)


def part(why: str = "") -> None:
    """Tell the others that this rank ends, and why if that is their end; watch them no longer."""
    _here["ended"] = why
    _parted.set()
    for thread in _watch:
        thread.join(2 * TICK)  # it tells them


def watch(store: dist.Store, rank_timeout: float) -> None:
    rank, world = rank_and_world()
    others = [other for other in range(world) if other != rank]
    seen = {}
    silent = dict.fromkeys(others, 0.0)  # seconds since a sign of life
    late = dict.fromkeys(others, 0.0)  # ... that this rank waits for it, and it does not move
    position = ()  # what this rank has come to
    ends = math.inf  # when this process does, whatever its main thread waits for
    faults = {}  # rank -> what is wrong with it
    beat = 0
    before = time.monotonic()
    while True:
        beat += 1
        parted = _parted.is_set()
        now = time.monotonic()
        # Where more time has passed, this process did not run, and the others may not have either:
        # a laptop slept, the machine is overloaded, torchrun with its store was stopped.
        passed = min(now - before, TICK)
        before = now
        last, position = position, (_here["phase"], _here["came"], _here["moves"])
        _here["still"] = _here["still"] + passed if position == last else 0.0
        if now > ends:
            _here["ended"] = ""  # which is no death
        with contextlib.suppress(RuntimeError):  # the store is gone: torchrun has ended
            store.set(str(rank), json.dumps({**_here, "beat": beat}))
            if parted:
                return
            found = read_states(store, others)
            for other in others:
                moved = found.get(other) != seen.get(other)
                silent[other] = 0.0 if moved else silent[other] + passed
                state = found.get(other, {})
                old = seen.get(other, {})
                behind = _here["waits"] and state.get("came", 0) < _here["came"]
                stands = state.get("moves") == old.get("moves")  # else it works, however long
                late[other] = late[other] + passed if behind and stands else 0.0
            seen = found
            still = _here["still"]  # who has all behind it, and waits, is no fault: all must be
            for other in others:
                still = min(still, seen.get(other, {}).get("still", 0.0))
            faults = {}
            for other in others:
                state = seen.get(other)
                fault = find_fault(state, silent[other], late[other], still, rank_timeout)
                if fault:
                    faults[other] = f"rank {other} {fault}"
            if faults and not _told.is_set():
                tell(faults)
                ends = now + GRACE
        if now > ends:
            for other in faults.keys() & seen.keys():
                end_here(seen[other])
            os._exit(1)
        if parted:
            return
        _parted.wait(TICK)


def read_states(store: dist.Store, ranks: list[int]) -> dict[int, dict]:
    """What each of these ranks last said of itself, as far as it has come yet."""
    there = ranks
    if not store.check([*map(str, ranks)]):
        there = [rank for rank in ranks if store.check([str(rank)])]
    texts = store.multi_get([*map(str, there)])
    return {rank: json.loads(text) for rank, text in zip(there, texts)}


def find_fault(
    state: dict | None, silent: float, late: float, still: float, rank_timeout: float
) -> str:
    """What is wrong with a rank that said `state` of itself, "" for nothing.

    In seconds: since its last sign of life; how long the others have waited for it and nothing of
    it has moved; how long nothing of any rank has.
    """
    if state is None:  # it is about to come, once it has imported everything
        waited = rank_timeout and silent > max(rank_timeout, PATIENCE["loading"])
        return f"has not come for {silent:.0f} s" if waited else ""
    phase = f"the phase '{state['phase']}'"
    if state["ended"] is not None:
        return f"ended in {phase}: {state['ended']}" if state["ended"] else ""
    if state["machine"] == _here["machine"] and not runs(state["pid"]):
        return f"died in {phase}: killed, by somebody or for want of memory (dmesg may know)"
    if not rank_timeout:
        return ""
    limit = max(rank_timeout, PATIENCE.get(state["phase"], 0))
    too_late = late > limit
    if silent > rank_timeout or (too_late and silent > 3 * TICK):
        return f"has given no sign of life for {silent:.0f} s in {phase} (--rank_timeout)"
    if too_late:
        return f"has not left {phase} while the others waited {late:.0f} s (--rank_timeout)"
    # Where all stand still each is at fault: one rank of each machine is enough to say so. Later
    # than the others wait for one, which says more.
    judge = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if judge and still > limit + GRACE:
        return f"has not moved for {still:.0f} s in {phase} (--rank_timeout)"
    return ""


def end_here(state: dict) -> None:
    """Kill a rank of this machine that hangs, as torchrun would after 30 s more."""
    if state["machine"] == _here["machine"] and state["ended"] is None:
        with contextlib.suppress(OSError):
            os.kill(state["pid"], signal.SIGKILL)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def tell(faults: dict[int, str]) -> None:
    """Say once on each machine which rank it is."""
    rank = rank_and_world()[0]
    first = rank - int(os.environ.get("LOCAL_RANK", 0))
    if rank == next(n for n in range(first, rank + 1) if n not in faults):
        name = Path(sys.argv[0]).name
        text = "; ".join(faults.values())
        print(
            f"{name}: {text}. All ranks end, what is saved stays: --resume goes on, with eval.py "
            "the same command"
        )
        sys.stdout.flush()
    _told.set()


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def end_with_torchrun() -> None:
    """However torchrun ends, this process does: else it would train on, and keep the folder."""
    if not under_torchrun():
        return
    with contextlib.suppress(OSError, AttributeError):  # Linux: at once, even while it is stopped
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(TICK)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()
