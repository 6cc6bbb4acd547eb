"""Several processes that train one student, as torchrun starts them: who a process is, and what the processes agree on.

    torchrun --nproc-per-node 4 -m ferkd train ...

NCCL between GPUs, gloo between CPUs. Alone, everything here is the identity and costs nothing. Rank 0 alone writes and speaks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib
import os
import socket
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from ferkd.errors import InputError, Stopped

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among `world` of them; `local_world` share this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    host_group: Any = None
    """The group for values on the host, which must not wait for the GPU's queue."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor on this process's device, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def of_main(self, value: Value) -> Value:
        """Rank 0's value, for all."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.host_group)
        return box[0]

    def gathered(self, value: Value) -> list[Value]:
        """Every process's value, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Gives every process rank 0's buffers: BatchNorm's running statistics, which each process gathers on its own crops."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model whose backward averages gradients over the processes; the model itself when alone."""
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    @contextlib.contextmanager
    def without_averaging(self, wrapped: nn.Module) -> Iterator[None]:
        """Within the block backward leaves each process its own gradients, to be averaged by a later backward outside it."""
        with wrapped.no_sync() if isinstance(wrapped, nn.parallel.DistributedDataParallel) else contextlib.nullcontext():
            yield


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """This process, in torchrun's group while the block lasts.

    Raises InputError for a WORLD_SIZE that is not torchrun's doing, and for more processes than GPUs on a machine.
    """
    has_gpu = torch.cuda.is_available()
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield Ranks(device=torch.device("cuda" if has_gpu else "cpu"))
        return
    try:
        rank, world, local_rank, local_world = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    except (KeyError, ValueError) as error:
        raise InputError(f"WORLD_SIZE: set, but {error} is not; start several processes with torchrun") from None
    if has_gpu and local_world > torch.cuda.device_count():
        raise InputError(f"torchrun: {local_world} processes for the {torch.cuda.device_count()} GPUs here; lower --nproc-per-node")
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_gpu else "gloo", device_id=device if has_gpu else None)
    all_leave = False
    try:
        group = dist.new_group(backend="gloo") if has_gpu else None
        yield Ranks(rank, world, local_rank, local_world, device, group)
        all_leave = True
    except Stopped:
        all_leave = True
        raise
    finally:
        # NCCL's is a meeting of all processes: one that alone met an error would wait there for those who wait for it, its error unsaid.
        if all_leave or not has_gpu:
            dist.destroy_process_group()


def with_synchronised_batchnorm(model: nn.Module) -> nn.Module:
    """The model with every BatchNorm's statistics taken over all processes.

    PyTorch's own conversion takes timm's BatchNormAct2d for a plain BatchNorm and loses the activation inside; timm's keeps it.
    """
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    with contextlib.suppress(ImportError):
        convert = importlib.import_module("timm.layers").convert_sync_batchnorm
    converted: nn.Module = convert(model)
    return converted


def first_to_say(text: str) -> bool:
    """Whether this process is the first of torchrun's to say this to people: an error that all of them find is one line.

    True without torchrun, and when it cannot be asked.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    key = f"ferkd said, attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=2.0).close()  # or PyTorch tries on
        store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(seconds=5)))
        return bool(store.add(key, 1) == 1)
    except (RuntimeError, ValueError, KeyError, OSError):
        return True


class StopVote:
    """Whether any process was asked to stop, as all of them agree in the same step.

    A vote is given in one step and counted in the next, so that nobody waits for it. Every process must ask in every step.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.votes = torch.zeros(1, dtype=torch.int32)
        self.pending: Any = None

    def __call__(self, asked: bool) -> bool:
        if self.ranks.world == 1:
            return asked
        agreed = False
        if self.pending is not None:
            self.pending.wait()
            agreed = bool(self.votes.item())
        self.votes = torch.tensor([int(asked)], dtype=torch.int32)
        self.pending = dist.all_reduce(self.votes, dist.ReduceOp.MAX, group=self.ranks.host_group, async_op=True)
        return agreed

    def close(self) -> None:
        """Waits for the last vote, so that the group can be left."""
        if self.pending is not None:
            self.pending.wait()
