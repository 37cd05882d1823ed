"""SGLang's control endpoints, one coroutine each."""

from real_megatron.errors import EngineError
from real_megatron.rollout.remote.control import ControlClient
from real_megatron.rollout.remote.labels import incomplete
from real_megatron.rollout.remote.replica import Replica


class Control(ControlClient):
    """What a weight sync and sleep need of a server."""

    async def weight_label(self, replica: Replica) -> str:
        return (await self.loaded(replica))[1]

    async def loaded(self, replica: Replica) -> tuple[str, str]:
        """The checkpoint that the server has loaded last, at its start or in a sync by disk; its weights' label."""
        info = await self.get(replica, "/model_info")
        return str(info["model_path"]), str(info["weight_version"])

    async def tensor_parallel(self, replica: Replica) -> int:
        return int((await self.get(replica, "/server_info"))["tp_size"])

    async def set_weight_label(self, replica: Replica, label: str) -> None:
        await self.post(replica, "/update_weight_version", {"new_version": label, "abort_all_requests": False})

    async def quiesce(self, replica: Replica, label: str) -> None:
        """Abort what runs, take nothing new, and label the weights as a mixture until `admit`.

        The label stays with the server: should this process die half-way, the next one sees it in every reply.
        """
        await self.post(replica, "/pause_generation", {"mode": "abort"})
        await self.set_weight_label(replica, incomplete(label))

    async def admit(self, replica: Replica, label: str) -> None:
        """The weights are whole: drop every cached state, name them, and take requests again."""
        await self.post(replica, "/flush_cache", {})
        await self.set_weight_label(replica, label)
        await self.unpause(replica)

    async def unpause(self, replica: Replica) -> None:
        await self.post(replica, "/continue_generation", {})

    async def begin(self, replica: Replica) -> None:
        """Begin what SGLang calls a weight update, which both need that send buckets; end one left by a failed sync."""
        try:
            await self.post(replica, "/begin_weight_update", {})
        except EngineError:
            await self.post(replica, "/end_weight_update", {})
            await self.post(replica, "/begin_weight_update", {})

    async def end(self, replica: Replica) -> None:
        await self.post(replica, "/end_weight_update", {})
