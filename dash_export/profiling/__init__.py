"""Where the time of a token goes: timed launches, statistics over them, a trace and a report."""
