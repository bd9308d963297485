"""Fits of several real processes, which talk by gloo."""
