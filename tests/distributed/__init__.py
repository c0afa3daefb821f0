"""Tests of what is done on several processes; the engine's own are in ``tests/engine/test_ranks.py``."""
