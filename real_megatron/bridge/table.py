"""The parameter table: which Hugging Face tensors make up which Megatron parameter, for a whole model.

A family's TABLE is a tuple of rules with `{layer}` and `{expert}` in their names; `bridge.parameters(description)`
expands it. Conversion, export, weight sync and the parameter count use this expansion and nothing else.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from math import prod

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.transforms import Reader, Transform, Vocabulary
from real_megatron.hf.checkpoint import HFCheckpoint, Shape


@dataclass(frozen=True)
class Rule:
    """One row of a table.

    name: of the parameter in Megatron's local layer spec. te_name: in the Transformer Engine spec, where it differs.
    hf: the Hugging Face tensors, in the transform's order. transform: made from the description. when: a condition on
    the description. layers: "all", or only the "dense" or "moe" ones.
    """

    name: str
    hf: tuple[str, ...]
    transform: Callable[[ModelDescription], Transform]
    te_name: str | None = None
    when: Callable[[ModelDescription], bool] | None = None
    layers: str = "all"


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter of a concrete model, under its global name: layers and experts counted over all ranks."""

    name: str
    te_name: str
    hf: tuple[str, ...]
    transform: Transform
    layer: int | None = None
    expert: int | None = None

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Shapes of the Hugging Face tensors by name."""
        return dict(zip(self.hf, self.transform.hf_shapes, strict=True))

    def reader(self, checkpoint: HFCheckpoint) -> Reader:
        """The transform's view of the Hugging Face tensors in a checkpoint."""
        return lambda i, rows, columns: checkpoint.block(self.hf[i], rows, columns)

    @property
    def hf_numel(self) -> int:
        """Number of elements, without vocabulary padding."""
        return sum(prod(shape) for shape in self.transform.hf_shapes)


def expand(table: tuple[Rule, ...], description: ModelDescription, vocab_rows: int | None) -> Iterator[Parameter]:
    """The parameters of a concrete model, in the table's order, layer by layer; see bridge.parameters."""
    rules = [rule for rule in table if rule.when is None or rule.when(description)]
    for per_layer, group in groupby(rules, key=lambda rule: "{layer}" in rule.name):
        if not per_layer:
            for rule in group:
                yield _parameter(rule, _transform(rule, description, vocab_rows))
            continue
        bound = [(rule, rule.transform(description)) for rule in group]
        for layer in range(description.num_layers):
            kind = "moe" if description.is_moe_layer(layer) else "dense"
            for rule, transform in bound:
                if rule.layers not in ("all", kind):
                    continue
                experts = range(description.num_experts) if "{expert}" in rule.name else (None,)
                for expert in experts:
                    yield _parameter(rule, transform, layer, expert)


def hf_shapes(parameters: Iterable[Parameter]) -> dict[str, Shape]:
    """Name and shape of every Hugging Face tensor that the parameters are made of."""
    return {name: shape for parameter in parameters for name, shape in parameter.hf_shapes.items()}


def _transform(rule: Rule, description: ModelDescription, vocab_rows: int | None) -> Transform:
    transform = rule.transform(description)
    if isinstance(transform, Vocabulary) and vocab_rows is not None:
        return Vocabulary(transform.rows, transform.shape[1], vocab_rows)
    return transform


def _parameter(rule: Rule, transform: Transform, layer: int | None = None, expert: int | None = None) -> Parameter:
    def name(pattern: str) -> str:
        return pattern.format(layer=layer, expert=expert)

    return Parameter(
        name=name(rule.name),
        te_name=name(rule.te_name or rule.name),
        hf=tuple(name(pattern) for pattern in rule.hf),
        transform=transform,
        layer=layer,
        expert=expert,
    )
