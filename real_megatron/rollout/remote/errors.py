"""Faults of one attempt at a request, inside the remote engines. What is left in the end is an EngineError."""

from real_megatron.errors import EngineError


class Retryable(Exception):
    """One attempt failed in a way that another attempt may not."""


class Unreachable(Exception):
    """No whole reply: the server cannot be reached, closed the connection, or missed the deadline."""


class ServerFault(Retryable):
    """The server answered that it has failed. Its front end may be all that is left of it."""


class StaleReply(Retryable):
    """A reply was sampled from other weights than the current ones."""


class WrongServer(EngineError):
    """What listens at a server's address is not the server that was asked for. Neither waiting nor a restart helps."""
