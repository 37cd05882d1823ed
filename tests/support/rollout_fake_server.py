"""A local HTTP server that speaks SGLang's or vLLM's protocol, with faults on demand. Standard library only.

Replies are recorded ones (tests/rollout/recorded_sglang.json, from SGLang 0.5.21) with ids and log-probabilities filled
in. Tokens come from a rule that a test can check: token t of sample k for a prompt is `token(prompt, k, t)`.
Run as a script it is a server process: it takes an engine's own command line (`… --port P`) and environment.
"""

import copy
import json
import os
import socket
import sys
import textwrap
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RECORDED = json.loads((Path(__file__).parents[1] / "rollout" / "recorded_sglang.json").read_text(encoding="utf-8"))
VOCABULARY = 100
WATCHED = -3.5


def token(prompt: list[int], k: int, t: int) -> int:
    return (sum(prompt) * 7 + k * 13 + t * 5) % (VOCABULARY - 10) + 10


def logprob(token_id: int) -> float:
    return -token_id / VOCABULARY


def watched_behind(sequences: list[list[int]], sequence: list[int]) -> float:
    """What the log-probs of watched tokens begin with behind one sequence of a batch: it tells those with more tokens
    than the first, and those of other last tokens, apart."""
    more = len(sequence) - len(sequences[0])
    return WATCHED - (1000 * more + sequence[-1] if more else 0)


def expected_ids(prompt: list[int], k: int, length: int) -> list[int]:
    return [token(prompt, k, t) for t in range(length)]


