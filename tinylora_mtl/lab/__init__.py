"""The laboratory: which of the papers' claims hold, what a run looks like inside, and how fast it is.

Read `claims.py` first: the claims, the comparisons and the rules, as data. `plan.py` lists the runs that they need,
`compare.py` does them, `report.py` judges and writes; `heads.py` looks inside one run; `bench.py` is a table of what is
measured against what, and `cost.py` measures time and memory; `pictures.py` draws. Nothing else needs this room:
whoever trains adapters can pass it by.
"""
