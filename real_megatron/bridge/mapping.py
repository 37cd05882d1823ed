"""What a conversion would do, from config.json alone: no weights are read, and none need to exist."""

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from rich.table import Table

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.expansion import padded_vocab, parameters
from real_megatron.bridge.families import describe
from real_megatron.bridge.placement import ParallelLayout, check_layout
from real_megatron.hf.checkpoint import Shape
from real_megatron.hf.directory import checkpoint_directory
from real_megatron.hf.side_files import read_config

_PREFIXES = ("decoder.layers.{layer}.", "model.layers.{layer}.")


@dataclass
class Row:
    """All parameters that differ only in layer and expert. Shapes: whole, and on one tensor-parallel rank."""

    megatron: str
    te_name: str
    hf: tuple[str, ...]
    transform: str
    whole: Shape
    shard: Shape
    count: int = 0

    @property
    def elements(self) -> int:
        """Elements of all of them, with vocabulary padding."""
        return self.count * prod(self.whole)


def mapping(description: ModelDescription, layout: ParallelLayout | None = None, vocab_multiple: int = 64) -> list[Row]:
    """The mapping table of a model at a layout (default: one rank), one row per kind of parameter.

    Raises ConfigError for a layout that does not divide the model.
    """
    layout = layout or ParallelLayout()
    check_layout(description, layout)
    rows: dict[tuple[str, str], Row] = {}
    for parameter in parameters(description, vocab_rows=padded_vocab(description, layout.tensor, vocab_multiple)):
        transform = parameter.transform
        key = (_pattern(parameter.name), _pattern(parameter.te_name))
        if key not in rows:
            names = tuple(map(_pattern, parameter.hf))
            rows[key] = Row(*key, names, transform.kind, transform.shape, transform.shard_shape(layout.tensor))
        rows[key].count += 1
    return list(rows.values())


def dry_run(
    hf_path: str | Path,
    *,
    revision: str | None = None,
    family: str = "auto",
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    dtype: torch.dtype | None = None,
    vocab_multiple: int = 64,
) -> Table:
    """The mapping as a table: names on both sides, shapes, transforms, counts and sizes.

    hf_path: a directory with config.json, or a name on the hub, there at `revision`; weights are neither needed nor
    downloaded. dtype: for the sizes; default: the one that config.json names, else bfloat16. The others are those of
    `convert_hf_to_megatron`, and so are the errors.
    """
    config = read_config(checkpoint_directory(hf_path, revision, weights=False))
    description = describe(config, family)
    dtype = dtype or config.dtype or torch.bfloat16
    rows = mapping(description, ParallelLayout(tensor, pipeline, expert), vocab_multiple)
    total = sum(parameter.hf_numel for parameter in parameters(description))
    name = str(dtype).removeprefix("torch.")
    experts = f", {{expert}}: 0 to {description.num_experts - 1}" if description.num_experts else ""
    table = Table(
        title=f"{description.family}: {total:,} parameters, {_size(total * dtype.itemsize)} in {name}; "
        f"TP {tensor}, PP {pipeline}, EP {expert}",
        caption=f"A leading dot stands for {_PREFIXES[0]} and {_PREFIXES[1]}, {{layer}}: 0 to "
        f"{description.num_layers - 1}{experts}. TE: the name in the Transformer Engine spec.",
        show_footer=True,
    )
    table.add_column("Megatron", "all", overflow="fold")
    table.add_column("Hugging Face", overflow="fold")
    table.add_column("transform")
    table.add_column("whole", no_wrap=True)
    table.add_column("a TP rank", no_wrap=True)
    table.add_column("count", f"{sum(row.count for row in rows):,}", justify="right")
    table.add_column("size", _size(sum(row.elements for row in rows) * dtype.itemsize), justify="right", no_wrap=True)
    for row in rows:
        megatron = _short(row.megatron)
        if row.te_name != row.megatron:
            megatron += f"\nTE: {_short(row.te_name)}"
        table.add_row(
            megatron,
            "\n".join(map(_short, row.hf)),
            row.transform,
            _shape(row.whole),
            _shape(row.shard),
            f"{row.count:,}",
            _size(row.elements * dtype.itemsize),
        )
    return table


def _pattern(name: str) -> str:
    name = re.sub(r"(?<=layers\.)\d+", "{layer}", name)
    return re.sub(r"(?<=experts\.)\d+|(?<=fc[12]\.weight)\d+", "{expert}", name)


def _short(name: str) -> str:
    for prefix in _PREFIXES:
        name = re.sub(f"^{re.escape(prefix)}", ".", name)
    return name


def _shape(shape: Shape) -> str:
    return " × ".join(map(str, shape))


def _size(count: float) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.0f} {units[0]}" if units[0] == "B" else f"{count:.1f} {units[0]}"
