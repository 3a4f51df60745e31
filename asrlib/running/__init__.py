"""What runs: parameters, plans, steps, sweeps, and what a run would take."""
