"""What ranks exchange during a forward pass: sums, gathered columns, rows from one to another.

NCCL between GPUs; gloo between CPUs, and between ranks that share a GPU, through host memory. It starts no
process and knows no model.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LOOPBACK = "127.0.0.1"
CONNECT_TIMEOUT = timedelta(seconds=300)


class RankLinks:
    """One rank's end. Every rank makes the same calls in the same order; `num_collectives` counts them.

    Sums over gloo are gathered and added in rank order, in float32: a row's sum then depends neither on the
    batch around it nor on the rank that asks, which a ring's does from three ranks on.
    """

    def __init__(
        self, rank: int, num_ranks: int, store_path: Path, device: torch.device, *, nccl: bool
    ) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device
        self.num_collectives = 0
        store = dist.FileStore(str(store_path), num_ranks)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        options._timeout = CONNECT_TIMEOUT
        self._gloo: Any = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, num_ranks, options)
        self._nccl: Any = None
        if nccl:
            torch.cuda.set_device(device)
            self._nccl = dist.ProcessGroupNCCL(
                dist.PrefixStore("nccl", store), rank, num_ranks, timedelta(seconds=600)
            )
            self.add_up(torch.zeros(1, device=device))  # connects now, not in the first step
        self.smallest(0)

    @property
    def is_nccl(self) -> bool:
        """Whether GPUs exchange by themselves, each rank having its own."""
        return self._nccl is not None

    def add_up(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of equally shaped tensors, on every rank; may change `partial`."""
        self.num_collectives += 1
        if self._nccl is not None:
            partial = partial.contiguous()
            _wait(self._nccl.allreduce([partial], _on_stream(dist.AllreduceOptions())))
            return partial
        total, *others = self._all(partial.to("cpu", torch.float32))
        for other in others:
            total += other
        return total.to(partial.device, partial.dtype)

    def gather_columns(self, columns: torch.Tensor) -> torch.Tensor:
        """[..., n] of each rank side by side, [..., num_ranks * n], on every rank."""
        self.num_collectives += 1
        if self._nccl is not None:
            columns = columns.contiguous()
            gathered = columns.new_empty(self.num_ranks, *columns.shape)
            _wait(
                self._nccl._allgather_base(
                    gathered, columns, _on_stream(dist.distributed_c10d.AllgatherOptions())
                )
            )
            return torch.cat(list(gathered), dim=-1)
        parts = self._all(columns.to("cpu", torch.float32))
        return torch.cat(parts, dim=-1).to(columns.device, columns.dtype)

    def smallest(self, value: int) -> int:
        """The least of the ranks' values, over gloo in any case."""
        mine = torch.tensor([value])
        self._gloo.allreduce([mine], dist.ReduceOp.MIN).wait()
        return int(mine)

    def send(self, rows: torch.Tensor, to_rank: int) -> None:
        self.num_collectives += 1
        if self._nccl is not None:
            self._nccl.send([rows.contiguous()], to_rank, 0).wait()
        else:
            self._gloo.send([rows.to("cpu").contiguous()], to_rank, 0).wait()

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, from_rank: int) -> torch.Tensor:
        self.num_collectives += 1
        if self._nccl is not None:
            rows = torch.empty(shape, dtype=dtype, device=self.device)
            self._nccl.recv([rows], from_rank, 0).wait()
            return rows
        rows = torch.empty(shape, dtype=dtype)
        self._gloo.recv([rows], from_rank, 0).wait()
        return rows.to(self.device)

    def abort(self) -> None:
        """Frees a thread that waits in NCCL for a rank that is gone; gloo notices by itself."""
        if self._nccl is not None:
            self._nccl.abort()

    def _all(self, mine: torch.Tensor) -> list[torch.Tensor]:
        mine = mine.contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.num_ranks)]
        self._gloo.allgather([parts], [mine]).wait()
        return parts


def _on_stream(options: Any) -> Any:
    """Lets NCCL work on the step's own stream, where this torch can: a captured step has no forks then."""
    if hasattr(options, "asyncOp"):
        options.asyncOp = False
    return options


def _wait(work: Any) -> None:
    """For the stream, not the host; what ran on the stream itself gives nothing to wait for."""
    if work is not None:
        work.wait()
