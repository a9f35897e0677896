"""Contenders that are not ours: each module has one function, `make(job) -> Built`."""
