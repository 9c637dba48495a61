"""Weights of other libraries as files of this one."""
