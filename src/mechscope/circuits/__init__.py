"""Circuits: finding them, running them, judging them, comparing them."""
