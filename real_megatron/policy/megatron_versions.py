"""What differs between the versions of Megatron-Core that this package runs on: 0.16.1 to 0.19.

Only this module asks for the version, or for what a version has. `tests/compat.sh` runs the test suite with another
version than the pinned one.
"""

import inspect
import logging
import queue
import re
from pathlib import Path
from typing import Any

from megatron.core import __version__, dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from real_megatron.errors import CheckpointError, ConfigError
from real_megatron.policy.attention import PackedParams
from real_megatron.policy.pending_save import WRITER, PendingSave, Results
from real_megatron.processes import forks_end_with_us, killed_children_raise

logger = logging.getLogger(__name__)

INSTALLED = __version__.partition("+")[0]
"""Without the commit, which 0.19 appends: that of whichever repository is the working directory."""
OLDEST = "0.16.1"
NEXT = "0.20"
"""The first version that has not been tried."""


def check(version: str = INSTALLED) -> None:
    """Raise ConfigError for a Megatron-Core that is too old, and log a warning for one that has not been tried."""
    if _numbers(version) < _numbers(OLDEST):
        raise ConfigError(
            f"megatron-core {version} is installed, and real_megatron needs {OLDEST} or newer: "
            f'pip install "megatron-core>={OLDEST},<{NEXT}"'
        )
    if _numbers(version) >= _numbers(NEXT):
        logger.warning(
            "megatron-core %s is newer than what real_megatron has been tested with (%s to before %s). "
            "`real-megatron convert to-megatron --verify` compares a model's logits with transformers'.",
            version,
            OLDEST,
            NEXT,
        )


def _numbers(version: str) -> tuple[int, ...]:
    """`0.18.0rc1` → (0, 18, 0)."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()


def require_hybrid_model() -> None:
    """Raise ConfigError where HybridModel is missing or older than what policy/hybrid.py was written for."""
    if _numbers(INSTALLED) < (0, 19):
        raise ConfigError(
            f"model.megatron_class = HybridModel needs Megatron-Core 0.19 or newer, and {INSTALLED} is installed: "
            "install that, or set GPTModel"
        )


def fill_gaps() -> None:
    """Define what Megatron-Core uses without defining it. 0.16 reads this name when it routes tokens to experts, also
    where Transformer Engine, which defines it, is not installed; later versions define it themselves."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


HAS_OUTPUT_PROCESSOR = "output_processor" in inspect.signature(GPTModel.forward).parameters
"""From 0.18 on `GPTModel.forward` takes a function that turns hidden states into the model's output."""


class GPTModelWithHead(GPTModel):
    """GPTModel that asks JudgeHead's `rotary` for the angles of its positions and `head` for its output.

    For positions no version has a hook: they are the second element of what `_preprocess` returns, a tuple whose length
    differs. For the head it is `output_processor`, and before 0.18 `_postprocess`.
    """

    def forward(self, *args: Any, packed_seq_params: PackedParams, **kwargs: Any) -> Tensor:
        rows = packed_seq_params.head_rows
        if rows is not None and HAS_OUTPUT_PROCESSOR:
            kwargs["output_processor"] = lambda hidden_states, **unused: self.head(hidden_states, rows)
        output: Tensor = super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
        return output

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        decoder_input: Tensor | None = None,
        inference_context: None = None,
        packed_seq_params: PackedParams | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        outputs = super()._preprocess(input_ids, position_ids, decoder_input, None, None, **kwargs)
        return outputs[0], self.rotary(position_ids), *outputs[2:]

    def _postprocess(self, hidden_states: Tensor, *args: Any, packed_seq_params: PackedParams, **kwargs: Any) -> Tensor:
        rows = packed_seq_params.head_rows
        if self.post_process and rows is not None and not HAS_OUTPUT_PROCESSOR:
            return self.head(hidden_states, rows)
        output: Tensor = super()._postprocess(hidden_states, *args, packed_seq_params=None, **kwargs)
        return output


def save_sharded(state: dict[str, Any], directory: str | Path, metadata: dict[str, Any]) -> None:
    """`dist_checkpointing.save`, with no process that outlives it. Collective.

    Megatron hands the writers' results over in a queue that it makes for asynchronous saves: in a process of its own,
    kept for all later saves. A signal to the process group, as torchrun passes it on, would end that process and with
    it the save that answers the signal; its socket cannot be made in a long TMPDIR; and it outlives a killed trainer.
    Within one process a queue of that process does. The writers themselves are forks in 0.16, and later threads.
    Raises ChildProcessError where one of these forks is killed: Megatron would wait for its answer for ever.
    """
    filesystem_async._results_queue = queue.Queue()
    with forks_end_with_us(), killed_children_raise(WRITER):
        dist_checkpointing.save(state, str(directory), content_metadata=metadata)


def begin_sharded_save(state: dict[str, Any], directory: str | Path, metadata: dict[str, Any]) -> PendingSave:
    """`save_sharded`, but for the files of tensors, which are written while the caller goes on. Collective."""
    filesystem_async._results_queue = results = Results()
    request = dist_checkpointing.save(state, str(directory), content_metadata=metadata, async_sharded_save=True)
    return PendingSave(request, results)


def read_common_state(directory: str | Path) -> dict[str, Any]:
    """What a `torch_dist` checkpoint holds beside tensors. Raises CheckpointError as `require_readable` does."""
    require_readable(directory)
    state: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(directory))
    return state


def load_sharded(state: dict[str, Any], directory: str | Path) -> dict[str, Any]:
    """`dist_checkpointing.load`. Raises CheckpointError as `require_readable` does. Collective."""
    require_readable(directory)
    loaded: dict[str, Any] = dist_checkpointing.load(state, str(directory))
    return loaded


def require_readable(directory: str | Path) -> None:
    """Raise CheckpointError where the installed Megatron-Core is too old for a checkpoint.

    0.19 keeps what is not a tensor as an object among the tensors. Before, it is the file `common.pt`, which 0.19 still
    reads; the converter writes that, for all versions.
    """
    common = Path(directory) / "common.pt"
    if _numbers(INSTALLED) < (0, 19) and common.parent.is_dir() and not common.is_file():
        raise CheckpointError(
            f"{common} is missing: the checkpoint is damaged, or Megatron-Core 0.19 or newer has written it. Read it "
            f'with that: pip install "megatron-core>=0.19,<{NEXT}" (installed: {INSTALLED})'
        )
