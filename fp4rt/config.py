"""config.json as a stranger's claim: every value is fetched with its type and range, and errors name file and key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4rt.errors import Fp4rtError, shown

_REQUIRED = object()


@dataclass(frozen=True)
class Config:
    """A JSON object and the file and key path it came from."""

    values: dict[str, Any]
    file: Path
    path: str = ""

    def refuse(self, key: str, found: str, do: str = "") -> Fp4rtError:
        return Fp4rtError("checkpoint", f"{self.file}: {self.path}{key} {found}{'; ' + do if do else ''}")

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of `key`; a missing key and null are the same."""
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.refuse(key, "is missing", "take the config.json that these weights were published with")
            return default
        return value

    def alias(self, *keys: str) -> str:
        """The first of several spellings of a key that the config uses; the first one if it uses none."""
        return next((key for key in keys if self.values.get(key) is not None), keys[0])

    def integer(self, key: str, default: Any = _REQUIRED, *, least: int = 1, most: int = 1 << 31) -> Any:
        value = self.get(key, default)
        if value is default and default is not _REQUIRED:
            return value
        if type(value) is not int or not least <= value <= most:
            raise self.refuse(key, f"is {shown(value)}", f"expected a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, *, least: float = 0.0, most: float = 1e12) -> Any:
        value = self.get(key, default)
        if value is default and default is not _REQUIRED:
            return value
        if type(value) not in (int, float) or not least <= value <= most:  # NaN fails the comparison
            raise self.refuse(key, f"is {shown(value)}", f"expected a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.refuse(key, f"is {shown(value)}", "expected true or false")
        return value

    def section(self, key: str) -> Config | None:
        """A nested object, or None where there is none."""
        value = self.get(key, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refuse(key, f"is a {type(value).__name__}", "expected an object")
        return Config(value, self.file, f"{self.path}{key}.")
