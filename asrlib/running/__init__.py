"""Runs: their parameters, plans, steps and sweeps, and what they would take."""
