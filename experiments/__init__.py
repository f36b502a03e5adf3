"""Experiments: what the lessons claim, shown on small networks and on the served ones, each with a control."""
