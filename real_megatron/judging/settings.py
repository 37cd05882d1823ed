"""What a checkpoint says of how it is asked: the part of its training configuration that is safe to follow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real_megatron.config import RunConfig
from real_megatron.data import is_built_in
from real_megatron.errors import ConfigError
from real_megatron.hf.side_files import RUN_FILE, TEMPLATE_FILE
from real_megatron.sections import read_tree

# What describes the model. The rest, such as programs to start and servers to use, is no business of a checkpoint that
# may have been downloaded.
FOLLOWED = {
    "scale": ("scores", "values", "anchor", "spellings", "ends", "aspects", "probabilities"),
    "data": (
        *("template", "chat_template", "chat_template_args"),
        *("max_prompt_tokens", "long_prompts", "max_response_tokens"),
    ),
    "evaluation": ("samples", "temperature", "top_p", "no_anchor"),
}


def judge_config(directory: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration to ask the checkpoint in `directory` with: scale, template, lengths and sampling as training
    left them there (`FOLLOWED`), everything else by default, then `key=value` overrides.

    A template that does not come with this package is read from the checkpoint (`TEMPLATE_FILE`), wherever it was in
    training: no other file. Raises ConfigError where it is not there, and for overrides that do not fit.
    """
    file = directory / RUN_FILE
    saved = read_tree(file) if file.is_file() else {}
    tree: dict[str, dict[str, Any]] = {}
    for section, keys in FOLLOWED.items():
        given = saved.get(section)
        if isinstance(given, dict):
            tree[section] = {key: given[key] for key in keys if key in given}
    template = tree.get("data", {}).get("template")
    named = any(override.partition("=")[0].strip() == "data.template" for override in overrides)
    if isinstance(template, str) and not is_built_in(template) and not named:
        if not (directory / TEMPLATE_FILE).is_file():
            raise ConfigError(
                f"{file}: data.template: {template!r} was a file where the model was trained, which has not come with "
                f"it as {TEMPLATE_FILE}: name your copy with data.template=FILE"
            )
        tree["data"]["template"] = str(directory / TEMPLATE_FILE)
    return RunConfig.from_tree(tree, overrides, source=file)
