"""The trained policy as a Hugging Face checkpoint that `AutoModelForCausalLM.from_pretrained` loads."""

import logging
import shutil
from pathlib import Path

import torch.distributed as dist

from real_megatron.bridge import parameters
from real_megatron.bridge.hf_writer import PlacedTensors, plan_files, write_index
from real_megatron.config import RunConfig
from real_megatron.data import is_built_in
from real_megatron.hf.side_files import RUN_FILE, TEMPLATE_FILE, carry
from real_megatron.hf.staging import staged_directory
from real_megatron.policy.policy import Policy
from real_megatron.rollout.engine import drain

logger = logging.getLogger(__name__)
FILE_BYTES = 5 * 10**9


def save_hf(policy: Policy, output: Path, max_file_bytes: int = FILE_BYTES) -> None:
    """Write the policy's weights, in the dtype it holds them, with config, tokenizer files and run configuration.

    Rank 0 writes tensor by tensor, so that it never holds the whole model; the directory appears when it is complete.
    Files hold the tensors in the order of the family's table, whatever the layout.
    Collective. Raises FileExistsError when `output` exists and is not empty.
    """
    if dist.get_rank() == 0:
        _write(policy, output, max_file_bytes)
    else:
        drain(policy.export(everywhere=False))
    dist.barrier()


def _write(policy: Policy, output: Path, max_file_bytes: int) -> None:
    table = parameters(policy.description)
    dtype = next(policy.chunks[0].parameters()).dtype
    files = plan_files(table, [dtype] * len(table), max_file_bytes)
    with staged_directory(output) as staging:
        carry(policy.model_dir, staging, dtype)
        write_run(policy.config, staging)
        placed = PlacedTensors(staging, files)
        for name, tensor in policy.export(everywhere=False):
            placed.write(name, tensor.cpu())
        placed.close()
        write_index(staging, files)


def write_run(config: RunConfig, directory: Path) -> None:
    """Put beside the weights how they were trained, from which follows how a judge is asked; a template of the user's
    own with it, since a judge reads no other file that a checkpoint names."""
    (directory / RUN_FILE).write_text(config.to_yaml(), encoding="utf-8")
    file = directory / TEMPLATE_FILE
    file.unlink(missing_ok=True)  # that of the start model
    if is_built_in(config.data.template):
        return
    try:
        shutil.copyfile(config.data.template, file)
    except OSError as error:
        logger.warning("the template does not go with the checkpoint (%s): judge it with data.template=FILE", error)
