"""The processes that learn one run together, as `torchrun` starts them, and what they compute together."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import msgspec
import torch
from torch import Tensor
from torch import distributed as dist

from onerec.errors import Failure, UserError

T = TypeVar("T")

TIMEOUT_SECONDS = 1800.0
"""How long a rank waits for the others: longer than the leader may need for a catalogue or a checkpoint."""


class Ranks:
    """This process among those that learn together. One alone needs no group, and each method is then free of cost.

    Every method must be called by all ranks, in the same order. One that is gone makes it raise Failure in the others.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, device

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """Join the group that `torchrun` describes by RANK, WORLD_SIZE and LOCAL_RANK; alone where there is none.

        gloo on the CPU; with CUDA, NCCL for tensors on the GPU, which is that of number LOCAL_RANK. Raises UserError for
        more ranks on a machine than it has GPUs, Failure where the others do not come.
        """
        size = int(environment.get("WORLD_SIZE", "1"))
        cuda = torch.cuda.is_available()
        if size == 1:
            return cls(device="cuda" if cuda else "cpu")
        rank, local = int(environment["RANK"]), int(environment.get("LOCAL_RANK", "0"))
        if cuda and local >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank} has no GPU of its own: this machine has {torch.cuda.device_count()}; start torchrun with "
                f"--nproc-per-node {torch.cuda.device_count()}, or with CUDA_VISIBLE_DEVICES= for the CPU"
            )
        device = f"cuda:{local}" if cuda else "cpu"
        if cuda:
            torch.cuda.set_device(device)
        ranks = cls(rank, size, device)
        timeout = datetime.timedelta(seconds=TIMEOUT_SECONDS)
        ranks._call(lambda: dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout))
        return ranks

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which decides and writes."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor`, overwritten by its sum over all ranks; the same bytes on each."""
        if self.size > 1:
            self._call(lambda: dist.all_reduce(tensor))
        return tensor

    def sum_slices(self, tensor: Tensor, own: Tensor) -> Tensor:
        """`own`, overwritten by this rank's slice of the sum of the flat `tensor`, of which each rank has an equal one."""
        if self.size > 1:
            self._call(lambda: dist.reduce_scatter_tensor(own, tensor))
        else:
            own.copy_(tensor)
        return own

    def join_slices(self, tensor: Tensor) -> Tensor:
        """The flat `tensor`, of which each rank has brought its slice up to date, whole again."""
        if self.size > 1:
            own = tensor.chunk(self.size)[self.rank]
            self._call(lambda: dist.all_gather_into_tensor(tensor, own))
        return tensor

    def gather_slices(self, own: Tensor) -> Tensor:
        """Every rank's `own` (CPU, equal lengths) end to end on rank 0; on the others their own."""
        if self.size == 1:
            return own
        whole = own.new_empty(self.size * len(own)) if self.leads else None
        parts = None if whole is None else list(whole.chunk(self.size))
        self._call(lambda: dist.gather(own, parts, 0))
        return own if whole is None else whole

    def same(self, tensor: Tensor) -> Tensor:
        """`tensor`, overwritten by that of rank 0."""
        if self.size > 1:
            self._call(lambda: dist.broadcast(tensor, 0))
        return tensor

    def tell(self, value: T | None, kind: Any) -> T:
        """What rank 0 gives as `value`, a type that msgspec knows; the others give None."""
        if self.size == 1:
            return cast("T", value)
        content = msgspec.msgpack.encode(value) if self.leads else b""
        length = self.same(torch.tensor(len(content)))
        data = bytearray(content) if self.leads else bytearray(int(length))
        self.same(torch.frombuffer(data, dtype=torch.uint8))
        return msgspec.msgpack.decode(bytes(data), type=kind)

    def collect(self, value: T, kind: Any) -> list[T]:
        """The values of all ranks in their order, on each of them; of a type that msgspec knows."""
        if self.size == 1:
            return [value]
        content = msgspec.msgpack.encode(value)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        self._call(lambda: dist.all_gather_into_tensor(lengths, torch.tensor([len(content)])))
        data = torch.zeros(self.size, int(lengths.max()), dtype=torch.uint8)
        data[self.rank, : len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        own = data[self.rank].clone()
        self._call(lambda: dist.all_gather_into_tensor(data.view(-1), own))
        rows = zip(data, lengths.tolist(), strict=True)
        return [msgspec.msgpack.decode(row[:length].numpy().tobytes(), type=kind) for row, length in rows]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Leave the group; after an error there may be no group left, and torchrun ends the other ranks."""
        if self.size > 1 and kind is None:
            self._call(dist.barrier)
            dist.destroy_process_group()

    def _call(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise Failure(
                f"rank {self.rank} of {self.size} lost the others ({reason}); see what the first one to end has said, then "
                "start the same command again: it goes on from the newest checkpoint"
            ) from error


def added(stats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of stats, name by name; nests of dicts, numbers, lists and tensors alike. A name may be missing in some."""
    total: dict[str, Any] = {}
    for one in stats:
        for name, value in one.items():
            if name not in total:
                total[name] = value
            elif isinstance(value, Mapping):
                total[name] = added([total[name], value])
            else:
                total[name] = total[name] + value
    return total


def plain(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Stats with numbers and lists in place of tensors."""
    return {
        name: plain(value) if isinstance(value, Mapping) else value.tolist() if isinstance(value, Tensor) else value
        for name, value in stats.items()
    }


def tensors(stats: Mapping[str, Any]) -> dict[str, Any]:
    """`plain` undone: lists as tensors again, numbers as they are."""
    return {
        name: tensors(value) if isinstance(value, Mapping) else torch.tensor(value) if isinstance(value, list) else value
        for name, value in stats.items()
    }
