"""Seconds of a step of a layout, from first principles and the assumptions of `planning.efficiency`."""

from collections.abc import Mapping
from dataclasses import dataclass

from real_megatron.hardware import Gpu
from real_megatron.planning.efficiency import DEFAULT, Efficiency
from real_megatron.planning.rollout_time import rollout_time
from real_megatron.planning.servers import Servers
from real_megatron.planning.sync_time import sync_time
from real_megatron.planning.update_time import update_time
from real_megatron.planning.workload import Layout, Workload


@dataclass(frozen=True)
class StepTime:
    """Projected seconds of a step."""

    parts: Mapping[str, float]
    """By name, `PHASE: PART`; phases are `update`, `log-probs`, `rollout`, `sync` and `host`."""
    overlapped: bool = False
    """Whether the rollout of the next step runs beside update and log-probs (rollout.staleness 1)."""

    def phase(self, name: str) -> float:
        """Seconds of a phase; 0 for one that the step does not have."""
        return sum(seconds for part, seconds in self.parts.items() if part.startswith(f"{name}: "))

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of each phase that takes any."""
        names = dict.fromkeys(part.partition(":")[0] for part in self.parts)
        return {name: self.phase(name) for name in names}

    @property
    def training(self) -> float:
        """Seconds in which the policy computes."""
        return self.phase("update") + self.phase("log-probs")

    @property
    def total(self) -> float:
        """Seconds of the step: of its phases one after the other, or with the longer of rollout and training."""
        rest = self.phase("sync") + self.phase("host")
        if self.overlapped:
            return rest + max(self.training, self.phase("rollout"))
        return rest + self.training + self.phase("rollout")

    @property
    def binds(self) -> str:
        """The part that takes longest, of those that the step waits for."""
        hidden: tuple[str, ...] = ()
        if self.overlapped:
            hidden = ("update", "log-probs") if self.phase("rollout") > self.training else ("rollout",)
        waited = {part: seconds for part, seconds in self.parts.items() if not part.startswith(hidden)} or self.parts
        return max(waited, key=lambda part: waited[part])


def step_time(
    layout: Layout, workload: Workload, gpu: Gpu, servers: Servers | None, efficiency: Efficiency = DEFAULT
) -> StepTime:
    """The projection for a layout. servers: None where the workload generates nothing."""
    if workload.generates and servers is None:
        raise ValueError("a workload that generates needs servers")
    update, forward = update_time(layout, workload, gpu, efficiency)
    parts = {f"update: {name}": seconds for name, seconds in update.items()}
    parts |= {f"log-probs: {name}": seconds for name, seconds in forward.items()}
    if workload.generates and servers is not None:
        rollout = rollout_time(layout.description, workload, gpu, servers, efficiency)
        parts |= {f"rollout: {name}": seconds for name, seconds in rollout.items() if seconds}
        sync = sync_time(layout, gpu, servers, efficiency)
        parts |= {f"sync: {name}": seconds for name, seconds in sync.items() if seconds}
    parts["host: requests, scores, packing"] = workload.prompts * workload.responses * efficiency.response
    return StepTime(parts, overlapped=servers is not None and servers.staleness == 1)
