"""Constants of modules are of the inside: no page shows them."""

from __future__ import annotations

from typing import Any

import griffe


class HideConstants(griffe.Extension):
    """Leave out names in capitals that a module assigns; options of enumerations stay."""

    def on_module_members(self, *, mod: griffe.Module, **_kwargs: Any) -> None:
        """Of one module."""
        for name in [
            name for name, found in mod.members.items() if name.isupper() and not found.is_alias and found.is_attribute
        ]:
            mod.del_member(name)
