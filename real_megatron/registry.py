"""Extension points: objects by name, some built in, others from a module that the configuration names.

A name of the form `module:name` imports the module first. It then is what the module has registered as `name`, or, if
it has registered nothing of that name, the module's attribute `name`.
"""

import importlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from real_megatron.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """The known objects of one kind."""

    def __init__(self, kind: str, key: str, built_in: Mapping[str, str] | None = None) -> None:
        """
        kind, key: what the objects are and the configuration key that names one, for error messages
        built_in: name → module that registers it, imported when the name is asked for
        """
        self.kind = kind
        self.key = key
        self._known: dict[str, T] = {}
        self._built_in = dict(built_in or {})
        self._module_of = dict(self._built_in)

    def register(self, name: str, item: T, module: str) -> T:
        """Add an object on behalf of `module`; returns it. Raises ConfigError for a name that another module has."""
        before = self._module_of.get(name, module)
        if before != module:
            raise ConfigError(f"{self.kind} {name!r} of {module}: {before} has registered this name; choose another")
        self._known[name], self._module_of[name] = item, module
        return item

    def find(self, name: str) -> T:
        """The object of a plain name or of `module:name`. Raises ConfigError for an unknown one."""
        module_name, _, short = name.rpartition(":")
        if not module_name:
            if short not in self:
                raise ConfigError(
                    f"{self.key}: unknown {self.kind} {name!r}; known: {', '.join(self)}, or module:name for one of "
                    "your own (docs/extending.md)"
                )
            return self[short]
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ConfigError(
                f"{self.key}: {name!r}: module {module_name} cannot be imported ({error}); is it on PYTHONPATH?"
            ) from error
        except ConfigError:
            raise
        except Exception as error:  # whatever a user's module does when it is imported
            fault = f"{type(error).__name__}: {error}".splitlines()[0]
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise ConfigError(
                f"{self.key}: {name!r}: module {module_name} fails when it is imported ({fault}, {where.filename} line "
                f"{where.lineno}); mend the module"
            ) from error
        if f"{self._module_of.get(short)}.".startswith(f"{module_name}."):
            return self[short]
        if not hasattr(module, short):
            raise ConfigError(f"{self.key}: {name!r}: module {module_name} neither registers nor defines {short!r}")
        item: T = getattr(module, short)
        return item

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._known, *self._built_in}))

    def __getitem__(self, name: str) -> T:
        if name not in self._known and name in self._built_in:
            importlib.import_module(self._built_in[name])
        return self._known[name]


def calling_module() -> str:
    """Name of the module that has called the function which calls this one: the owner of what it registers."""
    return str(sys._getframe(2).f_globals["__name__"])
