"""What a vLLM server says of its own settings (GET /server_info?config_format=json, vLLM 0.32)."""

from typing import Any

from real_megatron.rollout.remote.errors import WrongServer
from real_megatron.rollout.vllm.command import LIVE_HEAD

_LOGPROBS_MODE = "raw_logprobs"


def check_settings(url: str, info: Any, synced_tied: bool) -> None:
    """Raise WrongServer for settings with which a server's replies would be wrong without saying so.

    synced_tied: whether weights will be sent to the server for a model whose output layer is its embedding
    """
    try:
        config = info["vllm_config"]
        mode = config["model_config"]["logprobs_mode"]
        device = config["device_config"]["device"]
        extension = config["parallel_config"]["worker_extension_cls"]
    except (KeyError, TypeError) as error:
        raise WrongServer(f"{url}/server_info has not the form of vLLM 0.32: {error!r}") from error
    if mode != _LOGPROBS_MODE:
        raise WrongServer(
            f"{url} runs with --logprobs-mode {mode}: its log-probabilities are not those of the policy; start it with "
            f"{_LOGPROBS_MODE}, the default"
        )
    if synced_tied and device == "cpu" and extension != LIVE_HEAD:
        raise WrongServer(
            f"{url} runs on a CPU, where vLLM keeps a copy of an output layer that is tied to the embedding: no sync "
            "would reach it. Leave rollout.servers empty, and the server is started with what it needs, or start it "
            f"with --worker-extension-cls {LIVE_HEAD} and real_megatron/rollout/remote/launcher on PYTHONPATH"
        )
