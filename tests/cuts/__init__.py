"""A channel that is cut at random points: `proxy` cuts it, `python -m tests.cuts` sends gigabytes through it."""
