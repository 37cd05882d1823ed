"""A process group that joins the trainer and the servers: the trainer is rank 0, the servers follow."""

import datetime
import socket
import threading
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import GroupName, PrefixStore

from real_megatron.rollout.engine import WeightSyncError


class SenderGroup:
    """The trainer's end, independent of the trainer's own process group.

    A server joins through POST /init_weights_update_group and forms its end in the same way; store prefixes and
    names must agree with it.
    """

    def __init__(self, name: str, backend: str, device: torch.device, host: str, timeout_s: float) -> None:
        """device: on which NCCL sends
        host: address of this machine that the servers reach; the group's store listens there and nowhere else
        timeout_s: of joining and of one broadcast; longer than the sender waits for them: NCCL's ends the process
        """
        self.name = name
        self._backend = backend
        self._device = device
        # Not much longer: a gloo broadcast that no server receives cannot be cancelled, and the process ends after it.
        self._timeout = datetime.timedelta(seconds=timeout_s)
        try:
            listener = socket.create_server((host, 0))
        except OSError as error:
            raise WeightSyncError(
                f"cannot listen on {host}: {error}; set rollout.sync_host to an address of this host"
            ) from error
        self.port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=self._timeout,
            master_listen_fd=listener.detach(),
        )
        self._group: dist.ProcessGroup | None = None
        self._lock = threading.Lock()
        self._sending = False
        self._stream: torch.cuda.Stream | None = None

    def join(self, world_size: int) -> None:
        """Blocks until every server has joined, or raises at the timeout."""
        # The public new_group() makes groups of the trainer's own ranks only.
        self._group, _ = distributed_c10d._new_process_group_helper(
            world_size,
            0,
            [],
            dist.Backend(self._backend),
            PrefixStore(self.name, self._store),
            group_name=GroupName(self.name),
            timeout=self._timeout,
        )
        distributed_c10d._world.pg_group_ranks[self._group] = {i: i for i in range(world_size)}

    def broadcast(self, flat: Tensor) -> None:
        """Send; blocks until every server has received it, or raises."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        with self._lock:
            group = self._group
            if group is None:
                raise WeightSyncError(f"the process group {self.name} has been given up")
            self._sending = True
        try:
            if self._backend == "nccl":
                self._broadcast_on_a_stream(group, flat, options)
            else:
                group.broadcast([flat], options).wait()
        finally:
            with self._lock:
                self._sending = False
                given_up = self._group is None
            if given_up:
                _destroy(group)

    def _broadcast_on_a_stream(self, group: dist.ProcessGroup, flat: Tensor, options: dist.BroadcastOptions) -> None:
        """On a stream of its own: a server is restored while the policy trains, which on the default stream would wait
        for a broadcast that the server may never receive."""
        torch.cuda.set_device(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        stream = self._stream
        if flat.is_cuda:  # the export of a sync, which the default stream has computed
            stream.wait_stream(torch.cuda.default_stream(self._device))
            flat.record_stream(stream)
        with torch.cuda.stream(stream):
            # Weights kept on the host come to a server that was started anew.
            group.broadcast([flat.to(self._device)], options).wait()
        stream.synchronize()

    def abort(self) -> None:
        """Give the group up. Connections close at once, or, while a broadcast runs, when that ends."""
        with self._lock:
            group, self._group = self._group, None
            sending = self._sending
        if group is None:
            return
        with suppress(RuntimeError):
            group.abort()
        # Destroying a gloo group waits for its broadcast, and holds the interpreter's lock meanwhile.
        if not sending:
            _destroy(group)


def _destroy(group: dist.ProcessGroup) -> None:
    with suppress(RuntimeError, ValueError):
        dist.destroy_process_group(group)
