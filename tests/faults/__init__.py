"""Fault injection: killed runs, damaged files, full disks; `python tools/faults.py`."""
