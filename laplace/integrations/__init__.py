"""Estimators and callbacks of other libraries: each module needs its library (an extra of its name)."""
