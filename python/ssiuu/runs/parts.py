"""Work in parts that are kept in a folder: what is finished is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .folder import Run
from .locks import LOCK, locked

CONFIG = "config.json"


class Parts:
    """A folder with a config.json and one JSON file per finished part."""

    def __init__(self, path: Path):
        self.path, self._files = path, Run(path)

    @classmethod
    @contextmanager
    def claim(cls, path: str | Path, config: Mapping[str, Any]) -> Iterator[Parts]:
        """A folder for work with these options, which no other process may use meanwhile; nothing is written yet.

        Raises:
            ValueError: a folder with other options or with other files, or another process is at work there.
            OSError: a folder that cannot be made or written to.
        """
        parts, config = cls(Path(path)), json.loads(json.dumps(config))
        with locked(parts.path):
            if parts.has(CONFIG):
                parts._check(config)
            elif any(file.name != LOCK for file in parts.path.iterdir()):
                raise ValueError(f"{path} is not empty, and no audit was begun there; choose another folder")
            parts._config = config
            yield parts

    def _check(self, config: dict[str, Any]) -> None:
        before = self._files.read(CONFIG)
        changed = [name for name in config if before.get(name) != config[name]]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{self.path} was begun with {name}={before.get(name)!r}, now {config[name]!r}; choose another folder, "
                "or the same options"
            )

    def has(self, name: str) -> bool:
        """Whether this file is there."""
        return (self.path / name).is_file()

    def read(self, name: str) -> Any:
        """A part's content; a ValueError if it is missing or malformed."""
        return self._files.read(f"{name}.json")

    def write(self, name: str, content: Any) -> None:
        """Keep a part, whole or not at all."""
        if not self.has(CONFIG):
            self._files.write(CONFIG, self._config)
        self._files.write(f"{name}.json", content)

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """The content of a part: what is kept, or what `make` returns, which is then kept."""
        if not self.has(f"{name}.json"):
            self.write(name, make())
        return self.read(name)
