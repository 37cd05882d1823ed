"""What a conversion would do, from config.json alone: no weights are read, none need exist."""

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from rich.table import Table

from real_megatron.bridge import side_files
from real_megatron.bridge.convert import check_layout
from real_megatron.bridge.expansion import padded_vocab, parameters
from real_megatron.bridge.families import describe
from real_megatron.bridge.layout import Layout
from real_megatron.bridge.table import Parameter
from real_megatron.bridge.transforms import Shape


@dataclass
class Row:
    """All parameters that differ only in layer and expert."""

    megatron: str
    te_name: str
    hf: tuple[str, ...]
    kind: str
    whole: Shape
    shard: Shape
    count: int = 0


def mapping(config_path: str | Path, *, tp: int = 1, pp: int = 1, ep: int = 1, vocab_multiple: int = 64) -> list[Row]:
    """The mapping table of a model at a layout, one row per kind of parameter."""
    description = describe(side_files.read_config(Path(config_path)))
    check_layout(description, Layout(tp, pp, ep))
    rows: dict[tuple[str, str], Row] = {}
    for parameter in parameters(description, vocab_rows=padded_vocab(description, tp, vocab_multiple)):
        names = _pattern(parameter)
        transform = parameter.transform
        row = rows.setdefault(
            names[:2], Row(*names, transform.kind, transform.shape, transform.shard_shape(_tp(parameter, tp)))
        )
        row.count += 1
    return list(rows.values())


def dry_run(
    config_path: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    dtype: torch.dtype | None = None,
    vocab_multiple: int = 64,
) -> Table:
    """The mapping as a table to print: names on both sides, shapes, the cut, counts and sizes.

    dtype: for the sizes; default: the one named in config.json, else bfloat16.
    """
    config = side_files.read_config(Path(config_path))
    description = describe(config)
    dtype = dtype or config.dtype or torch.bfloat16
    rows = mapping(config_path, tp=tp, pp=pp, ep=ep, vocab_multiple=vocab_multiple)
    total = sum(parameter.hf_numel for parameter in parameters(description))
    name = str(dtype).removeprefix("torch.")
    table = Table(
        title=f"{description.family}: {total:,} parameters, {_size(total * dtype.itemsize)} in {name}",
        caption=f"At TP {tp}, PP {pp}, EP {ep}. {{layer}} 0–{description.num_layers - 1}"
        + (f", {{expert}} 0–{description.num_experts - 1}" if description.num_experts else ""),
        show_footer=True,
    )
    table.add_column("Megatron", "all", overflow="fold")
    table.add_column("Hugging Face", overflow="fold")
    table.add_column("transform")
    table.add_column("whole")
    table.add_column("one TP rank")
    table.add_column("count", f"{sum(row.count for row in rows):,}", justify="right")
    padded = sum(row.count * prod(row.whole) for row in rows) * dtype.itemsize
    table.add_column("size", _size(padded), justify="right")
    for row in rows:
        megatron = row.megatron if row.te_name == row.megatron else f"{row.megatron}\n(TE: {row.te_name})"
        size = _size(row.count * prod(row.whole) * dtype.itemsize)
        table.add_row(
            megatron, "\n".join(row.hf), row.kind, _shape(row.whole), _shape(row.shard), f"{row.count:,}", size
        )
    return table


def _tp(parameter: Parameter, tp: int) -> int:
    return 1 if parameter.transform.split_axis is None else tp


def _pattern(parameter: Parameter) -> tuple[str, str, tuple[str, ...]]:
    def generic(name: str) -> str:
        name = re.sub(r"(?<=layers\.)\d+", "{layer}", name)
        return re.sub(r"(?<=experts\.)\d+|(?<=fc[12]\.weight)\d+", "{expert}", name)

    return generic(parameter.name), generic(parameter.te_name), tuple(generic(name) for name in parameter.hf)


def _shape(shape: Shape) -> str:
    return " × ".join(map(str, shape))


def _size(count: float) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.0f} {units[0]}" if units[0] == "B" else f"{count:.1f} {units[0]}"
