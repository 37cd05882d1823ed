"""Groups of a data set as a file without a name, which all ranks of a host map into their memory."""

import hashlib
import json
import mmap
import os
import struct
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

from real_megatron.batch.types import Group, Trajectory
from real_megatron.data.lazy import LazySequence
from real_megatron.errors import ConfigError, DataError

_ENTRY = struct.Struct("<qiiid")
_INDEX = np.dtype([("start", "<i8"), ("prompt", "<i4"), ("response", "<i4"), ("about", "<i4"), ("label", "<f8")])
"""Of each group: where it begins, tokens of its prompt and of its response (-1: it has none), bytes of its JSON."""
_BEGIN = bytes(8)
"""No file is empty: an empty one cannot be mapped."""


class StoredGroups(LazySequence[Group]):
    """Groups in a mapped file: int32 tokens, masks, and a line of JSON each. A group is made when it is asked for.

    The file has no name, from its beginning on: however a run ends, nothing is left of it, and nobody can read an old
    one. It lies in the directory for temporary files of the host (TMPDIR).
    """

    def __init__(self, file: IO[bytes], index: int, count: int, digest: str) -> None:
        self._file = file
        self._begin = index
        self.digest = digest
        """Of all groups without their ids, which may come from a file's name."""
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._index = np.frombuffer(self._map, _INDEX, count, index)

    @classmethod
    def of(cls, groups: Iterable[Group]) -> "StoredGroups":
        """These groups, stored. Raises as `GroupWriter`."""
        writer = GroupWriter()
        for group in groups:
            writer.append(group)
        return writer.finish()

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes of this host, as long as this one holds the groups. Raises ConfigError there, where the
        file cannot be opened."""
        handle = self._file.fileno()
        found = os.fstat(handle)
        path = f"/proc/{os.getpid()}/fd/{handle}"
        return _opened, (path, found.st_dev, found.st_ino, self._begin, len(self), self.digest)

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each group's prompt."""
        return self._index["prompt"]

    @property
    def response_lengths(self) -> np.ndarray:
        """Tokens of each group's response; 0 where it has none."""
        return np.maximum(self._index["response"], 0)

    def __len__(self) -> int:
        return len(self._index)

    def _make(self, index: int) -> Group:
        start, prompt, response, about, label = self._index[index].tolist()
        tokens = array("i", self._map[start : (start := start + 4 * (prompt + max(response, 0)))]).tolist()
        mask = self._map[start : (start := start + max(response, 0))]
        facts = json.loads(self._map[start : start + about])
        given, labels = facts.pop("response"), tuple(facts.pop("labels"))
        trajectories = [] if response < 0 else [Trajectory(tokens[prompt:], loss_mask=list(map(bool, mask)), **given)]
        return Group(tokens[:prompt], trajectories, label, labels=labels, **facts)


class GroupWriter:
    """Stores groups one by one. Without `finish` nothing is left of them.

    Raises ConfigError, which names the directory and TMPDIR, where the file cannot be written, such as on a full disk.
    """

    def __init__(self) -> None:
        self._index = bytearray()
        self._digest = hashlib.blake2b(digest_size=16)
        with _naming_place():
            self._file = tempfile.TemporaryFile(prefix="real-megatron-")  # noqa: SIM115
            self._end = self._file.write(_BEGIN)

    def append(self, group: Group) -> None:
        """Add a group with one response at most.

        Raises DataError for what JSON cannot hold in its `meta`. Of what it can, tuples become lists, and keys texts.
        """
        given = group.trajectories[0] if group.trajectories else None
        if len(group.trajectories) > 1:
            raise ValueError(f"example {group.example_id} has {len(group.trajectories)} responses, not one or none")
        ids, mask = ([], []) if given is None else (given.response_ids, given.loss_mask)
        response = None
        if given is not None:
            response = {name: value for name, value in vars(given).items() if name not in ("response_ids", "loss_mask")}
        facts = {"example_id": group.example_id, "meta": group.meta, "response": response, "labels": group.labels}
        try:
            about = json.dumps(facts).encode()
        except TypeError as error:
            raise DataError(
                f"example {group.example_id}: its format puts into 'meta' what JSON cannot hold ({error}); make texts, "
                "numbers, lists or objects of it"
            ) from error
        self._digest.update(_content(group))
        entry = self._end, len(group.prompt_ids), -1 if given is None else len(ids), len(about), group.label
        self._index += _ENTRY.pack(*entry)
        with _naming_place():
            for part in (array("i", group.prompt_ids), array("i", ids), bytes(mask), about, b"\n"):
                self._end += self._file.write(part)

    def finish(self) -> StoredGroups:
        """The groups that have been added."""
        with _naming_place():
            self._file.write(self._index)
            self._file.flush()
        return StoredGroups(self._file, self._end, len(self._index) // _ENTRY.size, self._digest.hexdigest())


def _opened(path: str, device: int, inode: int, *about: Any) -> StoredGroups:
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise _not_shared(path, str(error.strerror)) from error
    found = os.fstat(file.fileno())
    if (found.st_dev, found.st_ino) != (device, inode):  # of another container, in which processes are counted anew
        file.close()
        raise _not_shared(path, "it is another file")
    return StoredGroups(file, *about)


def _content(group: Group) -> bytes:
    # Not `asdict`, which copies every token by itself.
    content = {**vars(group), "example_id": None, "trajectories": [vars(target) for target in group.trajectories]}
    if not group.labels:  # the digest of groups without aspects, as checkpoints have it
        del content["labels"]
    return json.dumps(content, sort_keys=True).encode() + b"\n"


def _not_shared(path: str, why: str) -> ConfigError:
    return ConfigError(
        f"{path}, the data as the first rank of this host has stored it, cannot be opened ({why}): start the ranks of "
        "a host as one user and in one container"
    )


@contextmanager
def _naming_place() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = tempfile.tempdir or "the directory for temporary files"
        failed = ConfigError(
            f"{place}: the tokens of the data cannot be written there ({error.strerror or error}): make room, or set "
            "TMPDIR to a directory of this host that has it"
        )
        failed.may_pass = True
        raise failed from error
