"""Trackers: services that show metrics. One process for each sends what the run folder holds."""
