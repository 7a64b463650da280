"""Decisions and their measures (numpy only): what runtime, oracle, training and measuring share."""
