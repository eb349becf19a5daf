"""Several processes that share one run, by torch.distributed; a single process is the case of one.

Started by torchrun, by srun (one task a GPU), or by `--n_GPUs N`, which calls torchrun's launcher.
"""

import atexit
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from error import UserError, silence_closed
from system.machine import best_device

SLURM = {'RANK': 'SLURM_PROCID', 'WORLD_SIZE': 'SLURM_NTASKS', 'LOCAL_RANK': 'SLURM_LOCALID'}


def share(script: str, argv: Sequence[str], processes: int, cpu: bool, work: Callable[[], None]) -> None:
    """Do a program's work: as one of several processes if a launcher started it so, or in so many, or here alone.

    Args:
        script: the program, to be started anew for several processes.
        argv: its options.
        processes: how many share the work, on a GPU each; 0 and 1: this one alone.
        cpu: leave GPUs alone.
        work: what one process does.

    Raises:
        UserError: there are not as many GPUs, or this is Windows; or what `work` raises.
    """
    if launched():
        start(cpu or processes == 0 or best_device() == 'cpu')
        work()
        finish()
    elif processes > 1:
        if sys.platform == 'win32':
            raise UserError(f'--n_GPUs {processes}: PyTorch on Windows cannot start several processes; give 1.')
        if not cpu and (found := gpus()) < processes:
            raise UserError(f'--n_GPUs {processes}: this host has {found}; give as many or fewer, or --cpu.')
        launch(script, processes, argv)
    else:
        work()