class FakeServer:
    """State of one server. `faults` are consumed one per generation request: hang, disconnect, truncate, error_500,
    refuse_400, wrong_k, short_logprobs, nan, abort, stale, until_paused (vLLM); or, before a good reply, a number of
    seconds or an Event to wait for.
    `control_faults` maps a control path to statuses that it answers with, one per call, or "hang", or for a reload of
    vLLM "half", after which all later reloads fail and a request ends the server. With a `key`, all requests but
    /health need it."""

    def __init__(self, flavour: str = "sglang", port: int = 0, key: str | None = None) -> None:
        self.flavour = flavour
        self.key = key
        self.faults: list = []
        self.control_faults: dict[str, list[int | str]] = {}
        self.version = "default"
        self.model_path = "/the/model"
        self.fp32_logits = True
        self.loaded: str | None = None
        self.session_open = False
        self.paused = False
        self.server_info = {
            "vllm_config": {
                "model_config": {"logprobs_mode": "raw_logprobs"},
                "device_config": {"device": "cuda"},
                "parallel_config": {"worker_extension_cls": ""},
            }
        }
        """Of vLLM."""
        self.development_mode = True
        self.requests_hold_the_cache = False
        self.half_loaded = False
        self.pauses = 0
        self._paused, self._resumed = threading.Event(), threading.Event()
        self._resumed.set()
        self.hangs_waited_for = 0
        self.generations = 0
        self.most_in_flight = 0
        self.calls: list[tuple[str, dict]] = []
        self.bodies: list[dict] = []
        """Of the generation requests."""
        self.connections: set[socket.socket] = set()
        self._in_flight = 0
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FakeServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        """End as a killed process does: open connections break."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def serve(self) -> None:
        self._server.serve_forever()

    # --- one request ------------------------------------------------------------------------------------------------

    def generate(self, body: dict) -> tuple[int, object] | str:
        """(status, reply), or the name of a fault that the connection must show."""
        with self._lock:
            self.generations += 1
            self.bodies.append(body)
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            fault = self.faults.pop(0) if self.faults else None
        try:
            if self.flavour == "vllm":
                self._resumed.wait(30)
            pauses = self.pauses
            if isinstance(fault, (int, float)):
                time.sleep(fault)
            if isinstance(fault, threading.Event):
                fault.wait(600)
            if fault == "until_paused":
                self._paused.wait(10)
            if self.pauses > pauses:
                fault = "abort"
            if self.half_loaded:
                return "disconnect"
            if fault in ("hang", "disconnect", "truncate"):
                return fault
            if fault == "error_500":
                return 500, {"error": {"message": "internal"}}
            if fault == "refuse_400":
                return RECORDED["refused"]["status"], RECORDED["refused"]["body"]
            if self.flavour == "vllm" and body["temperature"] == 0 and body["n"] > 1:
                return 400, {"error": {"message": f"n must be 1 when using greedy sampling, got {body['n']}."}}
            return 200, self._sglang(body, fault) if self.flavour == "sglang" else self._vllm(body, fault)
        finally:
            with self._lock:
                self._in_flight -= 1

    def _sglang(self, body: dict, fault) -> object:
        params = body["sampling_params"]
        n, length = params.get("n", 1), min(params["max_new_tokens"], 6)
        if params["max_new_tokens"] == 0:
            replies = [copy.deepcopy(RECORDED["score"]["body"]) for _ in body["input_ids"]]
            for reply, sequence, ids in zip(replies, body["input_ids"], body["token_ids_logprob"], strict=True):
                self._label(reply["meta_info"], 0, fault)
                score = watched_behind(body["input_ids"], sequence)
                reply["meta_info"]["output_token_ids_logprobs"] = [[[score - i, i, None] for i in ids]]
            return replies[:-1] if fault == "wrong_k" else replies
        samples = []
        for k in range(n - 1 if fault == "wrong_k" else n):
            sample = copy.deepcopy(RECORDED["generate"]["body"][0])
            meta = sample["meta_info"]
            ids = expected_ids(body["input_ids"], k, length)
            sample["output_ids"] = ids
            meta["output_token_logprobs"] = [[logprob(i), i, None] for i in ids]
            meta["completion_tokens"] = length
            watch = body.get("token_ids_logprob") or []
            meta["output_token_ids_logprobs"] = [[[WATCHED - i, i, None] for i in reversed(watch)] for _ in ids]
            meta["finish_reason"] = {"type": "length", "length": length}
            if length < params["max_new_tokens"]:
                meta["finish_reason"] = {"type": "stop", "matched": "on a text"}
            if fault == "short_logprobs":
                meta["output_token_logprobs"].pop()
            if fault == "nan":
                meta["output_token_logprobs"][0][0] = None  # which is what SGLang writes
            if fault == "abort":
                meta["finish_reason"] = RECORDED["aborted"]["body"]["meta_info"]["finish_reason"]
            self._label(meta, length, fault)
            samples.append(sample)
        return samples if n > 1 else samples[0] if samples else []

    def _label(self, meta: dict, length: int, fault) -> None:
        meta["weight_version"] = self.version
        meta["weight_versions"] = [{"version": self.version, "start": 0, "end": length}]
        if fault == "stale":
            meta["weight_versions"].insert(0, {"version": "older", "start": 0, "end": 1})

    def _vllm(self, body: dict, fault) -> object:
        length, watch = min(body["max_tokens"], 6), body.get("logprob_token_ids") or []
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        drawn = [(prompt, k) for prompt in prompts for k in range(body["n"])]
        choices = []
        for k, (prompt, sample) in enumerate(drawn[:-1] if fault == "wrong_k" else drawn):
            ids = expected_ids(prompt, sample, length)
            values = [logprob(i) for i in ids]
            score = watched_behind(prompts, prompt)
            # The token that was drawn is there too; a watched one has its value as such.
            positions = [{f"token_id:{t}": logprob(t)} | {f"token_id:{i}": score - i for i in watch} for t in ids]
            choices.append(
                {
                    "index": k,
                    "text": "",
                    "token_ids": ids,
                    "logprobs": {
                        "tokens": [f"token_id:{i}" for i in ids],
                        "token_logprobs": values[:-1] if fault == "short_logprobs" else values,
                        "top_logprobs": positions,
                    },
                    "finish_reason": "abort" if fault == "abort" else "stop" if body["stop"] else "length",
                    "stop_reason": body["stop"][0] if body["stop"] else None,
                }
            )
        # The protocol does not promise an order.
        return {"object": "text_completion", "model": body["model"], "choices": choices[::-1]}

    def control(self, path: str, body: dict) -> tuple[int, object]:
        self.calls.append((path, body))
        if self.control_faults.get(path):
            fault = self.control_faults[path].pop(0)
            if fault == "hang":
                time.sleep(600)
                self.hangs_waited_for += 1
                return 500, None
            if fault == "half":
                self.half_loaded = True
                fault = 500
            return fault, {"success": False, "message": "fault on demand"}
        if self.flavour == "vllm":
            return self._vllm_control(path, body)
        recorded = RECORDED
        if path == "/pause_generation":
            self.paused = True
        elif path == "/continue_generation":
            self.paused = False
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/begin_weight_update":
            if self.session_open:
                return 400, recorded["/begin_weight_update#twice"]["body"]
            self.session_open = True
        elif path == "/end_weight_update":
            if not self.session_open:
                return 400, recorded["/end_weight_update#twice"]["body"]
            self.session_open = False
        elif path == "/update_weights_from_disk":
            if not Path(body["model_path"]).is_dir():
                return 400, recorded["/update_weights_from_disk#missing"]["body"]
            self.loaded = body["model_path"]
        elif path == "/init_weights_update_group":
            return 400, {"success": False, "message": "this server joins no group"}
        elif path in ("/update_weights_from_tensor", "/update_weights_from_distributed") and not self.session_open:
            return 400, recorded["/update_weights_from_distributed"]["body"]
        return 200, recorded.get(path, {"body": {"success": True, "message": "Success"}})["body"]

    def _vllm_control(self, path: str, body: dict) -> tuple[int, object]:
        if not self.development_mode:
            return 404, {"detail": "Not Found"}
        if path == "/pause?mode=abort":
            self.paused = True
            self.pauses += 1
            self._resumed.clear()
            self._paused.set()
        elif path == "/resume":
            self.paused = False
            self._paused.clear()
            self._resumed.set()
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/collective_rpc":
            if body["method"] != "reload_weights" or not Path(body["kwargs"]["weights_path"]).is_dir():
                return 500, {"error": "no such checkpoint"}
            if self.half_loaded:
                return 500, {"error": "the error of the first load"}
            self.loaded = body["kwargs"]["weights_path"]
            return 200, {"results": [None]}
        elif path == "/reset_prefix_cache":
            return 200, {"success": not self.requests_hold_the_cache}
        return 200, {}

    def get(self, path: str) -> tuple[int, object]:
        if path == "/health":
            # SGLang's check generates a token, which a paused server does not.
            return (503, None) if self.paused and self.flavour == "sglang" else (200, None)
        if path == "/model_info":
            return 200, RECORDED["model_info"]["body"] | {"weight_version": self.version, "model_path": self.model_path}
        if path == "/server_info":
            return 200, RECORDED["server_info"]["body"] | {"enable_fp32_lm_head": self.fp32_logits}
        if not self.development_mode and path != "/v1/models":
            return 404, {"detail": "Not Found"}
        if path == "/server_info?config_format=json":
            return 200, self.server_info
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "policy", "object": "model", "root": self.model_path}]}
        return 404, {"detail": "Not Found"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeServer

    def setup(self) -> None:
        super().setup()
        self.fake.connections.add(self.connection)

    def finish(self) -> None:
        self.fake.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def _refused(self) -> bool:
        """Answers a request without the key; both servers do so in these words."""
        key = self.fake.key
        if key is None or self.path == "/health" or self.headers["Authorization"] == f"Bearer {key}":
            return False
        self._answer(401, {"error": "Unauthorized"})
        return True

    def do_GET(self) -> None:
        if not self._refused():
            self._answer(*self.fake.get(self.path))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        if self._refused():
            return
        if self.path not in ("/generate", "/v1/completions"):
            self._answer(*self.fake.control(self.path, body))
            return
        result = self.fake.generate(body)
        if result == "hang":
            time.sleep(30)
        elif result == "disconnect":
            self.connection.close()
            self.close_connection = True
        elif result == "truncate":
            whole = json.dumps(RECORDED["generate"]["body"]).encode()
            self._send(200, whole[: len(whole) // 2])
        else:
            self._answer(*result)

    def _answer(self, status: int, reply: object) -> None:
        data = reply.encode() if isinstance(reply, str) else b"" if reply is None else json.dumps(reply).encode()
        self._send(status, data)

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


FAKE = f"""
    import sys
    sys.path.insert(0, {str(Path(__file__).parents[2])!r})
    from tests.support.rollout_fake_server import main
    main()
"""


def python_that_runs(folder: Path, body: str = FAKE) -> str:
    """An executable that takes the place of the server environment's Python: it gets the engine's own command line."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(body))
    path.chmod(0o755)
    return str(path)


def main() -> None:
    """A server process that ends with its parent, as the launcher's servers do."""
    flavour = "vllm" if "vllm" in sys.argv[2] else "sglang"
    argument = {
        name: sys.argv[i + 1] for i, name in enumerate(sys.argv) if name in ("--port", "--model-path", "--model")
    }
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    print("fake server on port", argument["--port"], flush=True)
    key = os.environ["LAUNCH_API_KEY" if flavour == "sglang" else "VLLM_API_KEY"]
    server = FakeServer(flavour, int(argument["--port"]), key)
    server.model_path = argument.get("--model-path") or argument["--model"]
    server.serve()


if __name__ == "__main__":
    main()
