"""Measures what issue and docs promise, one file per question: a readable table, then one line of JSON.

python -m benchmarks.transport, .overhead, .clients, .scale; each takes --quick, for under a minute. Ratios compare what
ran in turns in the same run. A slow result is a result: nothing here fails for it.
"""
