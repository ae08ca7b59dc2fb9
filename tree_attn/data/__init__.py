"""Rollouts that ship with the package (rollouts.jsonl) and the script that made them (make_rollouts.py)."""
