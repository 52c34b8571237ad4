"""The endpoint. Importing it first decides how OpenMP waits, which torch's libgomp reads once, when it is loaded."""

import os

# An endpoint's OpenMP workers share the cores with the event loop that feeds them. Single runs on two cores, 64 clients:
# waiting actively for milliseconds (the default) leaves the loop no core (p99 340 ms), not at all costs 13 % of the
# requests; so many turns, some 0.1 ms, cost neither (p99 245 ms).
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
