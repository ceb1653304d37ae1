"""The run folder, its lock, its status and the registry of all runs."""
