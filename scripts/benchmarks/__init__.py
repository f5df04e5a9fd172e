"""Benchmarks: every figure stands beside the raw SQL limit of the same run, and only their ratio travels.

```
main ──► drain | enqueue | latency | cost | snapshot      one bar of the specification each
           │        places.py    an ephemeral server with default durability, a fresh database per measurement
           │        children.py  the processes that are measured, started together
           │        raw.py       the raw SQL limit: a minimal table, claimed and completed by psycopg
           └──────► report.py    medians, ratios of pairs, the table and the JSON
```
"""
