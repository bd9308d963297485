"""The run-time checker of annotated types and shapes that ``conftest.py`` installs where ``--check-shapes`` asks."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""As PEP 484 says, an ``int`` is good where a ``float`` is expected."""
