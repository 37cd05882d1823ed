"""Marks of progress: what tells a step that takes long from one that is stuck (training/watchdog.py)."""

_count = 0


def mark() -> None:
    """Something was done: a micro-batch, a token of a batch of responses, a reply of a server, a phase of a step.

    Cheap enough for each of them. Of several threads that mark at once one mark may be lost; the others stand.
    """
    global _count
    _count += 1


def marks() -> int:
    """How many marks this process has made."""
    return _count