def launch(script: str, processes: int, argv: Sequence[str]) -> None:
    """Run `script` in so many processes on this host, and wait for them; signals are passed on to them.

    Raises:
        UserError: one of them failed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')  # else each process warns of what is meant
    try:
        main(['--standalone', f'--nproc_per_node={processes}', script, *argv])
    except SignalException:
        return
    except ChildFailedError as error:
        number, failure = next(iter(error.failures.items()))
        hint = '.' if failure.exitcode == 2 else ': --load continues the run from its last state.'
        raise UserError(
            f'Process {number} of {processes} ended with status {failure.exitcode}, for the reason above{hint}'
        ) from error


def gpus() -> int:
    """Number of GPUs of this host."""
    return torch.cuda.device_count()


def launched() -> bool:
    """Whether a launcher started this process as one of several.

    Raises:
        UserError: it says how many, and not how they meet.
    """
    if int(os.environ.get('SLURM_NTASKS', '1')) > 1 and os.environ.keys() >= {*SLURM.values()}:
        for name, theirs in SLURM.items():
            os.environ.setdefault(name, os.environ[theirs])
        os.environ.setdefault('MASTER_ADDR', os.environ.get('SLURM_LAUNCH_NODE_IPADDR', 'localhost'))
        os.environ.setdefault('MASTER_PORT', str(20000 + int(os.environ['SLURM_JOB_ID']) % 20000))
    several = int(os.environ.get('WORLD_SIZE', '1')) > 1
    if several and (lacking := [name for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]):
        raise UserError(
            f'WORLD_SIZE is {os.environ["WORLD_SIZE"]} in the environment, and {lacking[0]} is not there: start all '
            'processes by torchrun or srun, or unset WORLD_SIZE.'
        )
    return several


def restarted() -> bool:
    """Whether torchrun started these processes again after one had failed; every host counts its own failures."""
    return sum(all_reduce_sum([float(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'))])) > 0


def launch_name() -> str:
    """What the first of the processes that torchrun started together has in common with the one it starts again."""
    name = os.environ.get('TORCHELASTIC_RUN_ID', '')
    # Without a rendezvous of its own torchrun calls each launch 'none'; but it stays the parent.
    return f'{name} {platform.node()} {os.getppid()}' if name == 'none' else name


def start(cpu: bool) -> None:
    """Meet the other processes; each takes the GPU of its number on its host.

    torchrun keeps its store when it starts processes again, with the addresses of those that failed in it
    (https://github.com/pytorch/pytorch/issues/135712), so on one host each start has a part of its own. Several hosts
    do not count alike.

    Raises:
        UserError: started again on several hosts by a torchrun that keeps its store.
    """
    if not cpu:
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', os.environ['RANK'])) % torch.cuda.device_count())
    store, number, processes = next(rendezvous('env://'))
    if os.environ.get('GROUP_WORLD_SIZE') == '1':
        store = distributed.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store)
    elif restarted() and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        raise UserError(
            'On several hosts torchrun can restart processes only with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its '
            'environment: set that, and start it again.'
        )
    backend = 'gloo' if cpu else 'nccl'
    # All wait while the first one makes LR images; the launcher ends those that wait for one that died.
    patience = timedelta(hours=2)
    distributed.init_process_group(backend, store=store, rank=number, world_size=processes, timeout=patience)


def rank() -> int:
    """Number of this process; the first, 0, does all writing."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def finish() -> NoReturn:
    """Part from the other processes, and end this one.

    What is registered for the end is done, but the interpreter is not taken apart: threads of the group, which
    DistributedDataParallel leaves behind, would now and then abort a process that is done ("terminate called without
    an active exception").
    """
    distributed.destroy_process_group()
    atexit._run_exitfuncs()
    silence_closed()
    os._exit(0)


@contextmanager
def main_process_first() -> Iterator[None]:
    """The first process does this block before the others do it."""
    if rank() > 0:
        distributed.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        distributed.barrier()


def local_slice(numbers: Sequence[int]) -> list[int]:
    """What of the numbers of a batch is this process's."""
    first, last = (len(numbers) * r // world_size() for r in (rank(), rank() + 1))
    return list(numbers[first:last])


class Batches:
    """Sample numbers of this process in each batch of `numbers`, which has `batch_size` in all processes together."""

    def __init__(self, numbers: range, batch_size: int) -> None:
        self.numbers, self.batch_size = numbers, batch_size

    def __len__(self) -> int:
        return len(self.numbers) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(len(self)):
            yield local_slice(self.numbers[i * self.batch_size : (i + 1) * self.batch_size])


def wrap_ddp(net: nn.Module, device: torch.device, accumulates: bool = False) -> nn.Module:
    """`net` with its gradients averaged over all processes; itself in a single one.

    Which parameters a network does not use (LCoAN has such) is looked up in the first step alone, or, where gradients
    of parts of a batch are accumulated, which PyTorch does not allow then, in every one.
    """
    if world_size() == 1:
        return net
    devices = [device.index] if device.index is not None else None
    return DistributedDataParallel(
        net, devices, find_unused_parameters=accumulates, static_graph=not accumulates, gradient_as_bucket_view=True
    )


def no_sync(net: nn.Module) -> AbstractContextManager[Any]:
    """Within this block gradients stay in this process, to be averaged with later ones."""
    return net.no_sync() if isinstance(net, DistributedDataParallel) else nullcontext()


def all_reduce_tensor(values: Tensor) -> Tensor:
    """The sums of the values over all processes, in all of them; on the device, which is not waited for."""
    if world_size() > 1:
        distributed.all_reduce(values)
    return values


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """The sums of the values over all processes, in all of them."""
    if world_size() == 1:
        return list(values)
    device = 'cuda' if distributed.get_backend() == 'nccl' else 'cpu'
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return sums.tolist()


def gather(value: Any) -> list[Any]:
    """The values of all processes in the first one; nothing in the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    distributed.gather_object(value, values)
    return values or []


def broadcast(value: Any) -> Any:
    """What the first process has, in all of them."""
    values = [value]
    if world_size() > 1:
        distributed.broadcast_object_list(values)
    return values[0]


def rank_indices(count: int) -> Iterator[tuple[int, int | None]]:
    """Rounds in which every process does one of `count` pieces: the first of the round, and that of this process."""
    for first in range(0, count, world_size()):
        own = first + rank()
        yield first, own if own < count else None


def progress(items: Iterable, title: str, **options: Any) -> tqdm:
    """A progress bar that is shown on a terminal only and leaves no trace."""
    disable = True if rank() else None
    return tqdm(items, desc=title, leave=False, disable=disable, dynamic_ncols=True, **options)
