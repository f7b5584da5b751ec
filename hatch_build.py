"""Puts the manual pages into what is built, where ``make docs`` has made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PAGES = {"qmpfd.1": "man1", "qmpfd.toml.5": "man5"}


class ManualPages(BuildHookInterface[Any]):
    """A hook of hatchling's, for the wheel and the sdist."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a build; *build_data* says what goes into it."""
        for page, section in _PAGES.items():
            made = Path("build/docs/man", page)
            if not Path(self.root, made).exists():
                continue
            if self.target_name == "wheel":
                build_data["shared_data"][str(made)] = f"share/man/{section}/{page}"
            else:
                build_data["force_include"][str(made)] = str(made)
