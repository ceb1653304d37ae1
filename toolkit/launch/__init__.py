"""Processes of a run: starting, restarting, failures, watchdog, stopping."""
