"""What is drawn from runs and datasets: `figures` draws plain arrays, `run_figures` chooses them.

Also the place of what is written about many runs. Nothing in the harness imports this package but
the command line, which hands its drawing functions to a run.
"""
