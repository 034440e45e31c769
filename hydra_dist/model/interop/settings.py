"""Reading another project's ``config.json``: every value is looked at before it is used."""

from collections.abc import Mapping
from typing import Any

from hydra_dist.errors import ConfigError


class Settings:
    """The values of one ``config.json``; ``source`` stands before every message.

    A key that is missing or null has its default. All methods raise ConfigError with the key and the value.
    """

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self.values = values

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands there."""
        value = self.values.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refused(key, "a positive integer is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """An integer or a decimal number."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refused(key, "a number is needed")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refused(key, "true or false is needed")
        return value

    def section(self, key: str) -> "Settings":
        """The values inside ``key``; empty where it is missing."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.refused(key, "keys and values are needed")
        return Settings(f"{self.source}: {key}", value)

    def expect(self, key: str, wanted: Any, reason: str) -> None:
        """Nothing but ``wanted`` has a counterpart here."""
        if self.get(key, wanted) != wanted:
            raise self.refused(key, f"{reason}; {wanted!r} works")

    def refused(self, key: str, reason: str) -> ConfigError:
        """The error for one key."""
        value = repr(self.values[key])[:80] if key in self.values else "missing"
        return ConfigError(f"{self.source}: {key} is {value}: {reason}")
