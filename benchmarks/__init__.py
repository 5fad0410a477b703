"""Speed, as ratios measured in one run on one machine; never asserted by a test.

    python -m benchmarks NAME [--json]

Each prints what it does, and as the last line of stdout one JSON object: `name`, `ratio`, `target`, `figures`
(plain numbers, the unit in the key), `runs`, `host`.
"""
