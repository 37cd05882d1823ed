"""What the head has to show on a GPU at the shape of a large judge's head, in bfloat16."""

import torch

from benchmarks.head_contenders import Shape
from benchmarks.report import Bar

ROWS, VOCAB_SIZE, HIDDEN_SIZE = 8192, 151_936, 4096
OVER_A_COPY = 1.18
"""Of the time in which a copy moves the same bytes: 2.05 ms on an H200, where Liger-Kernel's would take about 9 ms."""
OVER_LOGITS_MS = 2.05
FROM_HIDDEN_MS = 54.0
"""About Liger-Kernel's time on Hopper, with 4 GiB of memory beyond inputs and gradients."""
FROM_HIDDEN_MIB = 512.0


def over_logits(shape: Shape, milliseconds: float, copy_milliseconds: float) -> list[Bar]:
    """Forward and backward over logits that exist. copy_milliseconds: a copy's for the bytes that have to move."""
    if (shape.rows, shape.vocab_size, shape.dtype) != (ROWS, VOCAB_SIZE, torch.bfloat16):
        return []
    what = f"stats + dlogits over a copy of the same bytes ({shape})"
    bars = [Bar(what, milliseconds / copy_milliseconds, OVER_A_COPY, False)]
    if "H200" in torch.cuda.get_device_name():
        bars.append(Bar(f"stats + dlogits over {OVER_LOGITS_MS} ms", milliseconds / OVER_LOGITS_MS, 1, False))
    return bars


def from_hidden(shape: Shape, milliseconds: float, extra_mib: float) -> list[Bar]:
    """Forward and backward of the linear form. extra_mib: memory beyond inputs and gradients."""
    if (shape.rows, shape.vocab_size, shape.hidden_size) != (ROWS, VOCAB_SIZE, HIDDEN_SIZE):
        return []
    if shape.dtype != torch.bfloat16:
        return []
    bars = [Bar(f"linear form's memory over {FROM_HIDDEN_MIB:g} MiB", extra_mib / FROM_HIDDEN_MIB, 1, False)]
    if any(card in torch.cuda.get_device_name() for card in ("H100", "H200")):
        bars.append(Bar(f"linear form over {FROM_HIDDEN_MS:g} ms", milliseconds / FROM_HIDDEN_MS, 1, False))
    return bars
