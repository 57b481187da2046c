"""The watchdog of a node: which rank holds training up, and where it is. It reports, and ends nothing."""
