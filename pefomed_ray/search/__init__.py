"""Ray Tune with Optuna over a search space: space, trial, study, leaderboard."""
