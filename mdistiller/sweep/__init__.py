"""Sweeps: many configs trained from one file, by any number of processes that share one study.

`plan` reads the file, `study` shares out the trials and keeps the results, `work` trains them,
`table` reports.
"""
