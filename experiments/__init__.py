"""Experiments on claims about CNNs, with small networks and the served ones, each with a control."""
