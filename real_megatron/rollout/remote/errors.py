"""The faults of remote engines."""


class RolloutError(RuntimeError):
    """A request could not be fulfilled, or no server is left to fulfil it. The message says which and why."""


class WeightSyncError(RolloutError):
    """No server holds the new weights. Nothing is served until `update_weights` is called again and succeeds."""


class Retryable(Exception):
    """One attempt failed in a way that another attempt may not."""


class Unreachable(Exception):
    """No whole reply: the server cannot be reached, closed the connection, or missed the deadline."""


class StaleReply(Retryable):
    """A reply was sampled from other weights than the current ones."""
