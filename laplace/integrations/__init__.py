"""Estimators of other libraries, made of those of this one: each module needs its library (an extra of its name)."""
